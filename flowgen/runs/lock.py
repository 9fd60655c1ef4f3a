"""Locks for run directories and folders in use. The operating system releases the locks of a process when it ends."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import weakref
from collections.abc import Generator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows does not have this module, so runs are not protected there.
    fcntl = None

LOCK_FILE = "lock"


class RunLock:
    """Locks a run directory for training, until `release` is called. Reading a run does not require the lock.

    protects: whether the lock is effective. False on Windows and on file systems without locks, where nothing prevents
    other processes from training in the directory.

    Raises:
        BlockingIOError: another process is training in the directory; the message names the process.
        OSError: the lock cannot be created.

    Example:
        lock = RunLock("runs/digits")
        lock.release()
    """

    def __init__(self, run_dir: str | Path):
        self.path = Path(run_dir) / LOCK_FILE
        self._descriptor = os.open(
            self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666
        )
        try:
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise OSError(f"{self.path} is not a regular file; remove it.")
            self.protects = _take(self._descriptor, self.path)
            os.truncate(self._descriptor, 0)
            os.write(self._descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        except BaseException:
            os.close(self._descriptor)
            raise
        # A forked process, such as a data loader, may outlive this one and must not keep the lock.
        self._held, release = True, weakref.WeakMethod(self.release)
        os.register_at_fork(after_in_child=lambda: (method := release()) and method())

    def holds(self) -> bool:
        """Returns whether the lock file in the directory is still the file that was locked."""
        try:
            there = os.stat(self.path)
        except OSError:
            return False
        return os.path.samestat(there, os.fstat(self._descriptor))

    def release(self) -> None:
        """Releases the lock, so that another process can train in the directory."""
        if self._held:
            self._held = False
            os.close(self._descriptor)


class Place:
    """Identifies the directory at a path, to detect when it is removed or replaced.

    Example:
        place = Place("runs/digits")
        place.is_same()
        place.close()
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        # The descriptor stays open, so that no new directory can reuse the inode number after this one is deleted.
        self._descriptor = os.open(path, os.O_RDONLY)

    def is_same(self) -> bool:
        """Returns whether the path still leads to the same directory."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except OSError:
            return False

    def close(self) -> None:
        """Closes the descriptor of the directory."""
        os.close(self._descriptor)


@contextlib.contextmanager
def in_use(folder: str | Path) -> Generator[None]:
    """Returns a context in which `is_abandoned` returns False for a folder in every process.

    Example:
        with in_use("exported/.digits.tmp"): ...
    """
    descriptor = os.open(folder, os.O_RDONLY) if fcntl is not None else None
    try:
        if fcntl is not None and descriptor is not None:
            with contextlib.suppress(OSError):  # some network file systems do not support locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def is_abandoned(folder: str | Path) -> bool:
    """Returns whether no process has a folder `in_use`; False if this is unknown, as in file systems without locks.

    Example:
        is_abandoned("exported/.digits.tmp")
    """
    if fcntl is None:
        return False
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # it is locked, or the file system does not support locks
        return False
    finally:
        os.close(descriptor)
    return True


def check_unlocked(run_dir: str | Path) -> None:
    """Raises BlockingIOError if another process is training in a directory; the message names the process.

    Creates no files.

    Example:
        check_unlocked("runs/digits")
    """
    path = Path(run_dir) / LOCK_FILE
    if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK | os.W_OK):
        descriptor = os.open(path, os.O_RDWR)
        try:
            _take(descriptor, path)
        finally:
            os.close(descriptor)


def _take(descriptor: int, path: Path) -> bool:
    """Acquires the lock and returns True. Returns False if the file system does not support locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            f"workdir {path.parent} is in use by {_holder(path)}; wait until it ends, or give another directory."
        ) from error
    except OSError:
        return False  # some network file systems do not support locks
    return True


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_bytes()[:1000])
        return f"process {int(holder['pid'])} on {str(holder['host'])[:100]!r}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"
