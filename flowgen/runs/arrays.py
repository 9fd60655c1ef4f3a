"""Reads and writes the numpy arrays of a training state with orbax. Each process does so independently."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

Flat = dict[str, np.ndarray]
# Parts of a state that are stored in separate folders, so that each can be read without verifying the others.
GROUPS = ("params", "ema", "opt_state")
REST = "other"


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree in a dictionary with paths as keys, such as "params/blocks_0/proj_in/kernel".

    Example:
        names = sorted(flatten(state))
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def layout(tree: Any) -> dict[str, Any]:
    """Returns {path: [shape, dtype name]} for a tree of arrays or `jax.ShapeDtypeStruct`.

    Example:
        check_layout("Checkpoint 7", manifest["arrays"], layout(abstract_state))
    """
    return {name: [list(leaf.shape), leaf.dtype.name] for name, leaf in flatten(tree).items()}


def check_layout(name: str, given: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises ValueError unless two layouts are equal; the message lists up to three differences. See `layout`.

    name: the subject of the message, such as "Checkpoint 7".
    given: the layout of the saved arrays. expected: the layout of the arrays of the model.

    Example:
        check_layout("Checkpoint 7", manifest["arrays"], layout(abstract_state))
    """
    wrong = [f"{path} is missing" for path in expected if path not in given]
    wrong += [f"{path} is not expected" for path in given if path not in expected]
    wrong += [
        f"{path} is {_shown(given[path])} instead of {_shown(expected[path])}"
        for path in expected
        if path in given and given[path] != expected[path]
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{name} does not fit the model: {', '.join(wrong[:3])}{more}.")


def check_finite(step: int, flat: Flat) -> None:
    """Raises FloatingPointError if `first_not_finite` finds an array; the message contains its path.

    Example:
        check_finite(step, flatten(state))
    """
    if (name := first_not_finite(flat)) is not None:
        raise FloatingPointError(f"{name} is not finite after step {step}, so no checkpoint was saved.")


def first_not_finite(flat: Flat) -> str | None:
    """Returns the path of the first array that contains NaN or infinity, or None if there is none.

    Carried state ("collections/...") may contain infinities: the logarithm of a running mean that is still 0 is -inf.

    Example:
        first_not_finite({"params/w": np.array([np.nan])})  # "params/w"
    """
    for name, array in flat.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            continue
        bad = np.isnan(array) if name.startswith("collections/") else ~np.isfinite(array)
        if bad.any():
            return name
    return None


def group_of(path: str) -> str:
    """Returns the name of the folder in which the array with this path is stored.

    Example:
        group_of("ema/blocks_0/proj_in/kernel") == "ema"
    """
    first = path.split("/", 1)[0]
    return first if first in GROUPS else REST


def write_arrays(directory: Path, flat: Flat) -> None:
    """Writes each group of arrays to a new folder; see `group_of`. Raises ValueError or OSError if writing fails.

    Example:
        write_arrays(Path("300.saving"), flatten(state))
    """
    groups: dict[str, Flat] = {}
    for path, array in flat.items():
        if array.size:
            groups.setdefault(group_of(path), {})[path] = array
    for group, arrays in groups.items():
        with _orbax() as checkpointer:
            checkpointer.save(directory / group, args=ocp.args.PyTreeSave(arrays))


def read_arrays(directory: Path, chosen: dict[str, Any]) -> Flat:
    """Reads the arrays listed in `chosen`, a layout {path: [shape, dtype name]}.

    Example:
        arrays = read_arrays(Path("checkpoints/300"), {"params/w": [[3], "float32"]})
    """
    read = {path: np.empty(shape, jnp.dtype(dtype)) for path, (shape, dtype) in chosen.items()}
    for group in {group_of(path) for path, array in read.items() if array.size}:
        stored = {path: array for path, array in read.items() if array.size and group_of(path) == group}
        restore = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in stored}
        with _orbax() as checkpointer:
            read |= checkpointer.restore(
                directory / group, args=ocp.args.PyTreeRestore(stored, restore_args=restore, partial_restore=True)
            )
    return read


@contextlib.contextmanager
def _orbax() -> Generator[ocp.Checkpointer]:
    """Yields a checkpointer for this process only, which neither waits for other processes nor logs errors."""
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"flowgen-{here}"
    )
    log = logging.getLogger("absl")
    log.addFilter(_is_not_of_orbax)
    try:
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            yield checkpointer
    finally:
        log.removeFilter(_is_not_of_orbax)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """Returns False for log messages of orbax, most of which repeat errors that orbax also raises."""
    return "orbax" not in record.pathname


def _shown(entry: list[Any]) -> str:
    shape, dtype = entry
    return f"{dtype}{tuple(shape)}"
