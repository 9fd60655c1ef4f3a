"""Attention kernels by name: one interface for whole sequences and for a running state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from flowgen.attention.causal import Causal, as_causal
from flowgen.attention.checks import check_causal, check_heads, check_key_mask, check_mask, hide_keys, is_key_mask
from flowgen.attention.decay import retention, retention_of_pairs
from flowgen.attention.equality import ByFields
from flowgen.attention.features import FEATURE_MAPS, FeatureMap, per_head, signless_power
from flowgen.attention.linear import EPS, init_state, linear_attention, normalised, prefill, products
from flowgen.attention.masks import hide_queries, split_pairs
from flowgen.attention.prefix import Features, LinearState, empty_state, keep_keys, prefix_product
from flowgen.attention.segments import alike
from flowgen.backend import keep_axes

Queries = Float[Array, "b n h k"]
Keys = Float[Array, "b m g k"]
Values = Float[Array, "b m g d"]
# A pytree, defined by the kernel, that summarises the tokens so far; None before the first token.
State = PyTree


@runtime_checkable
class Kernel(Protocol):
    """The interface of attention kernels whose state does not grow with the number of tokens.

    The arguments of the methods are as in `linear_attention`, `init_state` and `prefill`. To define your own kernel,
    write a frozen dataclass with these methods. Its state may be any pytree. If its weights depend on the positions of
    tokens, set the class attribute `positional = True`.
    """

    def attend(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        *,
        mask: Bool[Array, "..."] | None = None,
        is_causal: bool | Causal = False,
        segment_ids: Int[Array, "b n"] | None = None,
    ) -> Float[Array, "b n h d"]:
        """Returns the attention outputs for whole sequences; arguments are as in `linear_attention`."""
        ...

    def init_state(
        self, batch: int, num_heads: int, key_dim: int, value_dim: int, dtype: DTypeLike = jnp.float32
    ) -> State:
        """Returns the state before the first token, with at least float32 precision.

        num_heads: the number of key heads. dtype: the dtype of the inputs.
        """
        ...

    def prefill(
        self,
        q: Queries,
        k: Float[Array, "b n g k"],
        v: Float[Array, "b n g d"],
        *,
        state: State = None,
        mask: Bool[Array, "..."] | None = None,
    ) -> tuple[Float[Array, "b n h d"], State]:
        """Returns the causal attention outputs for the next n tokens of a sequence, and the state after them.

        state: the state after the earlier tokens; None means that there are none.
        mask: a key mask, True for tokens to keep.
        """
        ...


@dataclass(frozen=True, eq=False)
class FeatureKernel(ByFields):
    """The kernel of `linear_attention` with a feature map; eps is added to the normaliser."""

    features: FeatureMap
    eps: float = EPS

    @property
    def positional(self) -> bool:
        return self.features.positional

    def attend(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        *,
        mask: Bool[Array, "..."] | None = None,
        is_causal: bool | Causal = False,
        segment_ids: Int[Array, "b n"] | None = None,
    ) -> Float[Array, "b n h d"]:
        options = {"mask": mask, "is_causal": is_causal, "segment_ids": segment_ids}
        return linear_attention(q, k, v, self.features, eps=self.eps, **options)

    def init_state(
        self, batch: int, num_heads: int, key_dim: int, value_dim: int, dtype: DTypeLike = jnp.float32
    ) -> LinearState:
        return init_state(batch, num_heads, key_dim, value_dim, self.features, dtype=dtype)

    def prefill(
        self,
        q: Queries,
        k: Float[Array, "b n g k"],
        v: Float[Array, "b n g d"],
        *,
        state: LinearState | None = None,
        mask: Bool[Array, "..."] | None = None,
    ) -> tuple[Float[Array, "b n h d"], LinearState]:
        return prefill(q, k, v, self.features, state=state, mask=mask, eps=self.eps)


@dataclass(frozen=True, eq=False)
class PolaKernel(ByFields):
    """The kernel of polarity-aware linear attention; see `pola_attention` for its fields."""

    power: float | Array = 3.0
    eps: float = EPS

    def attend(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        *,
        mask: Bool[Array, "..."] | None = None,
        is_causal: bool | Causal = False,
        segment_ids: Int[Array, "b n"] | None = None,
    ) -> Float[Array, "b n h d"]:
        check_heads(q, k, v)
        if as_causal(is_causal):
            check_causal(q, k)
        mask = check_mask(mask, q, k)
        k, v = hide_keys(k, v, mask)
        features = self._features(q, k, v)
        if mask is not None and is_key_mask(mask, k):
            (features, v), mask = keep_keys(features, v, mask), None
        elif mask is not None and mask.shape[1] > 1:
            mask = jnp.repeat(mask, 2, axis=1)
        out, total = products(features, v, mask=mask, is_causal=is_causal, segment_ids=segment_ids)
        return _halves(normalised(out, total, self.eps, v.dtype))

    def init_state(
        self, batch: int, num_heads: int, key_dim: int, value_dim: int, dtype: DTypeLike = jnp.float32
    ) -> LinearState:
        token, value = _token(batch, num_heads, key_dim, dtype), _token(batch, num_heads, value_dim, dtype)
        return empty_state(self._features(token, token, value), value)

    def prefill(
        self,
        q: Queries,
        k: Float[Array, "b n g k"],
        v: Float[Array, "b n g d"],
        *,
        state: LinearState | None = None,
        mask: Bool[Array, "..."] | None = None,
    ) -> tuple[Float[Array, "b n h d"], LinearState]:
        check_heads(q, k, v)
        check_causal(q, k)
        mask = None if mask is None else check_key_mask(mask, q, k)
        k, v = hide_keys(k, v, mask)
        features = self._features(q, k, v)
        out, total, state = prefix_product(features, v, state=state, mask=mask)
        return _halves(normalised(out, total, self.eps, v.dtype)), state

    def _features(self, q: Queries, k: Keys, v: Values) -> Features:
        """Returns features with two queries per head, one for equal and one for opposite signs.

        Both queries are compared with the same keys, so they share one state.
        """
        if v.shape[-1] % 2:
            raise ValueError(f"v has width {v.shape[-1]}, but it must be even, because each sign uses one half.")
        dtype = jnp.promote_types(q.dtype, jnp.float32)
        positive, negative = (_signed_power(x.astype(dtype), self.power) for x in (q, -q))
        same, opposite = jnp.concatenate([positive, negative], -1), jnp.concatenate([negative, positive], -1)
        pairs = keep_axes(_interleave, same, opposite, named=[(q, "b n h k")], out="b n h p")
        keys = jnp.concatenate([_signed_power(x.astype(dtype), self.power) for x in (k, -k)], axis=-1)
        return Features(pairs, keys)


class InlineState(NamedTuple):
    """Running sums of `inline_attention`.

    pairs: the sum of key-value products and the sum of keys. values: the sum of values and the number of tokens.
    """

    pairs: LinearState
    values: LinearState


@dataclass(frozen=True)
class InlineKernel:
    """The kernel of injective linear attention; see `inline_attention` for its field."""

    scale: float | None = None

    def attend(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        *,
        mask: Bool[Array, "..."] | None = None,
        is_causal: bool | Causal = False,
        segment_ids: Int[Array, "b n"] | None = None,
    ) -> Float[Array, "b n h d"]:
        check_heads(q, k, v)
        k, v = hide_keys(k, v, check_mask(mask, q, k))
        options = {"mask": mask, "is_causal": is_causal, "segment_ids": segment_ids}
        if segment_ids is not None:
            (q,), (k, v) = alike(q), alike(k, v)
        pairs, values = self._features(q, k)
        if segment_ids is not None:  # this makes both products NaN for the same outputs
            values = Features(*(jnp.where(jnp.isnan(x[..., :1]), jnp.nan, 1) for x in (pairs.q, pairs.k)))
        return _inline(*products(pairs, v, **options), *products(values, v, **options), v.dtype)

    def init_state(
        self, batch: int, num_heads: int, key_dim: int, value_dim: int, dtype: DTypeLike = jnp.float32
    ) -> InlineState:
        token, value = _token(batch, num_heads, key_dim, dtype), _token(batch, num_heads, value_dim, dtype)
        return InlineState(*(empty_state(features, value) for features in self._features(token, token)))

    def prefill(
        self,
        q: Queries,
        k: Float[Array, "b n g k"],
        v: Float[Array, "b n g d"],
        *,
        state: InlineState | None = None,
        mask: Bool[Array, "..."] | None = None,
    ) -> tuple[Float[Array, "b n h d"], InlineState]:
        check_heads(q, k, v)
        check_causal(q, k)
        mask = None if mask is None else check_key_mask(mask, q, k)
        k, v = hide_keys(k, v, mask)
        sums, states = [], []
        for features, before in zip(self._features(q, k), state or (None, None), strict=True):
            out, total, after = prefix_product(features, v, state=before, mask=mask)
            sums += [out, total]
            states.append(after)
        return _inline(*sums, v.dtype), InlineState(*states)

    def _features(self, q: Queries, k: Keys) -> tuple[Features, Features]:
        dtype = jnp.promote_types(q.dtype, jnp.float32)
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        ones = Features(jnp.ones_like(q[..., :1], dtype), jnp.ones_like(k[..., :1], dtype))
        return Features(q.astype(dtype) * scale, k.astype(dtype)), ones


@dataclass(frozen=True)
class RetentionKernel:
    """The kernel of `retention`, which is always causal: `attend` raises ValueError if is_causal is False."""

    positional: ClassVar[bool] = True

    def attend(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        *,
        mask: Bool[Array, "..."] | None = None,
        is_causal: bool | Causal = False,
        segment_ids: Int[Array, "b n"] | None = None,
    ) -> Float[Array, "b n h d"]:
        check_heads(q, k, v)
        causal = as_causal(is_causal)
        if causal is None or causal.block_size != 1 or causal.implementation != "xla":
            raise ValueError(
                f"is_causal is {is_causal}, but retention is always causal, token by token; set is_causal=True."
            )
        mask, queries = check_mask(mask, q, k), None
        if mask is not None and not is_key_mask(mask, k):
            queries, mask = split_pairs(mask, k.shape[2], block_size=1) or (None, mask)
        if mask is not None and not is_key_mask(mask, k):
            return retention_of_pairs(q, k, v, mask, segment_ids)
        out = retention(q, k, v, mask=mask, segment_ids=segment_ids, chunk_size=causal.chunk_size)[0]
        return out if queries is None else hide_queries(out, queries)

    def init_state(
        self, batch: int, num_heads: int, key_dim: int, value_dim: int, dtype: DTypeLike = jnp.float32
    ) -> LinearState:
        token = _token(batch, num_heads, key_dim, dtype)
        return empty_state(Features(token, token), _token(batch, num_heads, value_dim, dtype))

    def prefill(
        self,
        q: Queries,
        k: Float[Array, "b n g k"],
        v: Float[Array, "b n g d"],
        *,
        state: LinearState | None = None,
        mask: Bool[Array, "..."] | None = None,
    ) -> tuple[Float[Array, "b n h d"], LinearState]:
        return retention(q, k, v, state=state, mask=mask)


KERNELS: dict[str, Kernel] = {
    **{name: FeatureKernel(features) for name, features in FEATURE_MAPS.items()},
    "pola": PolaKernel(),
    "inline": InlineKernel(),
    "retention": RetentionKernel(),
}


def kernel(chosen: str | Kernel | FeatureMap) -> Kernel:
    """Returns the kernel with the given name in `KERNELS`, or the kernel of a feature map.

    chosen: a `Kernel` is returned unchanged.

    Raises ValueError if `chosen` is an unknown name or has another type.

    Example:
        out = kernel("nala").attend(q, k, v, is_causal=True)
    """
    if isinstance(chosen, FeatureMap):
        return FeatureKernel(chosen)
    if not isinstance(chosen, str) and isinstance(chosen, Kernel):
        return chosen
    if not isinstance(chosen, str) or chosen not in KERNELS:
        raise ValueError(
            f"attention kernel {chosen!r} is unknown; choose one of {', '.join(KERNELS)}, or pass a FeatureMap or a "
            "Kernel."
        )
    return KERNELS[chosen]


def _token(batch: int, num_heads: int, width: int, dtype: DTypeLike) -> Float[Array, "b 1 h k"]:
    return jnp.zeros((batch, 1, num_heads, width), dtype)


def _signed_power(x: Array, power: float | Array) -> Array:
    return jnp.where(x > 0, signless_power(x, per_head(power, x)), 0)


def _interleave(same: Array, opposite: Array) -> Array:
    return rearrange(jnp.stack([same, opposite]), "two b n h p -> b n (h two) p")


def _halves(pairs: Float[Array, "b n two_h d"]) -> Float[Array, "b n h d"]:
    """Returns the first half of each value from the even heads (equal signs), and the second half from the odd heads
    (opposite signs)."""

    def run(pairs):
        half = pairs.shape[-1] // 2
        return jnp.concatenate([pairs[:, :, 0::2, :half], pairs[:, :, 1::2, half:]], axis=-1)

    return keep_axes(run, pairs, named=[(pairs, "b n h d")], out="b n h d")


def _inline(pairs: Array, dots: Array, values: Array, count: Array, dtype: jnp.dtype) -> Array:
    """Returns s q·(Σkv/N - k̄ v̄) + v̄ from the sums Σ(q·k)v, Σ q·k, Σ v and N, or 0 if N is 0."""
    n = jnp.where(count == 0, 1, count)[..., None]
    mean = values / n
    return (pairs / n - dots[..., None] / n * mean + mean).astype(dtype)
