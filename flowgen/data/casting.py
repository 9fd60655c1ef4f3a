"""Casts the numbers of a file to float32, and refuses numbers that float32 cannot represent well."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float32

from flowgen.arrays import check_finite

# Larger numbers, and channels that vary less than the reciprocal, come near the limits of float32.
LARGEST = 1e36
# Below this ratio, rounding to float32 moves numbers by more than 2^-8 standard deviations.
LEAST_SPREAD = 2.0**-16


def as_float32(
    name: str, values: Float[np.ndarray, "n *event c"], mask: Bool[np.ndarray, "n m"] | None, where: str
) -> Float32[np.ndarray, "n *event c"]:
    """Returns numbers as float32, with 0 where the mask is False. Numbers at padding may be anything, even NaN.

    A channel is an index of the last axis.

    name, where: the name and the origin of the numbers, for error messages. mask: True for the rows that exist; None if
    there is no padding.

    Raises ValueError if a number is not finite, or if its size is above 1e36. Also raises ValueError if a channel is
    not constant, but its standard deviation is below 1e-36, or below 2^-16 times the size of its mean, because float32
    is too coarse for such a channel.

    Example:
        x = as_float32("x", arrays["x"], None, "data.path 'measurements.npz'")
    """
    if mask is not None:
        values = np.where(mask[:, :, None], values, 0)
    rows = values.reshape(-1, values.shape[-1]) if mask is None else values[mask]
    check_finite(**{f"{name!r} in {where}": values})
    if not rows.size:
        return values.astype(np.float32)
    if (largest := float(np.abs(rows).max())) > LARGEST:
        raise ValueError(
            f"{name!r} in {where} has numbers up to {largest:.3g}, but they are stored as float32 and must be at most "
            f"{LARGEST:g}; save them in larger units."
        )
    spread, mean = rows.std(axis=0, dtype=np.float64), np.abs(rows.mean(axis=0, dtype=np.float64))
    spread[np.ptp(rows, axis=0) == 0] = np.inf  # The mean of equal numbers is rounded, so their spread may not be 0.
    if (small := np.flatnonzero(spread < 1 / LARGEST)).size:
        raise ValueError(
            f"channel {small[0]} of {name!r} in {where} has standard deviation {spread[small[0]]:.3g}, but the numbers "
            f"are stored as float32, which needs at least {1 / LARGEST:g}; save it in smaller units."
        )
    if (close := np.flatnonzero(spread < LEAST_SPREAD * mean)).size:
        first = close[0]
        raise ValueError(
            f"channel {first} of {name!r} in {where} has standard deviation {spread[first]:.3g}, which is too small "
            f"beside its mean, {mean[first]:.3g} in size, because the numbers are stored as float32; subtract an "
            "offset from it before you save it."
        )
    return values.astype(np.float32)
