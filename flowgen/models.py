"""Every model by the type of its config."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Key

from flowgen.arrays import check_key, shown
from flowgen.codecs import AutoencoderConfig, VideoAutoencoderConfig
from flowgen.codecs import init as init_autoencoder
from flowgen.flows import (
    ClipDenoiser,
    STARFlowConfig,
    STARFlowVConfig,
    TARFlowConfig,
    init_denoiser,
)
from flowgen.flows import init as init_flow
from flowgen.matching import DiTConfig, MLPConfig, UNetConfig
from flowgen.matching import init as init_velocity

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
    if not hasattr(model, "config"):
        raise ValueError(f"model is {shown(model)}; give a model such as TARFlow(config), and then the key.")
    check_key(key)
    if isinstance(model.config, CodecConfig):
        return init_autoencoder(model, key)
    if not isinstance(model.config, FlowConfig):
        return init_velocity(model, key)
    variables = init_flow(model, key)
    if getattr(model.config, "denoiser_layers", 0):
        denoiser = init_denoiser(ClipDenoiser(model.config), jax.random.fold_in(key, model.config.num_blocks))
        variables["params"]["denoiser"] = denoiser["params"]
    return variables
