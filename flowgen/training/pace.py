"""Training speed and remaining time."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager


class Pace:
    """Measures steps per second, excluding compilation, evaluation, sampling and saving.

    Example:
        pace = Pace()
        pace.begin(step=1)    # the first step, which includes compilation, has ended
        pace.measure(step=51)["steps_per_second"]
    """

    def __init__(self):
        self.begun = False
        self._at, self._since = 0, 0.0
        self._steps, self._seconds = 0, 0.0

    def begin(self, step: int) -> None:
        """Starts the measurement after the first step."""
        self.begun, self._at, self._since = True, step, time.perf_counter()

    @contextmanager
    def left_out(self) -> Generator[None]:
        """Returns a context whose duration does not count."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - before

    def measure(self, step: int) -> dict[str, float]:
        """Returns the speed since the last call, or an empty dict if no step has ended since."""
        if not self.begun or step == self._at:
            return {}
        now = time.perf_counter()
        steps, seconds = step - self._at, now - self._since
        self._at, self._since = step, now
        self._steps, self._seconds = self._steps + steps, self._seconds + seconds
        return {"steps_per_second": steps / max(seconds, 1e-9)}

    def seconds_for(self, steps: int) -> float | None:
        """Returns the seconds that this many steps take at the average speed, or None if the speed is not known yet."""
        return steps * self._seconds / self._steps if self._steps else None
