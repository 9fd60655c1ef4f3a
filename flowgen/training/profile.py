"""Traces a few training steps for a profiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from flowgen.training.pace import Pace


class Profile:
    """Traces `steps` training steps, from the second step on, and writes the trace to a directory.

    If the directory is None, nothing is traced. The time needed to start and to end the trace is excluded from `pace`.
    If the run ends early, fewer steps are traced.

    Example:
        with Profile(Path("runs/digits/profile"), 5, pace, say=print) as profile:
            for step, batch in enumerate(batches, start=1):
                state, metrics = update(state, batch, key)
                profile.after(step, metrics)
    """

    def __init__(self, directory: Path | None, steps: int, pace: Pace, say: Callable[[str], None]):
        self._directory, self._steps, self._pace, self._say = directory, steps, pace, say
        self._first: int | None = None
        self._last = 0

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def after(self, step: int, results: Any) -> None:
        """Starts the trace after the first step and ends it `steps` steps later. Waits only for these two steps."""
        if self._directory is None:
            return
        self._last = step
        if self._first is not None and step - self._first < self._steps:
            return
        jax.block_until_ready(results)
        with self._pace.left_out():
            if self._first is None:
                jax.profiler.start_trace(self._directory)
                self._first = step
            else:
                self._end()

    def _end(self) -> None:
        if self._directory is None or self._first is None:
            return
        jax.profiler.stop_trace()
        self._say(
            f"Traced {self._last - self._first} steps into {self._directory}; open it with xprof --logdir "
            f"{self._directory} (pip install xprof), or the file in it that ends in trace.json.gz at ui.perfetto.dev."
        )
        self._directory = None
