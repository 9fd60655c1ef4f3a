"""Initialises the variables of any model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Key, PyTree

from flowgen.arrays import check_key, shown
from flowgen.nn.layers import master_dtype


def init(network: nn.Module, key: Key[Array, ""]) -> PyTree:
    """Returns freshly initialised variables of a model, including those of a flow's denoiser if its config has one.

    The initialisation is compiled. If the model has a method `initial_variables(key)`, that method computes the
    variables; flows define it so that their blocks share compiled programs. Otherwise, the model is initialised with
    arrays of the shapes and dtypes that its config lists in `inputs`. If the config has no `inputs`, the model is taken
    for a velocity network, with the arguments (times, samples of the config's `event_shape`).

    Raises ValueError if the network has no attribute `config`, or if the key is invalid.

    Example:
        variables = init(VelocityMLP(MLPConfig(dim=2)), jax.random.key(0))
    """
    config: Any = getattr(network, "config", None)
    if config is None:
        raise ValueError(f"model is {shown(network)}; pass a model, such as TARFlow(config), and then the key.")
    check_key(key)
    if hasattr(network, "initial_variables"):
        return network.initial_variables(key)
    if hasattr(config, "inputs"):
        inputs = config.inputs
    else:
        x = jax.ShapeDtypeStruct((1, *config.event_shape), master_dtype(getattr(config, "dtype", "float32")))
        inputs = (jax.ShapeDtypeStruct((1,), jnp.float32), x)
    return jax.jit(network.init)(key, *(jnp.zeros(x.shape, x.dtype) for x in inputs))
