"""Rotary position embedding of features: tables of angles for sequences and grids, and rotation of adjacent pairs."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from flowgen.attention.checks import concrete
from flowgen.backend import keep_axes


class Rotary(NamedTuple):
    """The cosines and sines of rotary position embeddings, with one angle per position and pair of adjacent channels.

    The arrays have n positions and r pairs of channels, and dtype float64.
    """

    cos: Float[np.ndarray, "n r"]
    sin: Float[np.ndarray, "n r"]


def rotary_line(num_positions: int, dim: int, base: float = 10_000.0) -> Rotary:
    """Returns the cosines and sines of rotary position embeddings for a sequence (RoFormer, arXiv 2104.09864).

    dim: the number of channels to rotate; it must be even.

    At position p, channels 2i and 2i + 1 are rotated by the angle p · base^(-2i/dim); positions and channels are
    counted from 0. Raises ValueError if dim is odd.

    Example:
        rotary = rotary_line(1024, 64)
    """
    if dim % 2:
        raise ValueError(f"dim is {dim}, but must be even, because pairs of channels are rotated.")
    frequencies = base ** (-np.arange(0, dim, 2) / dim)
    return _table(np.arange(num_positions)[:, None] * frequencies[None, :])


def rotary_grid(height: int, width: int, dim: int, base: float = 10_000.0) -> Rotary:
    """Returns the cosines and sines of rotary position embeddings for a grid of tokens in row-major order.

    dim: the number of channels to rotate; it must be a multiple of 4.

    In the first half of the channels, the angle is the token's row times a frequency, and in the second half its column
    times a frequency. Each half has dim/4 pairs of channels. Their frequencies are base^(-t), where t is evenly spaced
    from 0 for the first pair to 1 for the last, as in the released NaLaFormer. Raises ValueError unless dim is a
    multiple of 4.

    Example:
        rotary = rotary_grid(14, 14, 64)
    """
    if dim % 4:
        raise ValueError(
            f"dim is {dim}, but must be a multiple of 4, because rows and columns each rotate pairs of channels."
        )
    frequencies = base ** -np.linspace(0, 1, dim // 4)
    rows, columns = np.divmod(np.arange(height * width), width)
    angles = np.stack([rows, columns], axis=1)[:, :, None] * frequencies[None, None, :]
    return _table(angles.reshape(height * width, dim // 2))


def rotary_axes(positions: Float[np.ndarray, "n a"], pairs: tuple[int, ...], base: float = 10_000.0) -> Rotary:
    """Returns the cosines and sines of rotary position embeddings for points with several coordinates.

    Coordinate i rotates pairs[i] adjacent pairs of channels. If a coordinate x rotates p pairs, the angle of pair k is
    x · base^(-k/p). Raises ValueError unless `pairs` has one entry per coordinate.
    """
    if positions.shape[1] != len(pairs):
        raise ValueError(
            f"positions have {positions.shape[1]} coordinates, but pairs has {len(pairs)} entries; pass one per "
            "coordinate."
        )
    axes = (positions[:, axis, None] * base ** (-np.arange(p) / p)[None] for axis, p in enumerate(pairs))
    return _table(np.concatenate(list(axes), axis=1))


def rotate(
    x: Float[Array, "b n h p"], rotary: Rotary, positions: Int[Array, " n"] | Int[Array, "b n"]
) -> Float[Array, "b n h p"]:
    """Returns x with each pair of adjacent channels (x0, x1) rotated to (x0 cos - x1 sin, x1 cos + x0 sin).

    rotary: the cosines and sines for r pairs of channels. If x has several times 2r channels, each run of 2r channels
    is rotated in the same way. If the number of channels is no multiple of 2r, the function raises ValueError.
    positions: the positions of the n tokens, as row numbers of the arrays in `rotary`. Positions that these arrays do
    not have raise ValueError; if they are traced, their tokens are NaN instead.

    Example:
        y = rotate(x, rotary_line(256, 64), jnp.arange(x.shape[1]))
    """
    pairs = rotary.cos.shape[1]
    if x.shape[-1] % (2 * pairs):
        raise ValueError(f"x has {x.shape[-1]} channels, but the rotary table needs a multiple of {2 * pairs}.")
    _check_positions(positions, x.shape[:2], len(rotary.cos))

    def look_up(positions):
        tables = (jnp.asarray(table, x.dtype).at[positions] for table in rotary)
        return tuple(table.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False) for table in tables)

    letters = "b n r" if positions.ndim == 2 else "n r"
    cos, sin = keep_axes(look_up, positions, named=[(positions, letters[:-2])], out=(letters, letters))
    return turn(x, cos, sin)


def _check_positions(positions: Array, tokens: tuple[int, ...], limit: int) -> None:
    if positions.shape not in (tokens, tokens[1:]) or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(
            f"positions are {positions.dtype} of shape {positions.shape}, but x needs one whole number per token, of "
            f"shape {tokens[1:]} or {tokens}."
        )
    known = concrete(positions)
    if known is not None and known.size and not 0 <= known.min() <= known.max() < limit:
        raise ValueError(
            f"positions run from {known.min()} to {known.max()}, but the rotary table has the positions 0 to "
            f"{limit - 1}; create one with more."
        )


def turn(
    x: Float[Array, "b n h p"],
    cos: Float[Array, "n r"] | Float[Array, "#b n r"],
    sin: Float[Array, "n r"] | Float[Array, "#b n r"],
) -> Float[Array, "b n h p"]:
    """Rotates adjacent pairs of channels by the angles with these cosines and sines; the dtype of x is preserved."""
    parts = rearrange(x, "b n h (p r two) -> b n h p r two", r=cos.shape[-1], two=2)
    cos, sin = (jnp.expand_dims(table, (2, 3) if table.ndim == 3 else (0, 2, 3)) for table in (cos, sin))
    even, odd = parts[..., 0], parts[..., 1]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def _table(angles: Float[np.ndarray, "n r"]) -> Rotary:
    return Rotary(np.cos(angles), np.sin(angles))
