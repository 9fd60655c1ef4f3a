"""Every model by the type of its config."""

from __future__ import annotations

from typing import Any

from flax import linen as nn
from jaxtyping import Array, Key

from flowgen.codecs import Autoencoder, AutoencoderConfig
from flowgen.codecs import init as init_autoencoder
from flowgen.flows import STARFlow, STARFlowConfig, STARFlowV, STARFlowVConfig, TARFlow, TARFlowConfig
from flowgen.flows import init as init_flow
from flowgen.matching import DiT, DiTConfig, MLPConfig, UNet, UNetConfig, VelocityMLP
from flowgen.matching import init as init_velocity

FlowConfig = TARFlowConfig | STARFlowConfig
VelocityConfig = MLPConfig | DiTConfig | UNetConfig
ModelConfig = TARFlowConfig | STARFlowConfig | MLPConfig | DiTConfig | UNetConfig | AutoencoderConfig

MODELS: dict[type, type[nn.Module]] = {
    TARFlowConfig: TARFlow,
    STARFlowConfig: STARFlow,
    STARFlowVConfig: STARFlowV,
    MLPConfig: VelocityMLP,
    DiTConfig: DiT,
    UNetConfig: UNet,
    AutoencoderConfig: Autoencoder,
}


def build(config: ModelConfig) -> Any:
    """Returns the model of a config: an autoregressive flow, the velocity network of a continuous one, an autoencoder.

    Example:
        flow = build(TARFlowConfig(image_size=8))
    """
    return MODELS[type(config)](config)


def init(model: Any, key: Key[Array, ""]) -> Any:
    """Returns freshly initialised variables of a model; shapes come from its config.

    Example:
        params = init(flow, jax.random.key(0))
    """
    if isinstance(model.config, AutoencoderConfig):
        return init_autoencoder(model, key)
    return init_flow(model, key) if isinstance(model.config, FlowConfig) else init_velocity(model, key)
