"""Draws random numbers by position in the whole batch, so that they are the same on any number of devices.

Each device processes a share of the batch, and all devices have the same key. The numbers for row i of the whole batch
are drawn with fold_in(key, i), so they do not depend on the row's device or micro-batch. Batch-wide draws, such as a
transport plan or stratified times, are the same on every device. Each device then selects its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Key

from flowgen.backend import alike_rows, on_mesh_of
from flowgen.batch import Batch
from flowgen.conditioning import Padded, mean_tokens

# The key under which a dict batch stores its rows.
ROWS = "rows"


class Rows(struct.PyTreeNode):
    """The positions of some rows in the whole batch, and a key that all devices share.

    key: a key that is the same on every device and for every micro-batch. positions: the positions `b` of these rows in
    the whole batch. part: the index of the micro-batch. size: the size of the whole batch, over all devices and
    micro-batches. mean_tokens: the mean number of tokens per row of the whole batch, without padding; None if no row is
    padded. axis_name: the device axis over which the batch is split; None for a single device.

    Example:
        rows = batch_rows(batch, key, num=len(x))
        noise_rows, label_rows = rows.split(2)
        noise = noise_rows.draw(lambda key, x: jax.random.normal(key, x.shape), x)
    """

    key: Any
    positions: Any
    part: Any = 0
    size: int = struct.field(pytree_node=False, default=0)
    mean_tokens: Any = None
    axis_name: str | None = struct.field(pytree_node=False, default=None)

    def measured(self, batch: Any) -> Rows:
        """Returns these rows with the `mean_tokens` of the whole batch, given this device's share of the batch."""
        padded = isinstance(batch, Batch) and isinstance(batch.context, Padded)
        return self.replace(mean_tokens=self.mean(mean_tokens(batch.context))) if padded else self

    def split(self, num: int) -> tuple[Rows, ...]:
        """Returns `num` copies of these rows with different keys, for different purposes."""
        return tuple(self.replace(key=key) for key in jax.random.split(self.key, num))

    def draw(self, fn: Callable[..., Any], *arrays: Any) -> Any:
        """Calls fn once per row, with the row's key and that row of each array, and stacks the results.

        Arrays and results can be pytrees. fn receives batches of size 1, so a function (key, batch) -> batch can be
        passed directly.
        """

        def one(position, parts):
            drawn = fn(jax.random.fold_in(self.key, position), *jax.tree.map(lambda x: x[None], parts))
            return jax.tree.map(lambda x: x[0], drawn)

        return on_mesh_of(lambda *rows: jax.vmap(one)(*alike_rows(rows)), self.positions, arrays)

    def draw_whole(self, fn: Callable[[Key[Array, ""], int], Any]) -> Any:
        """Calls fn(key, size) for the whole batch, identically on every device. Returns these rows of the result."""
        return jax.tree.map(lambda x: x[self.positions], fn(self.key, self.size))

    def part_key(self) -> Key[Array, ""]:
        """Returns a key for the micro-batch; it is the same on every device."""
        return jax.random.fold_in(self.key, self.part)

    def device_key(self) -> Key[Array, ""]:
        """Returns a key that is unique to this device and micro-batch."""
        return jax.random.fold_in(self.key, self.positions[0])

    def gather(self, tree: Any) -> Any:
        """Returns the rows of all devices, in the order of the whole batch."""
        if self.axis_name is None:
            return tree
        return jax.tree.map(lambda x: lax.all_gather(x, self.axis_name, tiled=True), tree)

    def own(self, tree: Any) -> Any:
        """Returns these rows of a gathered batch."""
        if self.axis_name is None:
            return tree
        num = len(self.positions)
        start = lax.axis_index(self.axis_name) * num
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, num), tree)

    def mean(self, tree: Any) -> Any:
        """Returns the average of the devices' means: the mean over the whole batch if all shares are equal."""
        return tree if self.axis_name is None else lax.pmean(tree, self.axis_name)


def batch_rows(batch: Any, key: Key[Array, ""], num: int) -> Rows:
    """Returns the rows of a batch; if there are none, returns rows with positions 0 to num - 1 and the given key.

    Raises ValueError if the batch has rows, but their number is not `num`.

    Example:
        rows = batch_rows({"x1": x1}, key, num=len(x1))
    """
    rows = batch.rows if isinstance(batch, Batch) else batch.get(ROWS) if isinstance(batch, Mapping) else None
    if rows is None:
        return Rows(key, jnp.arange(num), size=num)
    if len(rows.positions) != num:
        raise ValueError(f"the batch has {num} rows but {len(rows.positions)} positions; give one position per row.")
    return rows


def with_rows(batch: Any, rows: Rows) -> Any:
    """Adds `rows` to a `Batch` or a dict. Returns any other kind of batch unchanged.

    Raises ValueError if the batch already has rows.

    Example:
        loss, metrics = objective(variables, with_rows(batch, rows), key)
    """
    if not isinstance(batch, Batch | Mapping):
        return batch
    if isinstance(batch, Batch) and batch.rows is None:
        return batch._replace(rows=rows)
    if isinstance(batch, Batch) or ROWS in batch:
        raise ValueError(f"the batch already has {ROWS!r}, which the training step adds; remove or rename it.")
    return {**batch, ROWS: rows}


def without_rows(batch: Any) -> Any:
    """Returns a batch without its rows.

    Example:
        num = len(jax.tree.leaves(without_rows(batch))[0])
    """
    if isinstance(batch, Batch):
        return batch._replace(rows=None)
    return {name: value for name, value in batch.items() if name != ROWS} if isinstance(batch, Mapping) else batch


def share_of_batch(key: Key[Array, ""], num: int, axis_name: str | None) -> Rows:
    """Returns this device's rows. The devices along `axis_name` get consecutive blocks of `num` rows.

    axis_name: None if the program computes the whole batch.

    Example:
        rows = share_of_batch(key, num=16, axis_name="data")  # inside jax.pmap(..., axis_name="data")
    """
    if axis_name is None:
        return Rows(key, jnp.arange(num), size=num)
    positions = lax.axis_index(axis_name) * num + jnp.arange(num)
    return Rows(key, positions, size=num * lax.axis_size(axis_name), axis_name=axis_name)


def micro_batches(tree: Any, count: int) -> Any:
    """Splits a batch into `count` micro-batches along a new first axis.

    Micro-batch j has rows j, j + count, j + 2 count, ... It therefore contains the same rows of the whole batch on any
    number of devices.

    Example:
        parts = micro_batches(batch, 4)
    """
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), tree)


@dataclass(frozen=True)
class StatefulObjective:
    """An objective with a state. `combine` merges the states of the micro-batches, which would otherwise be averaged.

    combine: a function that maps the collections before the step and the stacked states of the micro-batches to the
    state of the whole batch.

    Example:
        objective = StatefulObjective(objective, combine)
        loss, metrics, state = objective(variables, batch, key)
    """

    objective: Callable[..., tuple]
    combine: Callable[[Any, Any], Any]

    def __call__(self, variables: Any, batch: Any, key: Key[Array, ""]) -> tuple:
        return self.objective(variables, batch, key)
