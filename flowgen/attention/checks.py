"""Checks of shapes, dtypes and masks at trace time."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from flowgen.backend import keep_axes

# Largest number of weights n x m that the quadratic form may compute per sample and head.
QUADRATIC_LIMIT = 4096 * 4096


def check_heads(q: Array, k: Array, v: Array, *, heads: int = 2) -> None:
    """Raises ValueError unless q is `b n h k`, k is `b m g k`, v is `b m g d`, and h is a multiple of g.

    heads: the axis of the heads, 2 or, if it comes before the tokens, 1.
    """
    check_floats(q=q, k=k, v=v)
    axes = "batch, tokens, heads, width" if heads == 2 else "batch, heads, tokens, width"
    for name, array in {"q": q, "k": k, "v": v}.items():
        if array.ndim != 4:
            raise ValueError(f"{name} has shape {array.shape}, but attention expects ({axes}). Add or split an axis.")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k has shape {k.shape} and v has shape {v.shape}, but their batch, token and head axes must be equal."
        )
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q has shape {q.shape} and k has shape {k.shape}, but their batch sizes must be equal.")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has shape {q.shape} and k has shape {k.shape}, but their head widths must be equal.")
    if k.shape[heads] == 0 or q.shape[heads] % k.shape[heads]:
        raise ValueError(
            f"q has {q.shape[heads]} heads and k has {k.shape[heads]}, but "
            "the number of query heads must be a multiple of the number of key heads."
        )


def check_floats(**arrays: Array | None) -> None:
    """Raises ValueError unless every array that is not None has a real floating-point dtype."""
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            raise ValueError(
                f"{name} has dtype {jnp.result_type(array)}, but must be floating-point. Convert it with "
                f"{name}.astype(jnp.float32)."
            )


def check_causal(q: Array, k: Array) -> None:
    """Raises ValueError unless there are as many queries as keys, which causal order requires."""
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"is_causal needs as many queries as keys, but q has shape {q.shape} and k has shape {k.shape}; pass a "
            "mask instead or, to continue from a state, call `prefill` or `step`."
        )


def check_mask(mask: Array | None, q: Array, k: Array, *, heads: int = 2) -> Bool[Array, "#b #h #n #m"] | None:
    """Returns the mask; raises ValueError unless it is boolean (True for keys to keep) and broadcasts to `b h n m`.

    heads: the axis of the heads in q and k, as in `check_heads`.
    """
    if mask is None:
        return None
    tokens = 3 - heads
    full = (q.shape[0], q.shape[heads], q.shape[tokens], k.shape[tokens])
    if mask.ndim != 4 or any(have not in (1, want) for have, want in zip(mask.shape, full, strict=True)):
        raise ValueError(
            f"mask has shape {mask.shape}, which does not broadcast to (batch, heads, queries, keys) = {full}; "
            "pass a padding mask `valid` of shape (batch, keys) as valid[:, None, None, :]."
        )
    check_boolean(mask)
    return jnp.asarray(mask)


def check_boolean(mask: Array) -> None:
    """Raises ValueError unless a mask is boolean."""
    if jnp.result_type(mask) != jnp.bool_:
        raise ValueError(
            f"mask has dtype {jnp.result_type(mask)}, but must be boolean, True for the keys to keep. Pass "
            "`mask == 0` if your mask is added to the logits, or `mask != 0` if it has ones for the keys to keep."
        )


def check_key_mask(mask: Array, q: Array, k: Array) -> Bool[Array, "#b #g 1 m"]:
    """Returns the mask; raises ValueError unless it is the same for all queries and all heads that share a key head."""
    checked = check_mask(mask, q, k)
    if checked is None or not is_key_mask(checked, k):
        raise ValueError(
            f"mask has shape {mask.shape}, but this form of attention requires a key mask, (batch, 1, 1, keys). "
            "If your mask keeps the same tokens as queries and as keys, convert it with flowgen.attention.own_keys."
        )
    return checked


def is_key_mask(mask: Array, k: Array) -> bool:
    """Returns whether a mask is the same for all queries and all heads that share a key head."""
    return mask.shape[2] == 1 and mask.shape[1] in (1, k.shape[2])


def hide_keys(
    k: Float[Array, "b m g k"], v: Float[Array, "b m g d"], mask: Bool[Array, "#b #h #n #m"] | None
) -> tuple[Float[Array, "b m g k"], Float[Array, "b m g d"]]:
    """Returns k and v with zeros at keys that are masked for all queries, so that NaN there has no effect."""
    if mask is None:
        return k, v
    seen = mask.any(axis=2)
    if mask.shape[1] > 1:
        seen = rearrange(seen, "b (g r) m -> b g r m", g=k.shape[2]).any(axis=2)
    seen = seen.swapaxes(1, 2)[..., None]
    return jnp.where(seen, k, 0), jnp.where(seen, v, 0)


def repeat_key_heads(
    q: Float[Array, "b n h k"], k: Float[Array, "b m g k"], v: Float[Array, "b m g d"]
) -> tuple[Float[Array, "b m h k"], Float[Array, "b m h d"]]:
    """Returns k and v with their heads repeated to match q; on explicit mesh axes, heads are sharded as in q."""

    def repeated(k, v):
        return tuple(jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))

    return keep_axes(repeated, k, v, named=[(q, "b n h p")], out=("b m h p", "b m h d"))


def concrete(x: Array | int) -> np.ndarray | None:
    """Returns the values of an array, or None if it is traced or partly stored on devices of other processes."""
    if isinstance(x, Tracer) or not getattr(x, "is_fully_addressable", True):
        return None
    return np.asarray(x)


def check_contiguous(segment_ids: Array) -> None:
    """Raises ValueError if a segment id recurs after a different id; does nothing if the ids are not concrete."""
    ids = concrete(segment_ids)
    for row in () if ids is None else ids:
        first = row[np.concatenate([[True], row[1:] != row[:-1]])] if row.size else row
        if len(np.unique(first)) != len(first):
            raise ValueError(
                f"segment_ids recur: consecutive runs of tokens have the ids {first[:8].tolist()}, but each segment "
                "must be contiguous. Give each run its own id, or sort the tokens by segment."
            )


def check_segments(segment_ids: Array | None, q: Array, k: Array) -> None:
    """Raises ValueError unless there is one segment id per token and there are as many queries as keys."""
    if segment_ids is None:
        return
    if segment_ids.shape != q.shape[:2]:
        raise ValueError(f"segment_ids have shape {segment_ids.shape}, but must be (batch, tokens) = {q.shape[:2]}.")
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"segment_ids require as many queries as keys, but q has shape {q.shape} and k has shape {k.shape}. For "
            "cross attention, pass a mask instead."
        )
    check_contiguous(segment_ids)


def check_quadratic(q: Array, k: Array) -> None:
    """Raises ValueError if there are more than 4096 x 4096 query-key pairs. Symbolic lengths are not checked."""
    n, m = q.shape[1], k.shape[1]
    if isinstance(n * m, int) and n * m > QUADRATIC_LIMIT:
        raise ValueError(
            f"mask differs between queries, which requires {n} x {m} weights, but the limit is {QUADRATIC_LIMIT}. "
            "Use is_causal, segment_ids or a key mask. If your mask keeps the same tokens as queries and as keys, "
            "convert it with flowgen.attention.own_keys or, in Flax's modules, with "
            "make_attention_fn(..., masks='keys')."
        )


def check_pallas(block_size: int, segment_ids: Array | None) -> None:
    """Raises ValueError for options that the Pallas kernel does not support."""
    if block_size != 1 or segment_ids is not None:
        raise ValueError("the Pallas kernel supports neither blocks nor segments; use implementation='xla'.")


@contextmanager
def errors_of_kernel(name: str) -> Generator[None]:
    """Returns a context manager that replaces JAX's errors about a kernel with clearer ones that contain `name`.

    Example:
        with errors_of_kernel("the Pallas kernel"):
            out, total = causal_product(q, k, v)
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        if "custom_vjp" in str(error):
            raise TypeError(f"{name} has no forward-mode derivative; pass implementation='xla'.") from error
        if "axis_names" in str(error):
            raise ValueError(
                f"vmap cannot map {name} over an explicit mesh axis; pass implementation='xla', or fold that axis into "
                "the batch."
            ) from error
        raise
