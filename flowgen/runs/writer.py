"""Locks a run directory during training, and writes to it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from flowgen.data.inventory import Inventory
from flowgen.data.media import save_image
from flowgen.places import check_local
from flowgen.runs.directory import (
    CHECKPOINTS,
    CONFIG_FILE,
    DATA_FILE,
    PROFILE,
    SAMPLES,
    START_FILE,
    data_changes,
    write_config,
)
from flowgen.runs.files import remove_temporaries, write_bytes, write_json
from flowgen.runs.history import History
from flowgen.runs.lock import Place, RunLock
from flowgen.runs.metrics import MetricsLog, last_step
from flowgen.runs.mirror import Mirror
from flowgen.runs.progress import Progress
from flowgen.runs.store import CheckpointStore
from flowgen.runs.tracker import Tracker
from flowgen.runs.uploads import Uploads


class RunWriter:
    """Locks a run directory for one training process, and writes its config, checkpoints, metrics and samples.

    latest: the step of the latest checkpoint that the caller found in the directory; None if there was none. keep,
    best_metric: see `CheckpointStore`. mirror: for a run in a bucket, its local copy, whose path is `workdir`; all
    files that are written there are uploaded. None for other runs.

    Opening a writer creates the directory, acquires its lock and removes unfinished files that a killed process left
    behind. If something else removes the directory later, the next save creates it again and reports the loss.

    Raises:
        BlockingIOError: another process is training in the directory, or has trained there since `latest` was read.
        OSError: writing to the directory failed.

    Example:
        with RunWriter("runs/digits", keep=3, best_metric="bits_per_dim") as record:
            record.begin(config, first_step=0, last_step=1000, tensorboard=False, bar=True, tracker="none")
            record.save(1000, state)
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        latest: int | None = None,
        keep: int,
        best_metric: str,
        mirror: Mirror | None = None,
    ):
        check_local("the directory of a writer", workdir)
        self._mirror = mirror
        self.workdir = Path(workdir).absolute()  # stays valid if the process changes its directory
        self._shown = Path(workdir)
        self._keep, self._best_metric = keep, best_metric
        self._progress: Progress | None = None
        self._log: MetricsLog | None = None
        self._history: History | None = None
        self._tracker: Tracker | None = None
        self._step = 0
        self._config: dict[str, Any] = {}
        self._data: dict[str, Any] = {}
        self._waiting: list[str] = []
        self._uploads = None if mirror is None else Uploads(mirror, self._say)
        with _named(self._shown), self._released_on_error():
            self._had_checkpoints = (self.workdir / CHECKPOINTS).exists()
            self.workdir.mkdir(parents=True, exist_ok=True)
            self._lock, self._place = RunLock(self.workdir), Place(self.workdir)
            try:
                for folder in (self.workdir, self.workdir / SAMPLES):
                    remove_temporaries(folder)
                self.store = CheckpointStore(
                    self.workdir / CHECKPOINTS, keep=keep, best_metric=best_metric, say=self.say, uploads=self._uploads
                )
                self._folder = Place(self.workdir / CHECKPOINTS)
                if self.store.latest_step() != latest:
                    raise BlockingIOError(
                        f"another process has since trained in workdir {workdir}; run the command again."
                    )
            except BaseException:
                self._lock.release()
                raise

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            with ExitStack() as closing:  # each part is closed even if another one raises an error
                if self._uploads is not None:
                    closing.callback(self._uploads.close)
                if self._log is not None:
                    closing.callback(self._log.close)
                if self._tracker is not None:
                    closing.callback(self._tracker.close)
                if self._history is not None:
                    self._history.end(step=self._step, error="" if kind is None else kind.__name__)
                closing.callback(self.store.close)
        except OSError as error:
            if kind is None:
                raise
            self.say(str(error))  # the error that ended the run is already being raised
        finally:
            if self._progress is not None:
                self._progress.close()
            self._folder.close()
            self._place.close()
            self._lock.release()

    @contextmanager
    def _released_on_error(self) -> Generator[None]:
        try:
            yield
        except BaseException:
            if self._uploads is not None:
                self._uploads.close()
            raise

    def begin(
        self,
        config: dict[str, Any],
        *,
        first_step: int | None,
        last_step: int,
        tensorboard: bool,
        bar: bool,
        tracker: str,
    ) -> None:
        """Writes the config, deletes metrics of steps after `first_step`, and reports anything odd in the directory.

        first_step: the step from which the run resumes; None for a new run. last_step: the number of steps of the whole
        run. tensorboard: whether to write metrics and samples as TensorBoard events too. bar: see `Progress`. tracker:
        see `Tracker`.
        """
        self._progress = Progress(first_step=first_step or 0, last_step=last_step, bar=bar)
        self._step = first_step or 0
        with _named(self._shown):
            oddities = self._tell_of_oddities(first_step)
            self._config = config
            write_config(self.workdir, config)
            self._history = History(self.workdir, first_step=first_step)
            for line in oddities:
                self._history.warn(line, step=self._step)
            evaluated = first_step is not None and self.store.evaluation(first_step) is not None
            self._log = MetricsLog(
                self.workdir, first_step=first_step or 0, evaluated=evaluated, tensorboard=tensorboard
            )
        shown = self._shown if self._mirror is None else Path(self._mirror.url)
        self._tracker = Tracker(
            tracker, name=shown.name, identity=self._history.identity, config=config, warn=self._say_and_warn
        )
        if self._uploads is not None:
            self._uploads.send()

    def _tell_of_oddities(self, first_step: int | None) -> list[str]:
        """Reports anything unexpected in the directory, and returns the lines of this report."""
        lines, self._waiting = self._waiting, []
        if self._mirror is not None:
            self._say(f"Until they are uploaded to {self._mirror.url}, files are stored in {self._mirror.path}.")
        if not self._lock.protects:
            lines.append(f"{self._shown} is on a file system without locks; do not start another training run in it.")
        if first_step is not None and not (self.workdir / CONFIG_FILE).is_file():
            lines.append(f"{self._shown} has lost its {CONFIG_FILE}; it is recreated.")
        odd = self.store.passed_over()
        if odd:
            names = "; ".join(f"{name!r} ({why})" for name, why in list(odd.items())[:5])
            more = f"; and {len(odd) - 5} more" if len(odd) > 5 else ""
            lines.append(f"Ignored entries of {self._shown / CHECKPOINTS} that are not checkpoints: {names}{more}.")
        if first_step is None and (self.workdir / CONFIG_FILE).exists():
            gone = "has no checkpoint" if self._had_checkpoints else f"has lost its folder {CHECKPOINTS}"
            reached = last_step(self.workdir)
            told = f", though its metrics reach step {reached}" if reached else ""
            lines.append(f"{self._shown} {gone}{told}; training starts over at step 0.")
        for line in lines:
            self.say(line)
        return lines

    def describe_data(self, inventory: Inventory, *, resumed: bool) -> None:
        """Reports a summary of the data and, if the run is resumed, how the data have changed. Writes `data.json`."""
        self.say(inventory.line())
        if resumed and (changes := data_changes(self.workdir, inventory)):
            self.say(changes)
        self._data = inventory.record()
        with _named(self._shown):
            write_json(self.workdir / DATA_FILE, self._data)

    def describe_start(self, lines: Sequence[str]) -> None:
        """Shows lines that describe the origin of a new run's initial parameters, and writes them to `start.txt`."""
        for line in lines:
            self.say(line)
        with _named(self._shown):
            write_bytes(self.workdir / START_FILE, "".join(f"{line}\n" for line in lines).encode())

    def say(self, line: str) -> None:
        """Shows one line. Before `begin`, stores the line, which `begin` then shows."""
        self._say(line if self._mirror is None else self._mirror.told(line))

    def _say(self, line: str) -> None:
        if self._progress is None:
            self._waiting.append(line)
        else:
            self._progress.say(line)

    def warn(self, sentence: str) -> None:
        """Adds a warning to the run's history, without showing it."""
        assert self._history is not None
        with suppress(OSError):  # a full disk is reported by the next save
            self._history.warn(sentence if self._mirror is None else self._mirror.told(sentence), step=self._step)

    def _say_and_warn(self, sentence: str) -> None:
        self.say(sentence)
        self.warn(sentence)

    def advance(self, step: int) -> None:
        """Moves the progress bar, if there is one, to a step."""
        assert self._progress is not None
        self._step = step
        self._progress.advance(step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics of a step as one row, and sends them to the tracker."""
        assert self._log is not None
        assert self._tracker is not None
        with _named(self._shown):
            self._log.write(step, metrics)
        self._tracker.write(step, metrics)

    def show(self, step: int, metrics: dict[str, float], seconds_left: float | None) -> None:
        """Shows the metrics of a report; see `Progress.show`."""
        assert self._progress is not None
        self._progress.show(step, metrics, seconds_left)

    def draw(self, step: int, image: np.ndarray) -> Path | str:
        """Writes the sample grid of a step and returns its path, or its URL if the run is in a bucket."""
        assert self._log is not None
        assert self._tracker is not None
        with _named(self._shown):
            self._make_again(step)
            folder = self.workdir / SAMPLES
            folder.mkdir(exist_ok=True)
            save_image(folder / f"{step:07d}.png", image)
            self._log.draw(step, image)
        self._tracker.draw(step, image)
        path = folder / f"{step:07d}.png"
        return path if self._mirror is None else self._mirror.told(str(path))

    def profile_folder(self) -> Path:
        """Returns the folder for traces of training steps."""
        return self.workdir / PROFILE

    def save(self, step: int, state: Any) -> None:
        """Waits for the previous save, and then starts saving the state of a step."""
        self._wait()
        with _named(self._shown):
            self._make_again(step)
        self.store.save(step, state, config=self._config)

    def save_last(self, step: int, state: Any) -> None:
        """Saves the state of a step and waits until the save has finished. Raises OSError if saving fails."""
        for _ in range(2):  # the directory may be removed during the save
            self.save(step, state)
            self._wait()
            if self.holds(step):
                return
        raise OSError(
            f"Checkpoint {step} was saved in {self._shown} but has disappeared; find out what deletes files there."
        )

    def score(self, step: int, metrics: dict[str, float]) -> None:
        """Adds evaluation metrics to the checkpoint of a step, if this checkpoint still exists.

        Waits until the checkpoint is on this machine, but not for its upload.
        """
        self._wait(self.store.wait_for_disk)
        if self.holds(step):
            with _named(self._shown):
                self.store.score(step, metrics)

    def _wait(self, wait: Callable[[], None] | None = None) -> None:
        """Waits for the current save. Ignores its errors if the run's directories were removed or replaced."""
        try:
            (wait or self.store.wait)()
        except OSError:
            if self._is_there():
                raise

    def holds(self, step: int) -> bool:
        """Returns whether the directory is still the one that was opened, and contains the checkpoint of a step."""
        return self._is_there() and step in self.store.steps()

    def _is_there(self) -> bool:
        """Returns whether the run's directories are still those that were opened."""
        return self._place.is_same() and self._folder.is_same()

    def _make_again(self, step: int) -> None:
        """Recreates what was removed: the whole directory, or the config, metrics, checkpoints or lock in it."""
        assert self._log is not None
        if not self._place.is_same():
            self._check_empty(step)
            self.workdir.mkdir(parents=True, exist_ok=True)
            self._place.close()
            self._place = Place(self.workdir)
            self.say(
                f"{self._shown} was deleted or renamed during training; it is recreated, without its earlier "
                "checkpoints."
            )
        elif not self._folder.is_same():
            self.say(f"{self._shown / CHECKPOINTS} was deleted or renamed during training; it is recreated.")
        if not self._lock.holds():
            lost, self._lock = self._lock, RunLock(self.workdir)
            lost.release()
        if not self._folder.is_same():
            (self.workdir / CHECKPOINTS).mkdir(exist_ok=True)
            self._folder.close()
            self._folder = Place(self.workdir / CHECKPOINTS)
        if not (self.workdir / CONFIG_FILE).is_file():
            write_config(self.workdir, self._config)
        if self._data and not (self.workdir / DATA_FILE).is_file():
            write_json(self.workdir / DATA_FILE, self._data)
        self._log.restore(step)

    def _check_empty(self, step: int) -> None:
        """Raises FileExistsError if something else has replaced the directory."""
        if not self.workdir.exists():
            return
        # A save in progress may have recreated its folder.
        if not self.workdir.is_dir() or any(path.name != CHECKPOINTS for path in self.workdir.iterdir()):
            raise FileExistsError(
                f"workdir {self._shown} was replaced during training and now contains other files; step {step} could "
                "not be written."
            )


@contextmanager
def _named(workdir: Path) -> Generator[None]:
    """Returns a context that adds the path of the run to system errors. Other errors are raised unchanged."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:
            raise
        advice = "" if isinstance(error, PermissionError) else "free some space, or "
        raise type(error)(
            f"workdir {workdir} cannot be written to ({error.strerror}); {advice}give another directory (complete "
            "checkpoints are not affected)."
        ) from error
