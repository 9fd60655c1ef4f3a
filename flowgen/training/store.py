"""Checkpoints of one run: written in the background, committed whole, verified byte by byte when read.

<directory>/<step>/state/     orbax PyTree of numpy arrays by path, with digests.json: SHA-256 of each file
<directory>/<step>/meta/      orbax JSON: config, metrics, shape and dtype of each array, and its own SHA-256
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

Flat = dict[str, np.ndarray]
_DIGESTS = "digests.json"
_BLOCK = 1 << 24


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by path, such as "params/blocks_0/proj_in/kernel".

    Example:
        names = sorted(flatten(state))
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def check_layout(step: int, given: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises ValueError naming the arrays of a checkpoint that are not those expected, by path and shape.

    Example:
        check_layout(step, manifest["arrays"], layout(abstract_state))
    """
    wrong = [f"{name} is missing" for name in expected if name not in given]
    wrong += [f"{name} is not expected" for name in given if name not in expected]
    wrong += [
        f"{name} is {_shown(given[name])} instead of {_shown(expected[name])}"
        for name in expected
        if name in given and given[name] != expected[name]
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"Checkpoint {step} does not fit the model: {', '.join(wrong[:3])}{more}.")


def layout(tree: Any) -> dict[str, Any]:
    """Returns {path: [shape, dtype name]} of a tree of arrays or `jax.ShapeDtypeStruct`.

    Example:
        check_layout(step, manifest["arrays"], layout(abstract_state))
    """
    return {name: [list(leaf.shape), leaf.dtype.name] for name, leaf in flatten(tree).items()}


class CheckpointReader:
    """The finished checkpoints of a directory; writes nothing, so a run may be training into it.

    Example:
        reader = CheckpointReader("runs/digits/checkpoints")
        arrays = reader.arrays(reader.latest_step())
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).absolute()

    def steps(self) -> list[int]:
        """Returns the finished steps, ascending; unfinished saves carry a suffix and do not count."""
        if not self.directory.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.directory.iterdir() if entry.name.isdecimal())

    def latest_step(self) -> int | None:
        """Returns the latest finished step, or None."""
        return max(self.steps(), default=None)

    def meta(self, step: int) -> dict[str, Any]:
        """Returns what was saved beside the arrays: `config`, `metrics`, `arrays` (path: [shape, dtype]).

        Raises:
            ValueError: missing or damaged, naming the step.
        """
        try:
            meta = json.loads((self.directory / str(step) / "meta" / "metadata").read_bytes())
        except (OSError, ValueError) as error:
            raise self._damaged(step, "meta/metadata cannot be read") from error
        if not isinstance(meta, dict) or meta.pop("sha256", None) != _digest_of_json(meta):
            raise self._damaged(step, "meta/metadata has other content than was saved")
        return meta

    def arrays(self, step: int, choose: Callable[[str], bool] = lambda path: True) -> Flat:
        """Returns the saved arrays whose path is chosen, after comparing every file with its digest.

        Raises:
            ValueError: a file is missing, truncated or has other bytes than were written, naming file and step.
        """
        known = self.meta(step)["arrays"]
        directory = self.directory / str(step) / "state"
        self._verify(step, directory)
        chosen = {name: np.empty(shape, jnp.dtype(dtype)) for name, (shape, dtype) in known.items() if choose(name)}
        stored = {name: array for name, array in chosen.items() if array.size}
        restore = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in stored}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            read = checkpointer.restore(
                directory, args=ocp.args.PyTreeRestore(stored, restore_args=restore, partial_restore=True)
            )
        return {**chosen, **read}

    def restore(self, step: int, like: Any) -> Any:
        """Returns the state of a step as numpy arrays, in the tree of `like` (arrays or abstract ones).

        Raises:
            ValueError: damaged, or other arrays, shapes or dtypes than `like`.

        Example:
            state = reader.restore(reader.latest_step(), jax.eval_shape(make_state))
        """
        check_layout(step, self.meta(step)["arrays"], layout(like))
        read = self.arrays(step)
        return jax.tree.unflatten(jax.tree.structure(like), [read[name] for name in flatten(like)])

    def _verify(self, step: int, directory: Path) -> None:
        try:
            expected = json.loads((directory / _DIGESTS).read_bytes())
            found = _digests(directory)
        except (OSError, ValueError) as error:
            raise self._damaged(step, f"state/{_DIGESTS} cannot be read") from error
        if not isinstance(expected, dict):
            raise self._damaged(step, f"state/{_DIGESTS} cannot be read")
        for name in sorted(expected.keys() | found.keys()):
            if name not in found:
                raise self._damaged(step, f"state/{name} is missing")
            if expected.get(name) != found[name]:
                raise self._damaged(step, f"state/{name} has other bytes than were saved")

    def _damaged(self, step: int, what: str) -> ValueError:
        others = [other for other in self.steps() if other != step]
        fix = f"remove that folder to go on from step {others[-1]}" if others else "no other step is left"
        return ValueError(f"Checkpoint {step} in '{self.directory}' is damaged ({what}); {fix}.")


class CheckpointStore(CheckpointReader):
    """Saves in the background; keeps the latest `keep` steps and the one with the lowest `best_metric`.

    Opening it clears what a killed process left unfinished. `close` waits for the save under way.

    Example:
        with CheckpointStore("runs/digits/checkpoints", keep=3) as store:
            store.save(100, state, config=plain, metrics={"bits_per_dim": 2.1})
    """

    def __init__(self, directory: str | Path, *, keep: int = 3, best_metric: str = "bits_per_dim"):
        super().__init__(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._keep, self._best_metric = keep, best_metric
        self._scores = {step: self.meta(step)["metrics"].get(best_metric) for step in self.steps()}
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Preserve(self._preserved), cleanup_tmp_directories=True
            ),
            handler_registry=_handlers(),
        )

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(self, step: int, state: Any, *, config: Any, metrics: dict[str, float] | None = None) -> None:
        """Starts saving a tree of numpy arrays, which must not change until `wait`. Waits for the previous save.

        metrics that are not finite are left out.

        Raises:
            FloatingPointError: an array holds nan, or params, ema or optimizer state infinity; nothing is saved.
        """
        flat = {name: np.asarray(leaf) for name, leaf in flatten(state).items()}
        check_finite(step, flat)
        finite = {name: value for name, value in (metrics or {}).items() if np.isfinite(value)}
        meta = {"step": step, "config": config, "metrics": finite, "arrays": layout(flat)}
        self._scores[step] = finite.get(self._best_metric)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave({name: array for name, array in flat.items() if array.size}),
                meta=ocp.args.JsonSave({**meta, "sha256": _digest_of_json(meta)}),
            ),
        )

    def best(self) -> tuple[int, float] | None:
        """Returns (step, value) of the lowest `best_metric` among the steps kept, or None."""
        scored = [(value, -step) for step, value in self._scores.items() if value is not None]
        return (-min(scored)[1], min(scored)[0]) if scored else None

    def wait(self) -> None:
        """Returns when the save under way is committed; raises what went wrong in it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the threads."""
        self._manager.close()

    def _preserved(self, steps: Sequence[int]) -> set[int]:
        best = self.best()
        return {*sorted(steps)[-self._keep :], *([] if best is None else [best[0]])}


class _Preserve:
    """The orbax policy that asks the store which steps stay."""

    def __init__(self, preserved: Callable[[Sequence[int]], set[int]]):
        self._preserved = preserved

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self._preserved([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


class _VerifiedHandler(ocp.PyTreeCheckpointHandler):
    """The PyTree handler, which adds the digests after the last write and before the step is committed."""

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        path = Path(directory)
        (path / _DIGESTS).write_text(json.dumps(_digests(path), indent=0, sort_keys=True))


def _handlers() -> Any:
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handler = _VerifiedHandler()
    registry.add("state", ocp.args.PyTreeSave, handler)
    registry.add("state", ocp.args.PyTreeRestore, handler)
    registry.add("meta", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    return registry


def check_finite(step: int, flat: Flat) -> None:
    """Raises FloatingPointError naming the first array that a run cannot go on from.

    Carried state may hold infinities, such as the logarithm of a weight not yet seen.

    Example:
        check_finite(step, flatten(state))
    """
    for name, array in flat.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            continue
        bad = np.isnan(array) if name.startswith("collections/") else ~np.isfinite(array)
        if bad.any():
            raise FloatingPointError(f"{name} is not finite after step {step}, so it was not saved.")


def _digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / _DIGESTS)
    # Left out: a marker that some file systems get after the commit; it holds nothing.
    named = {path.relative_to(directory).as_posix(): path for path in files if path.name != "commit_success.txt"}
    return {name: _digest_of_file(path) for name, path in named.items()}


def _digest_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _digest_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _shown(entry: list[Any]) -> str:
    shape, dtype = entry
    return f"{dtype}{tuple(shape)}"
