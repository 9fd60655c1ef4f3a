"""Packed segments: runs of tokens with equal ids that attend only to each other. NaN affects only its own segment."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree


class Spoiled(NamedTuple):
    """Marks the results that a non-finite number affects: outputs per query head and token, states per key head."""

    out: Bool[Array, "b n h"]
    state: Bool[Array, "b g"]


def returning_ids(segment_ids: Int[Array, "b n"]) -> Bool[Array, " b"]:
    """Returns, for each sample, whether some segment id recurs after a different id."""
    runs = (segment_ids[:, 1:] != segment_ids[:, :-1]).sum(axis=1)
    ordered = jnp.sort(segment_ids, axis=1)
    return runs != (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1)


def finite(tree: PyTree) -> tuple[PyTree, Bool[Array, "b n x"]]:
    """Returns arrays `b n x ...` with zeros for non-finite entries (b, n, x), and a mask `b n x` of these entries.

    If an entry of one array contains a non-finite value, that entry is 0 in all the returned arrays.
    """
    bad = functools.reduce(jnp.logical_or, map(_not_finite, jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: jnp.where(jnp.expand_dims(bad, range(3, x.ndim)), 0, x), tree), bad


def _not_finite(x: Float[Array, "b n x *axes"]) -> Bool[Array, "b n x"]:
    return (~jnp.isfinite(x)).any(axis=tuple(range(3, x.ndim)))


def spoiled(
    segment_ids: Int[Array, "b n"],
    bad_q: Bool[Array, "b n h"],
    bad_k: Bool[Array, "b n g"],
    bad_state: Bool[Array, "b g"],
    block_size: int | None,
) -> Spoiled:
    """Returns which results of causal attention with blocks of `block_size` tokens depend on a non-finite token.

    If block_size is None, tokens attend to their whole segment. If ids recur in a sample, all outputs and the state of
    the sample count as spoiled, because a running state cannot compute them.
    """
    n = segment_ids.shape[1]
    place = jnp.arange(n)[None]
    new = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(new, place, 0), axis=1)
    ends = jnp.pad(new[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    last = jax.lax.cummin(jnp.where(ends, place, n - 1), axis=1, reverse=True)
    seen = last if block_size is None else jnp.minimum(last, (place // block_size + 1) * block_size - 1)
    so_far = jnp.pad(jnp.cumsum(bad_k, axis=1), ((0, 0), (1, 0), (0, 0)))
    count = jnp.take_along_axis(so_far, seen[..., None] + 1, axis=1)
    count = count - jnp.take_along_axis(so_far, first[..., None], axis=1)
    reached = (count > 0) | ((first == 0)[..., None] & bad_state[:, None])
    returning = returning_ids(segment_ids)
    per_query = jnp.repeat(reached, bad_q.shape[2] // bad_k.shape[2], axis=2) | bad_q
    return Spoiled(per_query | returning[:, None, None], reached[:, -1] | returning[:, None])


def spoil(x: Float[Array, "*axes"], bad: Bool[Array, "*fewer"]) -> Float[Array, "*axes"]:
    """Returns x with NaN where `bad` is True; the axes of `bad` are the first axes of x."""
    return jnp.where(jnp.expand_dims(bad, range(bad.ndim, x.ndim)), jnp.nan, x)


def alike(*arrays: Float[Array, "b n h _"]) -> tuple[Float[Array, "b n h _"], ...]:
    """Returns the arrays with NaN at every token and head where any of the arrays is not finite."""
    bad = finite(arrays)[1]
    return tuple(spoil(x, bad) for x in arrays)
