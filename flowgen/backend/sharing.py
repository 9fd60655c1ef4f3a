"""Divides batches over the devices of this host. Every device computes its own rows, without communication.

If the compiler divided the rows instead, devices would exchange rows whenever a batch is concatenated or reordered.
They would also communicate in each pass of a loop, for example for every token, to decide whether the loop is done.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh
from jaxtyping import Array, PyTree

from flowgen.backend.shards import FSDP

AXIS = "rows"
WHOLE = PartitionSpec()
# On a CPU, a token loop over fewer rows is hardly faster, because most of its time is then spent starting operations.
MIN_ROWS_ON_CPU = 4
_CONFIG: Any = jax.config  # The attributes of jax.config are not typed.


def available_cores() -> int:
    """Returns the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_core_devices() -> bool:
    """Creates one CPU device per core that this process may use; returns whether it did.

    This function does nothing if the number of CPU devices is already configured, if JAX has already started, or if JAX
    runs in several processes. Call it only in the main program, not in a library, because the number of devices is
    fixed for the whole process.
    """
    chosen = _CONFIG.jax_num_cpu_devices >= 0 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or jax.distributed.is_initialized():
        return False
    try:
        jax.config.update("jax_num_cpu_devices", available_cores())
    except RuntimeError:  # jax has started, for example in a module that the user imports.
        return False
    return True


def join_processes() -> None:
    """Connects this process to the other processes of its SLURM job, MPI run or TPU pod; call it before JAX starts.

    JAX detects these environments. In any other environment, the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
    and JAX_PROCESS_ID must describe the group.

    Raises ValueError if no group of processes is found, or if JAX has already started.
    """
    texts = [os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")]
    try:
        num_processes, process_id = (None if text is None else int(text) for text in texts)
        jax.distributed.initialize(num_processes=num_processes, process_id=process_id)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed found no group of processes ({error}); start the command with SLURM or MPI or on a TPU "
            "pod, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."
        ) from error


def devices_for(rows: int) -> list[jax.Device]:
    """Returns the devices of this host that share a batch of this many rows.

    Inside `jax.default_device`, the result is a single device. On CPUs, each device gets at least four rows, so a small
    batch stays on one device.
    """
    if _CONFIG.jax_default_device is not None:
        return jax.local_devices()[:1]
    devices = jax.local_devices()
    least = MIN_ROWS_ON_CPU if devices[0].platform == "cpu" else 1
    return devices[: max(1, rows // least)]


def sharing(rows: int, variables: PyTree = None) -> Mesh | None:
    """Returns the mesh of the devices that share a batch of this many rows; None for a single device.

    The result is also None if the caller has sharded `variables` over devices, because the computation then follows
    their placement, and if `variables` are traced inside jit.
    """
    devices = devices_for(rows)
    if len(devices) == 1 or not all(_is_whole(x) for x in jax.tree.leaves(variables)):
        return None
    return Mesh(np.array(devices), (AXIS,))


def share_rows(tree: PyTree, mesh: Mesh | None, axis: str = AXIS) -> PyTree:
    """Returns the arrays of a tree with their rows divided over an axis of a mesh; without a mesh, returns the tree.

    If the number of rows is not a multiple of the number of devices, the first rows are repeated at the end.
    """
    if mesh is None:
        return tree
    rows, count = NamedSharding(mesh, PartitionSpec(axis)), mesh.shape[axis]

    def share(x):
        size = -(-len(x) // count) * count
        return jax.device_put(x if size == len(x) else x[np.resize(np.arange(len(x)), size)], rows)

    return jax.tree.map(share, tree)


def copies(variables: PyTree, mesh: Mesh | None) -> PyTree:
    """Returns the variables replicated on all devices of a mesh; if the mesh is None, returns them unchanged.

    CPU devices share one copy in memory.
    """
    if mesh is None:
        return variables
    whole, first = NamedSharding(mesh, WHOLE), mesh.devices.flat[0]

    def copy(x):
        if isinstance(x, jax.Array) and x.sharding == whole:
            return x
        if first.platform == "cpu" and not (isinstance(x, jax.Array) and _is_key(x)):
            # From a device array, JAX would make a copy for every device. A NumPy view of its memory is used in place.
            x = np.asarray(jax.device_put(x, first))
        return jax.device_put(x, whole)

    with jax.ensure_compile_time_eval():  # Inside jit, the variables may belong to an outer function.
        return jax.tree.map(copy, variables)


def by_rows(fn: Callable[..., PyTree], shared: PyTree, *rows: PyTree, **static: Any) -> PyTree:
    """Returns fn(shared, *rows, **static) as NumPy arrays; the devices of this host divide the rows among themselves.

    fn: a module-level function, which is compiled once for each value of `static` and each shape. Row i of the results
    must depend only on `shared` and on row i of `rows`. shared: what all rows need, such as variables and a key.

    Example:
        features = by_rows(_features, variables, images, network=network)
    """
    count = len(jax.tree.leaves(rows)[0])
    mesh = sharing(count, shared)
    run = partial(_by_rows, fn=fn, mesh=mesh, static=tuple(static.items()))
    placed = share_rows(rows, _training_mesh(shared), FSDP) if mesh is None else share_rows(rows, mesh)
    return jax.tree.map(lambda x: np.asarray(x)[:count], run(copies(shared, mesh), placed))


@partial(jax.jit, static_argnames=("fn", "mesh", "static"))
def _by_rows(shared, rows, *, fn, mesh, static):
    def run(shared, rows):
        return fn(shared, *rows, **dict(static))

    return run(shared, rows) if mesh is None else on_own_rows(run, mesh, (WHOLE, PartitionSpec(AXIS)))(shared, rows)


def on_own_rows(fn: Callable[..., PyTree], mesh: Mesh, specs: Any, axis: Any = AXIS) -> Callable[..., PyTree]:
    """Returns a version of fn that every device of a mesh runs on its own rows of the arguments.

    specs: for each argument, a tree of partition specs: `WHOLE` for replicated arrays and `PartitionSpec(axis)` for
    arrays of rows. All results must be arrays of rows.
    """
    return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(axis), check_vma=False)


def rows_mesh(x: Any, variables: PyTree = None) -> tuple[Mesh, Any] | None:
    """Returns the mesh over which the rows of x are sharded, and the mesh axes that shard the rows.

    The result is None unless x is an array outside jit whose rows, and no other axes, are sharded over devices of this
    host, on a mesh with only automatic axes. It is also None if an array of `variables` is sharded.
    """
    sharding = None if isinstance(x, Tracer) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not x.is_fully_addressable:
        return None
    spec, mesh = tuple(sharding.spec), sharding.mesh
    if not spec or spec[0] is None or any(spec[1:]) or any(kind is not AxisType.Auto for kind in mesh.axis_types):
        return None
    return (mesh, spec[0]) if all(_is_whole(leaf) for leaf in jax.tree.leaves(variables)) else None


def rows_on_device(x: Array) -> int:
    """Returns the number of rows of x that each device stores; all of them if `rows_mesh(x)` is None."""
    divided = rows_mesh(x)
    return len(x) if divided is None else x.sharding.shard_shape(x.shape)[0]


def on_first_device(call: Callable[..., None], *args: Array) -> None:
    """Runs call(*args), such as a report to the host, once: inside `jax.shard_map`, only the first device runs it."""
    axes = get_abstract_mesh().manual_axes
    if not axes:
        return call(*args)
    first = jnp.stack([lax.axis_index(axis) == 0 for axis in axes]).all()
    return lax.cond(first, lambda *args: call(*args), lambda *args: None, *args)


def _is_whole(x: Any) -> bool:
    """Returns whether an array is fully replicated on this host's devices.

    The result is False on a mesh with explicit axes, where the caller controls the placement.
    """
    if not isinstance(x, jax.Array):
        return True
    if isinstance(x, Tracer):
        return False
    mesh = x.sharding.mesh if isinstance(x.sharding, NamedSharding) else None
    explicit = mesh is not None and AxisType.Explicit in mesh.axis_types
    return x.is_fully_addressable and x.sharding.is_fully_replicated and not explicit


def _training_mesh(variables: PyTree) -> Mesh | None:
    """Returns the mesh over which sharded training divides the variables; None if they are not divided in this way."""
    for x in jax.tree.leaves(variables):
        sharding = None if isinstance(x, Tracer) else getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding) and FSDP in sharding.mesh.axis_names and not _is_whole(x):
            return sharding.mesh
    return None


def _is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
