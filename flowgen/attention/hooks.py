"""Attention functions for Flax's own modules: linen MultiHeadDotProductAttention and nnx MultiHeadAttention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from flowgen.attention.checks import check_heads, check_mask, hide_keys
from flowgen.attention.features import FeatureMap
from flowgen.attention.kernels import KERNELS, FeatureKernel, Kernel, kernel
from flowgen.attention.linear import Causal, attend_features
from flowgen.attention.prefix import Features
from flowgen.attention.soft import soft_attention
from flowgen.attention.softmax import softmax_attention


def make_attention_fn(name: str | Kernel | FeatureMap, *, is_causal: bool | Causal = False) -> Callable[..., Array]:
    """Returns an `attention_fn` for Flax's multi-head attention modules that computes the named kernel.

    name: a kernel of `flowgen.attention.KERNELS`, a feature map, "softmax" or "soft". is_causal: causal whatever the
    module asks. The function takes query `... t h k`, key and value `... s g k` and what the modules pass:
    - mask `... h t s`, nonzero keeps: over keys alone at linear cost, else by the quadratic form. A causal mask
      cannot be told from others while tracing; `is_causal` is the fast form of it.
    - bias over keys alone (query axis 1) multiplies the keys' features by exp(bias); feature maps only. Where causal,
      keep it below 80, where exp overflows; otherwise only differences matter.
    - one query with a mask, as when decoding from Flax's cache, is never causal: the mask says what it sees. Feature
      maps with positions raise there, since the query does not say where it stands.
    - dtype: what query, key and value are promoted to. precision: ours is at least the one asked for.
    Raises ValueError for what linear attention does not have: dropout of weights, other biases, sown weights.

    Example:
        nn.MultiHeadDotProductAttention(num_heads=8, attention_fn=make_attention_fn("nala"))
    """
    attend = _attend_by_name(name)
    always_causal = is_causal

    def attention_fn(
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
    ) -> Array:
        if dropout_rate > 0 and not deterministic:
            raise ValueError(
                f"dropout_rate is {dropout_rate}; this attention never forms the weights that dropout would thin, "
                "so set it to 0 and drop its output instead."
            )
        if module is not None:
            raise ValueError("sow_weights is on; this attention never forms weights, so turn it off.")
        if min(query.ndim, key.ndim, value.ndim) < 3:
            raise ValueError(f"query has shape {query.shape}; attention takes (..., tokens, heads, width).")
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        leading = query.shape[:-3]
        if not key.shape[:-3] == value.shape[:-3] == leading:
            raise ValueError(f"query has shape {query.shape} and key {key.shape}; their leading axes must be equal.")
        q, k, v = (x.astype(dtype).reshape(-1, *x.shape[-3:]) for x in (query, key, value))
        check_heads(q, k, v)
        mask, bias = (_with_one_batch_axis(x, leading) for x in (mask, bias))
        mask = None if mask is None else mask != 0  # Flax makes masks of floats
        causal = False if q.shape[1] == 1 and mask is not None else always_causal or is_causal
        out = attend(q, k, v, bias, check_mask(mask, q, k), causal)
        return out.astype(dtype).reshape(*leading, *out.shape[1:])

    return attention_fn


def _attend_by_name(name: str | Kernel | FeatureMap) -> Callable[..., Array]:
    if name == "softmax":
        return _without_bias(lambda q, k, v, mask, causal: softmax_attention(q, k, v, mask, is_causal=causal), name)
    if name == "soft":
        return _without_bias(lambda q, k, v, mask, causal: soft_attention(q, k, v, mask=mask, is_causal=causal), name)
    if isinstance(name, str) and name not in KERNELS:
        raise ValueError(f"attention {name!r} is unknown; choose one of softmax, soft, {', '.join(KERNELS)}.")
    chosen = kernel(name)
    if isinstance(chosen, FeatureKernel) and chosen.features.positional:
        chosen = _Positional(chosen.features, chosen.eps)
    if isinstance(chosen, FeatureKernel):
        return lambda q, k, v, bias, mask, causal: _attend_biased(chosen, q, k, v, bias, mask, causal)
    return _without_bias(lambda q, k, v, mask, causal: chosen.attend(q, k, v, mask=mask, is_causal=causal), name)


class _Positional(FeatureKernel):
    """A feature kernel that knows where tokens stand, and so cannot serve a query apart from its keys."""

    def attend(self, q, k, v, **options):
        if q.shape[1] == 1 < k.shape[1]:
            raise ValueError(
                f"query has shape {q.shape} and key {k.shape}; a feature map with positions cannot decode from Flax's "
                "cache, so use the modules of flowgen.attention, which keep a state."
            )
        return super().attend(q, k, v, **options)


def _without_bias(attend: Callable[..., Array], name: Any) -> Callable[..., Array]:
    def attend_or_raise(q, k, v, bias, mask, causal):
        if bias is not None:
            raise ValueError(f"bias has shape {bias.shape}; {name!r} attention takes none, so leave it out.")
        return attend(q, k, v, mask, causal)

    return attend_or_raise


def _attend_biased(chosen: FeatureKernel, q, k, v, bias, mask, causal) -> Array:
    if bias is None:
        return chosen.attend(q, k, v, mask=mask, is_causal=causal)
    if bias.ndim != 4 or bias.shape[2] != 1 or bias.shape[1] not in (1, k.shape[2]):
        raise ValueError(
            f"bias has shape {bias.shape}; linear attention can only weigh keys, (batch, heads, 1, keys), "
            "since weights of pairs are never formed."
        )
    phi = chosen.features
    k, v = hide_keys(k, v, mask)
    mapped = phi(q, k)
    if not causal:  # where causal, a largest bias would tell of the future
        seen = bias if mask is None else jnp.where(mask.any(axis=2, keepdims=True), bias, -jnp.inf)
        top = seen.max(axis=-1, keepdims=True)
        bias = bias - jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    weight = jnp.exp(bias[:, :, 0, :].swapaxes(1, 2)[..., None].astype(mapped.k.dtype))
    norm_k = None if mapped.norm_k is None else mapped.norm_k * weight
    biased = Features(mapped.q, mapped.k * weight, mapped.norm_q, norm_k)
    scale = 1 if phi.query_scale is None else phi.query_scale(q)
    return attend_features(biased, v, mask=mask, is_causal=causal, eps=chosen.eps * scale)


def _with_one_batch_axis(x: Array | None, leading: tuple[int, ...]) -> Array | None:
    """A mask or bias `... h t s` as `b h t s`, broadcast over the leading axes only where it must be."""
    if x is None:
        return None
    x = x.reshape((1,) * (len(leading) + 3 - x.ndim) + x.shape)
    batch = x.shape[: len(leading)]
    if all(size == 1 for size in batch):
        return x.reshape(1, *x.shape[len(leading) :])
    return jnp.broadcast_to(x, (*leading, *x.shape[len(leading) :])).reshape(-1, *x.shape[len(leading) :])
