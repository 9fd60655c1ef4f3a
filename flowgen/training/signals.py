"""Ctrl-C and SIGTERM while a run trains: answered at once, and honoured where nothing is lost by it."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

# SIGHUP, where there is one, comes of a terminal that is closed.
NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# Programs such as `timeout` signal a process and then its group, which it belongs to: that is one wish, not two.
_TOGETHER = 0.2
# Seconds after which what a callback lost is raised again: the callback has then ended.
_AGAIN = 0.01


class Interrupted(KeyboardInterrupt):
    """What is under way ends because of a signal, whose number it carries; nothing is lost by it."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Signals:
    """Notes the first SIGINT or SIGTERM in `number` and says at once what happens; a second one ends without saving.

    The answer comes from a thread, since the main one may be compiling, which no Python can interrupt. `doing` is what
    it says. on_second(number) is called in that thread, and may end the process; without it the second signal does in
    the main thread what it would have done. Outside the main thread of a program nothing is caught.

    Example:
        with Signals() as signals:
            with signals.raising():
                data = load()    # a signal raises Interrupted
            for batch in data:
                step(batch)
                if signals.number:
                    break
    """

    def __init__(self, on_second: Callable[[int], None] | None = None):
        self.number = 0
        self.doing = "Stopping before the first step; nothing is lost"
        self._on_second, self._ending, self._raises = on_second, False, False
        self._lost = False  # whether what the first signal raised was lost, and is to be raised again
        self._repeats = 0  # signals still to be read that nobody sent: the first one again
        self._noted = ""  # What was being done when the main thread came to know of it.
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._previous_fd = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        # `nohup` has a program ignore that its terminal is closed.
        numbers = [n for n in NUMBERS if n in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(n) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._note) for number in numbers}
        self._thread = threading.Thread(target=self._answer, args=(reading,), name="flowgen-signals", daemon=True)
        self._thread.start()
        forget = weakref.WeakMethod(self._forget)
        os.register_at_fork(after_in_child=lambda: (method := forget()) and method())
        return self

    def __exit__(self, *exception: object) -> None:
        if self._previous:
            self._restore()
            signal.set_wakeup_fd(self._previous_fd, warn_on_full_buffer=False)
            os.write(self._writing, bytes(1))  # A program of ours that still runs may hold the pipe open.
            os.close(self._writing)
            self._thread.join()
            self._previous = {}

    @contextmanager
    def raising(self) -> Generator[None]:
        """Within it a signal raises Interrupted where it arrives, and at the start where it came before.

        Python loses an exception that arises in a callback, such as one of garbage collection; it is then raised again.
        """
        self._raises, hook = True, sys.unraisablehook
        timers: list[threading.Timer] = []

        def again(lost: Any) -> None:
            if not isinstance(lost.exc_value, Interrupted):
                hook(lost)
                return
            timers.append(threading.Timer(_AGAIN, self._repeat, (lost.exc_value.number,)))
            timers[-1].start()

        sys.unraisablehook = again
        try:
            if self.number:
                raise Interrupted(self.number)
            yield
            if self.number:
                raise Interrupted(self.number)
        finally:
            self._raises = False
            sys.unraisablehook = hook
            for timer in timers:
                timer.cancel()

    def _note(self, number: int, frame: Any) -> None:
        """In the main thread, when it next runs Python."""
        if self._ending:
            self._restore()
            signal.raise_signal(number)
        elif not self.number or self._lost:
            if not self.number:
                self.number, self._noted = number, self.doing
            self._lost = False
            if self._raises:
                raise Interrupted(number)

    def _repeat(self, number: int) -> None:
        """In a thread: has the main one raise again what was lost."""
        self._lost = True
        self._repeats += 1
        _thread.interrupt_main(signal.Signals(number))

    def _answer(self, reading: int) -> None:
        """In a thread, which reads the number of each signal as it comes, until the pipe is closed."""
        first = None
        with open(reading, "rb", buffering=0) as pipe:
            while byte := pipe.read(1):
                number = byte[0]
                if number == 0:
                    return
                if number not in self._previous or self._ending:
                    continue
                if self._repeats:
                    self._repeats -= 1
                    continue
                if first is None:
                    first = time.monotonic()
                    _say(f"{self._noted or self.doing}; a second signal ends without saving.")
                elif time.monotonic() - first > _TOGETHER:
                    self._ending = True
                    _say("Ending without saving; checkpoints stay as they are.")
                    if self._on_second is not None:
                        self._on_second(number)
                    signal.pthread_kill(threading.main_thread().ident or 0, number)

    def _forget(self) -> None:
        """In a process that was forked, such as one that loads data: its signals are not ours."""
        if self._previous:
            signal.set_wakeup_fd(-1)
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    # A terminal that was closed takes no answer.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        # Under a bar, or a terminal's ^C, the line starts anew.
        sys.stderr.write(("\n" if sys.stderr.isatty() else "") + line + "\n")
        sys.stderr.flush()
