"""Support for meshes with explicit axes.

On such a mesh, the type of every array states its sharding, and JAX refuses to reshape, scan or contract over a sharded
axis unless the output sharding is given. Attention, couplings and models do all three, but their output sharding is
simple: batch, queries and heads are sharded as in the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    auto_axes,
    get_abstract_mesh,
    reshard,
    use_abstract_mesh,
)
from jaxtyping import Array, PyTree


def keep_axes(fn: Callable[..., Any], *args: Any, named: Iterable[tuple[Array, str]], out: Any) -> Any:
    """Returns fn(*args), computed under automatic axes if the mesh of an argument has explicit ones.

    named: pairs of an array and the letters of its axes, such as "b n h k". out: the letters of the results, in a tree
    with the structure of the value that fn returns. An axis of a result is sharded like the axis with the same letter
    in `named`, in the first array in which that axis is sharded; if there is none, the axis of the result is not
    sharded.

    Example:
        out = keep_axes(attend, q, k, v, named=[(q, "b n h k")], out="b n h d")
    """
    mesh = _explicit_mesh(args)
    if mesh is None:
        return fn(*args)
    divided = _divided(named)
    shardings = jax.tree.map(lambda letters: NamedSharding(mesh, _spec(letters, divided)), out)
    return auto_axes(fn, axes=_explicit_names(mesh), out_sharding=shardings)(*args)


def map_axes(fn: Callable[..., Any], args: tuple[Array, ...], letters: str, *, divided: str, out: Any) -> Any:
    """Returns fn(*args); if the mesh of an argument has explicit axes, each device calls fn on its part of the
    arguments.

    Use this function for computations that the compiler cannot shard by itself.

    letters: the letters of the axes, which are the same for every argument. divided: the letters of the axes that may
    be sharded; all other axes are gathered first. out: the letters of the results, in a tree as for `keep_axes`.

    Example:
        out = map_axes(kernel, (q, k, v), "b n h k", divided="bh", out="b n h k")
    """
    mesh = _explicit_mesh(args)
    if mesh is None:
        return fn(*args)
    axes = {letter: axes for letter, axes in _divided((x, letters) for x in args).items() if letter in divided}
    spec = _spec(letters, axes)
    specs = jax.tree.map(lambda names: _spec(names, axes), out)
    mapped = jax.shard_map(
        fn, mesh=mesh, in_specs=spec, out_specs=specs, axis_names=set(_explicit_names(mesh)), check_vma=False
    )
    return mapped(*(reshard(x, NamedSharding(mesh, spec)) for x in args))


def keep_rows(fn: Callable[..., Any], variables: Any, *args: Any, **options: Any) -> Any:
    """Returns fn(variables, *args, **options), computed under automatic axes if the mesh of an input has explicit ones.

    The rows (first axis) of the results are sharded like the rows of the first array in args or options whose rows are
    sharded. Results with another number of rows are replicated.

    Example:
        logdet = keep_rows(run, variables, x, labels)
    """
    leaves = jax.tree.leaves((variables, args, options))
    explicit = [x for x in leaves if _explicit_mesh(x) is not None]
    if not explicit:
        return fn(variables, *args, **options)
    divided = [x for x in jax.tree.leaves((args, options)) if _explicit_mesh(x) is not None and "b" in _rows_of(x)]
    rows = _rows_of(divided[0]) if divided else {}
    count = len(divided[0]) if divided else None
    # Outside jit, arrays are on devices and are moved to a mesh; inside jit, only their types change.
    traced = any(isinstance(x, Tracer) for x in leaves)
    mesh: Any = _explicit_mesh(explicit) if traced else explicit[0].sharding.mesh
    automatic, context = _automatic(mesh), get_abstract_mesh()

    def to_automatic(x):
        if traced and _explicit_mesh(x) is not None:
            return reshard(x, PartitionSpec(*[None] * jnp.ndim(x)))
        return _moved(x, automatic)

    def to_explicit(x):
        letters = of_rows(x) if jnp.shape(x)[:1] == (count,) else ""
        return (reshard if traced else jax.device_put)(x, NamedSharding(mesh, _spec(letters, rows)))

    with use_abstract_mesh(automatic.abstract_mesh) if traced or not context.empty else nullcontext():
        variables, args, options = jax.tree.map(to_automatic, (variables, args, options))
        out = fn(variables, *args, **options)
    # Inside another call of this function, everything stays under automatic axes.
    return out if traced and context == automatic else jax.tree.map(to_explicit, out)


def with_automatic_axes(fn: Callable[[Any], Any], tree: Any) -> Any:
    """Returns fn(tree) for arrays outside jit. If their mesh has explicit axes, fn runs under automatic axes.

    In that case, the results stay on the mesh with automatic axes. `keep_rows` accepts such results together with
    arrays on the original mesh.

    Example:
        weights = with_automatic_axes(unstack, variables)
    """
    explicit = [x for x in jax.tree.leaves(tree) if _explicit_mesh(x) is not None]
    if not explicit:
        return fn(tree)
    automatic = _automatic(explicit[0].sharding.mesh)
    with nullcontext() if get_abstract_mesh().empty else use_abstract_mesh(automatic.abstract_mesh):
        return fn(jax.tree.map(lambda x: _moved(x, automatic), tree))


def on_mesh_of(fn: Callable[..., Any], *args: Any) -> Any:
    """Returns fn(*args), run under the mesh of an argument if it has explicit axes and no context mesh is set.

    Without a context mesh, vmap refuses sharded arrays outside jit, and constants such as `zeros_like(x)` are not
    sharded inside jit (jax 0.12). When this function sets the mesh outside jit, it compiles fn anew in every call.

    Example:
        y = on_mesh_of(jax.vmap(draw), x)
    """
    mesh = _explicit_mesh(args)
    if mesh is None or not get_abstract_mesh().empty:
        return fn(*args)

    def within(*args):
        with use_abstract_mesh(mesh):
            return fn(*args)

    # An argument that fn uses only for its shape still tells jit the mesh.
    return jax.jit(within, keep_unused=True)(*args)


class OnMeshes:
    """A mixin for Flax modules: `apply` also accepts arrays whose rows are sharded over explicit axes of a mesh.

    Example:
        class Network(OnMeshes, nn.Module): ...
    """

    def apply(self, variables: Any, *args: Any, **options: Any) -> Any:
        """Returns the result of `flax.linen.Module.apply`; its rows are sharded like the rows of the inputs."""
        apply: Any = getattr(super(), "apply")  # noqa: B009  (the method of the module, the next class in the MRO)
        return keep_rows(apply, variables, *args, **options)


def of_rows(x: Array, row: str = "b") -> str:
    """Returns a name for each axis of x, separated by spaces, as `keep_axes` expects; `row` is the name of the first.

    Example:
        of_rows(jnp.zeros((8, 32, 32, 3)))  # "b e1 e2 e3"
    """
    return " ".join([row, *(f"e{axis}" for axis in range(1, x.ndim))])


def take_rows(x: Array, index: Array) -> Array:
    """Returns x[index] for a vector of integers; the rows of the result are sharded like `index`.

    Example:
        x0 = take_rows(x0, permutation)
    """
    return keep_axes(lambda x, index: x[index], x, index, named=[(index, "b"), (x, of_rows(x, "rows"))], out=of_rows(x))


def alike_rows(tree: PyTree) -> PyTree:
    """Returns the tree with the rows of all arrays sharded in the same way.

    They are sharded like the rows of the first array whose rows are sharded over explicit axes; if there is none, the
    tree is returned unchanged. Inside jit, the mesh must be set as the context mesh; see `on_mesh_of`.

    Example:
        positions, x = alike_rows((positions, x))
    """
    divided = [x for x in jax.tree.leaves(tree) if _explicit_mesh(x) is not None and "b" in _rows_of(x)]
    if not divided:
        return tree
    # Outside jit, adding an array on one device to an array on a mesh moves the former to the mesh.
    nothing = jnp.zeros_like(divided[0], jnp.int32).sum(axis=tuple(range(1, divided[0].ndim)))

    def divide(x):
        return x + jnp.expand_dims(nothing, range(1, x.ndim)).astype(x.dtype)

    return jax.tree.map(lambda x: x if any(x is y for y in divided) else divide(x), tree)


def varies(x: Array) -> bool:
    """Returns whether x varies over a mesh axis of the `jax.shard_map` program that is being traced.

    Example:
        jax.shard_map(lambda x: x * varies(x), ...)
    """
    return bool(jax.typeof(x).manual_axis_type.varying)


def explicit_axes(tree: PyTree) -> bool:
    """Returns whether any array of a tree is on a mesh with explicit axes.

    Example:
        explicit_axes((q, k, v))
    """
    return _explicit_mesh(tree) is not None


def divided_axes(x: Array) -> set[int]:
    """Returns the axes of x that are sharded over explicit axes of a mesh.

    Example:
        if 1 in divided_axes(q): ...
    """
    if _explicit_mesh(x) is None:
        return set()
    return {axis for axis, names in enumerate(jax.typeof(x).sharding.spec) if names is not None}


def partitioned(x: Array) -> bool:
    """Returns whether the compiler may divide a computation with x over several devices.

    The compiler cannot do so if there is only one device, or in a `jax.shard_map` program that is mapped over all axes
    of its mesh. Axes that are explicit do not count, because `map_axes` maps over them.

    Example:
        jax.pmap(lambda x: x * partitioned(x))(x)
    """
    mesh = jax.typeof(x).sharding.mesh
    mesh = get_abstract_mesh() if mesh.empty else mesh
    return jax.device_count() > 1 if mesh.empty else AxisType.Auto in mesh.axis_types


def check_unmapped(what: str, tree: PyTree) -> None:
    """Raises ValueError if an array of the tree varies over a mesh axis of a `jax.shard_map` program.

    Call this function before a computation that the checks of `jax.shard_map` reject.

    what: noun phrase for the computation, used in the error message.

    Example:
        check_unmapped("dopri5", x0)
    """
    if any(varies(x) for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)):
        raise ValueError(
            f"{what} does not pass the checks of jax.shard_map. Use shard_map(..., check_vma=False), so that each "
            "device works on its own part, or use jax.jit with sharded arrays."
        )


def varying(tree: PyTree, like: PyTree) -> PyTree:
    """Returns the tree with its arrays marked as varying over all mesh axes over which the arrays in `like` vary.

    Inside `jax.shard_map`, the initial state of a loop must vary over the same axes as its later states.

    Example:
        carry, out = jax.lax.scan(body, varying(jnp.zeros(3), x), x)
    """
    nothing = sum(jnp.zeros_like(x, jnp.int32).sum() for x in jax.tree.leaves(like))
    return jax.tree.map(lambda x: x + jnp.asarray(nothing, x.dtype), tree)


def _divided(named: Iterable[tuple[Array, str]]) -> dict[str, Any]:
    """Returns the mesh axes that shard each letter's axis, from the first array in which this axis is sharded."""
    divided = {}
    for array, letters in named:
        for letter, axes in zip(letters.split(), jax.typeof(array).sharding.spec, strict=True):
            if axes is not None:
                divided.setdefault(letter, axes)
    return divided


def _automatic(mesh: Any) -> Any:
    """Returns a concrete or abstract mesh with automatic axes in place of its explicit ones."""
    types = tuple(AxisType.Auto if kind is AxisType.Explicit else kind for kind in mesh.axis_types)
    if isinstance(mesh, AbstractMesh):
        return mesh.update_axis_types(dict(zip(mesh.axis_names, types, strict=True)))
    return Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def _moved(x: Any, automatic: Any) -> Any:
    """Returns an array moved to the same mesh with automatic axes; unchanged if its mesh has no explicit axes."""
    return x if _explicit_mesh(x) is None else jax.device_put(x, NamedSharding(automatic, x.sharding.spec))


def _rows_of(x: Array) -> dict[str, Any]:
    """Maps the names of an array's axes, as in `of_rows`, to the mesh axes over which they are sharded."""
    return _divided([(x, of_rows(x))]) if jnp.ndim(x) else {}


def _explicit_names(mesh: AbstractMesh) -> tuple[str, ...]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind is AxisType.Explicit)


def _explicit_mesh(args: PyTree) -> AbstractMesh | None:
    for leaf in jax.tree.leaves(args):
        if not isinstance(leaf, jax.Array):
            continue
        mesh = jax.typeof(leaf).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def _spec(letters: str, divided: dict[str, Any]) -> PartitionSpec:
    """Returns the partition spec of a result; a mesh axis that several letters would use shards only the first."""
    used, spec = set(), []
    for letter in letters.split():
        axes = divided.get(letter)
        names = set(axes) if isinstance(axes, tuple) else {axes}
        spec.append(None if names & used else axes)
        used |= names - {None}
    return PartitionSpec(*spec)
