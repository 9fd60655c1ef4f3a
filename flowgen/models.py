"""Initialisation of any model: a flow with its denoiser, or another network."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Key

from flowgen.flows import ClipDenoiser, STARFlowConfig, TARFlowConfig, init_denoiser
from flowgen.flows import init as init_flow
from flowgen.nn import init as init_network


def init(model: Any, key: Key[Array, ""]) -> Any:
    """Returns freshly initialised variables of a model, including its denoiser's; shapes come from its config.

    Example:
        params = init(flow, jax.random.key(0))
    """
    if not isinstance(getattr(model, "config", None), TARFlowConfig | STARFlowConfig):
        return init_network(model, key)
    variables = init_flow(model, key)
    if getattr(model.config, "denoiser_layers", 0):
        denoiser = init_denoiser(ClipDenoiser(model.config), jax.random.fold_in(key, model.config.num_blocks))
        variables["params"]["denoiser"] = denoiser["params"]
    return variables
