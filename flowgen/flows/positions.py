"""Positions of a block's slots as rotary angles: a text prefix on its own axis, then the tokens of a grid.

Token (i, j) of an h x w grid stands at (i, j) · P / √(h w), whatever order the tokens come in; P is the side of the
grid that positions were learned on, so that a larger grid fills the same range. Text token k of n stands at k/n · P
on the third axis (STARFlow, arXiv 2506.06276), and so does frame t of a video, at t (STARFlow-V, arXiv 2511.20462).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from flowgen.attention.rotary import Rotary, rotary_axes

THIRD_AXIS_PAIRS = 8


@dataclass(frozen=True)
class GridPositions:
    """Grid, reference side P, pairs of channels that turn with (row, column) and a third axis if any, and frames."""

    rows: int
    columns: int
    rope_base_grid: float
    pairs: tuple[int, ...]
    frames: int = 1

    def rotary(self, prefix_length: int) -> Rotary:
        """Returns the angles of `prefix_length` text slots, then those of the grid, row by row, frame by frame."""
        grid = np.stack(np.divmod(np.arange(self.rows * self.columns), self.columns), axis=1)
        grid = grid / math.sqrt(self.rows * self.columns) * self.rope_base_grid
        positions = np.zeros((prefix_length + self.frames * len(grid), len(self.pairs)))
        positions[prefix_length:, :2] = np.tile(grid, (self.frames, 1))
        if self.frames > 1:
            positions[prefix_length:, 2] = np.repeat(np.arange(self.frames), len(grid))
        if prefix_length:
            positions[:prefix_length, 2] = np.arange(prefix_length) / prefix_length * self.rope_base_grid
        return rotary_axes(positions, self.pairs)


def rotary_pairs(head_dim: int, *, third_axis: bool) -> tuple[int, ...]:
    """Returns pairs of channels per axis: halves for (row, column), or 8 for text and frames and halves of the rest.

    Raises ValueError if the channels of a head cannot be split this way.
    """
    spatial = head_dim // 2 - (THIRD_AXIS_PAIRS if third_axis else 0)
    least = 2 * THIRD_AXIS_PAIRS + 4 if third_axis else 4
    if head_dim % 4 or spatial < 2:
        raise ValueError(f"head_dim is {head_dim}; rotary positions need a multiple of 4, at least {least}.")
    return (spatial // 2, spatial // 2, *((THIRD_AXIS_PAIRS,) if third_axis else ()))
