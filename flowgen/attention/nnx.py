"""NNX versions of the attention modules, created with Flax's bridge.

Their parameters and results are the same as for the linen modules. Each constructor accepts the width of the input, the
fields of the linen module and `rngs`, and initialises the parameters:

    attention = nnx.LinearAttention(64, width=64, num_heads=4, kernel="nala", is_causal=True, rngs=nnx.Rngs(0))
    y = attention(x)
    y, state = attention.prefill(x, attention.init_state(batch=2))
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen, nnx
from flax.nnx import bridge
from jaxtyping import Array, Float

from flowgen.attention import modules
from flowgen.attention.kernels import State


class _Twin(bridge.ToNNX):
    """A linen module as an NNX module, initialised for inputs with `in_features` channels."""

    def __init__(self, module: linen.Module, in_features: int, rngs: nnx.Rngs, num_tokens: int = 1, **example: Any):
        super().__init__(module, rngs=rngs)
        self.lazy_init(jnp.zeros((1, num_tokens, in_features)), **example)
        # Nothing is random after initialisation, and JAX's transforms do not accept NNX's key streams.
        self.to_nnx__rngs = None


class _Decoding(_Twin):
    def init_state(self, batch: int) -> State:
        """Returns the state for decoding `batch` sequences from their first token on."""
        return self.to_nnx__module.init_state(batch)

    def prefill(
        self, x: Float[Array, "b n d"], state: State = None, *, mask: Array | None = None
    ) -> tuple[Array, State]:
        """Returns the outputs of the next n tokens of each sequence, and the state after them.

        state: the state after the earlier tokens; None means that there are none.
        mask: a key mask, True for tokens to keep.
        """
        return self(x, state, mask=mask, method="prefill")

    def step(self, x: Float[Array, "b d"], state: State) -> tuple[Array, State]:
        """Returns the output for one more token of each sequence, and the state after it."""
        return self(x, state, method="step")


class LinearAttention(_Decoding):
    """`flowgen.attention.LinearAttention` as an NNX module.

    in_features: width of the input.
    context_features: width of the context in cross-attention; None means self-attention.
    fields: the fields of the linen module.

    Example:
        attention = LinearAttention(64, width=64, num_heads=4, rngs=nnx.Rngs(0))
    """

    def __init__(self, in_features: int, *, context_features: int | None = None, rngs: nnx.Rngs, **fields: Any):
        context = None if context_features is None else jnp.zeros((1, 1, context_features))
        super().__init__(modules.LinearAttention(**fields), in_features, rngs, context=context)


class NaLaAttention(_Decoding):
    """`flowgen.attention.NaLaAttention` as an NNX module.

    in_features: width of the input.
    fields: the fields of the linen module.

    Example:
        attention = NaLaAttention(64, width=64, num_heads=4, rngs=nnx.Rngs(0))
    """

    def __init__(self, in_features: int, *, rngs: nnx.Rngs, **fields: Any):
        module = modules.NaLaAttention(**fields)
        super().__init__(module, in_features, rngs, grid=None if module.is_causal else (1, 1))


class SOFTAttention(_Twin):
    """`flowgen.attention.SOFTAttention` as an NNX module.

    in_features: width of the input.
    fields: the fields of the linen module.

    Example:
        attention = SOFTAttention(64, width=64, num_heads=4, rngs=nnx.Rngs(0))
    """

    def __init__(self, in_features: int, *, rngs: nnx.Rngs, **fields: Any):
        module = modules.SOFTAttention(**fields)
        side = 1 if module.landmarks == "pool" else module.stride
        super().__init__(module, in_features, rngs, num_tokens=side * side, grid=(side, side))
