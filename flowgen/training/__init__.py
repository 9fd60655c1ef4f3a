"""Trains models: the training step, parallelism over devices, the training loop and its options."""

from __future__ import annotations

from flowgen.runs import CheckpointReader, CheckpointStore
from flowgen.training.job import Job, Result
from flowgen.training.loop import train
from flowgen.training.optimizer import make_optimizer, make_schedule
from flowgen.training.options import InitConfig, LogConfig, OptimConfig, TrainConfig
from flowgen.training.parallel import is_primary
from flowgen.training.signals import Interrupted, Signals
from flowgen.training.step import TrainState, make_step

__all__ = [
    "CheckpointReader",
    "CheckpointStore",
    "InitConfig",
    "Interrupted",
    "Job",
    "LogConfig",
    "OptimConfig",
    "Result",
    "Signals",
    "TrainConfig",
    "TrainState",
    "is_primary",
    "make_optimizer",
    "make_schedule",
    "make_step",
    "train",
]
