"""Writes the metrics of a run to `metrics.jsonl` and, with its sample grids, to TensorBoard event files."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import UInt8

from flowgen.runs.files import read_bytes, write_bytes

METRICS_FILE = "metrics.jsonl"
EVAL = "eval/"  # prefix of held-out metrics
# Metrics of speed and memory, explained in docs/training.md. Only these metrics change if a step is repeated.
SPEED = (
    "steps_per_second",
    "samples_per_second",
    "tokens_per_second",
    "flop_per_step",
    "flop_per_second",
    "mfu",
    "data_wait",
    "peak_memory_bytes",
)


class MetricsLog:
    """Writes the metrics of a run. First deletes the rows after `first_step`, the step from which the run resumes.

    evaluated: whether the evaluation of `first_step` is complete. If it is incomplete, training repeats the evaluation,
    so its row is deleted too.

    Example:
        log = MetricsLog("runs/digits", first_step=0, tensorboard=False)
        log.write(50, {"loss": 1.0})
        log.close()
    """

    def __init__(self, run_dir: str | Path, *, first_step: int, evaluated: bool = True, tensorboard: bool):
        self._path, self._tensorboard = Path(run_dir) / METRICS_FILE, tensorboard
        _truncate(self._path, first_step, evaluated)
        self._file: IO[bytes] = self._path.open("a+b")
        self._events = _Events(self._path.parent, first_step) if tensorboard else None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics of a step as one row."""
        self._file.write((json.dumps({**metrics, "step": step}) + "\n").encode())
        self._file.flush()
        if self._events is not None:
            self._events.write(step, metrics)

    def draw(self, step: int, image: UInt8[np.ndarray, "height width c"]) -> None:
        """Writes the sample grid of a step as a TensorBoard event."""
        if self._events is not None:
            self._events.draw(step, image)

    def restore(self, step: int) -> None:
        """Recreates files that were removed: metrics.jsonl with all rows so far, and an event file for later steps."""
        if self._path.exists() and os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
            return
        self._file.seek(0)
        write_bytes(self._path, self._file.read())
        self.close()
        self._file = self._path.open("a+b")
        self._events = _Events(self._path.parent, step) if self._tensorboard else None

    def close(self) -> None:
        """Closes the files."""
        with contextlib.suppress(OSError):  # `write` has already raised an error if a row could not be written
            self._file.close()
        if self._events is not None:
            self._events.close()


class _Events:
    """Writes TensorBoard events without a thread. The thread of tensorboardX's own writer dies if the disk is full."""

    def __init__(self, run_dir: Path, first_step: int):
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2 as untyped

        event_pb2: Any = untyped  # the module's names are generated on import
        self._summary, self._event = summary, event_pb2.Event
        self._writer = EventsWriter(str(run_dir / "events"), filename_suffix=f".{os.getpid()}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(first_step + 1, session_log=start)  # makes TensorBoard ignore earlier events for these steps

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._write(step, summary=self._summary.scalar(name, value))
        self._writer.flush()

    def draw(self, step: int, image: UInt8[np.ndarray, "height width c"]) -> None:
        self._write(step, summary=self._summary.image("samples", image, dataformats="HWC"))
        self._writer.flush()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **content))

    def close(self) -> None:
        self._writer.close()


def last_step(run_dir: str | Path) -> int:
    """Returns the last step in a run's metrics, or 0 if there are no metrics.

    Example:
        last_step("runs/digits")
    """
    path = Path(run_dir) / METRICS_FILE
    return max((row["step"] for _, row in _rows(path)), default=0) if path.exists() else 0


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics in the order in which they were written; [] if there are none.

    Each row has a "step". The names of evaluation metrics begin with "eval/".

    Example:
        losses = {row["step"]: row["loss"] for row in read_metrics("runs/digits") if "loss" in row}
    """
    path = Path(run_dir) / METRICS_FILE
    return [row for _, row in _rows(path)] if path.exists() else []


def _truncate(path: Path, last: int, evaluated: bool) -> None:
    """Deletes the rows after the step `last`, and lines that are not complete rows."""
    if os.path.lexists(path):
        kept = b"".join(line + b"\n" for line, row in _rows(path) if _stays(row, last, evaluated))
        if kept != read_bytes(path):
            write_bytes(path, kept)


def _stays(row: dict[str, Any], last: int, evaluated: bool) -> bool:
    return row["step"] < last or (row["step"] == last and (evaluated or not any(n.startswith(EVAL) for n in row)))


def _rows(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Returns the lines that are rows of metrics, with their parsed contents."""
    found = []
    for line in read_bytes(path).splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            found.append((line, row))
    return found
