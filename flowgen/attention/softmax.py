"""Softmax attention on arrays `b n h k`, with the softmax in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Causal attention runs in this many slices of queries at most, each against only the keys it may see.
MAX_CAUSAL_SLICES = 4
MIN_CAUSAL_SLICE = 64


def attend_heads(
    q: Float[Array, "b h n k"],
    k: Float[Array, "b h m k"],
    v: Float[Array, "b h m d"],
    mask: Bool[Array, "#b #h #n #m"] | None,
) -> Float[Array, "b h n d"]:
    """Returns softmax(q kᵀ / √k) v with heads before tokens; see `softmax_attention` for the mask.

    Example:
        out = attend_heads(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), None)
    """
    master = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bhnk,bhmk->bhnm", q, k, preferred_element_type=master) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(master).min)
    # Softmax does not change with a shift of its logits, so neither do the gradients.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    if mask is not None:
        weights = jnp.where(mask, weights, 0)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=master)
    return (out / jnp.where(total == 0, 1, total)).astype(v.dtype)


def softmax_attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h d"],
    mask: Bool[Array, "#b #h #n #m"] | None = None,
    is_causal: bool = False,
) -> Float[Array, "b n h d"]:
    """Returns softmax(q kᵀ / √k) v per head.

    mask: True where a query may attend to a key. is_causal: query i attends to keys 0..i as well as to what
    `mask` allows; n and m must then be equal (ValueError). A row with no allowed key gives 0.

    Example:
        out = softmax_attention(q, k, v, is_causal=True)
    """
    n, m = q.shape[1], k.shape[1]
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    if not is_causal:
        return attend_heads(q, k, v, mask).swapaxes(1, 2)
    if n != m:
        raise ValueError(f"is_causal needs as many queries as keys, got {n} and {m}; pass a mask instead.")
    causal = jnp.tril(jnp.ones((n, n), bool))[None, None]
    mask = causal if mask is None else mask & causal
    size = max(MIN_CAUSAL_SLICE, -(-n // MAX_CAUSAL_SLICES))
    out = []
    for start in range(0, n, size):
        end = min(start + size, n)
        rows = mask[:, :, start:end, :end]
        out.append(attend_heads(q[:, :, start:end], k[:, :, :end], v[:, :, :end], rows))
    return jnp.concatenate(out, axis=2).swapaxes(1, 2)
