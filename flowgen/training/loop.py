"""The training loop of all experiments: it runs the steps of a `Job`, saves checkpoints and reports progress."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flowgen import backend
from flowgen.runs import EVAL, NullWriter, RunReader, RunWriter, passing_warnings
from flowgen.training.fsdp import FullySharded, parallel_for
from flowgen.training.job import Job, Result
from flowgen.training.opening import evaluation_of, open_writer, resumed_from
from flowgen.training.options import LogConfig, OptimConfig, TrainConfig, check_packages
from flowgen.training.pace import Pace
from flowgen.training.parallel import DataParallel, barrier, from_primary, is_primary, largest
from flowgen.training.profile import Profile
from flowgen.training.signals import Interrupted, Signals
from flowgen.training.step import TrainState, init_state, make_step
from flowgen.training.work import CountedStep, work_of

# The number of steps that may be queued on the device, so that it stays busy while the host prepares the next step.
STEPS_AHEAD = 2
# The interval, in steps, at which to check for signals in other processes; each check waits for the current step.
AGREE_EVERY = 8


def train(
    job: Job,
    workdir: str | Path,
    *,
    optim: OptimConfig,
    train: TrainConfig,
    log: LogConfig,
    config: dict[str, Any],
    check_config: Callable[[dict[str, Any]], None],
    signals: Signals | None = None,
) -> Result:
    """Trains from the last checkpoint in `workdir`, or from step 0 if there is none, and returns the result.

    If a run is stopped by a signal, even by SIGKILL, and then resumed on the same number of devices, it ends in the
    same state as an uninterrupted run, bit for bit.

    config: plain values that are saved with the run as JSON. check_config(saved): raises ValueError if a run with the
    saved config cannot be resumed with the current config. signals: a `Signals` context that has already been entered;
    None to create one.

    Raises:
        ImportError: a requested report requires a package that is not installed.
        ValueError: the devices cannot share the batch equally, the run in `workdir` has more than train.steps steps or
            is refused by `check_config`, or a checkpoint is damaged.
        FileExistsError, OSError: `workdir` contains files but no run, is in use by another process, or cannot be
            written to.
        FloatingPointError: the loss or a gradient is not finite, or too many updates in a row were skipped; the message
            names the step. Checkpoints stay intact.
        Interrupted: a signal arrived before the first step.

    Example:
        result = train(job, "runs/digits", optim=optim, train=train, log=log, config={}, check_config=print)
    """
    parallel = parallel_for(train, job.devices)
    check_packages(log)
    step = make_step(
        job.objective,
        optim,
        steps=train.steps,
        accumulation=train.accumulation,
        axis_name=parallel.axis_name,
        others=job.optims,
        frozen=train.frozen,
    )
    init_key, step_key = jax.random.split(jax.random.key(train.seed))
    run = RunReader(workdir)

    def state_of(variables: Any) -> TrainState:
        return init_state(variables, optim, train.steps, job.optims, train.frozen)

    def initial() -> TrainState:
        return state_of(job.init(init_key))

    with Signals() if signals is None else nullcontext(signals) as signals, run.named():
        with _interruptible(signals):
            run.check(check_config, locks=is_primary())
            barrier("flowgen: workdir checked")  # Otherwise, one process's first file would look foreign to the others.
            # Everything that may be invalid is read and checked before anything is written.
            latest = resumed_from(run.checkpoints, train.steps, check_config)
            if latest is not None:
                state, told = run.checkpoints.restore(latest, parallel.abstract(initial)), ()
            elif job.start is None:
                state, told = parallel.create(initial), ()
            else:
                variables, told = job.start(parallel.create(lambda: job.init(init_key)))
                state = parallel.create(state_of, variables)
            run.free()
            scores = None if latest is None else evaluation_of(run.checkpoints, latest)
        with open_writer(run, latest, log, job.best_metric) as record:
            with _interruptible(signals):
                record.begin(
                    config,
                    first_step=latest,
                    last_step=train.steps,
                    tensorboard=log.tensorboard,
                    bar=log.progress,
                    tracker=log.tracker,
                )
                for sentence in job.warnings:
                    record.warn(sentence)
                if told:
                    record.describe_start(told)
                if job.inventory is not None:
                    record.describe_data(job.inventory, resumed=latest is not None)
            loop = _Run(job, record, log, parallel, signals, length=train, first=latest, max_skips=optim.max_skips)
            with passing_warnings(record.warn):
                return loop.train(CountedStep(step, parallel.program_devices), state, step_key, scores)


class _Run:
    """Runs the training loop, and stores its progress."""

    def __init__(
        self,
        job: Job,
        record: RunWriter | NullWriter,
        config: LogConfig,
        parallel: DataParallel | FullySharded,
        signals: Signals,
        *,
        length: TrainConfig,
        first: int | None,
        max_skips: int,
    ):
        self.job, self.record, self.config, self.parallel, self.signals = job, record, config, parallel, signals
        self.steps, self.rows = length.steps, length.batch_size // jax.process_count()
        self.first, self.saved, self.max_skips = first or 0, first, max_skips
        self.pending: list[tuple[int, Any]] = []
        self.pace = Pace()
        self.profile = Profile(record.profile_folder() if job.profile else None, job.profile, self.pace, record.say)
        self.metrics: dict[str, float] = {}
        self.evaluated: int | None = None  # the step that the metrics belong to
        self.samples: Path | str | None = None
        self.signal = 0

    def train(self, counted: CountedStep, state: TrainState, key: jax.Array, scores: dict[str, float] | None) -> Result:
        """Trains from step `first` to the last step and returns the result.

        scores: the results of the evaluation at step `first`; None if there are none.
        """
        with _interruptible(self.signals):
            state = self.parallel.place(state)
            key = self.parallel.replicate_key(key)
        if self.saved is not None:
            self.resume(state, scores)
        step = self.first
        if step < self.steps and not self.signal:
            with self.profile:
                step, state = self.run(counted, state, key)
        if step == self.steps and not self.signal:
            self.finish(step, state)
        self.signal = self.signal or self.signals.number
        return Result(self.parallel.to_host(state), self.metrics, self.samples, self.signal)

    def resume(self, state: TrainState, scores: dict[str, float] | None) -> None:
        """Reports the step from which the run resumes, and repeats an evaluation of this step that did not finish."""
        finished = self.first == self.steps
        if scores is not None:
            self.metrics, self.evaluated = scores, self.first
        missing = scores is None and self.job.evaluate is not None
        if finished and not missing:
            self.record.say(
                f"{self.record.workdir} already has all of its {self.steps} steps; raise train.steps to continue."
            )
        else:
            self.record.say(f"Resuming {self.record.workdir} from step {self.first}.")
        if missing and not finished and _due(self.first, self.config.eval_every):
            self.unless_stopped(lambda: self.evaluate(self.first, state))

    def run(self, counted: CountedStep, state: TrainState, key: jax.Array) -> tuple[int, TrainState]:
        """Runs the steps, saves the state after the last one, and returns that step's number and the state."""
        self.signals.doing = "Stopping after the current step and saving it"
        self.record.say("Compiling the training step.")
        update, fixed = self.parallel.compile(counted), self.parallel.place(self.job.fixed)
        batches = iter(self.job.batches(self.first, self.steps))
        step = self.first
        while step < self.steps:
            with self.keeping(step, state):
                batch, tokens = self.next_batch(batches, step)
            state, metrics = update(state, batch, key, fixed)
            step += 1
            self.pending.append((step, metrics))
            with self.keeping(step, state):
                self.pace.add(work_of(counted.flop(batch), self.parallel.local_devices, self.rows, tokens))
                if not self.pace.begun:
                    jax.block_until_ready(metrics)  # Until here, most of the time is spent on compilation.
                    self.pace.begin(step)
                self.wait_for_all_but(0 if self.parallel.must_wait else STEPS_AHEAD)
                self.profile.after(step, metrics)
                self.record.advance(step)
                if self.told_to_stop(step):
                    break
                if step < self.steps:
                    self.due(step, state)
                    if self.signal:
                        break
        close = getattr(batches, "close", None)
        if close is not None:
            close()
        self.report(step)
        self.save_last(step, state)
        return step, state

    def next_batch(self, batches: Iterator[Any], step: int) -> tuple[Any, int]:
        """Returns the batch for the step after `step`, placed on the devices, and its number of tokens."""
        with self.pace.waiting():
            batch = next(batches, None)
        if batch is None:
            raise ValueError(
                f"the batches end after step {step}, but train.steps is {self.steps}; give one batch per step."
            )
        tokens = 0 if self.job.tokens is None else self.job.tokens(batch)
        return self.parallel.shard(batch, self.rows), tokens

    @contextmanager
    def keeping(self, step: int, state: TrainState) -> Generator[None]:
        """Returns a context that saves the state if an error ends the run, unless the error is a FloatingPointError.

        Saves nothing if other processes would have to contribute their parts of the state.
        """
        try:
            yield
        except FloatingPointError:
            raise
        except Exception:
            if step > (self.saved or 0) and self.parallel.reads_alone:
                try:
                    self.save_last(step, state)
                    self.record.say(f"Step {step} is saved.")
                except (OSError, FloatingPointError) as error:
                    self.record.say(f"Step {step} could not be saved: {error}")
            raise

    def finish(self, step: int, state: TrainState) -> None:
        """Evaluates and samples after the last step, which is already saved."""

        def evaluate_and_draw():
            if self.job.evaluate is not None and (self.first < step or not self.metrics):
                self.record.say(f"step {step}: evaluating")
                self.evaluate(step, state)
            self.draw(step, state)

        self.unless_stopped(evaluate_and_draw)
        # The directory may have been removed in the meantime.
        if self.parallel.reads_alone and not self.record.holds(step):
            self.save_last(step, state)
            if self.evaluated == step:
                self.record.score(step, self.metrics)

    def unless_stopped(self, work: Callable[[], Any]) -> None:
        """Runs work that a signal may interrupt, because the current step is already saved."""
        doing = self.signals.doing
        # Processes that evaluate together must stop together.
        alone = jax.process_count() == 1
        self.signals.doing = (
            "Stopping this evaluation; its step is saved"
            if alone
            else "Stopping after this evaluation, which other processes share; its step is saved"
        )
        try:
            with self.pace.left_out(), self.signals.raising() if alone else nullcontext():
                work()
        except Interrupted as stop:
            self.signal = stop.number
        self.signals.doing = doing

    def wait_for_all_but(self, ahead: int) -> None:
        """Waits until no more than `ahead` steps are queued, so that the bar is accurate and the run stops promptly."""
        if len(self.pending) > ahead:
            jax.block_until_ready(self.pending[-1 - ahead][1])

    def told_to_stop(self, step: int) -> bool:
        """Returns whether any process has received a signal; all processes stop at the same step."""
        number = self.signals.number
        if jax.process_count() > 1:
            number = largest(number) if _due(step, AGREE_EVERY) else 0
        self.signal = number
        return number > 0

    def due(self, step: int, state: TrainState) -> None:
        """Does what is due at this step: writing metrics, saving and evaluating the state, or drawing samples."""
        evaluates = self.job.evaluate is not None and _due(step, self.config.eval_every)
        draws = _due(step, self.config.sample_every)
        if _due(step, self.config.log_every):
            self.report(step)
        if evaluates or _due(step, self.config.checkpoint_every):
            self.save(step, state)
        if evaluates:
            self.unless_stopped(lambda: self.evaluate(step, state))
        if draws and not self.signal:
            self.unless_stopped(lambda: self.draw(step, state))

    def report(self, step: int) -> None:
        """Writes the mean metrics of the steps since the last report, and the fraction of skipped steps among them.

        The means exclude skipped steps.

        Raises FloatingPointError if the run cannot continue.
        """
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
        means |= self.pace.measure(step)
        if (most := backend.peak_memory(self.parallel.local_devices)) is not None:
            means["peak_memory_bytes"] = float(most)
        self.record.write(step, means)
        if _due(step, self.config.log_every) or step == self.steps:
            self.record.show(step, means, self.pace.seconds_for(self.steps - step))

    def check(self, step: int, row: dict[str, float]) -> None:
        """Raises FloatingPointError if the run cannot continue.

        A run cannot continue if a step that was not skipped has a non-finite loss or gradient, or if more than
        `max_skips` steps in a row were skipped.
        """
        in_a_row, most = row.get("skipped_in_a_row", 0), self.max_skips
        if in_a_row <= most and (in_a_row or (np.isfinite(row["loss"]) and np.isfinite(row["grad_norm"]))):
            return
        why = f"; {in_a_row:.0f} updates in a row were skipped, more than optim.max_skips" if in_a_row else ""
        raise FloatingPointError(
            f"Step {step} has loss {row['loss']} and gradient norm {row['grad_norm']}{why}, so the run was stopped "
            f"(last good checkpoint: {self.saved}); start a new run with a lower optim.lr or optim.clip_norm."
        )

    def evaluate(self, step: int, state: TrainState) -> None:
        assert self.job.evaluate is not None
        metrics = self.job.evaluate(self.parallel.variables(state))
        # All processes must agree on the best checkpoint, and therefore on which ones to delete.
        self.metrics = {name: from_primary(float(value)) for name, value in metrics.items()}
        self.evaluated = step
        self.record.write(step, {f"{EVAL}{name}": value for name, value in self.metrics.items()})
        self.record.say(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in self.metrics.items()))
        self.record.score(step, self.metrics)

    def draw(self, step: int, state: TrainState) -> None:
        writes = not isinstance(self.record, NullWriter)
        if self.job.sample is None or (self.parallel.reads_alone and not writes):
            return
        variables = self.parallel.variables(state)
        if writes:
            self.samples = self.record.draw(step, self.job.sample(variables))

    def save(self, step: int, state: TrainState) -> None:
        self.report(step)  # A state whose metrics are not finite is never saved.
        with self.pace.left_out():
            self.record.save(step, self.parallel.to_host(state))
        self.saved = step

    def save_last(self, step: int, state: TrainState) -> None:
        self.report(step)
        self.record.save_last(step, self.parallel.to_host(state))
        self.saved = step


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _interruptible(signals: Signals) -> Any:
    """Returns a context in which a signal raises Interrupted, unless other processes would then wait for this one."""
    return signals.raising() if jax.process_count() == 1 else nullcontext()
