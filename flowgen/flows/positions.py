"""Rotary angles of a block's sequence: a text prefix, whose positions have a separate axis, and then a grid of tokens.

For an h x w grid, token i w + j in the block's order has position (i, j) · P / √(h w). P is the side of the grid on
which the model was trained, so a larger grid covers the same range. On the third axis, text token k of n has position
k/n · P (STARFlow, arXiv 2506.06276), and frame t of a video has position t (STARFlow-V, arXiv 2511.20462).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from flowgen.attention.rotary import Rotary, rotary_axes

THIRD_AXIS_PAIRS = 8


@dataclass(frozen=True)
class GridPositions:
    """The positions of a grid of tokens in one or more frames.

    rope_base_grid: the side P. pairs: number of channel pairs for the row axis, the column axis and, if there is one,
    the third axis.
    """

    rows: int
    columns: int
    rope_base_grid: float
    pairs: tuple[int, ...]
    frames: int = 1

    def rotary(self, prefix_length: int) -> Rotary:
        """Returns the angles of the prefix tokens, then of the grid tokens, frame by frame and row by row."""
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
    """Returns the number of channel pairs for the row axis, the column axis and, if there is one, the third axis.

    The third axis gets 8 pairs; the row and column axes share the remaining pairs equally.

    Raises ValueError if the channels of a head cannot be split this way.
    """
    spatial = head_dim // 2 - (THIRD_AXIS_PAIRS if third_axis else 0)
    least = 2 * THIRD_AXIS_PAIRS + 4 if third_axis else 4
    if head_dim % 4 or spatial < 2:
        raise ValueError(f"head_dim is {head_dim}; rotary positions need a multiple of 4 that is at least {least}.")
    return (spatial // 2, spatial // 2, *((THIRD_AXIS_PAIRS,) if third_axis else ()))
