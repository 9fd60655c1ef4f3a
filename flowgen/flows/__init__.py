"""Autoregressive transformer flows and their densities."""

from flowgen.flows.block import AutoregressiveBlock, BlockConfig, block_parameters, decoding_block
from flowgen.flows.tarflow import TARFlow, TARFlowConfig, init

__all__ = [
    "AutoregressiveBlock",
    "BlockConfig",
    "TARFlow",
    "TARFlowConfig",
    "block_parameters",
    "decoding_block",
    "init",
]
