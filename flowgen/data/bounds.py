"""Bounds of the numbers in a file: the box in which all samples lie, such as that of a uniform prior."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float32

from flowgen.data.casting import LARGEST
from flowgen.settings import FieldError

Bounds = None | float | tuple[float | None, ...]
# A value on one of two bounds is moved inside by this share of their distance, as far as uniform float32 numbers lie.
MOVED = 2.0**-24


def check_bounds(low: Bounds, high: Bounds) -> None:
    """Raises ValueError unless each low bound is below its high bound, tuples have equal lengths, and float32 suffices.

    Example:
        check_bounds(data.low, data.high)
    """
    sizes = [len(bound) for bound in (low, high) if isinstance(bound, tuple)]
    if len(set(sizes)) > 1:
        raise ValueError(f"low has {sizes[0]} entries, but high has {sizes[1]}; give one entry per channel of x.")
    if 0 in sizes:
        raise ValueError(f"{'high' if low != () else 'low'} has no entries; give one per channel of x, or none at all.")
    for name, bound in (("low", low), ("high", high)):
        for number in bound if isinstance(bound, tuple) else (bound,):
            if number is not None and abs(number) > LARGEST:
                raise ValueError(
                    f"{name} is {number:g}; a bound has at most the size {LARGEST:g}, or None if there is none."
                )
    lows, highs = bounds_of(low, high, sizes[0] if sizes else 1)
    if (wrong := np.flatnonzero(lows >= highs)).size:
        raise ValueError(f"low is {lows[wrong[0]]:g}, but high is {highs[wrong[0]]:g}; low must be below high.")


def bounds_of(low: Bounds, high: Bounds, channels: int) -> tuple[Float32[np.ndarray, " c"], Float32[np.ndarray, " c"]]:
    """Returns the bounds of each channel, with -inf and inf for missing bounds.

    Raises ValueError if a tuple does not have one entry per channel.

    Example:
        low, high = bounds_of(0.0, (1.0, None), 2)  # [0, 0] and [1, inf]
    """
    for name, bound in (("low", low), ("high", high)):
        if isinstance(bound, tuple) and len(bound) != channels:
            raise FieldError(
                f"{name} has {len(bound)} entries, but x has {channels} channels; give one number, or one per channel."
            )
    lows, highs = (bound if isinstance(bound, tuple) else (bound,) * channels for bound in (low, high))
    lows = np.array([-np.inf if bound is None else bound for bound in lows], np.float32)
    return lows, np.array([np.inf if bound is None else bound for bound in highs], np.float32)


def within_bounds(
    x: Float32[np.ndarray, "n *event"],
    mask: Bool[np.ndarray, "n rows"] | None,
    low: Float32[np.ndarray, " c"],
    high: Float32[np.ndarray, " c"],
    where: str,
) -> Float32[np.ndarray, "n *event"]:
    """Returns the samples, with values on either of two bounds moved inside by 2^-24 of the interval's width.

    mask: True for the rows that exist; the others are not checked. where: the origin of the samples, for error
    messages.

    Raises ValueError if a value is outside its bounds, or on its only bound.

    Example:
        x = within_bounds(x, None, *bounds_of(0.0, 10.0, x.shape[-1]), "data.path 'simulations.npz'")
    """
    low, high = (bound.reshape((1,) * (x.ndim - 1) + (-1,)) for bound in (low, high))
    both = np.isfinite(low) & np.isfinite(high)
    wrong = np.where(both, (x < low) | (x > high), (x <= low) | (x >= high))
    if mask is not None:
        wrong &= mask[:, :, None]
    if count := int(wrong.sum()):
        index = tuple(map(int, np.argwhere(wrong)[0]))
        raise ValueError(
            f"'x' in {where} has {count} values that are not between data.low and data.high, the first at index "
            f"{index}: {x[index]:g} is not between {low.flat[index[-1]]:g} and {high.flat[index[-1]]:g}; correct the "
            "bounds, or remove these samples."
        )
    moved = MOVED * np.where(both, high - low, 0)
    least, most = (np.asarray(bound, np.float32) for bound in (low + moved, high - moved))
    least, most = np.maximum(least, np.nextafter(low, high)), np.minimum(most, np.nextafter(high, low))
    x = np.where(both & (x == low), least, x)
    return np.where(both & (x == high), most, x).astype(np.float32)
