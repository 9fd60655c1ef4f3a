"""Reads and writes run directories: config, checkpoints, metrics, samples and lock. No other code accesses them."""

from flowgen.runs.arrays import check_layout, flatten, layout
from flowgen.runs.checkpoints import CheckpointReader
from flowgen.runs.directory import (
    CHECKPOINTS,
    PLAN_FILE,
    check_workdir,
    is_run,
    read_config,
    read_plan,
    was_trained_in,
    write_config,
    write_plan,
)
from flowgen.runs.evaluations import EVALUATIONS, check_new_evaluation, evaluation_path, save_evaluation
from flowgen.runs.files import DIGEST
from flowgen.runs.lock import RunLock
from flowgen.runs.metrics import EVAL, SPEED
from flowgen.runs.progress import on_terminal
from flowgen.runs.reader import RunReader
from flowgen.runs.store import CheckpointStore
from flowgen.runs.writer import NullWriter, RunWriter

__all__ = [
    "CHECKPOINTS",
    "DIGEST",
    "EVAL",
    "EVALUATIONS",
    "PLAN_FILE",
    "SPEED",
    "CheckpointReader",
    "CheckpointStore",
    "NullWriter",
    "RunLock",
    "RunReader",
    "RunWriter",
    "check_layout",
    "check_new_evaluation",
    "check_workdir",
    "evaluation_path",
    "flatten",
    "is_run",
    "layout",
    "on_terminal",
    "read_config",
    "read_plan",
    "save_evaluation",
    "was_trained_in",
    "write_config",
    "write_plan",
]
