"""The `Batch` that datasets return and objectives accept."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from flowgen.arrays import check_bytes, shown
from flowgen.conditioning import UNCONDITIONAL, Condition, Padded


class Moments(NamedTuple):
    """The posterior N(mean, std²) of each element of the latents.

    mean, std: `b height width c`, or `b frames height width c` for clips; std must not be negative.

    Example:
        moments = Moments(*codec.moments(images))
    """

    mean: Float[Array | np.ndarray, "b *event"]
    std: Float[Array | np.ndarray, "b *event"]


class Batch(NamedTuple):
    """A batch of samples and their context, if any.

    x: images `b height width c` or clips `b frames height width c` as bytes, the `Moments` of latents, or numbers `b d`
    or `b n c` for flows on tokens.
    context: None, int32 labels `b` (-1 for no class), a `TextCondition`, or the continuous context that the model's
    config describes. For padded samples, the context is a `Padded`.
    rows: a `flowgen.rows.Rows` that identifies these samples within the whole batch; added by the training step.

    Example:
        batch = Batch(images, np.array([3, -1], np.int32))
    """

    x: UInt8[Array | np.ndarray, "b *event"] | Moments | Float[Array | np.ndarray, "b *event"]
    context: Condition | Float[Array | np.ndarray, "b *context"] | Int[np.ndarray, " b"] | None = None
    rows: Any = None

    @property
    def size(self) -> int:
        """The number of samples."""
        return len(self.x.mean if isinstance(self.x, Moments) else self.x)

    @property
    def pixels(self) -> UInt8[Array | np.ndarray, "b *event"]:
        """The images or clips. Raises ValueError if x is anything else, such as latents."""
        if isinstance(self.x, Moments):
            raise ValueError("batch.x must be images or clips, not the moments of latents.")
        check_bytes("batch.x", self.x)
        return self.x

    @property
    def labels(self) -> Int[Array | np.ndarray, " b"]:
        """The labels; all -1 if the batch has none. Raises ValueError if x or context contains a list."""
        check_arrays(self)
        labels = self.context.cond if isinstance(self.context, Padded) else self.context
        if labels is None or isinstance(labels, tuple) or not np.issubdtype(labels.dtype, np.integer):
            return np.full(self.size, UNCONDITIONAL, np.int32)
        return labels


def check_arrays(batch: Batch) -> None:
    """Raises ValueError if x or a part of the context is a list or a scalar."""
    for name, part in (("x", batch.x), ("context", batch.context)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(part, is_leaf=_is_sequence):
            if not getattr(leaf, "shape", ()):
                raise ValueError(
                    f"batch.{name}{jax.tree_util.keystr(path)} is {shown(leaf)}; give an array with one row per "
                    "sample. np.asarray converts a list."
                )


def _is_sequence(part: Any) -> bool:
    return isinstance(part, list) or type(part) is tuple  # Contexts are named tuples.
