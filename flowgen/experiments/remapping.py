"""Maps arrays of parameters to a model with other classes or another image size."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, Int

NEW = -1  # stands for a missing old class


def matched_classes(
    num_old: int, num_new: int, old_names: Sequence[str] = (), new_names: Sequence[str] = ()
) -> Int[np.ndarray, " new"]:
    """Returns, for each class of the new model, the number of the same class in the old model, or -1 if there is none.

    Classes are matched by name if both models have class names, and otherwise by number. If they are matched by name, a
    class without a name is new.

    Example:
        matched_classes(3, 2, ("cat", "dog", "fox"), ("fox", "owl"))  # 2, -1
    """
    if old_names and new_names:
        known = {name: number for number, name in enumerate(old_names[:num_old])}
        found = [known.get(name, NEW) for name in new_names[:num_new]]
        return np.array(found + [NEW] * (num_new - len(found)), int)
    numbers = np.arange(num_new)
    return np.where(numbers < num_old, numbers, NEW)


def remapped_classes(
    table: Float[np.ndarray, "old_and_rest d"], num_old: int, matched: Int[np.ndarray, " new"]
) -> Float[np.ndarray, "new_and_rest d"]:
    """Returns a class table with the rows of the matched classes; a new class gets the mean of all old classes.

    If the table has one more row than there are old classes, its last row is the embedding for no class, and stays
    last. Otherwise, the mean of all rows is the embedding for no class, which changes only if an old class is dropped.

    Example:
        remapped_classes(table, 3, np.array([2, -1]))  # two rows, and the row for no class
    """
    rows, rest = table[:num_old], table[num_old:]
    mean = rows.mean(axis=0, keepdims=True, dtype=np.float64).astype(table.dtype)
    return np.concatenate([np.where(matched[:, None] == NEW, mean, rows[matched]), rest])


def resampled(
    table: Float[np.ndarray, "old d"], old_hw: tuple[int, int], new_hw: tuple[int, int]
) -> Float[np.ndarray, "new d"]:
    """Returns a table with one row per token, resampled bilinearly from one grid of tokens to another.

    Both grids are in raster order and cover the same image, so the centre of token i of n is at (i + 1/2) / n. Beyond
    the centres of the outermost tokens, the result is constant. If the new grid is smaller, each of its tokens gets an
    average of the rows that it covers.

    Example:
        resampled(pos_embed, (8, 8), (16, 16))
    """
    if old_hw == new_hw:
        return table
    grid = table.reshape(*old_hw, -1)
    return np.asarray(jax.image.resize(grid, (*new_hw, grid.shape[-1]), "linear")).reshape(-1, grid.shape[-1])
