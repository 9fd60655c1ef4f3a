"""Applies an optimizer to each layer of a stack separately.

The networks scan over equal layers, so every array below a module called `layers` has a leading axis that indexes the
layers. An optimizer that uses shapes or norms would treat such an array as one large tensor. For example, Muon would
orthogonalise the wrong matrix, and LAMB would use one trust ratio for all layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

STACK = "layers"  # the name of a module whose parameters are stacked


def per_layer(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns an optimizer that applies `optimizer` to each layer of a stack as if its parameters were not stacked.

    The arrays of a module called `layers` count as stacked if all have a first axis of the same size, which is then the
    number of layers, and those called `kernel` have more than two axes. Integer scalars in the optimizer's state are
    assumed to count updates; all layers share these counts.

    Example:
        tx = per_layer(optax.lamb(1e-3))
    """

    def init(params):
        depths = _depths(params)
        return {str(depth): _init(optimizer, _part(params, depths, depth), depth) for depth in _distinct(depths)}

    def update(updates, state, params=None):
        depths, new_updates, new_state = _depths(updates), [], {}
        for depth in _distinct(depths):
            given = [None if tree is None else _part(tree, depths, depth) for tree in (updates, params)]
            part, new_state[str(depth)] = _update(optimizer, given[0], state[str(depth)], given[1], depth)
            new_updates.append(part)
        order = {depth: index for index, depth in enumerate(_distinct(depths))}
        return jax.tree.map(lambda depth, *parts: parts[order[depth]], depths, *new_updates), new_state

    return optax.GradientTransformation(init, update)


def _init(optimizer: optax.GradientTransformation, params: Any, depth: int) -> Any:
    if not depth:
        return optimizer.init(params)
    layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params)
    axes = jax.tree.map(lambda leaf: None if _is_count(leaf) else 0, jax.eval_shape(optimizer.init, layer))
    return jax.vmap(optimizer.init, out_axes=axes)(params)


def _update(
    optimizer: optax.GradientTransformation, updates: Any, state: Any, params: Any, depth: int
) -> tuple[Any, Any]:
    if not depth:
        return optimizer.update(updates, state, params)
    axes = jax.tree.map(lambda leaf: 0 if jnp.ndim(leaf) else None, state)
    mapped = jax.vmap(optimizer.update, in_axes=(0, axes, None if params is None else 0), out_axes=(0, axes))
    return mapped(updates, state, params)


def _is_count(leaf: Any) -> bool:
    return leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jnp.integer)


def _depths(params: Any) -> Any:
    """Returns the number of layers in each leaf's stack, or 0 for a leaf that is not stacked."""
    modules: dict[tuple[str, ...], list[tuple[bool, tuple[int, ...]]]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        is_kernel = names_of(path)[-1:] == ("kernel",)
        modules.setdefault(_stack(path), []).append((is_kernel, jnp.shape(leaf)))

    def depth(path, leaf):
        del leaf
        return _depth(modules[_stack(path)]) if _stack(path) else 0

    return jax.tree_util.tree_map_with_path(depth, params)


def _depth(leaves: list[tuple[bool, tuple[int, ...]]]) -> int:
    """Returns the number of layers if a module's arrays are stacked, as `per_layer` defines it; otherwise 0."""
    sizes = {shape[:1] for _, shape in leaves}
    stacked = len(sizes) == 1 and all(len(shape) > (2 if is_kernel else 0) for is_kernel, shape in leaves)
    return sizes.pop()[0] if stacked else 0


def names_of(path: Any) -> tuple[str, ...]:
    """Returns the names of the keys in a path of `jax.tree_util`, from the root to a leaf.

    Example:
        paths = [names_of(path) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    """
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _stack(path: Any) -> tuple[str, ...]:
    """Returns the path of the module called `layers` that contains a leaf; empty if there is none."""
    names = names_of(path)
    return names[: names.index(STACK) + 1] if STACK in names else ()


def _distinct(depths: Any) -> list[int]:
    return sorted(set(jax.tree.leaves(depths)))


def _part(tree: Any, depths: Any, depth: int) -> Any:
    """Returns the tree with only the leaves of one depth."""
    return jax.tree.map(lambda own, leaf: leaf if own == depth else optax.MaskedNode(), depths, tree)
