"""Reads and writes run directories: config, checkpoints, metrics, samples and lock.

This package also reads exported models, and finds models that ship with flowgen or are on a hub.
"""

from flowgen.runs.arrays import check_layout, flatten, layout
from flowgen.runs.checkpoints import CheckpointReader
from flowgen.runs.contents import RunContents, read_contents
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
from flowgen.runs.exported import ExportedReader, is_exported
from flowgen.runs.files import DIGEST
from flowgen.runs.history import passing_warnings, read_history
from flowgen.runs.located import located, shipped_models
from flowgen.runs.lock import RunLock
from flowgen.runs.metrics import EVAL, SPEED, read_metrics
from flowgen.runs.null_writer import NullWriter
from flowgen.runs.progress import on_terminal
from flowgen.runs.reader import RunReader
from flowgen.runs.store import CheckpointStore
from flowgen.runs.writer import RunWriter

__all__ = [
    "CHECKPOINTS",
    "DIGEST",
    "EVAL",
    "EVALUATIONS",
    "PLAN_FILE",
    "SPEED",
    "CheckpointReader",
    "CheckpointStore",
    "ExportedReader",
    "NullWriter",
    "RunContents",
    "RunLock",
    "RunReader",
    "RunWriter",
    "check_layout",
    "check_new_evaluation",
    "check_workdir",
    "evaluation_path",
    "flatten",
    "is_exported",
    "is_run",
    "layout",
    "located",
    "on_terminal",
    "passing_warnings",
    "read_config",
    "read_contents",
    "read_history",
    "read_metrics",
    "read_plan",
    "save_evaluation",
    "shipped_models",
    "was_trained_in",
    "write_config",
    "write_plan",
]
