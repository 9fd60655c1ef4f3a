"""Autoregressive transformer flows and their densities."""

from flowgen.flows.block import AutoregressiveBlock, BlockConfig, block_parameters, decoding_block
from flowgen.flows.flow import AutoregressiveFlow, init
from flowgen.flows.starflow import STARFLOW_PRESETS, STARFlow, STARFlowConfig
from flowgen.flows.tarflow import TARFlow, TARFlowConfig

__all__ = [
    "STARFLOW_PRESETS",
    "AutoregressiveBlock",
    "AutoregressiveFlow",
    "BlockConfig",
    "STARFlow",
    "STARFlowConfig",
    "TARFlow",
    "TARFlowConfig",
    "block_parameters",
    "decoding_block",
    "init",
]
