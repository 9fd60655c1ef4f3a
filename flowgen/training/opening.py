"""Opens a run directory for training: finds the step to resume from, and creates the writer of the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowgen.runs import CheckpointReader, NullWriter, RunReader, RunWriter
from flowgen.training.options import LogConfig
from flowgen.training.parallel import is_primary, largest


def open_writer(run: RunReader, latest: int | None, log: LogConfig, best_metric: str) -> RunWriter | NullWriter:
    """Returns the run's writer. Processes other than the first get a writer that writes nothing.

    If the first process cannot write, all processes raise OSError.

    Example:
        with open_writer(RunReader("runs/digits"), None, LogConfig(), "bits_per_dim") as record: ...
    """
    record: RunWriter | NullWriter = NullWriter(run.directory)
    error: OSError | None = None
    if is_primary():
        try:
            record = RunWriter(run.directory, latest=latest, keep=log.keep, best_metric=best_metric, mirror=run.mirror)
        except OSError as caught:
            error = caught
    if largest(int(error is not None)):
        raise error or OSError(f"The first process cannot write to workdir {run.shown}; see its error message.")
    return record


def resumed_from(reader: CheckpointReader, steps: int, check_config: Callable[[dict[str, Any]], None]) -> int | None:
    """Returns the step to resume from, which is the same in all processes; None if there is no checkpoint.

    Raises ValueError if all checkpoints lack files, if the latest one is damaged or its step exceeds `steps`, or if
    `check_config` raises it.

    Example:
        step = resumed_from(CheckpointReader("runs/digits/checkpoints"), 2_000, experiment.check_resumable)
    """
    latest = reader.latest_step()
    if latest is None:
        reader.check_not_broken()
    latest = largest(-1 if latest is None or not is_primary() else latest)
    if latest < 0:
        return None
    saved = reader.manifest(latest)
    if latest > steps:
        raise ValueError(
            f"{reader.directory.parent} already has {latest} steps, more than train.steps {steps}; raise train.steps."
        )
    try:
        check_config(saved["config"])
    except ValueError as error:
        raise ValueError(f"Checkpoint {latest} of {reader.directory.parent}: {error}") from error
    return latest


def evaluation_of(reader: CheckpointReader, step: int) -> dict[str, float] | None:
    """Returns the metrics of a step, or None if they are missing or damaged. The run's writer reports damaged metrics.

    Example:
        metrics = evaluation_of(CheckpointReader("runs/digits/checkpoints"), 500)
    """
    try:
        return reader.evaluation(step)
    except ValueError:
        return None
