"""Embeddings of classes, times and positions."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from flowgen.conditioning import UNCONDITIONAL

# Sinusoidal embeddings were designed for 1,000 integer steps, so times in [0, 1] are scaled to this range. Without
# scaling, no angle would exceed one radian.
TIME_SCALE = 1000.0
EMBEDDING_STDDEV = 0.02


def class_rows(
    table: Float[Array, "classes_and_none d"], labels: Int[Array, " b"] | None, batch: int
) -> Float[Array, "b d"]:
    """Returns the table row of each label.

    The label -1 selects the last row, and `labels=None` means -1 for all `batch` samples. For a label that is neither
    -1 nor the index of another row, the result is NaN: a compiled program cannot raise an error, and NaN is safer than
    the row of another class.

    Example:
        e = class_rows(table, jnp.array([3, -1]), batch=2)
    """
    none = table.shape[0] - 1
    if labels is None:
        return jnp.broadcast_to(table[none][None], (batch, table.shape[1]))
    known = (labels >= UNCONDITIONAL) & (labels < none)
    rows = jnp.take(table, jnp.where(labels == UNCONDITIONAL, none, labels), axis=0, mode="clip")
    return jnp.where(known[:, None], rows, jnp.nan)


def class_embedding(
    table: Float[Array, "classes d"], labels: Int[Array, " b"] | None, batch: int
) -> Float[Array, "b d"]:
    """Returns `class_rows` for a table without an unconditional row.

    As in TARFlow, the mean over all classes replaces the missing row.
    """
    return class_rows(jnp.concatenate([table, table.mean(axis=0, keepdims=True)]), labels, batch)


def class_one_hot(
    labels: Int[Array, " b"] | None, num_classes: int, batch: int, dtype: jnp.dtype
) -> Float[Array, "b classes_and_none"]:
    """Returns one-hot rows with num_classes + 1 columns, the last of which stands for no class.

    STARFlow treats a class as a one-token text with these features (arXiv 2506.06276).
    """
    return class_rows(jnp.eye(num_classes + 1, dtype=dtype), labels, batch)


def time_features(
    t: Float[Array, " b"], dim: int, max_period: float = 10_000.0, scale: float = TIME_SCALE
) -> Float[Array, "b dim"]:
    """Returns sinusoidal features of times t, usually in [0, 1]: dim/2 cosines, and then dim/2 sines.

    The angles are scale · t · f for frequencies f in geometric progression from 1 down to almost 1/max_period.

    Raises ValueError unless dim is even.

    Example:
        features = time_features(t, 256)
    """
    if dim % 2:
        raise ValueError(f"dim is {dim}, but must be even, because half the features are cosines and half are sines.")
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(dim // 2) / (dim // 2))
    angles = scale * t[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


def normal_dense(features: int, fan_in: int, name: str) -> nn.Dense:
    """Returns a Dense layer whose kernel is initialised from N(0, 0.02²), as in DiT."""
    return nn.Dense(features, kernel_init=nn.initializers.normal(EMBEDDING_STDDEV), name=name)


class ConditionEmbedding(nn.Module):
    """Maps times, intervals of time and class labels to the sum of their embeddings, of shape `b width`.

    Times and intervals are multiplied by time_scale and mapped to `frequencies` sinusoidal features, which pass through
    two Dense layers with a SiLU between them. Class labels select rows of a table whose last row stands for no class;
    without classes (`num_classes` 0), there is no table.

    intervals: whether there is also an embedding of intervals; an interval of None counts as 0.
    dense: a function of (features, fan_in, name) that returns a Dense layer.
    table_std: standard deviation of the initial entries of the table.

    Example:
        c = ConditionEmbedding(width=256, num_classes=10, intervals=False).apply(params, t, cond, None)
    """

    width: int
    num_classes: int
    intervals: bool
    frequencies: int = 256
    time_scale: float = TIME_SCALE
    dense: Callable[..., nn.Module] = normal_dense
    table_std: float = EMBEDDING_STDDEV

    @nn.compact
    def __call__(
        self, t: Float[Array, " b"], cond: Int[Array, " b"] | None, interval: Float[Array, " b"] | None
    ) -> Float[Array, "b width"]:
        c = self._embed(t, "time")
        if self.intervals:
            c = c + self._embed(jnp.zeros_like(t) if interval is None else interval, "interval")
        if self.num_classes:
            init = nn.initializers.normal(self.table_std)
            table = self.param("class_embed", init, (self.num_classes + 1, self.width), jnp.float32)
            c = c + class_rows(jnp.asarray(table), cond, len(t))
        return c

    def _embed(self, t: Float[Array, " b"], name: str) -> Float[Array, "b width"]:
        h = self.dense(self.width, self.frequencies, name=f"{name}_up")(
            time_features(t, self.frequencies, scale=self.time_scale)
        )
        return self.dense(self.width, self.width, name=f"{name}_down")(jax.nn.silu(h))


def grid_positions(grid: tuple[int, int], width: int) -> Float[np.ndarray, "n width"]:
    """Returns sinusoidal embeddings of all positions in a grid of (rows, columns), row by row.

    width: number of features, a multiple of 4.

    The first half of an embedding's features depends on the column, and the second half on the row.

    Example:
        table = grid_positions((4, 4), 64)
    """
    frequencies = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies[None] for axis in (columns, rows)]
    return np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1).astype(np.float32)
