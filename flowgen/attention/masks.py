"""Converts query-key masks to query masks and key masks, which linear attention applies at linear cost."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from flowgen.attention.checks import concrete


def own_keys(mask: Bool[Array, "#b #h n n"]) -> Bool[Array, "#b #h 1 n"]:
    """Returns the diagonal of a query-key mask as a key mask, so that linear attention has linear cost inside jit.

    The key mask is equivalent if the query-key mask keeps the same tokens as queries and as keys, such as Flax's
    `make_attention_mask(valid, valid)`, or keeps all queries. It may also be the product of such a mask and Flax's
    `make_causal_mask`; then also pass is_causal=True to the attention function. The outputs of tokens that the mask
    does not keep as queries are meaningless. Raises ValueError unless there are as many queries as keys.

    Example:
        y = nala_attention(q, k, v, own_keys(mask != 0), is_causal=True)
    """
    if mask.shape[-2] != mask.shape[-1]:
        raise ValueError(f"mask has shape {mask.shape}, but own_keys needs as many queries as keys.")
    return jnp.diagonal(mask, axis1=-2, axis2=-1)[..., None, :]


def split_pairs(
    mask: Bool[Array, "#b #h n m"], groups: int, block_size: int | None
) -> tuple[Bool[Array, "#b #h n 1"], Bool[Array, "#b #h 1 m"]] | None:
    """Returns the query mask and the key mask whose product is the given query-key mask.

    Returns None if no such masks exist, or if the mask is traced.

    groups: number of key heads; the mask may differ between them.
    block_size: the block size of causal attention, or None if attention is not causal. In causal attention, the causal
    mask is a third factor of the product.
    """
    seen = concrete(mask)
    if seen is None or seen.shape[1] not in (1, groups):
        return None
    n, m = seen.shape[2:]
    order = np.ones((n, m), bool)
    if block_size is not None:
        order = np.arange(n)[:, None] // block_size >= np.arange(m)[None] // block_size
    seen = seen & order
    queries, keys = seen.any(axis=3, keepdims=True), seen.any(axis=2, keepdims=True)
    if not np.array_equal(queries & keys & order, seen):
        return None
    return jnp.asarray(queries), jnp.asarray(keys)


def hide_queries(tree: PyTree, mask: Bool[Array, "#b #g n 1"]) -> PyTree:
    """Returns a tree of arrays `b n h ...` with 0 for masked queries.

    mask: one mask for all heads, or one for each key head.
    """

    def hide(x):
        keep = mask[..., 0].swapaxes(1, 2)
        keep = jnp.repeat(keep, x.shape[2] // keep.shape[2], axis=2)
        return jnp.where(jnp.expand_dims(keep, range(3, x.ndim)), x, 0)

    return jax.tree.map(hide, tree)
