"""The budget of a training run in benchmarks/quality.py: processor time of one core. Both sides use this module.

It needs only the standard library, because the published code runs in an interpreter without flowgen.
"""

import contextlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BATCH = 64
NOISE_STD = 0.1
# The learning rate rises to its largest value over the first 5 % of the budget, and then falls along a half cosine.
LEARNING_RATE, LEAST_RATE, WARMUP = 1e-3, 1e-6, 0.05
CURVE_POINTS = 10


class Budget:
    """Counts the processor time of all threads of this process until `seconds` are spent."""

    def __init__(self, seconds: float):
        self.seconds, self.steps, self.compile_seconds = seconds, 0, 0.0
        self._began, self._left_out = time.process_time(), 0.0

    @property
    def spent(self) -> float:
        return time.process_time() - self._began - self._left_out

    @property
    def fraction(self) -> float:
        return min(self.spent / self.seconds, 1.0)

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Returns a context manager whose processor time does not count."""
        before = time.process_time()
        try:
            yield
        finally:
            self._left_out += time.process_time() - before

    def count_only(self, part: "Budget") -> None:
        """Reduces the time counted so far to the time that `part`, a budget that began later, has counted."""
        self._left_out = time.process_time() - self._began - part.spent
        self.compile_seconds += part.compile_seconds

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Returns a context manager whose processor time is counted separately, as compilation."""
        before = time.process_time()
        with self.left_out():
            yield
        self.compile_seconds += time.process_time() - before


def learning_rate(fraction: float) -> float:
    """Returns the learning rate after a fraction of the budget."""
    if fraction < WARMUP:
        return LEAST_RATE + fraction / WARMUP * (LEARNING_RATE - LEAST_RATE)
    progress = (fraction - WARMUP) / (1 - WARMUP)
    return LEAST_RATE + 0.5 * (1 + math.cos(math.pi * progress)) * (LEARNING_RATE - LEAST_RATE)


def spend(budget: Budget, step: Callable[[float], Any], evaluate: Callable[[], float]) -> dict[str, Any]:
    """Calls step(fraction of the budget) until the budget is spent, and returns the entries for the run's record.

    evaluate: returns the held-out value for the curve; its time does not count.
    """
    curve, due, began = [], 1, time.perf_counter()
    while budget.fraction < 1:
        step(budget.fraction)
        budget.steps += 1
        if budget.fraction >= due / CURVE_POINTS:
            seconds = round(budget.spent, 2)
            with budget.left_out():
                curve.append({"seconds": seconds, "steps": budget.steps, "value": evaluate()})
            print(f"{seconds:7.1f} s  step {budget.steps}: {curve[-1]['value']:.4f}", flush=True)
            due = int(budget.fraction * CURVE_POINTS) + 1
    return {
        "budget_seconds": budget.seconds,
        "processor_seconds": round(budget.spent, 2),
        "steps": budget.steps,
        "steps_per_second": round(budget.steps / budget.spent, 4),
        "compile_seconds": round(budget.compile_seconds, 2),
        "wall_seconds": round(time.perf_counter() - began, 1),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "curve": curve,
    }


def confine(core: int) -> None:
    """Confines this process to one core. Call it before importing jax or torch, which then use one thread."""
    os.sched_setaffinity(0, {core})


def save_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes a run's record, which marks the run as done."""
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
