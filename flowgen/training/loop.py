"""The one training loop. It knows steps, checkpoints and reports; what is trained comes in a `Job`."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flowgen.data.media import save_image
from flowgen.documents import read_json
from flowgen.training.metrics import MetricsLog, Silence, check_packages
from flowgen.training.options import LogConfig, OptimConfig, TrainConfig
from flowgen.training.parallel import DataParallel, barrier, from_primary, is_primary, largest
from flowgen.training.step import Objective, Step, TrainState, init_state, make_step
from flowgen.training.store import CheckpointReader, CheckpointStore

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
# Steps that may be queued on the device: enough to keep it busy while the host prepares the next.
STEPS_AHEAD = 2
# Steps after which several processes ask each other for a signal; asking waits for the step under way.
AGREE_EVERY = 8


@dataclass(frozen=True)
class Job:
    """What the loop needs to train something.

    init(key) -> variables. objective: see `make_step`. batches(start, stop) -> this process's batches of steps
    start..stop-1. evaluate(variables) -> metrics, of which the checkpoint with the lowest `best_metric` is kept.
    sample(variables) -> uint8 picture `height width 3`. optims: of parts of the parameters that have an optimizer of
    their own, by their names at the top.
    """

    init: Callable[[jax.Array], Any]
    objective: Objective
    batches: Callable[[int, int], Iterator[Any]]
    evaluate: Callable[[Any], dict[str, float]] | None = None
    sample: Callable[[Any], np.ndarray] | None = None
    best_metric: str = "bits_per_dim"
    optims: Mapping[str, OptimConfig] = field(default_factory=dict)


class Result(NamedTuple):
    """How a run ended.

    state: unreplicated numpy arrays. metrics: the last evaluation. samples: path of the last sample grid or
    None. signal: number of the signal that stopped the run, 0 if it finished.
    """

    state: TrainState
    metrics: dict[str, float]
    samples: Path | None
    signal: int


def train(
    job: Job,
    workdir: str | Path,
    *,
    optim: OptimConfig,
    train: TrainConfig,
    log: LogConfig,
    config: dict[str, Any],
    check_config: Callable[[dict[str, Any]], None],
) -> Result:
    """Returns the result of a run in `workdir`, resumed if there is a checkpoint.

    config: JSON saved with the run. check_config(saved config): raises ValueError where a run that was begun
    with it cannot be resumed as it is asked for now.
    A run that is stopped (SIGINT, SIGTERM or killed) and resumed ends with bitwise the same state as one that
    was not, on the same number of devices.

    Raises:
        ValueError: a batch that cannot be shared, a config that does not fit, a damaged checkpoint.
        FileExistsError, OSError: a workdir that holds something else or cannot be written.
        FloatingPointError: loss or gradient is not finite; names the step, checkpoints stay good.

    Example:
        result = train(job, "runs/digits", optim=optim, train=train, log=log, config={}, check_config=print)
    """
    parallel = DataParallel()
    parallel.check_batch(train)
    check_packages(log)
    step = make_step(job.objective, optim, steps=train.steps, accumulation=train.accumulation, others=job.optims)
    workdir = Path(workdir)
    reader = CheckpointReader(workdir / CHECKPOINTS)
    latest = reader.latest_step()
    if latest is not None and latest > train.steps:
        raise ValueError(f"{workdir} has {latest} steps already, above train.steps {train.steps}; raise it.")
    check_workdir(workdir, check_config)
    init_key, step_key = jax.random.split(jax.random.key(train.seed))

    def initial() -> TrainState:
        return init_state(job.init(init_key), optim, train.steps, job.optims)

    state = initial() if latest is None else reader.restore(latest, jax.eval_shape(initial))
    open_workdir(workdir, config)
    with CheckpointStore(workdir / CHECKPOINTS, keep=log.keep, best_metric=job.best_metric) as store:
        run = _Run(
            job, workdir, store, log, config, parallel, steps=train.steps, first=latest, max_skips=optim.max_skips
        )
        try:
            return run.train(parallel.compile(step), state, step_key)
        finally:
            run.log.close()


def check_workdir(workdir: Path, check_config: Callable[[dict[str, Any]], None]) -> None:
    """Raises where a directory holds something else than a run with this config; writes nothing.

    Example:
        check_workdir(Path("runs/digits"), experiment.check_resumable)
    """
    if (workdir / CONFIG_FILE).exists():
        try:
            check_config(read_config(workdir))
        except ValueError as error:
            raise ValueError(f"workdir {workdir}: {error}") from error
    elif workdir.exists() and (not workdir.is_dir() or any(path != _temporary(workdir) for path in workdir.iterdir())):
        raise FileExistsError(f"workdir {workdir} holds files but no flowgen run; give a new or empty directory.")
    barrier("flowgen: workdir checked")  # The first file of one process would look foreign to another.


def open_workdir(workdir: Path, config: dict[str, Any]) -> None:
    """Makes the run's directory and writes its config; OSError names a directory that cannot be written.

    Example:
        open_workdir(Path("runs/digits"), experiment.to_json())
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if is_primary():
            write_config(workdir, config)
    except OSError as error:
        raise OSError(f"workdir {workdir} cannot be written ({error.strerror}); give another directory.") from error


def read_config(run_dir: str | Path) -> dict[str, Any]:
    """Returns the JSON of a run's config; FileNotFoundError or ValueError say what the directory is instead.

    Example:
        read_config("runs/digits")["model"]
    """
    path = Path(run_dir) / CONFIG_FILE
    if not Path(run_dir).is_dir():
        raise FileNotFoundError(f"checkpoint {run_dir} is not a directory; give the --workdir of a training run.")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {run_dir} is not a flowgen run (it has no {CONFIG_FILE}).")
    config = read_json(path, fix="restore it or train again")
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no config; restore it or train again.")
    return config


def write_config(run_dir: str | Path, config: dict[str, Any]) -> None:
    """Writes a run's config, atomically.

    Example:
        write_config("runs/digits", experiment.to_json())
    """
    temporary = _temporary(Path(run_dir))
    temporary.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(temporary, Path(run_dir) / CONFIG_FILE)


def _temporary(run_dir: Path) -> Path:
    """Where a config is written before it is whole; a run killed there has nothing else."""
    return run_dir / f"{CONFIG_FILE}.tmp"


class _Run:
    """What the loop remembers beside the state of the training."""

    def __init__(
        self,
        job: Job,
        workdir: Path,
        store: CheckpointStore,
        config: LogConfig,
        saved_config: dict[str, Any],
        parallel: DataParallel,
        *,
        steps: int,
        first: int | None,
        max_skips: int,
    ):
        self.job, self.workdir, self.store = job, workdir, store
        self.config, self.saved_config, self.parallel = config, saved_config, parallel
        self.steps, self.first, self.saved, self.max_skips = steps, first or 0, first, max_skips
        self.log = MetricsLog(workdir, config, first_step=self.first, last_step=steps) if is_primary() else Silence()
        self.pending: list[tuple[int, Any]] = []
        self.since = time.perf_counter()
        self.metrics: dict[str, float] = {}
        self.samples: Path | None = None
        self.signal = 0
        self.told = False

    def train(self, update: Step, state: TrainState, key: jax.Array) -> Result:
        state = self.parallel.replicate(state)
        key = self.parallel.replicate_key(key)
        if self.first == self.steps:
            self.metrics = self.store.meta(self.first)["metrics"]
            self.log.say(f"{self.workdir} has all of its {self.steps} steps already; raise train.steps to go on.")
        elif self.first:
            self.log.say(f"Resuming {self.workdir} from step {self.first}.")
        batches = self.job.batches(self.first, self.steps)
        step = self.first
        with _Signals() as signals:
            for batch in batches:
                state, metrics = update(state, self.parallel.shard(batch), key)
                step += 1
                self.pending.append((step, metrics))
                self.wait_for_all_but(0 if self.parallel.must_wait else STEPS_AHEAD)
                self.log.advance(step)
                if signals.number and not self.told:
                    self.told = True
                    self.log.say(f"Stopping after step {step} and saving; a second signal ends without saving.")
                if self.told_to_stop(step, signals.number):
                    break
                if step < self.steps:
                    self.due(step, state)
        close = getattr(batches, "close", None)
        if close is not None:
            close()
        finished = step == self.steps
        if finished:
            self.report(step)
        try:
            if finished:
                self.signal = self.finish(step, state)
        finally:
            # Whatever fails in the last evaluation or in drawing, what was trained is kept.
            if self.saved != step:
                self.save(step, state, self.metrics if finished else {})
            self.store.wait()
        return Result(self.parallel.to_host(state), self.metrics, self.samples, self.signal)

    def finish(self, step: int, state: TrainState) -> int:
        """Evaluates and draws after the last step; returns the signal that cut this short, or 0."""
        # Processes that evaluate together must not be parted.
        with _Signals(interrupt=jax.process_count() == 1) as signals:
            try:
                if self.first < step or not self.metrics:
                    if self.job.evaluate is not None:
                        self.log.say(f"step {step}: evaluating")
                    self.evaluate(step, state)
                self.draw(step, state)
            except _Interrupted:
                self.log.say("Stopping without the last evaluation or its samples, and saving.")
                return signals.number
        return 0

    def wait_for_all_but(self, ahead: int) -> None:
        """Waits until at most `ahead` steps are queued, so that the bar tells the truth and a stop is prompt."""
        if len(self.pending) > ahead:
            jax.block_until_ready(self.pending[-1 - ahead][1])

    def told_to_stop(self, step: int, number: int) -> bool:
        """Whether a signal came; of several processes all stop at the same step, whichever of them it reached."""
        if jax.process_count() > 1:
            number = largest(number) if _due(step, AGREE_EVERY) else 0
        self.signal = number
        return number > 0

    def due(self, step: int, state: TrainState) -> None:
        """Reports, evaluation, samples and checkpoints that fall on this step."""
        evaluated: dict[str, float] = {}
        if _due(step, self.config.log_every):
            self.report(step)
        if _due(step, self.config.eval_every):
            evaluated = self.evaluate(step, state)
        if _due(step, self.config.sample_every):
            self.draw(step, state)
        if _due(step, self.config.checkpoint_every) or evaluated:
            self.save(step, state, evaluated)

    def report(self, step: int) -> None:
        """Writes the mean of the metrics since the last report, over steps that were not skipped, and the share that
        was; raises where the run cannot go on."""
        if not self.pending:
            return
        rows = [(at, jax.tree.map(float, self.parallel.to_host(row))) for at, row in self.pending]
        self.pending = []
        for at, row in rows:
            self.check(at, row)
        taken = [row for _, row in rows if not row.get("skipped")]
        means = {name: float(np.mean([row[name] for row in taken])) for name in rows[0][1]} if taken else {}
        if "skipped" in rows[0][1]:
            means.pop("skipped_in_a_row", None)
            means["skipped"] = 1 - len(taken) / len(rows)
        now = time.perf_counter()
        self.log.write(step, {**means, "steps_per_second": len(rows) / (now - self.since)})
        self.since = now

    def check(self, step: int, row: dict[str, float]) -> None:
        """Raises FloatingPointError where a step is not finite and was not skipped, or too many were in a row."""
        in_a_row, most = row.get("skipped_in_a_row", 0), self.max_skips
        if in_a_row <= most and (in_a_row or (np.isfinite(row["loss"]) and np.isfinite(row["grad_norm"]))):
            return
        self.store.wait()
        latest = self.store.latest_step()
        why = f"; it is number {in_a_row:.0f} of updates skipped in a row, above optim.max_skips" if in_a_row else ""
        raise FloatingPointError(
            f"Step {step} has loss {row['loss']} and gradient norm {row['grad_norm']}{why}, so the run was stopped "
            f"(last good checkpoint: {latest}); lower optim.lr or optim.clip_norm in a new --workdir."
        )

    def evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        if self.job.evaluate is None:
            return {}
        self.report(step)
        metrics = self.job.evaluate(self.parallel.to_host(state.averaged))
        # Which checkpoint is best, and so which are removed, must not differ between processes.
        self.metrics = {name: from_primary(value) for name, value in metrics.items()}
        self.log.write(step, {f"eval/{name}": value for name, value in self.metrics.items()})
        self.log.say(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in self.metrics.items()))
        self.since = time.perf_counter()
        return self.metrics

    def draw(self, step: int, state: TrainState) -> None:
        if self.job.sample is None or not is_primary():
            return
        image = self.job.sample(self.parallel.to_host(state.averaged))
        folder = self.workdir / SAMPLES
        folder.mkdir(exist_ok=True)
        self.samples = folder / f"{step:07d}.png"
        save_image(self.samples, image)
        self.since = time.perf_counter()

    def save(self, step: int, state: TrainState, metrics: dict[str, float]) -> None:
        self.report(step)  # A state whose metrics are not finite is never saved.
        self.store.save(step, self.parallel.to_host(state), config=self.saved_config, metrics=metrics)
        self.saved = step
        self.since = time.perf_counter()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Interrupted(KeyboardInterrupt):
    """What is under way is to end now, but not the program."""


class _Signals:
    """Notes the first SIGINT or SIGTERM, so that the loop can save and end; a second one is not caught.

    interrupt: raise _Interrupted where it arrives.
    """

    def __init__(self, interrupt: bool = False):
        self.number, self._interrupt = 0, interrupt
        self._previous: dict[int, Any] = {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:  # Not the main thread: the caller's own handlers stay in charge.
                break
        return self

    def _note(self, number, frame):
        self.number = number
        self._restore()
        if self._interrupt:
            raise _Interrupted

    def _restore(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __exit__(self, *exception):
        self._restore()
