"""Causal linear attention that forgets (simple GLA, RetNet): its state shrinks by a scalar per head at each token."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flowgen.attention.checks import check_causal, check_floats, check_heads, check_key_mask, check_segments
from flowgen.attention.prefix import CHUNK_SIZE, Features, LinearState, prefix_product


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
    """Returns out_t = k^-0.5 S_tᵀ q_t with S_t = exp(log_decay_t) S_(t-1) + k_t v_tᵀ, and the last state.

    Simple GLA, as the field calls gated linear attention (arXiv 2312.06635) with one gate per head instead of one per
    channel; not normalised: a norm per head usually follows. log_decay: at most 0. mask: over keys, True keeps; a
    masked token changes nothing, whatever it holds, not even by its decay. segment_ids: see `prefix_product`.
    Raises ValueError where shapes or mask do not fit.

    Example:
        out, state = gated_linear_attention(q, k, v, jax.nn.log_sigmoid(gate))
    """
    check_heads(q, k, v)
    check_causal(q, k)
    if log_decay.shape != k.shape[:3]:
        raise ValueError(f"log_decay has shape {log_decay.shape}; (batch, tokens, key heads) are {k.shape[:3]}.")
    check_segments(segment_ids, q, k)
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
    """Returns retention (RetNet, arXiv 2307.08621) and the last state: decay 1 - 2^(-5-i) for key head i.

    Without the rotation of q and k and the group norm that its layer has around it. Masked tokens do not count as time.

    Example:
        out, state = retention(q, k, v)
    """
    check_heads(q, k, v)
    decay = jnp.broadcast_to(retention_log_decay(k.shape[2])[None, None], k.shape[:3])
    return gated_linear_attention(
        q, k, v, decay, state=state, mask=mask, segment_ids=segment_ids, chunk_size=chunk_size
    )


def retention_log_decay(num_heads: int) -> Float[Array, " g"]:
    """Returns log(1 - 2^(-5-i)) for head i, the constant decays of RetNet.

    Example:
        log_decay = retention_log_decay(8)
    """
    return jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(num_heads))))
