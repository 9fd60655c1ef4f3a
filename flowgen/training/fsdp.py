"""Sharded training: parameters, moments and averaged parameters are divided over devices and processes.

The training step is written as for one device, and processes the whole batch. The compiler divides it over the devices,
according to the shardings of the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flowgen import backend
from flowgen.training.options import TrainConfig
from flowgen.training.parallel import DataParallel, check_batch, check_rows
from flowgen.training.sharding import partition_specs
from flowgen.training.step import Step, TrainState

WHOLE, ROWS = PartitionSpec(), PartitionSpec(backend.FSDP)


@dataclass(frozen=True)
class FullySharded:
    """Sharded training over a mesh of devices, with the same methods as `DataParallel`.

    Arrays are global. A batch contains the rows of all devices, divided over the first axis of the mesh. A state has
    the same shapes as on one device. `partition_specs` defines how states are divided.

    devices: the local devices to use; None for all of them. mesh_shape: the number of devices that share the batch and
    the parameters, and the number that share heads and MLPs; None for (number of devices, 1).

    Raises ValueError if the mesh does not fit the devices.

    Example:
        parallel = FullySharded(mesh_shape=(4, 2))
        state, metrics = parallel.compile(step)(parallel.create(initial), parallel.shard(batch), key)
    """

    devices: Sequence[jax.Device] | None = None
    mesh_shape: tuple[int, int] | None = None
    axis_name = None

    def __post_init__(self):
        if self.mesh_shape is None:
            return
        local = len(self.local_devices)
        count = local * jax.process_count()
        told = f"train.mesh is {self.mesh_shape}"
        if math.prod(self.mesh_shape) != count:
            raise ValueError(
                f"{told}, which is a mesh of {math.prod(self.mesh_shape)} devices, but there are {count}; choose two "
                f"numbers whose product is {count}."
            )
        if local % self.mesh_shape[1]:
            raise ValueError(
                f"{told}, but each process has {local} devices; the second number must divide {local}, because the "
                "devices that share heads must belong to one process."
            )

    @property
    def local_devices(self) -> Sequence[jax.Device]:
        return jax.local_devices() if self.devices is None else self.devices

    @cached_property
    def mesh(self) -> Mesh:
        """The mesh of all devices. Each process stores its rows of the batch on its own devices."""
        devices = self.local_devices
        if jax.process_count() > 1:
            if self.devices is not None:
                raise ValueError("devices is given, but sharded training in several processes uses all of them.")
            devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
        return Mesh(np.array(devices).reshape(self.mesh_shape or (-1, 1)), (backend.FSDP, backend.TENSOR))

    @property
    def must_wait(self) -> bool:
        """Whether each step must end before the next one starts."""
        return backend.must_wait(self.local_devices)

    @property
    def reads_alone(self) -> bool:
        """Whether a process can read a whole state without the help of others."""
        return jax.process_count() == 1

    @property
    def program_devices(self) -> int:
        """The number of devices that execute one program together."""
        return self.mesh.size

    def check_batch(self, config: TrainConfig) -> None:
        """Raises ValueError if the devices cannot share the batch equally."""
        check_batch(config, self.mesh.shape[backend.FSDP])

    def shardings(self, tree: Any) -> Any:
        """Returns the sharding of every leaf of a state or of variables. The leaves may be abstract arrays."""
        return _shardings(self.mesh, tree)

    def abstract(self, make: Callable[[], Any]) -> Any:
        """Returns the result of `make` as abstract arrays."""
        with jax.set_mesh(self.mesh):
            return jax.eval_shape(make)

    def create(self, make: Callable[..., Any], *given: Any) -> Any:
        """Returns make(*given), computed in parts, so that no device stores a whole result or argument."""
        with jax.set_mesh(self.mesh):
            shardings = self.shardings(jax.eval_shape(make, *given))
            return jax.jit(make, out_shardings=shardings)(*map(self.place, given))

    def compile(self, step: Step) -> Step:
        """Returns the step, compiled for the whole batch. Each call donates the buffers of its input state."""

        def update(state, batch, key, fixed):
            state, metrics = step(state, batch, key, fixed)
            return jax.lax.with_sharding_constraint(state, self.shardings(state)), metrics

        compiled = jax.jit(update, donate_argnums=0)

        def run(state, batch, key, fixed=None):
            with jax.set_mesh(self.mesh):
                return compiled(state, batch, key, fixed)

        return run

    def place(self, state: Any) -> Any:
        """Returns a state placed on the devices, each of which receives only its own part."""
        return jax.tree.map(_placed, state, self.shardings(state))

    def replicate_key(self, key: jax.Array) -> jax.Array:
        """Returns the same key on every device."""
        data = np.asarray(jax.random.key_data(key))
        return jax.random.wrap_key_data(_placed(data, NamedSharding(self.mesh, WHOLE)))

    def shard(self, batch: Any, rows: int | None = None) -> Any:
        """Returns the global batch, of which `batch` contains this process's rows. Does not wait for the transfer.

        rows: the required number of rows, which is this process's share of train.batch_size; None allows any number
        that the devices can share equally. Raises ValueError unless all leaves are arrays of numbers with this many
        rows.
        """
        check_rows(batch, self.mesh.shape[backend.FSDP] // jax.process_count(), rows)
        sharding = NamedSharding(self.mesh, ROWS)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)

    def to_host(self, tree: Any) -> Any:
        """Returns, in every process, a tree as whole numpy arrays with their own memory. Waits for the devices."""
        return jax.tree.map(_whole, tree)

    def variables(self, state: TrainState) -> Any:
        """Returns the variables for evaluation and sampling, divided over this process's devices.

        They must not be used after the next step.
        """
        averaged = state.averaged
        if jax.process_count() == 1:
            return averaged
        devices = np.array(self.local_devices).reshape(-1, self.mesh.shape[backend.TENSOR])
        whole = self.to_host(averaged)
        return jax.tree.map(_placed, whole, _shardings(Mesh(devices, self.mesh.axis_names), whole))


def parallel_for(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> DataParallel | FullySharded:
    """Returns the parallelism that `config.parallel` selects.

    devices: this process's devices to train on; None for all of them.

    Raises ValueError if the mesh does not fit the devices, or if they cannot share the batch equally.

    Example:
        parallel = parallel_for(TrainConfig(parallel="fsdp", mesh=(4, 2)))
    """
    sharded = config.parallel == "fsdp"
    parallel = FullySharded(devices, config.mesh) if sharded else DataParallel(devices)
    parallel.check_batch(config)
    return parallel


def divided_over_heads(variables: Any) -> Any:
    """Returns variables whose heads and hidden MLP channels are divided over all devices of this host.

    In each layer, the devices then exchange activations, but no weights. Arrays that are not divided are copied to
    every device (see `partition_spec`).

    variables: numpy arrays, so that no device stores all of them.

    Example:
        flow, variables, _ = flowgen.checkpoint.load_on_host("runs/digits")
        images = sample(flow, divided_over_heads(variables), key, 4).x
    """
    devices = jax.local_devices()
    return FullySharded(devices, (1, len(devices))).place(variables)


def _shardings(mesh: Mesh, tree: Any) -> Any:
    """Returns the sharding of every leaf of a tree of (abstract) arrays."""
    specs = partition_specs(tree, dict(mesh.shape))
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _placed(x: Any, sharding: NamedSharding) -> jax.Array:
    """Returns x with this sharding. All processes must pass the same x, which may already have the sharding."""
    if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim):
        return x
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _whole(x: jax.Array) -> np.ndarray:
    """Returns an array of any sharding as a numpy array with its own memory."""
    if not x.is_fully_addressable and not x.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    # np.asarray would keep a second copy, and on a CPU it may be a view, whose memory the next step overwrites.
    whole = np.empty(x.shape, x.dtype)
    for shard in x.addressable_shards:
        if shard.replica_id == 0 or not x.is_fully_addressable:
            whole[shard.index] = shard.data
    return whole
