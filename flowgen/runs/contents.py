"""Reads the files of a run other than its arrays, for reports. This works while the run is training."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgen.runs.directory import DATA_FILE, SAMPLES, START_FILE
from flowgen.runs.files import is_regular, read_bytes, read_json
from flowgen.runs.history import HISTORY_FILE, read_history
from flowgen.runs.metrics import METRICS_FILE, read_metrics
from flowgen.runs.reader import RunReader

_SAMPLE = re.compile(r"[0-9]{1,18}\.png")
MAX_TEXT = 20_000  # characters of start.txt


@dataclass(frozen=True)
class RunContents:
    """The contents of a run's files, except its arrays.

    shown: the run's directory or URL, as the user gave it. config: the experiment as plain JSON values. steps: the
    steps of the complete checkpoints, in ascending order. evaluations: {step: metrics} for the checkpoints that were
    evaluated. ignored: {name: reason} for the entries of the folder of checkpoints that are not complete checkpoints.
    metrics, history: the rows of metrics.jsonl and of history.jsonl, in the order in which they were written. data: the
    summary of the data in data.json; None if there is no such file. start: the text of start.txt, which lists the
    parameters that come from another run; "" if there is no such file. samples: {step: path} of the sample grids, by
    ascending step.
    """

    shown: str
    config: dict[str, Any]
    steps: tuple[int, ...]
    evaluations: dict[int, dict[str, float]]
    ignored: dict[str, str]
    metrics: list[dict[str, Any]]
    history: list[dict[str, Any]]
    data: dict[str, Any] | None
    start: str
    samples: dict[int, Path]


def read_contents(run: RunReader) -> RunContents:
    """Returns the contents of a run. Treats damaged files as missing, except the config.

    Raises the errors of `RunReader.config`.

    Example:
        contents = read_contents(RunReader("runs/digits"))
    """
    with run.named():
        config, folder, reader = run.config(), run.directory, run.checkpoints
        if run.mirror is not None:
            drawn = [name for name in run.mirror.sizes if name.startswith(f"{SAMPLES}/")]
            run.mirror.fetch([METRICS_FILE, HISTORY_FILE, DATA_FILE, START_FILE, *drawn])
        steps = tuple(reader.steps())
        evaluations = {step: _or_none(lambda step=step: reader.evaluation(step)) for step in steps}
        return RunContents(
            shown=run.shown,
            config=config,
            steps=steps,
            evaluations={step: found for step, found in evaluations.items() if found},
            ignored=reader.passed_over(),
            metrics=_or_none(lambda: read_metrics(folder)) or [],
            history=_or_none(lambda: read_history(folder)) or [],
            data=_or_none(lambda: read_json(folder / DATA_FILE)),
            start=(_or_none(lambda: read_bytes(folder / START_FILE)) or b"").decode("utf-8", "replace")[:MAX_TEXT],
            samples=_samples(folder / SAMPLES),
        )


def _or_none(read: Any) -> Any:
    try:
        return read()
    except (OSError, ValueError):
        return None


def _samples(folder: Path) -> dict[int, Path]:
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return {int(path.stem): path for path in paths if _SAMPLE.fullmatch(path.name) and is_regular(path)}
