"""Records when and where a run was trained, and its warnings, as rows of `history.jsonl`."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import platform
import secrets
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax

from flowgen import __version__
from flowgen.runs.files import read_bytes

HISTORY_FILE = "history.jsonl"
START, END, WARNING = "start", "end", "warning"
MAX_WARNINGS = 200  # rows of one process; a run may give the same warning at every evaluation


class History:
    """Adds rows to the history of a run. Every row has an "event" and a "time" in UTC.

    identity: a text that stays the same if the run is resumed, and changes if the run starts over at step 0.

    Example:
        history = History("runs/digits", first_step=None)
        history.warn("The data have changed.", step=0)
        history.end(step=300, error="")
    """

    def __init__(self, run_dir: str | Path, *, first_step: int | None):
        self._path = Path(run_dir) / HISTORY_FILE
        known = [row["id"] for row in read_history(run_dir) if row["event"] == START and isinstance(row.get("id"), str)]
        self.identity = secrets.token_hex(4) if first_step is None or not known else known[-1]
        self._warned: set[str] = set()
        devices = jax.devices()
        self._add(
            START,
            id=self.identity,
            step=first_step or 0,
            device=devices[0].device_kind,
            devices=len(devices),
            processes=jax.process_count(),
            versions={"flowgen": __version__, "jax": jax.__version__, "python": platform.python_version()},
        )

    def warn(self, sentence: str, *, step: int) -> None:
        """Adds a warning, unless this process has added it already or has added `MAX_WARNINGS` others."""
        if sentence not in self._warned and len(self._warned) < MAX_WARNINGS:
            self._warned.add(sentence)
            self._add(WARNING, step=step, text=sentence)

    def end(self, *, step: int, error: str) -> None:
        """Adds the end of training, if the file exists and can be written. error: why training ended early, or ""."""
        if self._path.exists():  # and the run has not been removed
            with contextlib.suppress(OSError):
                self._add(END, step=step, error=error)

    def _add(self, event: str, **values: Any) -> None:
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with self._path.open("ab") as file:
            file.write((json.dumps({"event": event, "time": time, **values}) + "\n").encode())


def read_history(run_dir: str | Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's history; [] if there is none. Leaves out damaged lines.

    Example:
        starts = [row for row in read_history("runs/digits") if row["event"] == "start"]
    """
    path, rows = Path(run_dir) / HISTORY_FILE, []
    for line in read_bytes(path).splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("event"), str) and isinstance(row.get("time"), str):
                rows.append(row)
    return rows


@contextlib.contextmanager
def passing_warnings(record: Callable[[str], None]) -> Generator[None]:
    """Returns a context that passes warnings of Python and of flowgen's logger to `record`, and shows them as usual.

    Example:
        with passing_warnings(lines.append):
            job = experiment.job()
    """
    shown, handler, logger = warnings.showwarning, _Passing(record), logging.getLogger("flowgen")

    def show(message: Warning | str, *place: Any) -> None:
        record(" ".join(str(message).split()))
        shown(message, *place)

    warnings.showwarning = show  # ty: ignore[invalid-assignment]
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        if warnings.showwarning is show:
            warnings.showwarning = shown


class _Passing(logging.Handler):
    """Passes the text of each logged warning to a function."""

    def __init__(self, record: Callable[[str], None]):
        super().__init__(logging.WARNING)
        self._record = record

    def emit(self, record: logging.LogRecord) -> None:
        self._record(" ".join(record.getMessage().split()))
