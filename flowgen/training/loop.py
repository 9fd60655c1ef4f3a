"""The one training loop. It knows steps, checkpoints and reports; what is trained comes in a `Job`."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flowgen.data.media import save_image
from flowgen.training import parallel
from flowgen.training.metrics import MetricsLog, Silence, check_packages
from flowgen.training.options import LogConfig, OptimConfig, TrainConfig
from flowgen.training.step import (
    Objective,
    StepOptions,
    TrainState,
    init_state,
    make_optimizer,
    make_step,
)
from flowgen.training.store import CHECKPOINTS, CONFIG_FILE, CheckpointStore, read_config, write_config


@dataclass(frozen=True)
class Job:
    """What the loop needs to train something.

    init(key) -> variables. objective: see `make_step`. batches(start, stop) -> this host's batches of steps
    start..stop-1. evaluate(variables) -> metrics. sample(variables, step) -> uint8 picture `height width 3`.
    """

    init: Callable[[jax.Array], Any]
    objective: Objective
    batches: Callable[[int, int], Iterator[Any]]
    evaluate: Callable[[Any], dict[str, float]] | None = None
    sample: Callable[[Any, int], np.ndarray] | None = None


class Result(NamedTuple):
    """How a run ended.

    variables: as trained. ema: averaged parameters or None. step: steps done. metrics: the last evaluation.
    samples: path of the last sample grid or None. signal: number of the signal that stopped it, 0 if it finished.
    """

    variables: Any
    ema: Any
    step: int
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
    Raises FloatingPointError naming the step where loss or gradient is not finite; checkpoints stay good.

    Example:
        result = train(job, "runs/digits", optim=optim, train=train, log=log, config={}, check_config=print)
    """
    parallel.check_batch_size(train.batch_size, train.accumulation)
    check_packages(log)
    optimizer = make_optimizer(optim, train.steps)
    workdir = _prepare(Path(workdir), config, check_config)
    store = CheckpointStore(workdir, keep=log.keep)
    root = jax.random.key(train.seed)
    init_key, step_key = jax.random.split(root)
    state = init_state(job.init(init_key), optimizer, optim)
    latest = store.latest_step()
    if latest is not None:
        state = _from_items(store.restore(latest), state, latest)
    step = make_step(job.objective, optimizer, StepOptions(optim, train.steps, train.accumulation))
    run = _Run(job, workdir, store, log, train.steps, first=0 if latest is None else latest)
    try:
        return run.train(parallel.data_parallel(step), state, step_key)
    finally:
        run.close()


def _prepare(workdir: Path, config: dict[str, Any], check_config: Callable[[dict[str, Any]], None]) -> Path:
    if (workdir / CONFIG_FILE).exists():
        check_config(read_config(workdir))
    elif workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise FileExistsError(f"workdir {workdir} holds files but no flowgen run; give a new or empty directory.")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            write_config(workdir, config)
    except OSError as error:
        raise OSError(f"workdir {workdir} cannot be written ({error.strerror}); give another directory.") from error
    return workdir


class _Run:
    """The state of the loop that is not the state of the training."""

    def __init__(self, job: Job, workdir: Path, store: CheckpointStore, log: LogConfig, steps: int, first: int):
        self.job, self.workdir, self.store, self.config = job, workdir, store, log
        self.steps, self.first = steps, first
        self.is_primary = jax.process_index() == 0
        self.log = MetricsLog(workdir, log, first_step=first, last_step=steps) if self.is_primary else Silence()
        self.pending: list[tuple[int, Any]] = []
        self.since = time.perf_counter()
        self.metrics: dict[str, float] = {}
        self.samples: Path | None = None
        self.saved = first if store.latest_step() is not None else -1

    def train(self, step_fn: Callable[..., tuple], state: TrainState, key: jax.Array) -> Result:
        if self.first >= self.steps:
            self.log.say(f"{self.workdir} has {self.first} of {self.steps} steps already; nothing to train.")
        state = parallel.replicate(state)
        batches = self.job.batches(self.first, self.steps)
        step = self.first
        with _Signals() as signals:
            for batch in batches:
                state, metrics = step_fn(state, parallel.shard(batch), key)
                step += 1
                if parallel.must_wait():
                    jax.block_until_ready(metrics)
                self.pending.append((step, metrics))
                self.log.advance(step)
                stopping = signals.number != 0
                if _due(step, self.config.log_every) or step == self.steps or stopping:
                    self.report(step)
                if not stopping and step < self.steps:
                    self.extras(step, state)
                if stopping:
                    break
            close = getattr(batches, "close", None)
            if close is not None:
                close()
        stopped = signals.number if step < self.steps else 0
        if not stopped:
            self.finish(step, state)
        if self.saved != step:
            self.save(step, state, self.metrics if not stopped else {})
        self.store.wait()
        host = parallel.unreplicate(state)
        return Result(host.variables, host.ema, step, self.metrics, self.samples, stopped)

    def extras(self, step: int, state: TrainState) -> None:
        """Evaluation, samples and checkpoint where they are due."""
        evaluated: dict[str, float] = {}
        if _due(step, self.config.eval_every):
            evaluated = self.evaluate(step, state)
        if _due(step, self.config.sample_every):
            self.draw(step, state)
        if _due(step, self.config.checkpoint_every) or evaluated:
            self.save(step, state, evaluated)

    def finish(self, step: int, state: TrainState) -> None:
        """What every run reports at its end."""
        self.evaluate(step, state)
        self.draw(step, state)

    def report(self, step: int) -> None:
        """Writes the mean of the metrics since the last report; raises where one of them is not finite."""
        if not self.pending:
            return
        rows = [(at, parallel.unreplicate(metrics)) for at, metrics in self.pending]
        self.pending = []
        for at, row in rows:
            if not (np.isfinite(row["loss"]) and np.isfinite(row["grad_norm"])):
                raise FloatingPointError(
                    f"step {at}: loss is {row['loss']}, gradient norm {row['grad_norm']}; the last good checkpoint "
                    f"is {self.store.latest_step()}, lower optim.lr or optim.clip_norm and start again from it."
                )
        means = {name: float(np.mean([row[name] for _, row in rows])) for name in rows[0][1]}
        now = time.perf_counter()
        means["steps_per_second"] = len(rows) / (now - self.since)
        self.since = now
        self.log.write(step, means)

    def evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        if self.job.evaluate is None:
            return {}
        self.report(step)
        self.metrics = self.job.evaluate(_averaged(state))
        self.log.write(step, {f"eval/{name}": value for name, value in self.metrics.items()})
        self.log.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items()))
        self.since = time.perf_counter()
        return self.metrics

    def draw(self, step: int, state: TrainState) -> None:
        if self.job.sample is None:
            return
        image = self.job.sample(_averaged(state), step)
        if self.is_primary:
            folder = self.workdir / "samples"
            folder.mkdir(exist_ok=True)
            self.samples = folder / f"{step:07d}.png"
            save_image(self.samples, image)
        self.since = time.perf_counter()

    def save(self, step: int, state: TrainState, metrics: dict[str, float]) -> None:
        self.report(step)  # A state whose metrics are not finite is never saved.
        self.store.save(step, _to_items(parallel.unreplicate(state)), metrics)
        self.saved = step
        self.since = time.perf_counter()

    def close(self) -> None:
        self.log.close()
        self.store.close()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _averaged(state: TrainState) -> Any:
    """Host variables with averaged parameters where there is an average."""
    host = parallel.unreplicate(TrainState(state.step, state.variables, None, state.ema))
    return host.variables if host.ema is None else {**host.variables, "params": host.ema}


def _to_items(state: TrainState) -> dict[str, Any]:
    leaves = jax.tree.leaves(state.opt_state)
    items = {"variables": state.variables, "optimizer": {str(i): leaf for i, leaf in enumerate(leaves)}}
    return items if state.ema is None else {**items, "ema": state.ema}


def _from_items(items: dict[str, Any], like: TrainState, step: int) -> TrainState:
    """The saved state in the structure of a fresh one; shapes were checked with the config."""
    if "optimizer" not in items:
        raise ValueError(f"checkpoint {step} holds weights without optimizer state; train in a new workdir.")
    tree = jax.tree.structure(like.opt_state)
    leaves = [items["optimizer"][str(i)] for i in range(tree.num_leaves)]
    return TrainState(
        step=np.asarray(step, np.int32),
        variables=items["variables"],
        opt_state=jax.tree.unflatten(tree, leaves),
        ema=items.get("ema"),
    )


class _Signals:
    """Notes SIGINT and SIGTERM instead of dying at once; a second one is not caught."""

    def __init__(self):
        self.number = 0
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

    def _restore(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __exit__(self, *exc):
        self._restore()
