"""Training: the step, its parallel layout, the loop, checkpoints and reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowgen.arrays import shown
from flowgen.training.loop import Job, Result, check_workdir, train
from flowgen.training.options import LogConfig, OptimConfig, TrainConfig
from flowgen.training.step import TrainState, make_optimizer, make_schedule, make_step
from flowgen.training.store import CheckpointReader, CheckpointStore

__all__ = [
    "CheckpointReader",
    "CheckpointStore",
    "Job",
    "LogConfig",
    "OptimConfig",
    "Result",
    "TrainConfig",
    "TrainState",
    "fit",
    "make_optimizer",
    "make_schedule",
    "make_step",
    "train",
]


def fit(experiment: Any, workdir: str | Path) -> Result:
    """Returns the result of training an `Experiment` in `workdir`; resumes where it holds a checkpoint.

    Raises what `train` and the experiment's parts raise, before any compute.

    Example:
        result = fit(flowgen.config.load("configs/tarflow_digits.py"), "runs/digits")
    """
    if not hasattr(experiment, "sealed"):
        raise ValueError(f"experiment is {shown(experiment)}; give a flowgen.Experiment, and then the workdir.")
    experiment = experiment.sealed()
    check_workdir(Path(workdir), experiment.check_resumable)  # Before data are encoded.
    return train(
        experiment.job(),
        workdir,
        optim=experiment.optim,
        train=experiment.train,
        log=experiment.log,
        config=experiment.to_json(),
        check_config=experiment.check_resumable,
    )
