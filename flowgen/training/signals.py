"""Handles Ctrl-C, SIGTERM and SIGHUP in training: reports a signal at once, and stops when no work would be lost."""

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

# A closing terminal sends SIGHUP, on systems that have it.
NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# Programs such as `timeout` signal a process and then its process group. Signals within this many seconds count as one.
_TOGETHER = 0.2
# Seconds until an exception that was lost in a callback is raised again; the callback has ended by then.
_AGAIN = 0.01


class Interrupted(KeyboardInterrupt):
    """Raised when a signal, such as SIGINT, stops work that can be repeated. `number` is the signal's number."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Signals:
    """A context that records the first SIGINT, SIGTERM or SIGHUP, and prints at once what training will do.

    number: number of the first signal; 0 if none has arrived. doing: the text to print, which training keeps up to
    date.

    A separate thread prints this text, because the main thread may be compiling, which Python cannot interrupt. A
    second signal ends the program without saving: the thread calls on_second(number), if `on_second` is given, with the
    number of the second signal. Unless this call ends the process, the signal then has its usual effect in the main
    thread. Signals are caught only if the context is entered in the main thread.

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
        self._lost = False  # whether the first signal's exception was lost and must be raised again
        self._repeats = 0  # signals from `_repeat` that have not been read yet
        self._noted = ""  # `doing` when the main thread noticed the signal
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._previous_fd = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        # `nohup` makes a program ignore SIGHUP.
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
            os.write(self._writing, bytes(1))  # A child process may still hold the pipe open.
            os.close(self._writing)
            self._thread.join()
            self._previous = {}

    @contextmanager
    def raising(self) -> Generator[None]:
        """Returns a context that raises Interrupted when a signal arrives, or on entry if one has already arrived.

        Python loses exceptions that are raised in some callbacks, such as garbage-collection callbacks. A lost
        Interrupted is raised again.
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
        """Handles a signal as soon as the main thread runs Python code again."""
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
        """Makes the main thread raise the lost exception again; runs in another thread."""
        self._lost = True
        self._repeats += 1
        _thread.interrupt_main(signal.Signals(number))

    def _answer(self, reading: int) -> None:
        """Reads the number of each signal as it arrives, until the pipe is closed; runs in its own thread."""
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
                    _say(f"{self._noted or self.doing}; a second signal ends the program without saving.")
                elif time.monotonic() - first > _TOGETHER:
                    self._ending = True
                    _say("Ending without saving; existing checkpoints are unchanged.")
                    if self._on_second is not None:
                        self._on_second(number)
                    signal.pthread_kill(threading.main_thread().ident or 0, number)

    def _forget(self) -> None:
        """Stops handling signals in a forked process, such as a data-loading worker."""
        if self._previous:
            signal.set_wakeup_fd(-1)
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    # Errors are ignored: the terminal may be closed.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        # Starts a new line after a progress bar or a terminal's ^C.
        sys.stderr.write(("\n" if sys.stderr.isatty() else "") + line + "\n")
        sys.stderr.flush()
