"""Autoregressive transformer flows and their densities."""

from flowgen.flows.affine import ScaleMap
from flowgen.flows.block import AutoregressiveBlock, block_parameters
from flowgen.flows.block_config import BlockConfig
from flowgen.flows.decoding_form import decoding_block
from flowgen.flows.denoiser import ClipDenoiser, DenoiserStep, denoiser_variables, init_denoiser
from flowgen.flows.flow import AutoregressiveFlow
from flowgen.flows.score_matching import flow_score_objective, score_matching_loss, score_target
from flowgen.flows.starflow import STARFLOW_PRESETS, STARFlow, STARFlowConfig
from flowgen.flows.starflow_v import STARFLOW_V_480P, STARFlowV, STARFlowVConfig
from flowgen.flows.tarflow import TARFlow, TARFlowConfig
from flowgen.flows.token_flow import TokenFlow, TokenFlowConfig

__all__ = [
    "STARFLOW_PRESETS",
    "STARFLOW_V_480P",
    "AutoregressiveBlock",
    "AutoregressiveFlow",
    "BlockConfig",
    "ClipDenoiser",
    "DenoiserStep",
    "STARFlow",
    "STARFlowConfig",
    "STARFlowV",
    "STARFlowVConfig",
    "ScaleMap",
    "TARFlow",
    "TARFlowConfig",
    "TokenFlow",
    "TokenFlowConfig",
    "block_parameters",
    "decoding_block",
    "denoiser_variables",
    "flow_score_objective",
    "init_denoiser",
    "score_matching_loss",
    "score_target",
]
