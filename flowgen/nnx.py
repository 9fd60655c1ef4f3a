"""Trained models as NNX modules, created with Flax's bridge. They have the same parameters and results as the original
modules.

    flow, params, _ = flowgen.load("digits")
    twin = Twin(flow, params)
    log_p = twin.log_prob(x, labels)
    r = twin.sample(jax.random.key(0), 10, labels)

The parameters have the type `nnx.Param`, so a twin can be trained with `nnx.grad` and `nnx.Optimizer`, or be part of
another NNX module. Other functions of flowgen accept `twin.flow` and its trained parameters, `twin.params`.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import linen, nnx
from flax.nnx import bridge

from flowgen.decoding import DecodeResult, sample

# The attributes of a bridge that are not parameters begin with one of these.
_OF_BRIDGE = ("to_nnx__", "_pytree__")


class Twin(bridge.ToNNX):
    """A flow, a velocity network or another linen module as an NNX module with the given variables.

    A call runs the module, and each method of the module is a method of the twin: `forward`, `log_prob` and others.
    The arrays are not copied.

    flow: the linen module. params: its variables, as `flowgen.load` and `flowgen.init` return them.

    Example:
        flow, params, _ = flowgen.load("digits")
        z, logdet = Twin(flow, params).forward(x, labels)
    """

    def __init__(self, flow: linen.Module, params: Any):
        if not isinstance(flow, linen.Module) or "params" not in params:
            raise ValueError("Twin needs a linen module and its variables; pass both as flowgen.load returns them.")
        super().__init__(flow)
        for name, value in bridge.variables.linen_vars_to_nnx_attrs(params).items():
            setattr(self, name, nnx.data(value))

    @property
    def flow(self) -> Any:
        """The linen module."""
        return self.to_nnx__module

    @property
    def params(self) -> dict[str, Any]:
        """The twin's variables in the form that linen modules accept."""
        return bridge.variables.nnx_attrs_to_linen_vars(
            {name: value for name, value in vars(self).items() if not name.startswith(_OF_BRIDGE)}
        )

    def sample(self, key: jax.Array, num: int, cond: Any = None, **options: Any) -> DecodeResult:
        """Returns samples of a flow. The options are those of `flowgen.decoding.sample`."""
        return sample(self.flow, self.params, key, num, cond, **options)
