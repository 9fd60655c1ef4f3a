"""Positions of a block's slots as rotary angles: a text in front on an axis of its own, then the tokens of a grid.

Token (i, j) of an h x w grid stands at (i, j) · P / √(h w), whatever order the tokens come in; P is the side of the
grid that positions were learned on, so that a larger grid fills the same range. Text token k of n stands at k/n · P
on the third axis (STARFlow, arXiv 2506.06276).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from flowgen.attention.rotary import Rotary, rotary_axes

THIRD_AXIS_PAIRS = 8


@dataclass(frozen=True)
class GridPositions:
    """Grid, reference side P, and pairs of channels that turn with (row, column) or (row, column, text)."""

    rows: int
    columns: int
    reference_side: float
    pairs: tuple[int, ...]

    def rotary(self, prefix_length: int) -> Rotary:
        """Returns the angles of `prefix_length` text slots followed by those of the grid, row by row.

        Example:
            rotary = GridPositions(32, 32, 32, rotary_pairs(64, has_text=True)).rotary(128)
        """
        grid = np.stack(np.divmod(np.arange(self.rows * self.columns), self.columns), axis=1)
        grid = grid / math.sqrt(self.rows * self.columns) * self.reference_side
        positions = np.zeros((prefix_length + len(grid), len(self.pairs)))
        positions[prefix_length:, :2] = grid
        if prefix_length:
            positions[:prefix_length, 2] = np.arange(prefix_length) / prefix_length * self.reference_side
        return rotary_axes(positions, self.pairs)


def rotary_pairs(head_dim: int, *, has_text: bool) -> tuple[int, ...]:
    """Returns pairs of channels per axis: halves for (row, column), or 8 for the text and halves of the rest.

    Raises ValueError where the channels of a head cannot be split so.

    Example:
        rotary_pairs(64, has_text=True)  # (12, 12, 8)
    """
    spatial = head_dim // 2 - (THIRD_AXIS_PAIRS if has_text else 0)
    least = 2 * THIRD_AXIS_PAIRS + 4 if has_text else 4
    if head_dim % 4 or spatial < 2:
        raise ValueError(f"model.head_dim is {head_dim}; rotary positions need a multiple of 4, at least {least}.")
    return (spatial // 2, spatial // 2, *((THIRD_AXIS_PAIRS,) if has_text else ()))
