"""Softmax attention for arrays `b n h k`; the softmax is computed in at least float32."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from flowgen import backend
from flowgen.attention.checks import check_causal, check_heads, check_mask, hide_keys
from flowgen.attention.fused import chosen_implementation, fused_attention
from flowgen.attention.slices import Start, positions
from flowgen.backend import Implementation, keep_axes

# Whether a query may attend to a key; axes of length 1 broadcast.
Mask = Bool[Array, "#b #h #n #m"] | None


def attend_heads(
    q: Float[Array, "b h n k"],
    k: Float[Array, "b g m k"],
    v: Float[Array, "b g m d"],
    mask: Mask,
) -> Float[Array, "b h n d"]:
    """Returns softmax(q kᵀ / √(head width)) v for arrays whose head axis comes before the token axis.

    Each key head serves h/g query heads.

    mask: True for keys to keep; it must broadcast to `b h n m`. None keeps all keys. If all keys of a query are masked,
    its output is 0.

    Raises ValueError if shapes, dtypes or the mask do not match.

    Example:
        out = attend_heads(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), None)
    """
    check_heads(q, k, v, heads=1)
    mask = check_mask(mask, q, k, heads=1)
    return _attend_in_parts(q, k, v, mask, None, None)


def _attend_heads(
    q: Float[Array, "b h n k"], k: Float[Array, "b g m k"], v: Float[Array, "b g m d"], mask: Mask
) -> Float[Array, "b h n d"]:
    master = jnp.promote_types(q.dtype, jnp.float32)
    groups = k.shape[1]
    q = rearrange(q, "b (g r) n k -> b g r n k", g=groups)
    logits = jnp.einsum("bgrnk,bgmk->bgrnm", q, k, preferred_element_type=master) * q.shape[-1] ** -0.5
    if mask is not None:
        per_group = groups if mask.shape[1] > 1 else 1
        mask = rearrange(mask, "b (g r) n m -> b g r n m", g=per_group)
        logits = jnp.where(mask, logits, jnp.finfo(master).min)
    # Shifting the logits changes neither the softmax nor its gradients.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    if mask is not None:
        weights = jnp.where(mask, weights, 0)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("bgrnm,bgmd->bgrnd", weights.astype(v.dtype), v, preferred_element_type=master)
    out = out / jnp.where(total == 0, 1, total)
    return rearrange(out, "b g r n d -> b (g r) n d").astype(v.dtype)


def attend_in_parts(
    q: Float[Array, "b h n k"],
    k: Float[Array, "b g m k"],
    v: Float[Array, "b g m d"],
    mask: Mask = None,
    first: Start | None = None,
) -> Float[Array, "b h n d"]:
    """Returns the result of `attend_heads`, computed in chunks of queries to limit memory.

    Each chunk has at most `backend.MAX_LOGITS` logits, which the backward pass recomputes.

    first: for causal attention, the position of the first query among the keys, one for the whole batch or one per
    sample. Query i then attends to the keys among 0..first+i that `mask` allows.
    """
    return _attend_in_parts(q, k, v, mask, first, backend.MAX_LOGITS)


@partial(jax.jit, static_argnames="max_logits")
def _attend_in_parts(q, k, v, mask, first, max_logits):
    named = [(q, "b h n k"), (k, "b g m k"), (v, "b g m d")]
    run = partial(_run_in_parts, max_logits=max_logits)
    return keep_axes(run, q, k, v, mask, first, named=named, out="b h n d")


def _run_in_parts(
    q: Float[Array, "b h n k"],
    k: Float[Array, "b g m k"],
    v: Float[Array, "b g m d"],
    mask: Mask,
    first: Start | None,
    max_logits: int | None,
) -> Float[Array, "b h n d"]:
    batch, heads, n, _ = q.shape
    rows = backend.queries_at_once(batch, heads, k.shape[2], max_logits)

    def part(q, mask, begin):
        if first is not None:
            last = positions(first + begin, q.shape[2])
            seen = (jnp.arange(k.shape[2])[None, None] <= last[:, :, None])[:, None]
            mask = seen if mask is None else mask & seen
        return _attend_heads(q, k, v, mask)

    if rows is None or not isinstance(n, int) or n <= rows:
        return part(q, mask, 0)
    beyond, parts = -n % rows, -(-n // rows)
    padded = jnp.pad(q, ((0, 0), (0, 0), (0, beyond), (0, 0)))
    if mask is not None and mask.shape[2] > 1:
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, beyond), (0, 0)))

    @jax.checkpoint
    def at(begin):
        return part(jax.lax.dynamic_slice_in_dim(padded, begin, rows, axis=2), _of_queries(mask, begin, rows), begin)

    out = jax.lax.map(at, rows * jnp.arange(parts))
    return jnp.moveaxis(out, 0, 2).reshape(batch, heads, parts * rows, v.shape[-1])[:, :, :n]


def _of_queries(mask: Bool[Array, "..."] | None, first: Int[Array, ""] | int, count: int) -> Bool[Array, "..."] | None:
    """Returns the rows of a mask for some queries. None, or a mask shared by all queries, is returned unchanged."""
    if mask is None or mask.shape[2] == 1:
        return mask
    return jax.lax.dynamic_slice_in_dim(mask, first, count, axis=2)


def softmax_attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m g k"],
    v: Float[Array, "b m g d"],
    mask: Mask = None,
    is_causal: bool = False,
    implementation: Implementation = "auto",
) -> Float[Array, "b n h d"]:
    """Returns softmax(q kᵀ / √(head width)) v for each head. Each key head serves h/g query heads.

    mask: True for keys to keep; it must broadcast to `b h n m`. None keeps all keys. If all keys of a query are masked,
    its output is 0.
    is_causal: whether query i attends only to keys 0..i, in addition to the mask. If True, n and m must be equal.
    implementation: "xla" is compiled by XLA, and limits memory by processing the queries in chunks. "cudnn" and "tpu"
    are fused kernels for GPUs and TPUs, which can be differentiated only once and only in reverse mode. "auto" uses the
    platform's fused kernel if the inputs have half precision and the kernel supports them, and "xla" otherwise;
    `attention_plan` returns its choice and the reason.

    Raises ValueError if shapes, dtypes or the mask are invalid, or if the given implementation cannot run.

    Example:
        out = softmax_attention(q, k, v, is_causal=True)
    """
    check_heads(q, k, v)
    if not isinstance(is_causal, bool | np.bool_):
        raise ValueError(
            f"is_causal is {is_causal}, but softmax_attention accepts only True or False; pass a mask instead."
        )
    mask = check_mask(mask, q, k)
    chosen = chosen_implementation(q, k, v, mask, bool(is_causal), implementation)
    k, v = hide_keys(k, v, mask)
    if 0 in (q.shape[1], k.shape[1]):
        return jnp.zeros((*q.shape[:3], v.shape[-1]), v.dtype)
    if is_causal:
        check_causal(q, k)
    if chosen != "xla":
        return fused_attention(q, k, v, mask, bool(is_causal), chosen)
    n = q.shape[1]
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    if not is_causal:
        return attend_in_parts(q, k, v, mask).swapaxes(1, 2)
    if not isinstance(n, int):  # n is symbolic, as in an exported program
        return attend_in_parts(q, k, v, mask, 0).swapaxes(1, 2)
    return _attend_in_slices(q, k, v, mask, backend.MAX_LOGITS).swapaxes(1, 2)


@partial(jax.jit, static_argnames="max_logits")
def _attend_in_slices(q, k, v, mask, max_logits):
    def run(q, k, v, mask):
        n = q.shape[2]
        size = backend.causal_slice(n)
        out = []
        for start in range(0, n, size):
            end = min(start + size, n)
            some = _of_queries(mask, start, end - start)
            some = None if some is None else some[..., :end]
            out.append(_run_in_parts(q[:, :, start:end], k[:, :, :end], v[:, :, :end], some, start, max_logits))
        return jnp.concatenate(out, axis=2)

    named = [(q, "b h n k"), (k, "b g m k"), (v, "b g m d")]
    return keep_axes(run, q, k, v, mask, named=named, out="b h n d")
