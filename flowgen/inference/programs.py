"""Compiled programs that call given functions, and that later calls reuse if this is safe.

A compiled program contains the values that a function read during tracing. Later calls may reuse it only if these
values cannot change, as in frozen dataclasses and their methods, or if they are arguments of the program, as the arrays
of pytrees are. A plain function may read variables that change later, so its program is not reused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import ismethod
from typing import Any

import jax
import numpy as np


def call_program(program: Callable[..., Any], functions: tuple[Any, ...], *args: Any, **options: Any) -> Any:
    """Returns program(functions, *args, **options), from a compiled program if later calls can reuse it.

    program: a module-level function that reads no variables that change.
    functions: callables; if one of them is a plain function, the program is not compiled as a whole.
    args: pytrees of arrays. options: hashable values; new values compile the program again.

    Example:
        x, acceptance = call_program(_langevin, (log_density,), key, x, num_steps=2)
    """
    leaves, tree = jax.tree.flatten(jax.tree.map(_with_owner, functions))
    fixed = tuple(None if _is_array(leaf) else leaf for leaf in leaves)
    if not all(leaf is None or _is_value(leaf) for leaf in fixed):
        return program(functions, *args, **options)
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    return _run(arrays, args, program=program, tree=tree, fixed=fixed, options=tuple(sorted(options.items())))


@partial(jax.jit, static_argnames=("program", "tree", "fixed", "options"))
def _run(arrays: list[Any], args: tuple[Any, ...], *, program: Any, tree: Any, fixed: Any, options: Any) -> Any:
    given = iter(arrays)
    functions = tree.unflatten([next(given) if leaf is None else leaf for leaf in fixed])
    return program(functions, *args, **dict(options))


def _with_owner(function: Any) -> Any:
    """Returns the callable; a method of a pytree or frozen dataclass becomes a pytree that contains the object."""
    if ismethod(function) and (_is_value(function.__self__) or not jax.tree_util.all_leaves([function.__self__])):
        return jax.tree_util.Partial(function.__func__, function.__self__)
    return function


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.number | bool | int | float)


def _is_value(leaf: Any) -> bool:
    """Returns whether an object is an immutable dataclass that can be hashed."""
    parameters = getattr(type(leaf), "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        return False
    try:
        hash(leaf)
    except TypeError:
        return False
    return True
