"""Reads the complete checkpoints of a run and checks their files against digests.

<directory>/<step>/{params,ema,opt_state,other}/   orbax PyTrees of numpy arrays by path
<directory>/<step>/meta.json                       step, config, shape and dtype of each array, SHA-256 of each file
<directory>/<step>/evaluation.json                 metrics of the step, once it has been evaluated

meta.json is written last. A folder that lacks a file was therefore only partly copied or deleted, and is ignored. A
complete folder with a changed file is a damaged checkpoint. Reading a damaged checkpoint raises an error, because
silently resuming from an older one would hide the damage.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from flowgen.places import check_local
from flowgen.runs.arrays import Flat, check_layout, first_not_finite, flatten, group_of, layout, read_arrays
from flowgen.runs.files import DIGEST, digest_of_file, is_regular, is_temporary, read_json, verified

CHECKPOINTS = "checkpoints"  # the folder of a run that contains them
META = "meta.json"
EVALUATION = "evaluation.json"
_STEP = re.compile(r"0|[1-9][0-9]{0,17}")
# Suffixes of the folders of unfinished saves and deletions. Training removes these folders when it next opens the run.
SAVING, DELETED = "saving", "deleted"
# The reason why a checkpoint is not complete begins with one of these if it has lost files.
_BROKEN = ("it has no", "it lacks")
_LEFTOVER = re.compile(rf"[0-9]+\.({SAVING}|{DELETED})(-[0-9]+)?")


class CheckpointReader:
    """Reads the complete checkpoints of a directory.

    A reader writes nothing, so it can be used while a run is training in the directory.

    directory: the folder `checkpoints` of a run on this machine.
    fetch: for a run in a bucket, a function that downloads files to `directory`. It is called with their paths in
    `directory`, such as "300/params/_METADATA", before these files are read.

    Example:
        reader = CheckpointReader("runs/digits/checkpoints")
        arrays = reader.arrays(reader.latest_step())
    """

    def __init__(self, directory: str | Path, fetch: Callable[[Iterable[str]], None] = lambda names: None):
        check_local("the directory of checkpoints", directory)
        self.directory, self._fetch = Path(directory).absolute(), fetch

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, in ascending order. Ignores other entries."""
        return sorted(int(name) for name, why in self._entries().items() if why is None)

    def latest_step(self) -> int | None:
        """Returns the step of the latest complete checkpoint, or None if there is none."""
        return max(self.steps(), default=None)

    def passed_over(self) -> dict[str, str]:
        """Returns {name: reason} for the entries of the directory that are not complete checkpoints.

        Leaves out unfinished saves and deletions.
        """
        return {name: why for name, why in self._entries().items() if why is not None}

    def check_not_broken(self) -> None:
        """Raises ValueError if the directory contains checkpoints but all of them lack files.

        Example:
            CheckpointReader("runs/digits/checkpoints").check_not_broken()
        """
        entries = self._entries()
        broken = {name: why for name, why in entries.items() if why is not None and why.startswith(_BROKEN)}
        if broken and None not in entries.values():
            name, why = max(broken.items(), key=lambda item: int(item[0]))
            raise ValueError(
                f"No checkpoint in '{self.directory}' is complete ({name}: {why}); restore the checkpoints from a "
                "copy, or remove their folders to start over at step 0."
            )

    def meta(self, step: int) -> dict[str, Any]:
        """Returns the `manifest` of a step and, under "metrics", its `evaluation`, or {} if the step was not evaluated.

        Raises:
            ValueError: the checkpoint is missing or damaged, its evaluation is damaged, or one of the two belongs to
                another step.
        """
        return {**self.manifest(step), "metrics": self.evaluation(step) or {}}

    def manifest(self, step: int) -> dict[str, Any]:
        """Returns the metadata of a step's checkpoint, a dict that contains the following items, among others.

        step: the step. config: the experiment as plain JSON values. arrays: {path: [shape, dtype name]} for each array.
        files: {path: SHA-256 digest} for each file.

        Raises:
            ValueError: the checkpoint is missing or damaged, or belongs to another step; the message names the step.
        """
        meta = self._read_meta(step)
        if meta["step"] != step:
            raise ValueError(
                f"Checkpoint {step} in '{self.directory}' contains step {meta['step']}, so its folder was copied or "
                f"renamed; remove it{self._alternative(step)}."
            )
        return meta

    def was_trained(self) -> bool:
        """Returns True if training wrote the latest checkpoint; False if its weights were imported or there is none."""
        step = self.latest_step()
        return step is not None and "step" in self.manifest(step)["arrays"]

    def evaluation(self, step: int) -> dict[str, float] | None:
        """Returns the metrics of the evaluation of a step, or None if the step has not been evaluated.

        Raises:
            ValueError: the evaluation is damaged, or belongs to another checkpoint.
        """
        path = self.directory / str(step) / EVALUATION
        if not os.path.lexists(path):
            return None
        what = f"; remove {EVALUATION} and run the training command again to repeat the evaluation"
        try:
            saved = verified(read_json(path))
        except (OSError, ValueError) as error:
            raise ValueError(f"Checkpoint {step} in '{self.directory}' has a damaged {EVALUATION}{what}.") from error
        if saved.get("step") != step or saved.get("of") != self._read_meta(step)[DIGEST]:
            raise ValueError(
                f"Checkpoint {step} in '{self.directory}' has the {EVALUATION} of another checkpoint{what}."
            )
        return saved["metrics"]

    def arrays(self, step: int, choose: Callable[[str], bool] = lambda path: True) -> Flat:
        """Returns the saved arrays of a step whose paths `choose` accepts, after checking the digests of their files.

        Raises:
            ValueError: a file is missing, truncated or changed; the message names the file and the step.
        """
        meta = self.manifest(step)
        chosen = {path: entry for path, entry in meta["arrays"].items() if choose(path)}
        groups = sorted({group_of(path) for path in chosen})
        self._fetch(f"{step}/{name}" for name in meta["files"] if name.partition("/")[0] in groups)
        for group in groups:
            self._verify(step, group, meta["files"])
        return read_arrays(self.directory / str(step), chosen)

    def restore(self, step: int, like: Any) -> Any:
        """Returns the state of a step as numpy arrays in the structure of `like`, a tree of (abstract) arrays.

        Raises:
            ValueError: the checkpoint is missing or damaged, belongs to another step, or does not fit `like`.

        Example:
            state = reader.restore(reader.latest_step(), jax.eval_shape(make_state))
        """
        check_layout(self._name_of(step), self.manifest(step)["arrays"], layout(like))
        read = self.arrays(step)
        if "step" in read and read["step"].ndim == 0 and int(read["step"]) != step:
            raise self._damaged(step, f"its arrays belong to step {int(read['step'])}")
        return jax.tree.unflatten(jax.tree.structure(like), [read[name] for name in flatten(like)])

    def variables(self, step: int, params: Any, *, ema: bool = True) -> dict[str, Any]:
        """Returns a step's weights as "params", and its other Flax collections under their names.

        The weights are the averaged ones if `ema` is true and averaged weights were saved, and otherwise the latest
        ones. Does not read the optimizer's state.

        params: the expected weights, as a tree of (abstract) arrays.

        Raises:
            ValueError: the checkpoint is missing or damaged, belongs to another step, does not fit `params`, or has
                weights that are not finite.

        Example:
            variables = reader.variables(step, jax.eval_shape(lambda: flowgen.init(flow, key))["params"])
        """
        group = self._group(step, ema)
        saved = self.manifest(step)["arrays"]
        given = {path.removeprefix(f"{group}/"): x for path, x in saved.items() if path.startswith(f"{group}/")}
        check_layout(self._name_of(step), _widened(given), layout(params))
        tree = traverse_util.unflatten_dict(self.weights(step, ema=ema), sep="/")
        return {"params": tree["params"], **tree.get("collections", {})}

    def weights(self, step: int, *, ema: bool = True) -> Flat:
        """Returns the arrays of `variables` by path ("params/..." or "collections/..."), without checking their shapes.

        Raises:
            ValueError: the checkpoint is missing or damaged, belongs to another step, or has weights that are not
                finite.
        """
        group = self._group(step, ema)
        arrays = self.arrays(step, lambda path: path.startswith((f"{group}/", "collections/")))
        if (name := first_not_finite(arrays)) is not None:
            raise ValueError(
                f"{self._name_of(step)} has values in {name} that are not finite, so it cannot be used; give another."
            )
        own = f"{group}/"
        return {f"params/{path.removeprefix(own)}" if path.startswith(own) else path: x for path, x in arrays.items()}

    def is_averaged(self, step: int) -> bool:
        """Returns whether averaged weights were saved at a step."""
        return any(path.startswith("ema/") for path in self.manifest(step)["arrays"])

    def _group(self, step: int, ema: bool) -> str:
        """Returns the group of arrays that `variables` reads as weights."""
        return "ema" if ema and self.is_averaged(step) else "params"

    def _name_of(self, step: int) -> str:
        """Returns what error messages call the weights of a step."""
        return f"Checkpoint {step}"

    def _entries(self) -> dict[str, str | None]:
        """Returns, for each entry of the directory, why it is not a complete checkpoint, or None if it is one."""
        if not self.directory.is_dir():
            return {}
        entries = sorted(self.directory.iterdir())
        ours = [entry for entry in entries if not _LEFTOVER.fullmatch(entry.name) and not is_temporary(entry.name)]
        return {entry.name: self._why_not(entry) for entry in ours}

    def _why_not(self, entry: Path) -> str | None:
        try:
            return self._unwhole(entry)
        except OSError as error:
            return f"it cannot be read ({error.strerror})"

    def _unwhole(self, entry: Path) -> str | None:
        if not _STEP.fullmatch(entry.name):
            return "its name is not a step number"
        if entry.is_symlink():
            return "it is a link"
        if not entry.is_dir():
            return "it is not a folder"
        if not os.path.lexists(entry / META):
            return f"{_BROKEN[0]} {META}" if any(entry.iterdir()) else "it is empty"
        try:
            files = self._read_meta(int(entry.name))["files"]
        except ValueError:
            return None  # damaged but complete, so reading it raises an error
        gone = [name for name in files if not os.path.lexists(entry / name)]
        return f"{_BROKEN[1]} {gone[0]}" if gone else None

    def _read_meta(self, step: int) -> dict[str, Any]:
        try:
            saved = read_json(self.directory / str(step) / META)
            meta = verified(saved)
        except OSError as error:
            raise self._damaged(step, f"{META} cannot be read") from error
        except ValueError as error:
            raise self._damaged(step, f"{META} has changed since it was saved") from error
        if not _is_meta(meta):
            raise self._damaged(step, f"{META} was not written by flowgen")
        return {**meta, DIGEST: saved[DIGEST]}

    def _verify(self, step: int, group: str, files: dict[str, str]) -> None:
        directory = self.directory / str(step)
        expected = {name: digest for name, digest in files.items() if name.startswith(f"{group}/")}
        found = {path.relative_to(directory).as_posix() for path in (directory / group).rglob("*") if not path.is_dir()}
        for name in sorted(expected.keys() | found):
            if name not in found:
                raise self._damaged(step, f"{name} is missing")
            if name not in expected:
                if _is_of_the_system(name):
                    continue
                raise ValueError(
                    f"Checkpoint {step} in '{self.directory}' has a file that was not saved with it; remove {name}."
                )
            if not is_regular(directory / name):
                raise self._damaged(step, f"{name} is not a regular file")
            try:
                same = digest_of_file(directory / name) == expected[name]
            except OSError as error:
                raise self._damaged(step, f"{name} cannot be read") from error
            if not same:
                raise self._damaged(step, f"{name} has changed since it was saved")

    def _alternative(self, step: int) -> str:
        others = [other for other in self.steps() if other != step]
        return f" to resume from step {others[-1]}" if others else ""

    def _damaged(self, step: int, what: str) -> ValueError:
        # The other steps are found without reading their checkpoints, which may also be damaged.
        names = [path.name for path in self.directory.iterdir()] if self.directory.is_dir() else []
        others = [int(name) for name in names if _STEP.fullmatch(name) and int(name) != step]
        fix = f"remove that folder to resume from step {max(others)}" if others else "restore it from a copy"
        return ValueError(f"Checkpoint {step} in '{self.directory}' is damaged ({what}); {fix}.")


def leftovers(directory: Path) -> list[Path]:
    """Returns the paths that interrupted saves and deletions left in a directory of checkpoints.

    Example:
        for path in leftovers(Path("runs/digits/checkpoints")): ...
    """
    return [path for path in directory.iterdir() if _LEFTOVER.fullmatch(path.name)] if directory.is_dir() else []


def _widened(arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns a layout in which float32 replaces bfloat16, the dtype of some imported weights."""
    return {path: [shape, "float32" if dtype == "bfloat16" else dtype] for path, (shape, dtype) in arrays.items()}


def _is_of_the_system(name: str) -> bool:
    """Returns whether a name is that of a file added by desktop systems, such as .DS_Store."""
    return PurePosixPath(name).name.startswith(".") or PurePosixPath(name).name in ("Thumbs.db", "desktop.ini")


def _is_meta(meta: dict[str, Any]) -> bool:
    arrays, files = meta.get("arrays"), meta.get("files")
    return (
        type(meta.get("step")) is int
        and isinstance(arrays, dict)
        and all(_is_entry(entry) for entry in arrays.values())
        and isinstance(files, dict)
        and all(isinstance(digest, str) and _is_inside(name) for name, digest in files.items())
    )


def _is_entry(entry: Any) -> bool:
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], list) and isinstance(entry[1], str)):
        return False
    try:
        jax.numpy.dtype(entry[1])
    except TypeError:
        return False
    return all(type(size) is int and size >= 0 for size in entry[0])


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def finite(metrics: dict[str, float] | None) -> dict[str, float]:
    """Returns the finite metrics, as Python floats.

    Example:
        finite({"loss": 1.0, "bits_per_dim": float("nan")}) == {"loss": 1.0}
    """
    return {name: float(value) for name, value in (metrics or {}).items() if np.isfinite(value)}
