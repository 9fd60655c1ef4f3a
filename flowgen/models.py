"""Every model by the type of its config."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Key

from flowgen.codecs import AutoencoderConfig, VideoAutoencoderConfig
from flowgen.flows import (
    ClipDenoiser,
    STARFlowConfig,
    STARFlowVConfig,
    TARFlowConfig,
    init_denoiser,
)
from flowgen.flows import init as init_flow
from flowgen.matching import DiTConfig, MLPConfig, UNetConfig
from flowgen.nn import init as init_network

FlowConfig = TARFlowConfig | STARFlowConfig
CodecConfig = AutoencoderConfig | VideoAutoencoderConfig
VelocityConfig = MLPConfig | DiTConfig | UNetConfig
ModelConfig = (
    TARFlowConfig
    | STARFlowConfig
    | STARFlowVConfig
    | MLPConfig
    | DiTConfig
    | UNetConfig
    | AutoencoderConfig
    | VideoAutoencoderConfig
)


def init(model: Any, key: Key[Array, ""]) -> Any:
    """Returns freshly initialised variables of a model, its denoiser's among them; shapes come from its config.

    Example:
        params = init(flow, jax.random.key(0))
    """
    if not isinstance(getattr(model, "config", None), FlowConfig):
        return init_network(model, key)
    variables = init_flow(model, key)
    if getattr(model.config, "denoiser_layers", 0):
        denoiser = init_denoiser(ClipDenoiser(model.config), jax.random.fold_in(key, model.config.num_blocks))
        variables["params"]["denoiser"] = denoiser["params"]
    return variables
