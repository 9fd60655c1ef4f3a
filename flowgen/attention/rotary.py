"""Rotary position embedding of features: tables of angles for lines and grids, and the rotation of adjacent pairs."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int


class Rotary(NamedTuple):
    """cos and sin of the angles of every position, one per adjacent pair of channels: float64 NumPy arrays `n r`."""

    cos: Float[np.ndarray, "n r"]
    sin: Float[np.ndarray, "n r"]


def rotary_line(num_positions: int, dim: int, base: float = 10_000.0) -> Rotary:
    """Returns the table of a sequence: angle position · base^(-2i/dim) for pair i < dim/2 (RoFormer, 2104.09864).

    Raises ValueError unless dim is even.

    Example:
        rotary = rotary_line(1024, 64)
    """
    if dim % 2:
        raise ValueError(f"dim is {dim}; rotation turns pairs of channels, so it must be even.")
    frequencies = base ** (-np.arange(0, dim, 2) / dim)
    return _table(np.arange(num_positions)[:, None] * frequencies[None, :])


def rotary_grid(height: int, width: int, dim: int, base: float = 10_000.0) -> Rotary:
    """Returns the table of a row-major grid: half of the channels turn with the row, then half with the column.

    Frequencies base^(-t) with t from 0 to 1 inclusive over dim/4 pairs, as in the released NaLaFormer. Raises
    ValueError unless dim is a multiple of 4.

    Example:
        rotary = rotary_grid(14, 14, 64)
    """
    if dim % 4:
        raise ValueError(f"dim is {dim}; rows and columns each turn pairs of channels, so it must be a multiple of 4.")
    frequencies = base ** -np.linspace(0, 1, dim // 4)
    rows, columns = np.divmod(np.arange(height * width), width)
    angles = np.stack([rows, columns], axis=1)[:, :, None] * frequencies[None, None, :]
    return _table(angles.reshape(height * width, dim // 2))


def rotate(x: Float[Array, "b n h f"], rotary: Rotary, positions: Int[Array, " n"]) -> Float[Array, "b n h f"]:
    """Returns x with adjacent channels (x0, x1) turned to (x0 cos - x1 sin, x1 cos + x0 sin) at these positions.

    Where x has several times the channels of the table, each part is turned alike. Raises ValueError where it has
    no whole number of parts.

    Example:
        y = rotate(x, rotary_line(256, 64), jnp.arange(x.shape[1]))
    """
    pairs = rotary.cos.shape[1]
    if x.shape[-1] % (2 * pairs):
        raise ValueError(f"features have {x.shape[-1]} channels; the rotary table turns parts of {2 * pairs}.")
    cos, sin = (jnp.asarray(table, x.dtype)[positions][None, :, None, None, :] for table in rotary)
    parts = rearrange(x, "b n h (p r two) -> b n h p r two", r=pairs, two=2)
    even, odd = parts[..., 0], parts[..., 1]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


def _table(angles: Float[np.ndarray, "n r"]) -> Rotary:
    return Rotary(np.cos(angles), np.sin(angles))
