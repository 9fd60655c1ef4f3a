"""Measures the speed of training, for example in steps and FLOP per second, and estimates the remaining time."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple


class Work(NamedTuple):
    """The work of one step, summed over all devices.

    samples: the size of the batch. tokens: the number of tokens in it, or 0 if samples are not divided into tokens.
    flop: the number of FLOP, as counted by `flowgen.counting.flop_of`; 0 if unknown. seconds_at_peak: the time that the
    devices would need for this number of FLOP at their peak throughput; None if the peak is unknown.
    """

    samples: int = 0
    tokens: int = 0
    flop: float = 0.0
    seconds_at_peak: float | None = None


class Pace:
    """Measures the speed between two reports, excluding compilation, evaluation, sampling and saving.

    Example:
        pace = Pace()
        pace.begin(step=1)    # the first step, which includes compilation, has ended
        pace.add(Work(samples=64))    # for each later step
        pace.measure(step=51)["samples_per_second"]
    """

    def __init__(self):
        self.begun = False
        self._at, self._since, self._waited = 0, 0.0, 0.0
        self._work: list[Work] = []
        self._steps, self._seconds = 0, 0.0

    def begin(self, step: int) -> None:
        """Starts the measurement after step number `step`, which is usually the first."""
        self.begun, self._at = True, step
        self._restart()

    def add(self, work: Work) -> None:
        """Adds the work of a step that has been started."""
        self._work.append(work)

    @contextmanager
    def left_out(self) -> Generator[None]:
        """Returns a context whose duration is excluded from the measurement."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - before

    @contextmanager
    def waiting(self) -> Generator[None]:
        """Returns a context whose duration counts as time spent waiting for data."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - before

    def measure(self, step: int) -> dict[str, float]:
        """Returns metrics of the speed since the last call, or an empty dict if no step has ended since then.

        docs/training.md explains the metrics.
        """
        if not self.begun or step == self._at:
            return {}
        steps, seconds = step - self._at, max(time.perf_counter() - self._since, 1e-9)
        speed = {"steps_per_second": steps / seconds, "data_wait": min(self._waited / seconds, 1.0)}
        if self._work:
            speed["samples_per_second"] = sum(work.samples for work in self._work) / seconds
            if tokens := sum(work.tokens for work in self._work):
                speed["tokens_per_second"] = tokens / seconds
            flop = sum(work.flop for work in self._work)
            speed |= {"flop_per_step": flop / len(self._work), "flop_per_second": flop / seconds}
            ideal = [work.seconds_at_peak for work in self._work if work.seconds_at_peak is not None]
            if len(ideal) == len(self._work):
                speed["mfu"] = sum(ideal) / seconds
        self._steps, self._seconds = self._steps + steps, self._seconds + seconds
        self._at = step
        self._restart()
        return speed

    def seconds_for(self, steps: int) -> float | None:
        """Returns the seconds that `steps` steps take at the average speed, or None if the speed is not known yet."""
        return steps * self._seconds / self._steps if self._steps else None

    def _restart(self) -> None:
        self._since, self._waited, self._work = time.perf_counter(), 0.0, []
