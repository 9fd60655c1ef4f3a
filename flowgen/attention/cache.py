"""Cached attention: the interface between decoders and causal kernels.

A decoder processes a *window* of tokens, possibly several times with different guesses, and then moves on to the next
window. A `CausalKernel` has four main functions: `attend` processes whole sequences, `attend_window` processes a window
after a cached prefix, `rewind` prepares the cache for another pass over the same window, and `accept` adds the solved
tokens at the beginning of the window to the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from flowgen.attention.checks import check_heads, concrete
from flowgen.attention.features import FeatureMap
from flowgen.attention.kernels import KERNELS, Kernel, State, kernel
from flowgen.attention.slices import Start, positions, put
from flowgen.attention.softmax import attend_in_parts, softmax_attention
from flowgen.backend import Implementation, keep_axes


class KVCache(NamedTuple):
    """The keys and values of one softmax attention layer, with one slot per position.

    Each query attends only to the slots up to its own position.
    """

    keys: Float[Array, "b h m k"]
    values: Float[Array, "b h m k"]


class CausalKernel(NamedTuple):
    """A causal attention kernel with a cache: the functions that the blocks and decoders of a flow call.

    - `attend(q, k, v) -> out`: causal attention over whole sequences. All arrays have axes `b n h k`; k and v may have
      fewer heads than q.
    - `init_cache(batch, length, num_heads, head_dim, dtype) -> cache`: an empty cache for one layer, with room for
      `length` positions and `num_heads` key heads.
    - `attend_window(q, k, v, cache, start) -> (out, window)`: causal attention of n tokens, at positions
      start..start+n-1, to the cached tokens before `start` and to each other. `start` is one number for the whole
      batch, or one per sample. Pass `window` to `accept` to add the n tokens to the cache.
    - `rewind(before, after) -> cache`: the cache for another pass over the same window. `before` is the cache that the
      previous pass read, and `after` is the `window` that it returned. The result is `after` if a pass overwrites its
      own slots, and `before` if the cache is a running sum.
    - `has_slots`: whether the cache has one slot per token. A window may then start at any token that has already been
      processed.
    - `has_temperature`: whether scaling the queries sharpens or flattens the attention weights, as in softmax
      attention.
    - `accept(before, window, count) -> cache`: adds the first `count` tokens of a window to `before`, the cache that
      `attend_window` read. `count` is one number per sample; None adds all tokens. Set `accept` to None if `window` is
      itself the cache with all tokens added; decoders can then use a sliding window only if `has_slots` is True.
    - `grow(cache, length) -> cache`: the same cache with room for `length` positions. Every pass reads the whole cache,
      so decoders start with a short cache and let it grow. If `grow` is None, they create it at full length.
    """

    attend: Callable[..., Array]
    init_cache: Callable[..., State]
    attend_window: Callable[..., tuple[Array, State]]
    rewind: Callable[[State, State], State]
    has_slots: bool
    has_temperature: bool
    accept: Callable[[State, State, Array | None], State] | None = None
    grow: Callable[[State, int], State] | None = None

    @property
    def can_slide(self) -> bool:
        """Whether decoders can use a sliding window: `has_slots` is True, or `accept` is not None."""
        return self.has_slots or self.accept is not None


def init_kv_cache(batch: int, length: int, num_heads: int, head_dim: int, dtype: DTypeLike) -> KVCache:
    """Returns an empty key-value cache for one layer, with `length` positions and `num_heads` key heads.

    Example:
        cache = init_kv_cache(batch=4, length=64, num_heads=8, head_dim=64, dtype=jnp.float32)
    """
    zeros = jnp.zeros((batch, num_heads, length, head_dim), dtype)
    return KVCache(zeros, zeros)


def grow_kv_cache(cache: KVCache, length: int) -> KVCache:
    """Returns the cache extended to `length` positions; `length` must not be below the current number of positions.

    Example:
        cache = grow_kv_cache(cache, length=128)
    """
    batch, heads, _, width = cache.keys.shape
    longer = init_kv_cache(batch, length, heads, width, cache.keys.dtype)
    return jax.tree.map(partial(jax.lax.dynamic_update_slice, start_indices=(0, 0, 0, 0)), longer, cache)


def attend_kv_window(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b n g k"],
    v: Float[Array, "b n g k"],
    cache: KVCache,
    start: Start,
) -> tuple[Float[Array, "b n h k"], KVCache]:
    """Returns the causal softmax attention of n tokens to the cached tokens and to each other, and the updated cache.

    start: the position of the first of the n tokens, one for the whole batch or one per sample.

    Keys k and values v overwrite slots start..start+n-1, which the cache must have. Query i, counted from 0, attends to
    slots 0..start+i; later slots must contain finite numbers, but have no effect. You can therefore process the same
    tokens again with the returned cache. Each key head serves h/g query heads.

    Raises ValueError if shapes or dtypes do not match, or if the window ends beyond the cache; a traced start is not
    checked.

    Example:
        out, cache = attend_kv_window(q, k, v, cache, start=12)
    """
    _check_window(q, k, v, cache, start)

    def run(q, k, v, cache, start):
        keys = put(cache.keys, k.swapaxes(1, 2).astype(cache.keys.dtype), start, axis=2)
        values = put(cache.values, v.swapaxes(1, 2).astype(cache.values.dtype), start, axis=2)
        out = attend_in_parts(q.swapaxes(1, 2), keys, values, first=start)
        return out.swapaxes(1, 2), keys, values

    named = [(q, "b n h k"), (k, "b n g k"), (v, "b n g k"), (cache.keys, "b g m k")]
    letters = ("b n h k", "b g m k", "b g m k")
    out, keys, values = keep_axes(run, q, k, v, cache, start, named=named, out=letters)
    return out, KVCache(keys, values)


def _check_window(q: Array, k: Array, v: Array, cache: KVCache, start: Start) -> None:
    check_heads(q, k, v)
    n, slots, first = q.shape[1], cache.keys.shape[2], concrete(start)
    if k.shape[1] != n:
        raise ValueError(f"q has shape {q.shape} and k has shape {k.shape}, but a window has one key per query.")
    for name, slot, x in (("keys", cache.keys, k), ("values", cache.values, v)):
        wanted = (x.shape[0], x.shape[2], slots, x.shape[3])
        if slot.shape != wanted:
            raise ValueError(
                f"cache.{name} has shape {slot.shape}, but must be (batch, heads, positions, width) = {wanted}; create "
                "the cache with init_kv_cache."
            )
    if first is None or not isinstance(n, int) or not isinstance(slots, int) or first.size == 0:
        return
    if first.min() < 0 or first.max() + n > slots:
        raise ValueError(
            f"start is {first.max() if first.min() >= 0 else first.min()}, but a window of {n} tokens must lie in the "
            f"{slots} positions of the cache; create a longer cache."
        )


def _recurrent(kernel: Kernel) -> CausalKernel:
    """Returns a `CausalKernel` for a kernel with a running state; the state serves as a cache of constant size."""
    running = _Running(kernel)
    return CausalKernel(
        attend=running.attend,
        init_cache=running.init_cache,
        attend_window=running.attend_window,
        rewind=_before,
        has_slots=False,
        has_temperature=False,
        accept=running.accept,
    )


class _Window(NamedTuple):
    """The state after a window, and the keys and values that `accept` needs to add only some of the window's tokens."""

    after: State
    keys: Float[Array, "b n g k"]
    values: Float[Array, "b n g d"]


@dataclass(frozen=True)
class _Running:
    kernel: Kernel

    def attend(
        self, q: Float[Array, "b n h k"], k: Float[Array, "b n g k"], v: Float[Array, "b n g d"]
    ) -> Float[Array, "b n h d"]:
        return self.kernel.attend(q, k, v, is_causal=True)

    def init_cache(self, batch: int, length: int, num_heads: int, head_dim: int, dtype: DTypeLike) -> State:
        return self.kernel.init_state(batch, num_heads, head_dim, head_dim, dtype)

    def attend_window(
        self,
        q: Float[Array, "b n h k"],
        k: Float[Array, "b n g k"],
        v: Float[Array, "b n g d"],
        cache: State,
        start: Start,
    ) -> tuple[Float[Array, "b n h d"], _Window]:
        out, after = self.kernel.prefill(q, k, v, state=cache)
        return out, _Window(after, k, v)

    def accept(self, before: State, window: _Window, count: Int[Array, " b"] | None) -> State:
        if count is None:
            return window.after
        keep = positions(0, window.keys.shape[1]) < count[:, None]
        # No output is used, so any queries will do.
        return self.kernel.prefill(window.keys, window.keys, window.values, state=before, mask=keep[:, None, None])[1]


def _attend_causally(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b n g k"],
    v: Float[Array, "b n g d"],
    implementation: Implementation = "auto",
) -> Float[Array, "b n h d"]:
    return softmax_attention(q, k, v, is_causal=True, implementation=implementation)


def _before(before: State, after: State) -> State:
    return before


def _after(before: State, after: State, count: Array | None = None) -> State:
    return after


SOFTMAX = CausalKernel(
    attend=_attend_causally,
    init_cache=init_kv_cache,
    attend_window=attend_kv_window,
    rewind=_after,
    has_slots=True,
    has_temperature=True,
    accept=_after,
    grow=grow_kv_cache,
)
CAUSAL_KERNEL_NAMES = ("softmax", *KERNELS)


def causal_kernel(
    attention: str | Kernel | FeatureMap | CausalKernel, implementation: Implementation = "auto"
) -> CausalKernel:
    """Returns the `CausalKernel` for a name in `CAUSAL_KERNEL_NAMES`, a `Kernel` or a feature map.

    attention: a `CausalKernel` is returned unchanged.
    implementation: how the kernel "softmax" attends over whole sequences, as in `softmax_attention`. Other kernels
    ignore it.

    Raises ValueError if `attention` is an unknown name or has another type.

    Example:
        kernel = causal_kernel("softmax")
    """
    if isinstance(attention, CausalKernel):
        return attention
    if isinstance(attention, str) and attention not in CAUSAL_KERNEL_NAMES:
        raise ValueError(
            f"attention {attention!r} is not a causal kernel; choose one of {', '.join(CAUSAL_KERNEL_NAMES)}."
        )
    if not (isinstance(attention, str) and attention == "softmax"):
        return _recurrent(kernel(attention))
    if implementation == "auto":
        return SOFTMAX
    return SOFTMAX._replace(attend=partial(_attend_causally, implementation=implementation))
