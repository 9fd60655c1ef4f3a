"""Where metrics go: `metrics.jsonl`, TensorBoard events, and one progress line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from flowgen.packages import missing
from flowgen.training.options import LogConfig

METRICS_FILE = "metrics.jsonl"


def check_packages(config: LogConfig) -> None:
    """Raises ImportError, in one sentence, where a report that was asked for needs a package that is missing.

    Example:
        check_packages(LogConfig(tensorboard=True))
    """
    for wanted, module, field in (
        (config.tensorboard, "tensorboardX", "log.tensorboard"),
        (config.progress, "tqdm", "log.progress"),
    ):
        if wanted:
            try:
                __import__(module)
            except ImportError as error:
                raise missing(field, module, otherwise=f"set --{field} false") from error


class MetricsLog:
    """Writes metrics of one run; a resumed run drops the rows after the step that it resumes from.

    Example:
        log = MetricsLog("runs/digits", LogConfig(), first_step=0, last_step=1000)
        log.write(50, {"loss": 1.0})
        log.close()
    """

    def __init__(self, run_dir: str | Path, config: LogConfig, *, first_step: int, last_step: int):
        path = Path(run_dir) / METRICS_FILE
        _truncate(path, first_step)
        self._file = path.open("a")
        self._events: Any = None
        if config.tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(run_dir), purge_step=first_step + 1)
        self._bar: Any = None
        if config.progress:
            from tqdm import tqdm

            self._bar = tqdm(total=last_step, initial=first_step, file=sys.stderr, unit="step", dynamic_ncols=True)

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes one row of metrics at a step."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)
        if self._bar is not None:
            shown = {name: metrics[name] for name in _SHOWN if name in metrics}
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)

    def say(self, line: str) -> None:
        """Shows one line above the progress bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            sys.stderr.write(line + "\n")

    def close(self) -> None:
        """Flushes and closes everything."""
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._bar is not None:
            self._bar.close()


class Silence:
    """Takes what `MetricsLog` takes and writes nothing: for processes other than the first."""

    def advance(self, step: int) -> None: ...

    def write(self, step: int, metrics: dict[str, float]) -> None: ...

    def say(self, line: str) -> None: ...

    def close(self) -> None: ...


_SHOWN = ("loss", "bits_per_dim", "grad_norm", "learning_rate")


def _truncate(path: Path, last_step: int) -> None:
    """Keeps the rows up to and including `last_step`; a half-written last row goes as well."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row.get("step", 0) <= last_step:
            kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    temporary.replace(path)
