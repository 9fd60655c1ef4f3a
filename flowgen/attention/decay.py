"""Causal linear attention with decay (simple GLA, RetNet): each token scales the state by one factor per head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flowgen.attention.causal import Causal
from flowgen.attention.checks import (
    check_causal,
    check_floats,
    check_heads,
    check_key_mask,
    check_quadratic,
    check_segments,
    hide_keys,
)
from flowgen.attention.linear import quadratic_products, seen_pairs
from flowgen.attention.prefix import CHUNK_SIZE, Features, LinearState, prefix_product
from flowgen.backend import keep_axes


def gated_linear_attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b n g k"],
    v: Float[Array, "b n g d"],
    log_decay: Float[Array, "b n g"],
    *,
    state: LinearState | None = None,
    mask: Array | None = None,
    segment_ids: Int[Array, "b n"] | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Array, "b n h d"], LinearState]:
    """Returns the outputs of causal linear attention with decay, and the state after the last token.

    For each token t, each head computes S_t = exp(log_decay_t) S_(t-1) + k_t v_tᵀ and out_t = scale S_tᵀ q_t, where
    scale is (width of k)^-0.5. This is simple GLA: gated linear attention (arXiv 2312.06635) with one gate per head
    instead of one per channel. The outputs are not normalised; models usually apply a normalisation layer to each head
    afterwards.

    log_decay: the logarithm of the decay factor of each token and key head. It must be at most 0; this is not checked.
    state: the state after earlier tokens; None means that there are none.
    mask: a key mask `b 1 1 n` or `b g 1 n`, True for tokens to keep. The key, value and decay of a masked token are
    ignored.
    segment_ids, chunk_size: see `prefix_product`.

    Raises ValueError if shapes, dtypes, the mask or the segment ids are invalid.

    Example:
        out, state = gated_linear_attention(q, k, v, jax.nn.log_sigmoid(gate))
    """
    check_heads(q, k, v)
    check_causal(q, k)
    check_floats(log_decay=log_decay)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    features = Features(q.astype(dtype) * q.shape[-1] ** -0.5, k)
    mask = None if mask is None else check_key_mask(mask, q, k)
    out, _, state = prefix_product(
        features, v, state=state, log_decay=log_decay, mask=mask, segment_ids=segment_ids, chunk_size=chunk_size
    )
    return out.astype(v.dtype), state


def retention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b n g k"],
    v: Float[Array, "b n g d"],
    *,
    state: LinearState | None = None,
    mask: Array | None = None,
    segment_ids: Int[Array, "b n"] | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Array, "b n h d"], LinearState]:
    """Returns the outputs of retention (RetNet, arXiv 2307.08621), and the state after the last token.

    This is `gated_linear_attention` with the constant decay factor 1 - 2^(-5-i) in key head i, counted from 0. The
    arguments are described there. Masked tokens cause no decay. RetNet's layer also rotates q and k and applies a group
    norm; this function does neither.

    Example:
        out, state = retention(q, k, v)
    """
    check_heads(q, k, v)
    decay = jnp.broadcast_to(retention_log_decay(k.shape[2])[None, None], k.shape[:3])
    return gated_linear_attention(
        q, k, v, decay, state=state, mask=mask, segment_ids=segment_ids, chunk_size=chunk_size
    )


def retention_of_pairs(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b n g k"],
    v: Float[Array, "b n g d"],
    mask: Bool[Array, "#b #h #n #n"],
    segment_ids: Int[Array, "b n"] | None = None,
) -> Float[Array, "b n h d"]:
    """Returns causal retention under a query-key mask, computed from all n x n weights.

    A key that is masked for all queries causes no decay. Raises ValueError if shapes do not match, or if there are more
    than 4096 x 4096 weights.
    """
    check_heads(q, k, v)
    check_causal(q, k)
    check_segments(segment_ids, q, k)
    check_quadratic(q, k)
    return _retention_of_pairs(q, k, v, mask, segment_ids)


@jax.jit
def _retention_of_pairs(q, k, v, mask, segment_ids):
    def run(q, k, v, mask, segment_ids):
        pairs = seen_pairs(mask, Causal(), segment_ids, q.shape[1], k.shape[1])
        time = jnp.cumsum(pairs.any(axis=2), axis=-1)
        ago = jnp.maximum(time[..., :, None] - time[..., None, :], 0)
        log_decay = jnp.repeat(retention_log_decay(k.shape[2]), q.shape[2] // k.shape[2])
        k, v = hide_keys(k, v, pairs)
        features = Features(q.astype(jnp.promote_types(q.dtype, jnp.float32)) * q.shape[-1] ** -0.5, k)
        return quadratic_products(features, v, pairs, jnp.exp(log_decay[None, :, None, None] * ago))[0].astype(v.dtype)

    named = [(q, "b n h k"), (k, "b m g k"), (v, "b m g d")]
    return keep_axes(run, q, k, v, mask, segment_ids, named=named, out="b n h d")


def retention_log_decay(num_heads: int) -> Float[Array, " g"]:
    """Returns the logarithms of RetNet's decay factors, log(1 - 2^(-5-i)) for head i, counted from 0.

    Example:
        log_decay = retention_log_decay(8)
    """
    return jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(num_heads))))
