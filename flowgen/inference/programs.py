"""Compiled programs that call given functions, and that later calls reuse if this is safe.

A compiled program contains the values that a function read during tracing. Later calls may therefore reuse it only if
these values cannot change. This is known only of this library's own objects: their arrays are arguments of the program,
and their other values are fixed. Any other function may read variables that change later, so its program is not reused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import ismethod
from typing import Any

import jax
import numpy as np

from flowgen.backend import on_mesh_of

LIBRARY = __name__.partition(".")[0]


@partial(jax.tree_util.register_dataclass, data_fields=["owner"], meta_fields=["function"])
@dataclass(frozen=True, eq=False)
class Method:
    """A method as a pytree that contains its object.

    Example:
        log_density = Method(ManyWell.log_density, ManyWell(4))
    """

    function: Any
    owner: Any

    def __call__(self, *args: Any) -> Any:
        return self.function(self.owner, *args)


def call_program(program: Callable[..., Any], functions: tuple[Any, ...], *args: Any, **options: Any) -> Any:
    """Returns program(functions, *args, **options), from a compiled program if later calls can reuse it.

    program: a module-level function that reads no variables that change.
    functions: callables; if one of them is not an object of this library, the program is not compiled as a whole.
    args: pytrees of arrays. options: hashable values; new values compile the program again.

    Example:
        x, acceptance = call_program(_langevin, (log_density,), key, x, num_steps=2)
    """
    leaves, tree = jax.tree.flatten(jax.tree.map(_with_owner, functions, is_leaf=_is_foreign), is_leaf=_is_foreign)
    fixed = tuple(None if _is_array(leaf) else leaf for leaf in leaves)
    if not all(leaf is None or _is_own(leaf) for leaf in fixed):
        # The constants of the program need the mesh of the samples.
        return on_mesh_of(partial(program, functions, **options), *args)
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    return _run(arrays, args, program=program, tree=tree, fixed=fixed, options=tuple(sorted(options.items())))


@partial(jax.jit, static_argnames=("program", "tree", "fixed", "options"))
def _run(arrays: list[Any], args: tuple[Any, ...], *, program: Any, tree: Any, fixed: Any, options: Any) -> Any:
    given = iter(arrays)
    functions = tree.unflatten([next(given) if leaf is None else leaf for leaf in fixed])
    return on_mesh_of(partial(program, functions, **dict(options)), *args)


def _with_owner(function: Any) -> Any:
    """Returns the callable; a method of one of the library's objects becomes a pytree."""
    if ismethod(function) and _is_own(function.__self__):
        return Method(function.__func__, function.__self__)
    return function


def _is_own(value: Any) -> bool:
    """Returns whether an object's class is a frozen dataclass of this library."""
    parameters = getattr(type(value), "__dataclass_params__", None)
    return type(value).__module__.partition(".")[0] == LIBRARY and parameters is not None and parameters.frozen


def _is_foreign(node: Any) -> bool:
    """Returns whether a node of a pytree is a callable from elsewhere, whose values may change."""
    return callable(node) and not _is_own(node)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.number | bool | int | float)
