"""Slices of consecutive tokens, which begin at the same position in all samples or at a separate position in each."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

# The position of the first token: one for the whole batch, or one per sample.
Start = Int[Array, ""] | Int[Array, " b"] | int


def positions(start: Start, length: int) -> Int[Array, "#b n"]:
    """Returns the positions start, start + 1, ... of `length` tokens; one row if all samples share them."""
    return jnp.atleast_1d(start)[:, None] + jnp.arange(length)[None]


def take(x: Array, start: Start, length: int, axis: int = 1) -> Array:
    """Returns x[:, start : start + length], with the slice along any axis after the first. x must contain the slice."""
    if jnp.ndim(start):
        return jax.vmap(partial(take, length=length, axis=axis - 1))(x, start)
    return jax.lax.dynamic_slice_in_dim(x, start, length, axis)


def put(x: Array, part: Array, start: Start, axis: int = 1) -> Array:
    """Returns x with `part` in place of the slice that `take` would return."""
    if jnp.ndim(start):
        return jax.vmap(partial(put, axis=axis - 1))(x, part, start)
    return jax.lax.dynamic_update_slice_in_dim(x, part, start, axis)
