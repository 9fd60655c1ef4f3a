"""Class conditioning: embedding with a mean null class, label dropout, and the checks on labels."""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

UNCONDITIONAL = -1


def class_embedding(
    table: Float[Array, "classes d"], labels: Int[Array, " b"] | None, batch: int
) -> Float[Array, "b d"]:
    """Returns the row of each label, and the mean of the table where the label is -1 or `labels` is None.

    TARFlow has no learned null class: "unconditional" is the mean class. A label outside -1..classes-1
    cannot raise inside a compiled program; it gives NaN rather than some other class.

    Example:
        e = class_embedding(table, jnp.array([3, -1]), batch=2)
    """
    null = jnp.broadcast_to(table.mean(axis=0), (batch, table.shape[1]))
    if labels is None:
        return null
    rows = jnp.take(table, jnp.maximum(labels, 0), axis=0, mode="fill", fill_value=jnp.nan)
    rows = jnp.where((labels < UNCONDITIONAL)[:, None], jnp.nan, rows)
    return jnp.where((labels == UNCONDITIONAL)[:, None], null, rows)


def drop_labels(key: Key[Array, ""], labels: Int[Array, " b"], rate: float) -> Int[Array, " b"]:
    """Returns labels with each one replaced by -1 with probability `rate`.

    Example:
        labels = drop_labels(key, labels, rate=0.1)
    """
    return jnp.where(jax.random.bernoulli(key, rate, labels.shape), UNCONDITIONAL, labels)


def check_labels(labels: Any, *, num_classes: int, batch: int) -> Int[Array, " b"] | None:
    """Returns labels as int32, or None; ValueError where they cannot be meant for this model and batch.

    Values that are traced pass unchecked; `class_embedding` turns wrong ones into NaN.

    Example:
        labels = check_labels([3, -1], num_classes=10, batch=2)
    """
    if labels is None:
        return None
    if not isinstance(labels, jax.Array):
        labels = np.asarray(labels)
    if num_classes == 0:
        raise ValueError("cond was given to a model without classes (num_classes is 0); pass cond=None.")
    if labels.shape != (batch,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"cond must be integers of shape ({batch},), one label per sample, "
            f"got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    if isinstance(labels, jax.core.Tracer):
        return labels.astype(jnp.int32)
    values = np.asarray(labels).astype(np.int64)
    bad = values[(values < UNCONDITIONAL) | (values >= num_classes)]
    if bad.size:
        raise ValueError(
            f"class {bad[0]} is out of range; use 0..{num_classes - 1}, or {UNCONDITIONAL} for unconditional."
        )
    return jnp.asarray(values, jnp.int32)
