"""Shows the progress of training: on a terminal as a bar, otherwise as one line per report."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from flowgen.printable import printable

# The metrics that a report shows, in this order.
SHOWN = ("loss", "bits_per_dim", "nats_per_dim", "grad_norm", "lr")

# How reports without a bar show the other measures of speed and memory, in this order.
SPEEDS = {
    "samples_per_second": lambda speed: f"{_whole(speed)} samples/s",
    "tokens_per_second": lambda speed: f"{_whole(speed)} tokens/s",
    "flop_per_second": lambda speed: f"{with_prefix(speed)}FLOP/s",
    "mfu": lambda share: f"MFU {share:.1%}",
    "peak_memory_bytes": lambda size: f"{with_prefix(size)}B used",
    "data_wait": lambda share: f"{share:.0%} waiting for data",
}


class Progress:
    """Shows the loss, the speed and the remaining time on standard error.

    bar: whether to show a progress bar if standard error is a terminal.

    Example:
        progress = Progress(first_step=0, last_step=1000, bar=True)
        progress.show(50, {"loss": 1.0, "steps_per_second": 12.5}, seconds_left=76.0)
    """

    def __init__(self, *, first_step: int, last_step: int, bar: bool):
        self._last = last_step
        self._bar: Any = None
        if bar and on_terminal():
            from tqdm import tqdm

            # Unlike the speed and remaining time that tqdm measures, ours exclude compilation.
            form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(
                total=last_step, initial=first_step, file=sys.stderr, dynamic_ncols=True, bar_format=form, leave=True
            )

    def advance(self, step: int) -> None:
        """Moves the bar, if there is one, to a step."""
        if self._bar is not None:
            with _unseen():
                self._bar.update(step - self._bar.n)

    def show(self, step: int, metrics: dict[str, float], seconds_left: float | None) -> None:
        """Shows the metrics of a report. seconds_left: None if the speed is not known yet."""
        words = [f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics]
        if "steps_per_second" in metrics:
            words.append(f"{metrics['steps_per_second']:.3g} steps/s")
        if self._bar is None:  # a bar has no room for more
            words += [speed(metrics[name]) for name, speed in SPEEDS.items() if name in metrics]
        if seconds_left is not None:
            words.append(f"{clock(seconds_left)} left")
        if self._bar is not None:
            with _unseen():
                self._bar.set_postfix_str(", ".join(words), refresh=True)
        else:
            self.say(f"step {step}/{self._last}: " + ", ".join(words))

    def say(self, line: str) -> None:
        """Shows one line, above the bar if there is one."""
        line = printable(line)  # may include the name of a folder, which can contain any character
        with _unseen():
            if self._bar is not None:
                self._bar.write(line, file=sys.stderr)
            elif sys.stderr is not None:
                sys.stderr.write(line + "\n")
                sys.stderr.flush()

    def close(self) -> None:
        """Closes the bar, leaving it on the terminal."""
        if self._bar is not None:
            with _unseen():
                self._bar.close()


def _unseen() -> contextlib.suppress:
    """Returns a context that ignores errors of output, such as a closed pipe, because they must not end training."""
    return contextlib.suppress(OSError, ValueError)


def on_terminal() -> bool:
    """Returns whether standard error is a terminal.

    Example:
        bar = on_terminal()
    """
    return sys.stderr is not None and sys.stderr.isatty()


def clock(seconds: float) -> str:
    """Returns a duration formatted for display, such as "0:07", "12:30" or "1:02:03".

    Example:
        clock(750) == "12:30"
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _whole(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def with_prefix(number: float) -> str:
    """Returns a number as text, ready for a unit: "1.25 T" with a metric prefix, or "40 " if it needs none.

    The number is rounded to three significant digits, without zeros at the end.

    Example:
        with_prefix(1.25e12) + "FLOP/s" == "1.25 TFLOP/s"
    """
    prefixes = ("", "k", "M", "G", "T", "P", "E")
    thousands = 0
    while abs(number) >= 999.5 and thousands < len(prefixes) - 1:
        number, thousands = number / 1000, thousands + 1
    return f"{number:.3g} {prefixes[thousands]}"
