"""Frozen parameters, which training leaves unchanged. Patterns of parameter names select them.

Training does not differentiate or update frozen parameters. They therefore have no gradient, no moments and no weight
decay, and gradient norms do not include them.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import optax

NEAREST = 3  # number of names that an error message suggests


def check_frozen(params: Any, patterns: Sequence[str]) -> None:
    """Raises ValueError if a pattern matches no parameter, or if the patterns match all of them.

    params: a tree of (abstract) arrays.

    Example:
        check_frozen(jax.eval_shape(lambda: flowgen.init(flow, key))["params"], ("blocks_0/*",))
    """
    check_patterns("train.frozen", params, patterns)
    if patterns and all(matches(name, patterns) for name in _names(params)):
        raise ValueError(f"train.frozen is {tuple(patterns)}, which freezes all parameters; leave some out.")


def check_patterns(field: str, params: Any, patterns: Sequence[str]) -> None:
    """Raises ValueError if one of a field's patterns matches no parameter; the message suggests the nearest names.

    params: a tree of (abstract) arrays.

    Example:
        check_patterns("optim.not_decayed", params, ("*/proj_out/*",))
    """
    names = _names(params)
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            parents = {f"{name[:end]}/*" for name in names for end, letter in enumerate(name) if letter == "/"}
            close = difflib.get_close_matches(pattern, sorted({*names, *parents}), n=NEAREST, cutoff=0.0)
            raise ValueError(
                f"{field} has the pattern '{pattern}', which matches no parameter; the nearest names are "
                f"{', '.join(close)}."
            )


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Returns whether the name of a parameter, such as "blocks_0/proj_in/kernel", matches one of the patterns.

    Example:
        matches("blocks_0/proj_in/kernel", ("blocks_0/*",))  # True
    """
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def trained(params: Any, patterns: Sequence[str]) -> Any:
    """Returns the tree with each frozen parameter replaced by `optax.MaskedNode()`, which has no leaves.

    patterns: a parameter is frozen if its name, such as "blocks_0/proj_in/kernel", matches one of them by the rules of
    `fnmatch.fnmatchcase`, in which * also matches /.

    Raises ValueError in the same cases as `check_frozen`.

    Example:
        updates, opt_state = tx.update(grads, opt_state, trained(params, ("blocks_0/*",)))
    """
    if not patterns:
        return params
    check_frozen(params, patterns)

    def kept(path, leaf):
        return optax.MaskedNode() if matches(name_of(path), patterns) else leaf

    return jax.tree_util.tree_map_with_path(kept, params)


def with_frozen(moving: Any, params: Any) -> Any:
    """Returns all parameters: the trained ones from `moving`, a result of `trained`, and the frozen ones from `params`.

    Example:
        params = with_frozen(optax.apply_updates(trained(params, patterns), updates), params)
    """
    return jax.tree.map(
        lambda new, old: old if isinstance(new, optax.MaskedNode) else new,
        moving,
        params,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )


def _names(params: Any) -> list[str]:
    return [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def name_of(path: Any) -> str:
    """Returns the name, such as "blocks_0/proj_in/kernel", of the parameter at a path of a tree.

    path: a key path, as `jax.tree_util` returns it.

    Example:
        names = [name_of(path) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")
