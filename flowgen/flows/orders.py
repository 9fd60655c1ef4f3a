"""The orders in which blocks process tokens: raster order, its reverse, or any permutation; padding comes last.

The order of a padded sample is the block's order of its tokens, followed by its padding. In causal attention, no token
then attends to padding, so padding needs no mask.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from flowgen.conditioning import AnyCondition, Padded, zero_padding

RasterOrder = Literal["raster", "reversed"]
# A permutation lists the raster index of the first token in the block's order, of the second one, and so on.
TokenOrder = RasterOrder | tuple[int, ...]
# The order of all samples, or the permutation of each.
SampleOrder = TokenOrder | Int[Array, "b n"]


def to_order(tokens: Shaped[Array, "*b n c"], order: SampleOrder) -> Shaped[Array, "*b n c"]:
    """Returns tokens in a block's order; the given tokens are in raster order."""
    return _permuted(tokens, order, inverse=False)


def to_raster(tokens: Shaped[Array, "*b n c"], order: SampleOrder) -> Shaped[Array, "*b n c"]:
    """Returns tokens in raster order; the given tokens are in a block's order. This is the inverse of `to_order`."""
    return _permuted(tokens, order, inverse=True)


def _permuted(tokens: Shaped[Array, "*b n c"], order: SampleOrder, *, inverse: bool) -> Shaped[Array, "*b n c"]:
    if isinstance(order, str):
        return tokens if order == "raster" else jnp.flip(tokens, axis=-2)
    if isinstance(order, tuple):
        places = np.argsort(order) if inverse else np.asarray(order)
        return tokens[..., places, :]
    places = jnp.argsort(order, axis=1) if inverse else order
    return jnp.take_along_axis(tokens, places[:, :, None], axis=1)


def permutation(order: TokenOrder, n: int) -> Int[np.ndarray, " n"]:
    """Returns an order of n tokens as a permutation."""
    if isinstance(order, str):
        return np.arange(n) if order == "raster" else np.arange(n)[::-1]
    return np.asarray(order)


def order_without_padding(order: TokenOrder, mask: Bool[Array | np.ndarray, "b n"]) -> Int[Array, "b n"]:
    """Returns each sample's permutation, which puts its tokens in a block's order and its padding last.

    The block's order applies to a sample of m tokens as if its padding were removed: only the entries below m of a
    permutation are used. The ordered tokens therefore do not depend on where the padding was.
    """
    return _without_padding(jnp.asarray(permutation(order, mask.shape[1])), jnp.asarray(mask))


@jax.jit  # Blocks share this program, also those that are called outside of any other.
def _without_padding(places: Int[Array, " n"], mask: Bool[Array, "b n"]) -> Int[Array, "b n"]:
    tokens_first = jnp.argsort(~mask, axis=1, stable=True)
    beyond = places[None] >= mask.sum(axis=1)[:, None]
    return jnp.take_along_axis(tokens_first, places[jnp.argsort(beyond, axis=1, stable=True)], axis=1)


def without_padding(values: Float[Array, "b n c"], cond: AnyCondition | None) -> Float[Array, "b n c"]:
    """Returns values of tokens, with 0 for padding."""
    return zero_padding(values, cond.mask) if isinstance(cond, Padded) else values


def check_permutation(order: tuple[int, ...], n: int, name: str) -> None:
    """Raises ValueError unless an order is a permutation of 0..n-1. name: the name of the order in the message."""
    if len(order) != n:
        raise ValueError(
            f"{name} has {len(order)} entries, but there are {n} tokens; give a permutation of 0..{n - 1}."
        )
    missing = sorted(set(range(n)) - set(order))
    if missing:
        raise ValueError(f"{name} is not a permutation of 0..{n - 1}, because it lacks {missing[0]}; list each once.")
