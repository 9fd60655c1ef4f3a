"""Writes the checkpoints of a run in the background.

A folder gets the name of its step only when all of its files are on disk. It is renamed before it is deleted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flowgen.runs.arrays import Flat, check_finite, flatten, layout, write_arrays
from flowgen.runs.checkpoints import DELETED, EVALUATION, META, SAVING, CheckpointReader, finite, leftovers
from flowgen.runs.files import DIGEST, digest_of_file, remove_temporaries, signed, sync, write_json
from flowgen.runs.uploads import Uploads

# The number of attempts to remove the files of a failed save, and the number of seconds between attempts.
_SETTLING, _PAUSE = 40, 0.05


class CheckpointStore(CheckpointReader):
    """Saves checkpoints in the background, and deletes old ones.

    Keeps the checkpoints of the latest `keep` steps, and the checkpoint with the lowest value of the metric
    `best_metric`. Opening a store removes unfinished files that a killed process left behind.

    directory: the folder `checkpoints` of a run. say: a function that is called with a line of text about each entry of
    the directory that is damaged, is renamed or cannot be deleted. uploads: for a run in a bucket, an object that
    uploads each checkpoint, and then its evaluation, in the background; None for other runs. The next save waits for
    the upload.

    Example:
        with CheckpointStore("runs/digits/checkpoints", keep=3) as store:
            store.save(100, state, config=plain)
            store.score(100, {"bits_per_dim": 2.1})
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 3,
        best_metric: str = "bits_per_dim",
        say: Callable[[str], None] = lambda line: None,
        uploads: Uploads | None = None,
    ):
        super().__init__(directory)
        self._keep, self._best_metric, self._say, self._uploads = keep, best_metric, say, uploads
        self._thread: threading.Thread | None = None  # does the last work; it first waits for the work before
        self._on_disk = threading.Event()  # whether the current save is on this machine
        self._error: Exception | None = None
        self._failed = False
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in leftovers(self.directory):
            _remove(path)
        self._scores = {step: self._score_of(step) for step in self.steps()}
        for step in self._scores:
            remove_temporaries(self.directory / str(step))
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._unraisable

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(self, step: int, state: Any, *, config: Any, metrics: dict[str, float] | None = None) -> None:
        """Waits for the previous save, and then starts saving `state`, a tree of numpy arrays, as a checkpoint.

        The arrays must not change until `wait` returns.

        config: the experiment as plain JSON values. metrics: the metrics of an evaluation at this step; None if there
        was none. They can also be added later, with `score`.

        Raises:
            FloatingPointError: an array contains NaN, or params, ema or opt_state contain infinity; nothing is saved.
            OSError: the previous save failed.
        """
        self.wait()
        flat = {name: np.asarray(leaf) for name, leaf in flatten(state).items()}
        check_finite(step, flat)
        meta = {"step": step, "config": config, "arrays": layout(flat)}
        self._on_disk = threading.Event()
        self._start(step, lambda: self._write(step, flat, meta, metrics))

    def score(self, step: int, metrics: dict[str, float]) -> None:
        """Adds evaluation metrics to a saved step, which may then become the best one.

        If the step is still being saved, this call waits until the checkpoint is on this machine. Leaves out non-finite
        metrics.
        """
        self.wait_for_disk()
        _write_evaluation(self.directory / str(step), step, self._read_meta(step)[DIGEST], metrics)
        if self._uploads is None:
            self._count(step, metrics)
        else:
            self._start(step, lambda: self._upload_score(step, metrics))

    def best(self) -> tuple[int, float] | None:
        """Returns (step, value) for the kept step with the lowest `best_metric`, or None if no kept step has one."""
        scored = [(value, -step) for step, value in self._scores.items() if value is not None]
        return (-min(scored)[1], min(scored)[0]) if scored else None

    def wait(self) -> None:
        """Waits for all saves and uploads. Raises OSError with the reason if one of them failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait_for_disk(self) -> None:
        """Waits until the current save is on this machine, but not for its upload. Raises the errors of `wait`."""
        if self._uploads is not None and self._thread is not None:
            self._on_disk.wait()
        if self._uploads is None or self._error is not None:
            self.wait()

    def close(self) -> None:
        """Waits for all saves and uploads. Raises the errors of `wait`."""
        try:
            self.wait()
        finally:
            # After a failure, other writes may still be running. Their messages are dropped until the process ends.
            if sys.unraisablehook == self._unraisable and not self._failed:
                sys.unraisablehook = self._hook

    def _unraisable(self, odd: Any) -> None:
        """Ignores tensorstore's errors about writes that end after another write has failed."""
        if not (isinstance(odd.exc_value, RuntimeError) and "Event loop is closed" in str(odd.exc_value)):
            self._hook(odd)

    def _start(self, step: int, work: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=self._try, args=(self._thread, step, work), name="flowgen-save")
        self._thread.start()

    def _try(self, before: threading.Thread | None, step: int, work: Callable[[], None]) -> None:
        if before is not None:
            before.join()
        if self._error is not None:
            return
        try:
            work()
        except (OSError, ValueError, RuntimeError) as error:  # tensorstore raises the last two for disk errors
            self._failed = True
            latest = self.latest_step()
            goes_on = (
                f"checkpoint {latest} is unchanged, and the same command resumes from it"
                if latest is not None
                else "there is no earlier checkpoint, so the same command starts from step 0"
            )
            self._error = OSError(
                f"Checkpoint {step} could not be saved in '{self.directory}' ({_reason(error)}); {goes_on}."
            )
            self._error.__cause__ = error
        finally:
            self._on_disk.set()

    def _write(self, step: int, flat: Flat, meta: dict[str, Any], metrics: dict[str, float] | None) -> None:
        unfinished = _free(self.directory / f"{step}.{SAVING}")
        unfinished.mkdir()
        try:
            write_arrays(unfinished, flat)
            files = [path for path in sorted(unfinished.rglob("*")) if path.is_file()]
            for path in files:
                sync(path)
            digests = {path.relative_to(unfinished).as_posix(): digest_of_file(path) for path in files}
            whole = signed({**meta, "files": digests})
            write_json(unfinished / META, whole)
            if metrics is not None:
                _write_evaluation(unfinished, step, whole[DIGEST], metrics)
            self._make_way(self.directory / str(step))
            os.rename(unfinished, self.directory / str(step))
        except BaseException:
            _remove_settled(unfinished)
            raise
        sync(self.directory)
        if self._uploads is not None:
            self._on_disk.set()
            self._uploads.save(step)
            if metrics is not None:
                self._uploads.score(step)
        self._count(step, metrics)

    def _upload_score(self, step: int, metrics: dict[str, float]) -> None:
        assert self._uploads is not None
        self._uploads.score(step)
        self._count(step, metrics)

    def _count(self, step: int, metrics: dict[str, float] | None) -> None:
        """Records the `best_metric` of a step, and deletes old checkpoints."""
        self._scores[step] = finite(metrics).get(self._best_metric)
        self._retire(step)

    def _score_of(self, step: int) -> float | None:
        try:
            self.manifest(step)
        except ValueError as error:
            self._say(str(error))
            return None
        path = self.directory / str(step) / EVALUATION
        try:
            return (self.evaluation(step) or {}).get(self._best_metric)
        except ValueError:
            aside = _free(path.with_name(f"{EVALUATION}.aside"))
            os.rename(path, aside)
            self._say(
                f"{path} is damaged or belongs to another checkpoint; it was renamed to {aside.name}, and step {step} "
                "counts as not evaluated."
            )
            return None

    def _make_way(self, path: Path) -> None:
        """Deletes the checkpoint at a path, or renames any other entry there."""
        if not os.path.lexists(path):
            return
        if self._why_not(path) is None:
            aside = _free(path.with_name(f"{path.name}.{DELETED}"))
            os.rename(path, aside)
            _remove(aside)
        else:
            aside = _free(path.with_name(f"{path.name}.aside"))
            os.rename(path, aside)
            self._say(f"{path} is not a checkpoint; it was renamed to {aside.name}.")

    def _retire(self, current: int) -> None:
        """Deletes this run's checkpoints, except the latest ones, the best one and the current one.

        Does not touch entries that other programs put into the directory.
        """
        steps = [step for step in self.steps() if step in self._scores]
        self._scores = {step: self._scores[step] for step in steps}
        best = self.best()
        kept = {current, *steps[-self._keep :], *([] if best is None else [best[0]])}
        for step in steps:
            if step not in kept:
                # The folder is renamed first, so that an interrupted deletion leaves nothing that looks like a
                # checkpoint.
                gone = _free(self.directory / f"{step}.{DELETED}")
                try:
                    os.rename(self.directory / str(step), gone)
                except OSError as error:
                    self._say(f"Checkpoint {step} could not be deleted ({error.strerror}), so it is kept.")
                    continue
                self._scores.pop(step, None)
                _remove(gone)
                if self._uploads is not None:
                    self._uploads.delete(step)


def _write_evaluation(folder: Path, step: int, of: str, metrics: dict[str, float]) -> None:
    write_json(folder / EVALUATION, signed({"step": step, "of": of, "metrics": finite(metrics)}))


def _free(path: Path) -> Path:
    """Returns the path, with a number appended if it already exists."""
    number, free = 0, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _remove(path: Path) -> None:
    """Removes a folder, link or file. Leaves files that cannot be removed from a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_settled(path: Path) -> None:
    """Removes the folder of a failed save; tries again if other writes of that save are still adding files."""
    for _ in range(_SETTLING):
        _remove(path)
        time.sleep(_PAUSE)
        if not os.path.lexists(path):
            return


def _reason(error: Exception) -> str:
    """Returns a short reason for a failed write, taken from an error raised by the system or tensorstore."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    code = re.search(r"os_error_code='([0-9]+)'", text)
    return os.strerror(int(code.group(1))) if code else json.dumps(text[:200])[1:-1]
