"""A lock that lets only one process at a time train in a folder of a bucket.

The lock is a file that only one process can create. Its holder regularly writes the time into the file. If the holder
has not done so for `EXPIRES` seconds, another process may take over the lock. To do so, this process must first create
a second file. Only one process can create it, so only one of several waiting processes acquires the lock.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from flowgen.places import RemoteFolder
from flowgen.runs.lock import LOCK_FILE

TAKEOVER_FILE = "lock.takeover"
# Seconds between two times that the holder writes, and seconds after which a lock counts as left by a dead process.
# Clocks of machines may differ by a part of the latter.
BEAT, EXPIRES = 60.0, 600.0
_TRIES, _PAUSE = 5, 0.1


class RemoteLock:
    """Locks a folder until `release` is called. The holder must call `refresh` every `BEAT` seconds.

    A process that was suspended, or could not reach the bucket, may lose the lock without noticing. To detect this,
    call `check` before each change to the folder.

    told: a line about a lock that was taken over from a dead process, or "".

    Raises:
        BlockingIOError: another process is training in the folder; the message names the process and the time at which
            its lock expires.
        OSError: the lock cannot be created.

    Example:
        lock = RemoteLock(RemoteFolder("gs://bucket/run"))
        lock.release()
    """

    def __init__(self, folder: RemoteFolder):
        self._folder, self._token, self.told = folder, secrets.token_hex(8), ""
        self._changing, self._lost = threading.Lock(), ""
        self._refreshed = _uptime()
        if not folder.create(LOCK_FILE, self._content()):
            self._take_over()

    def refresh(self) -> None:
        """Writes the time into the lock. Raises BlockingIOError if another process has taken the lock over.

        After the lock is lost, every later call raises this error too.
        """
        with self._changing:
            if not self._lost:
                start = _uptime()
                self._lost = self._why_lost()
                if not self._lost:
                    self._folder.write(LOCK_FILE, self._content())
                    # If this process was suspended in between, it may have written over the lock of another one.
                    if _uptime() - start > EXPIRES / 2:
                        self._lost = "its lock could not be refreshed in time"
                    self._refreshed = start
            if self._lost:
                raise BlockingIOError(
                    f"this process no longer holds workdir {self._folder}, because {self._lost}; nothing more is "
                    "uploaded."
                )

    def check(self) -> None:
        """Raises BlockingIOError if the lock is lost. Reads the bucket only after 5 minutes without a refresh."""
        if self._lost or _uptime() - self._refreshed > EXPIRES / 2:
            self.refresh()

    def _why_lost(self) -> str:
        holder = _holder(self._folder)
        if holder is None:
            return "someone has deleted its lock"
        return "" if holder.token == self._token else f"{holder} has taken over its lock"

    def release(self) -> None:
        """Deletes the lock, unless another process has taken it over."""
        if self._owns(LOCK_FILE):
            self._folder.delete(LOCK_FILE)

    def _take_over(self) -> None:
        holder = check_free(self._folder)
        if holder is None:  # released in the meantime
            if not self._folder.create(LOCK_FILE, self._content()):
                check_free(self._folder)
                raise BlockingIOError(f"workdir {self._folder} is in use; run the command again.")
            return
        claim = self._content()
        if not self._folder.create(TAKEOVER_FILE, claim):
            # A process may have died during a takeover.
            rival = _holder(self._folder, TAKEOVER_FILE)
            if rival is not None and time.time() >= rival.time + EXPIRES:
                self._folder.delete(TAKEOVER_FILE)
            if not self._folder.create(TAKEOVER_FILE, claim):
                raise BlockingIOError(
                    f"another process is taking over workdir {self._folder} from {holder}; run the command again, "
                    f"after {EXPIRES / 60:.0f} minutes if it has died."
                )
        try:
            # Of several that find an expired one, each may delete the new one of another.
            if not self._owns(TAKEOVER_FILE):
                raise BlockingIOError(f"another process is taking over workdir {self._folder}; run the command again.")
            # Only the holder of the second file changes an old lock, so the lock cannot change after this.
            now = check_free(self._folder)
            if now is not None and now.token == holder.token:
                self._folder.write(LOCK_FILE, self._content())
            elif now is not None or not self._folder.create(LOCK_FILE, self._content()):
                raise BlockingIOError(f"workdir {self._folder} is in use by another process; give another directory.")
        finally:
            if self._owns(TAKEOVER_FILE):
                self._folder.delete(TAKEOVER_FILE)
        self.told = (
            f"Took over {self._folder} from {holder}, which last reported at {_clock(holder.time)}, so it has died."
        )

    def _owns(self, name: str) -> bool:
        holder = _holder(self._folder, name)
        return holder is not None and holder.token == self._token

    def _content(self) -> bytes:
        about = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time(), "token": self._token}
        return json.dumps(about).encode()


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, and the time at which it last refreshed the lock."""

    pid: int
    host: str
    time: float
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host!r}"


def check_free(folder: RemoteFolder) -> Holder | None:
    """Returns the holder of an expired lock, or None if there is no lock. Writes nothing.

    Raises BlockingIOError if a process is training in the folder.

    Example:
        check_free(RemoteFolder("gs://bucket/run"))
    """
    holder = _holder(folder)
    if holder is not None and time.time() < holder.time + EXPIRES:
        raise BlockingIOError(
            f"workdir {folder} is in use by {holder}, which last reported at {_clock(holder.time)}; wait until it "
            f"ends. If it has died, wait until {_clock(holder.time + EXPIRES)}, or delete {folder}/{LOCK_FILE}."
        )
    return holder


def _holder(folder: RemoteFolder, name: str = LOCK_FILE) -> Holder | None:
    for _ in range(_TRIES):
        try:
            about = json.loads(folder.read(name)[:1000])
            return Holder(int(about["pid"]), str(about["host"])[:100], float(about["time"]), str(about["token"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, RecursionError):
            time.sleep(_PAUSE)  # unlike an object in a bucket, a file:// may be read while it is written
    raise BlockingIOError(
        f"the lock of workdir {folder} cannot be read; if no process is training there, delete {name} there."
    )


def _uptime() -> float:
    """Returns a time in seconds that also advances while this process or, on Linux, the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _clock(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%H:%M:%S} UTC"
