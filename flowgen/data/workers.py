"""Reads files on all cores, in threads of this process or in separate processes."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, TypeVar

from flowgen.backend import available_cores
from flowgen.data.unreadable import Unreadable
from flowgen.packages import missing
from flowgen.places import is_remote

T = TypeVar("T")
Job = Callable[[], T]
# Decoding an image holds Python's lock for about 8 % of its time, so threads keep about this many cores busy.
_CORES_OF_THREADS = 8
# A process needs about 200 MB. These suffice for more images per second than one process can pass to its devices.
_MOST_PROCESSES = 32
# Threads beyond one per core, because some wait for a disk or, with many more threads, for a bucket.
_WAIT_FOR_DISK, _WAIT_FOR_BUCKET = 4, 64
_WATCH_SECONDS = 1.0
# The pools by their size, and a lock, without which two threads could each start one.
_THREADS: dict[int, ThreadPoolExecutor] = {}
_PROCESSES: dict[int, Any] = {}
_STARTING = threading.Lock()


class Failure(NamedTuple):
    """The result of reading a file that cannot be decoded. named: the file and the reason."""

    named: str


class Workers:
    """Reads files on all cores.

    processes: number of processes that read; 0 reads in threads of this process. remote: whether the files are in a
    bucket, which requires more threads.

    Raises ModuleNotFoundError if processes are requested but loky is not installed.

    Example:
        contents = Workers(0).read([partial(read_image, path, size=(8, 8), channels=1, crop="center")])
    """

    def __init__(self, processes: int, *, remote: bool = False):
        self.processes, self._waiting = processes, _WAIT_FOR_BUCKET if remote else _WAIT_FOR_DISK
        if processes:
            _import_loky()

    def read(self, jobs: Sequence[Job[T]]) -> list[T | Failure]:
        """Returns the result of each job, or a `Failure` if the job raises `Unreadable`.

        jobs: functions without arguments, which must be picklable if processes run them.

        Raises RuntimeError if a process failed or was killed.
        """
        if not self.processes:
            return list(_threads(available_cores() + self._waiting).map(_read_one, jobs))
        share = max(1, math.ceil(len(jobs) / self.processes))
        parts = [jobs[start : start + share] for start in range(0, len(jobs), share)]
        executor = _processes(self.processes)
        try:
            futures = [executor.submit(_read_each, part) for part in parts]
            return [content for future in futures for content in future.result()]
        except BrokenExecutor as error:
            _PROCESSES.pop(self.processes, None)
            if not isinstance(error, _import_loky().process_executor.TerminatedWorkerError):
                raise RuntimeError(f"a process that reads files failed ({error.__cause__ or error}).") from error
            raise RuntimeError(
                f"one of the {self.processes} processes that read files was killed, possibly because memory ran out; "
                "lower data.workers, or set it to 0 to read in threads."
            ) from error


def workers_of(count: int | Literal["auto"], path: str) -> Workers:
    """Returns the workers for a value of `data.workers` and the path of the data.

    "auto" reads in threads if there are up to eight cores or the data are in a bucket. Otherwise, it reads in
    processes, one per core but at most 32, if the package loky is installed, and in threads if it is not.

    Example:
        workers_of("auto", "photos").processes
    """
    remote = is_remote(path)
    if count != "auto":
        return Workers(count, remote=remote)
    cores = available_cores()
    if remote or cores <= _CORES_OF_THREADS:
        return Workers(0, remote=remote)
    try:
        return Workers(min(cores, _MOST_PROCESSES))
    except ModuleNotFoundError:
        return Workers(0)


def _read_one(job: Job[T]) -> T | Failure:
    try:
        return job()
    except Unreadable as error:
        return Failure(error.named)


def _read_each(jobs: Sequence[Job[T]]) -> list[T | Failure]:
    return [_read_one(job) for job in jobs]


def _threads(count: int) -> ThreadPoolExecutor:
    """Returns the threads that all datasets share."""
    with _STARTING:
        if count not in _THREADS:
            _THREADS[count] = ThreadPoolExecutor(count, thread_name_prefix="flowgen-read")
        return _THREADS[count]


def _processes(count: int) -> Any:
    """Returns the processes that all datasets share.

    loky starts them without running the main program again, and ends them when this process exits.
    """
    with _STARTING:
        if count not in _PROCESSES:
            loky = _import_loky()
            context = loky.backend.get_context("loky")
            executor = loky.ProcessPoolExecutor(count, context=context, initializer=_begin, initargs=(os.getpid(),))
            with _interrupts_blocked():
                executor.submit(os.getpid)  # starts all processes
            _PROCESSES[count] = executor
        return _PROCESSES[count]


@contextlib.contextmanager
def _interrupts_blocked() -> Generator[None]:
    """Returns a context in which new processes start with Ctrl-C blocked, because they cannot ignore it immediately."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_processes() -> None:
    """Ends all processes that read files. Call this function before `os._exit`, which skips Python's own clean-up.

    Example:
        end_processes()
    """
    while _PROCESSES:
        _PROCESSES.popitem()[1].shutdown(wait=True, kill_workers=True)
    gc.collect()  # frees the semaphores, of which a warning would tell otherwise


def _begin(parent: int) -> None:
    """Makes a process that reads files ignore Ctrl-C, which its parent handles, and end if its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _import_loky() -> Any:
    try:
        import loky
        import loky.process_executor
    except ModuleNotFoundError as error:
        raise missing("data.workers", "loky") from error
    return loky


if hasattr(os, "register_at_fork"):  # the threads and processes belong to the parent
    os.register_at_fork(after_in_child=_THREADS.clear)
    os.register_at_fork(after_in_child=_PROCESSES.clear)
