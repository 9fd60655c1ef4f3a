"""Shuffles the rows of sets in training, because the density of an autoregressive flow depends on their order."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from flowgen.batch import Batch
from flowgen.conditioning import split_padded
from flowgen.rows import batch_rows


def with_rows_shuffled(batch: Batch, key: Key[Array, ""]) -> Any:
    """Returns a `Batch` in which the existing rows of each sample are in a random order. Padding stays where it is.

    The order depends only on the key of the sample's row in the whole batch, so the number of devices does not change
    it. The returned batch has new row keys, independent of those for the order.

    Example:
        loss, metrics = objective(variables, with_rows_shuffled(batch, key), key)
    """
    mask, _ = split_padded(batch.context)
    x = jnp.asarray(batch.x)
    exists = jnp.ones(x.shape[:2], bool) if mask is None else jnp.asarray(mask)
    order_rows, rows = batch_rows(batch, key, batch.size).split(2)
    return batch._replace(x=order_rows.draw(_shuffled, x, exists), rows=rows)


def _shuffled(key: Any, x: Float[Array, "b n c"], exists: Bool[Array, "b n"]) -> Float[Array, "b n c"]:
    draws = jnp.where(exists, jax.random.uniform(key, exists.shape), jnp.inf)
    chosen = jnp.argsort(draws, axis=1)  # the existing rows in random order, before the padding
    rank = jnp.cumsum(exists, axis=1) - 1
    # The existing row with rank r gets the r-th row chosen. Rows before the first existing one have rank -1.
    source = jnp.take_along_axis(chosen, jnp.maximum(rank, 0), axis=1)
    source = jnp.where(exists, source, jnp.arange(exists.shape[1])[None])
    return jnp.take_along_axis(x, source[:, :, None], axis=1)
