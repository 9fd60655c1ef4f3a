"""Training: the step, its parallel layout, the loop, checkpoints and reports."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from flowgen.arrays import shown
from flowgen.runs import CheckpointReader, CheckpointStore, check_workdir
from flowgen.training.loop import Job, Result, train
from flowgen.training.options import LogConfig, OptimConfig, TrainConfig
from flowgen.training.parallel import is_primary
from flowgen.training.signals import Interrupted, Signals
from flowgen.training.step import TrainState, make_optimizer, make_schedule, make_step

__all__ = [
    "CheckpointReader",
    "CheckpointStore",
    "Interrupted",
    "Job",
    "LogConfig",
    "OptimConfig",
    "Result",
    "Signals",
    "TrainConfig",
    "TrainState",
    "fit",
    "make_optimizer",
    "make_schedule",
    "make_step",
    "train",
]


def fit(experiment: Any, workdir: str | Path, *, signals: Signals | None = None) -> Result:
    """Returns the result of training an `Experiment` in `workdir`; resumes where it holds a checkpoint.

    signals: already watched ones; None, those of this process.
    Raises what `train` and the experiment's parts raise, before any compute.

    Example:
        result = fit(flowgen.load_config("tarflow_digits"), "runs/digits")
    """
    if not hasattr(experiment, "with_provenance"):
        raise ValueError(f"experiment is {shown(experiment)}; give a flowgen.Experiment, and then the workdir.")
    with Signals() if signals is None else nullcontext(signals) as signals:
        with signals.raising():
            experiment = experiment.with_provenance()
            # Before data are encoded.
            check_workdir(Path(workdir), experiment.check_resumable, locks=is_primary())
            job = experiment.job()
        return train(
            job,
            workdir,
            optim=experiment.optim,
            train=experiment.train,
            log=experiment.log,
            config=experiment.to_json(),
            check_config=experiment.check_resumable,
            signals=signals,
        )
