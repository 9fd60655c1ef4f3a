"""Cached attention: what a causal kernel must offer so that a decoder can use it.

A decoder asks for a *window* of tokens, possibly several times with different guesses, and then moves on.
A kernel serves it with three functions (`CausalKernel`): `attend` for whole sequences, `attend_window` for a
window behind a cached prefix, and `rewind`, which says from which cache the same window can be run again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flowgen.attention.softmax import masked_softmax, softmax_attention


class KVCache(NamedTuple):
    """Keys and values of every layer, `l b h m k`, slot = position; slots at or past the window are unused."""

    keys: Float[Array, "l b h m k"]
    values: Float[Array, "l b h m k"]


class CausalKernel(NamedTuple):
    """The functions through which blocks and decoders use one attention kernel.

    attend(q, k, v) -> out: causal attention over a whole sequence, arrays `b n h k`.
    init_cache(num_layers, batch, length, num_heads, head_dim, dtype) -> cache: empty, for `length` positions.
    attend_window(q, k, v, cache, layer, start) -> (out, cache): exact causal attention of tokens at positions
        start..start+n-1 to the cached prefix and to themselves, and the cache with these tokens included.
    rewind(before, after) -> cache: given the caches before and after a window was run, one from which the
        window can be run again. Where slots are overwritten that is `after`; a running sum needs `before`.
    """

    attend: Callable[..., Array]
    init_cache: Callable[..., Any]
    attend_window: Callable[..., tuple[Array, Any]]
    rewind: Callable[[Any, Any], Any]


def init_kv_cache(num_layers: int, batch: int, length: int, num_heads: int, head_dim: int, dtype: jnp.dtype) -> KVCache:
    """Returns an empty key/value cache for `length` positions.

    Example:
        cache = init_kv_cache(num_layers=2, batch=4, length=64, num_heads=8, head_dim=64, dtype=jnp.float32)
    """
    zeros = jnp.zeros((num_layers, batch, num_heads, length, head_dim), dtype)
    return KVCache(zeros, zeros)


def attend_kv_window(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b n h k"],
    v: Float[Array, "b n h k"],
    cache: KVCache,
    layer: Int[Array, ""] | int,
    start: Int[Array, ""] | int,
) -> tuple[Float[Array, "b n h k"], KVCache]:
    """Returns softmax attention of n tokens at positions start.. behind the cached prefix, and the cache.

    Keys and values overwrite their slots, so running a window again needs no bookkeeping. Query i attends to
    slots 0..start+i; what later slots hold does not matter as long as it is finite.

    Example:
        out, cache = attend_kv_window(q, k, v, cache, layer=0, start=12)
    """
    corner = (layer, 0, 0, start, 0)
    new_keys = k.transpose(0, 2, 1, 3)[None].astype(cache.keys.dtype)
    new_values = v.transpose(0, 2, 1, 3)[None].astype(cache.values.dtype)
    cache = KVCache(
        jax.lax.dynamic_update_slice(cache.keys, new_keys, corner),
        jax.lax.dynamic_update_slice(cache.values, new_values, corner),
    )
    keys, values = cache.keys[layer], cache.values[layer]
    master = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bnhk,bhmk->bhnm", q, keys, preferred_element_type=master) * q.shape[-1] ** -0.5
    positions = start + jnp.arange(q.shape[1])
    mask = jnp.arange(keys.shape[2])[None, :] <= positions[:, None]
    weights = masked_softmax(logits, mask[None, None]).astype(values.dtype)
    return jnp.einsum("bhnm,bhmk->bnhk", weights, values), cache


SOFTMAX = CausalKernel(
    attend=lambda q, k, v: softmax_attention(q, k, v, is_causal=True),
    init_cache=init_kv_cache,
    attend_window=attend_kv_window,
    rewind=lambda before, after: after,
)

_KERNELS = {"softmax": SOFTMAX}
KERNEL_NAMES = tuple(_KERNELS)


def causal_kernel(name: str) -> CausalKernel:
    """Returns the causal kernel of that name; ValueError lists the names there are.

    Example:
        kernel = causal_kernel("softmax")
    """
    if name not in _KERNELS:
        raise ValueError(f"attention {name!r} is not a causal kernel; choose one of {', '.join(KERNEL_NAMES)}.")
    return _KERNELS[name]
