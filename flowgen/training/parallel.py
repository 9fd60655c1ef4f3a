"""Data parallelism over devices and processes with pmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flowgen import backend
from flowgen.arrays import shown
from flowgen.training.options import TrainConfig
from flowgen.training.step import AXIS, Step, TrainState


@dataclass(frozen=True)
class DataParallel:
    """Data parallelism: each device stores a copy of the state and computes the gradients of a share of the batch.

    Arrays on devices have a leading device axis, as pmap expects. devices: the local devices to use; None for all of
    them.

    Example:
        parallel = DataParallel()
        state, metrics = parallel.compile(step)(parallel.replicate(state), parallel.shard(batch), keys)
    """

    devices: Sequence[jax.Device] | None = None
    axis_name = AXIS

    @property
    def local_devices(self) -> Sequence[jax.Device]:
        return jax.local_devices() if self.devices is None else self.devices

    @property
    def _sharding(self) -> NamedSharding:
        return NamedSharding(Mesh(np.array(self.local_devices), (AXIS,)), PartitionSpec(AXIS))

    @property
    def must_wait(self) -> bool:
        """Whether each step must end before the next one starts."""
        return backend.must_wait(self.local_devices)

    @property
    def reads_alone(self) -> bool:
        """Whether a process can read a whole state without the help of others."""
        return True

    @property
    def program_devices(self) -> int | None:
        """None, because each device executes its own program."""
        return None

    def check_batch(self, config: TrainConfig) -> None:
        """Raises ValueError if the devices cannot share the batch equally."""
        check_batch(config, len(self.local_devices) * jax.process_count())

    def compile(self, step: Step) -> Step:
        """Returns the step mapped over all devices. Each call donates the buffers of its input state."""
        return jax.pmap(step, axis_name=AXIS, devices=self.devices, donate_argnums=0)

    def abstract(self, make: Callable[[], Any]) -> Any:
        """Returns the result of `make` as abstract arrays."""
        return jax.eval_shape(make)

    def create(self, make: Callable[..., Any], *given: Any) -> Any:
        """Returns make(*given), computed on one device."""
        return make(*given)

    def place(self, state: Any) -> Any:
        """Returns a state placed on the devices, each of which receives a copy."""
        return self.replicate(state)

    def replicate(self, tree: Any) -> Any:
        """Returns the tree with a copy of every leaf on every device."""
        count = len(self.local_devices)

        def copies(x):
            x = np.asarray(x)
            return jax.device_put(np.broadcast_to(x, (count, *x.shape)), self._sharding)

        return jax.tree.map(copies, tree)

    def replicate_key(self, key: jax.Array) -> jax.Array:
        """Returns the same key on every device."""
        return jax.random.wrap_key_data(self.replicate(jax.random.key_data(key)))

    def shard(self, batch: Any, rows: int | None = None) -> Any:
        """Returns this process's batch in equal consecutive shares, one per device; does not wait for the transfer.

        rows: the required number of rows, which is this process's share of train.batch_size; None allows any number
        that the devices can share equally. Raises ValueError unless all leaves are arrays of numbers with this many
        rows.
        """
        count = len(self.local_devices)
        check_rows(batch, count, rows)
        return jax.tree.map(
            lambda x: jax.device_put(np.reshape(x, (count, len(x) // count, *x.shape[1:])), self._sharding),
            batch,
        )

    def to_host(self, tree: Any) -> Any:
        """Returns a replicated tree as numpy arrays with their own memory. Waits for the devices."""
        # np.asarray of a CPU array is a view, whose memory the next step overwrites.
        shards = jax.device_get(jax.tree.map(lambda x: x.addressable_shards[0].data, tree))
        return jax.tree.map(lambda x: np.array(x[0]), shards)

    def variables(self, state: TrainState) -> Any:
        """Returns the variables for evaluation and sampling, as numpy arrays."""
        return self.to_host(state.averaged)


def check_batch(config: TrainConfig, devices: int) -> None:
    """Raises ValueError if this number of devices cannot share the batch equally.

    Example:
        check_batch(TrainConfig(batch_size=64), devices=4)
    """
    if config.batch_size % (devices * config.accumulation):
        raise ValueError(
            f"train.batch_size is {config.batch_size}; it must be a multiple of {devices} devices × "
            f"train.accumulation {config.accumulation} = {devices * config.accumulation}."
        )


def check_rows(batch: Any, devices: int, rows: int | None = None) -> None:
    """Raises ValueError unless all leaves are arrays of numbers with the same number of rows, a multiple of `devices`.

    Example:
        check_rows({"x": np.zeros((16, 3))}, devices=4, rows=16)
    """
    counts = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        name = f"batch{jax.tree_util.keystr(path)}"
        shape, dtype = getattr(leaf, "shape", ()), getattr(leaf, "dtype", object)
        if not shape or not any(jnp.issubdtype(dtype, kind) for kind in (jnp.number, jnp.bool_)):
            raise ValueError(f"{name} is {shown(leaf)}; it must be an array of numbers with one row per sample.")
        counts[name] = shape[0]
    if not counts:
        raise ValueError("the batch contains no arrays; give arrays of numbers with one row per sample.")
    first, found = next(iter(counts.items()))
    for name, count in counts.items():
        if count != found:
            raise ValueError(
                f"{first} has {found} rows, but {name} has {count}; give all arrays of a batch the same number of rows."
            )
    if rows is not None and found != rows:
        raise ValueError(f"{first} has {found} rows; it must have {rows}, this process's share of train.batch_size.")
    if found == 0 or found % devices:
        raise ValueError(f"{first} has {found} rows; the devices share them equally, so give a multiple of {devices}.")


def is_primary() -> bool:
    """Returns whether this is the first process, which is the only one that writes files."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has reached this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def largest(value: int) -> int:
    """Returns, in every process, the largest of the processes' values. Waits until all processes have called it."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.array(value))))


def from_primary(value: float) -> float:
    """Returns, in every process, the value of the first process."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.broadcast_one_to_all(np.array(value, np.float32)))
