"""Reads and writes run directories: config, checkpoints, metrics, samples and lock. No other code accesses them.

Also reads exported models, and finds those that ship with flowgen.
"""

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
from flowgen.runs.exported import ExportedReader, is_exported
from flowgen.runs.files import DIGEST
from flowgen.runs.located import located, shipped_models
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
    "PLAN_FILE",
    "SPEED",
    "CheckpointReader",
    "CheckpointStore",
    "ExportedReader",
    "NullWriter",
    "RunLock",
    "RunReader",
    "RunWriter",
    "check_layout",
    "check_workdir",
    "flatten",
    "is_exported",
    "is_run",
    "layout",
    "located",
    "on_terminal",
    "read_config",
    "read_plan",
    "shipped_models",
    "was_trained_in",
    "write_config",
    "write_plan",
]
