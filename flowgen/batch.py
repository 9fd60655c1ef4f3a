"""The `Batch` that datasets return and objectives accept."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from flowgen.arrays import check_bytes, shown
from flowgen.conditioning import UNCONDITIONAL, Condition, Padded


class Moments(NamedTuple):
    """The posterior of a batch of latents, given their images or clips: each element is independently N(mean, std²).

    mean, std: arrays in the shape of the latents, `b height width c` for images or `b frames height width c` for clips;
    std must not be negative.

    Example:
        moments = Moments(*codec.moments(images))
    """

    mean: Float[Array | np.ndarray, "b *event"]
    std: Float[Array | np.ndarray, "b *event"]


class Batch(NamedTuple):
    """A batch of samples and their context, if any.

    x: images `b height width c` or clips `b frames height width c` as uint8, the `Moments` of their latents, or, for a
    `TokenFlow`, floating-point vectors `b d` or sequences `b n c`.
    context: int32 labels `b` (-1 for no class), a `TextCondition`, the continuous context that the field `context` of
    the model's config describes, or None for no context. For padded samples, this is a `flowgen.conditioning.Padded`,
    which contains the mask and one of these contexts.
    rows: a `flowgen.rows.Rows` with the positions of these samples in the whole batch, which may be divided among
    devices and into micro-batches. Leave it at None; the training step sets it.

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
        """The images or clips in x. Raises ValueError if x contains anything else, such as the `Moments` of latents."""
        if isinstance(self.x, Moments):
            raise ValueError("batch.x must be images or clips, not the moments of latents.")
        check_bytes("batch.x", self.x)
        return self.x

    @property
    def labels(self) -> Int[Array | np.ndarray, " b"]:
        """The labels in `context`; if it contains no labels, -1 for every sample.

        Raises ValueError if `x`, `context` or a part of them is a list or a scalar instead of an array.
        """
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
