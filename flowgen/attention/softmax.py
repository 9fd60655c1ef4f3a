"""Softmax attention on arrays `b n h k`, with the softmax in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def masked_softmax(logits: Float[Array, "b h n m"], mask: Bool[Array, "#b #h #n #m"] | None) -> Float[Array, "b h n m"]:
    """Returns softmax over keys, at least in float32; masked keys (False) get weight exactly 0.

    Example:
        weights = masked_softmax(logits, jnp.tril(jnp.ones((n, n), bool))[None, None])
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    return jax.nn.softmax(logits, axis=-1)


def softmax_attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h d"],
    mask: Bool[Array, "#b #h #n #m"] | None = None,
    is_causal: bool = False,
) -> Float[Array, "b n h d"]:
    """Returns softmax(q kᵀ / √k) v per head.

    mask: True where a query may attend to a key. is_causal: query i attends to keys 0..i as well as to what
    `mask` allows; n and m must then be equal (ValueError). A row with no allowed key averages all values.

    Example:
        out = softmax_attention(q, k, v, is_causal=True)
    """
    n, m = q.shape[1], k.shape[1]
    if is_causal:
        if n != m:
            raise ValueError(f"is_causal needs as many queries as keys, got {n} and {m}; pass a mask instead.")
        causal = jnp.tril(jnp.ones((n, m), bool))[None, None]
        mask = causal if mask is None else mask & causal
    master = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bnhk,bmhk->bhnm", q, k, preferred_element_type=master) * q.shape[-1] ** -0.5
    weights = masked_softmax(logits, mask).astype(v.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v)
