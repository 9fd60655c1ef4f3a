"""Attention functions for Flax's modules: linen's MultiHeadDotProductAttention and NNX's MultiHeadAttention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Num

from flowgen.attention.causal import Causal
from flowgen.attention.checks import check_heads, check_mask, hide_keys
from flowgen.attention.equality import ByFields
from flowgen.attention.features import FeatureMap
from flowgen.attention.kernels import KERNELS, FeatureKernel, Kernel, Keys, Queries, Values, kernel
from flowgen.attention.linear import attend_features
from flowgen.attention.masks import own_keys
from flowgen.attention.prefix import Features
from flowgen.attention.soft import soft_attention
from flowgen.attention.softmax import softmax_attention
from flowgen.backend import Implementation

# Query-key masks or key masks; axes of length 1 broadcast.
Pairs = Bool[Array, "#b #h #n #m"] | None


def make_attention_fn(
    name: str | Kernel | FeatureMap,
    *,
    is_causal: bool | Causal = False,
    masks: Literal["pairs", "keys"] = "pairs",
    implementation: Implementation = "auto",
) -> Callable[..., Array]:
    """Returns a function that you can pass to Flax's multi-head attention modules as `attention_fn`.

    name: the kernel: "softmax", "soft", a name in `flowgen.attention.KERNELS`, or your own feature map or kernel.
    is_causal: whether attention is causal even if the module does not request it. A `Causal` means True and sets
    options of linear attention, so "softmax" does not accept one. "soft" cannot be causal.
    masks: "pairs" accepts every query-key mask. "keys" tells the function that each query-key mask keeps the same
    tokens as queries and as keys, apart from causal order. It then reads these tokens from the diagonal of the mask, at
    linear cost, even inside jit. The outputs of the tokens that a mask does not keep are meaningless.
    implementation: how "softmax" is computed; see `softmax_attention`. Other kernels ignore it.

    The returned function accepts query `... t h k`, key and value `... s g k`, and the arguments that Flax's modules
    pass:

    - mask `... h t s`: nonzero for keys to keep. With a key mask (t is 1), the cost of linear attention is linear in
      the number of tokens. Flax's `make_causal_mask` and `make_attention_mask` return query-key masks. Inside jit,
      these make the cost quadratic, unless masks="keys". Outside jit, the cost is linear if the query-key mask is the
      product of a query mask and a key mask (and, in causal attention, of the causal mask).
    - bias `... g 1 s`: a bias per key, the same for all queries. The features of each key are multiplied by exp(bias).
      Only kernels that are feature maps accept a bias. In causal attention, keep biases below 80, so that exp does not
      overflow. In non-causal attention, only the differences between biases matter.
    - dtype: the dtype to which query, key and value are converted; None means their common dtype.
    - precision: ignored. For float32 inputs, "softmax" uses JAX's default precision of matrix products, and the other
      kernels use the highest.

    If there is one query but several keys, as in decoding from Flax's cache, and a mask is given, the mask alone
    determines the keys to which the query attends; is_causal is ignored. "retention" and feature maps that depend on
    positions then raise ValueError, because the query's position is unknown.

    Two returned functions are equal if they were made with equal arguments. A returned function can be pickled if its
    kernel can be.

    Raises ValueError for an unknown name. The returned function raises ValueError if the module requests dropout of
    attention weights, another kind of bias, or sowing of attention weights.

    Example:
        nn.MultiHeadDotProductAttention(num_heads=8, attention_fn=make_attention_fn("nala"))
    """
    if masks not in ("pairs", "keys"):
        raise ValueError(f"masks must be 'pairs' or 'keys', not {masks!r}.")
    if isinstance(name, str) and name in ("softmax", "soft"):
        return _AttentionFn(name, is_causal, masks, implementation)
    if isinstance(name, str) and name not in KERNELS:
        raise ValueError(f"attention {name!r} is unknown; choose one of softmax, soft, {', '.join(KERNELS)}.")
    return _AttentionFn(kernel(name), is_causal, masks, implementation)


@dataclass(frozen=True, eq=False)
class _AttentionFn(ByFields):
    kernel: Literal["softmax", "soft"] | Kernel
    always_causal: bool | Causal
    masks: str
    implementation: Implementation = "auto"

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        precision: lax.PrecisionLike = None,
        module: object = None,
        is_causal: bool = False,
    ) -> Array:
        _check_call(query, key, value, 0.0 if deterministic else dropout_rate, module)
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        leading = query.shape[:-3]
        q, k, v = (x if len(leading) == 1 else x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        check_heads(q, k, v)
        mask, bias = (_with_one_batch_axis(x, leading) for x in (mask, bias))
        mask = None if mask is None else check_mask(mask != 0, q, k)  # Flax's masks have a float dtype
        out = self._attend(q, k, v, bias, mask, self.always_causal or is_causal).astype(dtype)
        return out if len(leading) == 1 else out.reshape(*leading, *out.shape[1:])

    def _attend(
        self, q: Queries, k: Keys, v: Values, bias: Num[Array, "..."] | None, mask: Pairs, causal: bool | Causal
    ) -> Float[Array, "b n h d"]:
        if mask is not None and q.shape[1] == 1 and k.shape[1] != 1:  # decoding: the mask sets what the query sees
            _check_decodes(self.kernel, q, k)
            causal = False
        if self.masks == "keys" and mask is not None and mask.shape[2] > 1:
            mask = own_keys(mask)
        if isinstance(self.kernel, FeatureKernel) and bias is not None:
            return _attend_biased(self.kernel, q, k, v, bias, mask, causal)
        if bias is not None:
            raise ValueError(
                f"bias has shape {bias.shape}, but {_name(self.kernel)!r} attention does not support a bias; omit it."
            )
        if isinstance(self.kernel, str):
            of_softmax = partial(softmax_attention, implementation=self.implementation)
            attend = of_softmax if self.kernel == "softmax" else soft_attention
            # Both raise an error if given a `Causal`.
            return attend(q, k, v, mask=mask, is_causal=causal)  # ty: ignore[invalid-argument-type]
        return self.kernel.attend(q, k, v, mask=mask, is_causal=causal)


def _name(chosen: str | Kernel) -> str:
    names = (name for name, known in KERNELS.items() if known == chosen)
    return chosen if isinstance(chosen, str) else next(names, type(chosen).__name__)


def _check_call(query: Array, key: Array, value: Array, dropout_rate: float, module: object) -> None:
    if dropout_rate > 0:
        raise ValueError(
            f"dropout_rate is {dropout_rate}, but this attention does not support dropout on its weights; "
            "set it to 0, and apply dropout to the output instead."
        )
    if module is not None:
        raise ValueError("sow_weights is on, but this attention does not return its weights; turn it off.")
    if min(query.ndim, key.ndim, value.ndim) < 3:
        raise ValueError(f"query has shape {query.shape}, but attention expects (..., tokens, heads, width).")
    if not key.shape[:-3] == value.shape[:-3] == query.shape[:-3]:
        raise ValueError(
            f"query has shape {query.shape} and key has shape {key.shape}, but query, key and value must have equal "
            "leading axes."
        )


def _check_decodes(chosen: str | Kernel, q: Array, k: Array) -> None:
    if getattr(chosen, "positional", False):
        what = "a feature map with positions" if isinstance(chosen, FeatureKernel) else _name(chosen)
        raise ValueError(
            f"query has shape {q.shape} and key has shape {k.shape}; {what} cannot decode from Flax's cache, which "
            "does not give the query's position. Use the modules in flowgen.attention, which decode with a state."
        )


def _attend_biased(
    chosen: FeatureKernel, q: Queries, k: Keys, v: Values, bias: Num[Array, "..."], mask: Pairs, causal: bool | Causal
) -> Float[Array, "b n h d"]:
    if bias.ndim != 4 or bias.shape[2] != 1 or bias.shape[1] not in (1, k.shape[2]):
        raise ValueError(
            f"bias has shape {bias.shape}, but linear attention computes no query-key weights, so it supports only a "
            "bias over keys, (batch, heads, 1, keys)."
        )
    phi = chosen.features
    k, v = hide_keys(k, v, mask)
    mapped = phi(q, k)
    if not causal:  # in causal attention, the maximum over keys would leak the future
        seen = bias if mask is None else jnp.where(mask.any(axis=2, keepdims=True), bias, -jnp.inf)
        top = seen.max(axis=-1, keepdims=True)
        bias = bias - jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    weight = jnp.exp(bias[:, :, 0, :].swapaxes(1, 2)[..., None].astype(mapped.k.dtype))
    norm_k = None if mapped.norm_k is None else mapped.norm_k * weight
    biased = Features(mapped.q, mapped.k * weight, mapped.norm_q, norm_k)
    scale = 1 if phi.query_scale is None else phi.query_scale(q)
    return attend_features(biased, v, mask=mask, is_causal=causal, eps=chosen.eps * scale)


def _with_one_batch_axis(x: Array | None, leading: tuple[int, ...]) -> Array | None:
    """Returns a mask or bias `... h t s` as `b h t s`, broadcast over the leading axes only if necessary."""
    if x is None:
        return None
    x = x.reshape((1,) * (len(leading) + 3 - x.ndim) + x.shape)
    batch = x.shape[: len(leading)]
    if all(size == 1 for size in batch):
        return x.reshape(1, *x.shape[len(leading) :])
    return jnp.broadcast_to(x, (*leading, *x.shape[len(leading) :])).reshape(-1, *x.shape[len(leading) :])
