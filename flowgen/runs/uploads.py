"""Uploads the files of a training process to a bucket, and keeps the run there locked."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from flowgen.places import local_name
from flowgen.runs.checkpoints import EVALUATION, META
from flowgen.runs.directory import CHECKPOINTS, CONFIG_FILE, DATA_FILE, START_FILE
from flowgen.runs.files import is_temporary
from flowgen.runs.history import HISTORY_FILE
from flowgen.runs.lock import LOCK_FILE
from flowgen.runs.metrics import METRICS_FILE
from flowgen.runs.mirror import Mirror, for_each, is_of_checkpoint
from flowgen.runs.remote_lock import BEAT, RemoteLock

# Files that a resumed run reads or adds to.
CONTINUED = (CONFIG_FILE, DATA_FILE, START_FILE, METRICS_FILE, HISTORY_FILE)


class Uploads:
    """Locks a run in a bucket for one training process, and uploads the files that the process writes to `mirror`.

    The metadata of a checkpoint are uploaded last and deleted first, so that a partly uploaded or deleted checkpoint
    has no metadata. The thread that saves a checkpoint also uploads it. Two other threads run once a minute: one
    refreshes the lock, and the other uploads all other files, such as metrics.

    The lock is checked before each change to the bucket. A process that is suspended after this check may lose the lock
    and still make the change. The change cannot damage a checkpoint of the next process, because uploads never
    overwrite files of checkpoints.

    Raises:
        BlockingIOError: another process is training the run, or has trained it since the mirror was made.
        OSError: writing to the bucket failed.

    Example:
        uploads = Uploads(Mirror("gs://bucket/run"), say=print)
        uploads.save(300)
        uploads.close()
    """

    def __init__(self, mirror: Mirror, say: Callable[[str], None]):
        self.mirror, self._say = mirror, say
        self._remote = mirror.remote
        self._lock = RemoteLock(self._remote)
        self._sent: dict[str, tuple[int, int]] = {}  # time and size of each file when it was copied
        self._sending = threading.Lock()
        self.failed = False  # whether the last upload failed, so that the mirror has files that the bucket lacks
        try:
            if _checkpoint_files(self._remote.sizes(CHECKPOINTS)) != _checkpoint_files(mirror.sizes):
                raise BlockingIOError(
                    f"another process has since trained in workdir {mirror.url}; run the command again."
                )
            if self._lock.told:
                say(self._lock.told)
            self._remove_unfinished()
            mirror.fetch(CONTINUED)
            self._sent.update((name, _mark(mirror.path / name)) for name in CONTINUED if name in mirror.sizes)
        except BaseException:
            self._lock.release()
            raise
        # An upload may take longer than a lock lasts, so the lock is refreshed by a thread of its own.
        self._beating = _Regularly(self._lock.refresh, "flowgen-lock")
        self._sending_on = _Regularly(self.send, "flowgen-upload")

    def send(self) -> None:
        """Uploads all files that have changed, except checkpoints."""
        with self._sending:
            for path in sorted(self.mirror.path.rglob("*")):
                name = path.relative_to(self.mirror.path).as_posix()
                if is_of_checkpoint(name) or name == LOCK_FILE or is_temporary(path.name) or not path.is_file():
                    continue
                mark = _mark(path)
                if self._sent.get(name) != mark:
                    content = path.read_bytes()  # first, because metrics may be added during the upload
                    self._lock.check()
                    self._remote.write(name, content)
                    self._sent[name] = mark

    def save(self, step: int) -> None:
        """Uploads changed files, such as metrics, and then a checkpoint. Empties the local copies of its arrays.

        `score` uploads the checkpoint's evaluation. Raises OSError, and keeps the local files, if the upload fails.
        """
        self.failed = True
        self._lock.refresh()
        self.send()
        self._delete(name for name in self._remote.sizes(f"{CHECKPOINTS}/{step}"))
        folder = self.mirror.path / CHECKPOINTS / str(step)
        sizes = {
            path.relative_to(self.mirror.path).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.name != EVALUATION and not is_temporary(path.name) and path.is_file()
        }
        last = f"{CHECKPOINTS}/{step}/{META}"
        names = [name for name in sizes if name != last]
        for_each(self._upload, names)
        there = self._remote.sizes(f"{CHECKPOINTS}/{step}")
        for name in names:
            if there.get(name) != sizes[name]:
                raise OSError(f"{self._remote}/{name} has {there.get(name, 0)} bytes instead of {sizes[name]}.")
        self._lock.refresh()
        self._upload(last)
        self.failed = False
        self.mirror.make_empty(names)

    def score(self, step: int) -> None:
        """Uploads the evaluation of a checkpoint."""
        self._lock.refresh()
        self._upload(f"{CHECKPOINTS}/{step}/{EVALUATION}")

    def delete(self, step: int) -> None:
        """Deletes a checkpoint. If this fails, reports the failure, and leaves the deletion to the next process."""
        try:
            self._delete(self._remote.sizes(f"{CHECKPOINTS}/{step}"))
        except OSError as error:
            self._say(f"Checkpoint {step} could not be deleted: {error}")

    def close(self) -> None:
        """Uploads the remaining files and releases the lock. Then removes the mirror, unless an upload has failed.

        Raises OSError if the upload fails.
        """
        self._sending_on.end()
        try:
            self._lock.refresh()
            self.send()
        except OSError:
            self.failed = True
            raise
        finally:
            self._beating.end()
            with contextlib.suppress(OSError):  # the lock then expires
                self._lock.release()
            if self.failed:
                self.mirror.keep()
                self._say(f"What could not be uploaded is kept in {self.mirror.path} on this machine.")
            else:
                self.mirror.close()

    def _remove_unfinished(self) -> None:
        names = self.mirror.unfinished
        for step in sorted({int(name.split("/")[1]) for name in names}):
            self._say(f"Removed the rest of checkpoint {step} in {self._remote}, which an interruption has left.")
        self._delete(names)

    def _upload(self, name: str) -> None:
        """Uploads a file of a checkpoint. If the bucket has it, first refreshes the lock and deletes it there."""
        path = local_name(self.mirror.path, name)
        self._lock.check()
        if self._remote.upload_new(path, name):
            return
        self._lock.refresh()
        self._remote.delete(name)
        if not self._remote.upload_new(path, name):
            raise OSError(f"{self._remote}/{name} is also written by another process; end one of the two.")

    def _delete(self, names: Iterable[str]) -> None:
        """Deletes files of a checkpoint, its metadata first."""
        ordered = sorted(names, key=lambda name: (not name.endswith(f"/{META}"), name))
        first = [name for name in ordered if name.endswith(f"/{META}")]
        for name in first:
            self._delete_file(name)
        for_each(self._delete_file, ordered[len(first) :])

    def _delete_file(self, name: str) -> None:
        self._lock.check()
        self._remote.delete(name)


class _Regularly:
    """Calls a function in a thread, every `BEAT` seconds, until `end` is called.

    Ignores the function's OSErrors, because the next save reports a lost lock or an unreachable bucket.
    """

    def __init__(self, work: Callable[[], None], name: str):
        self._work, self._ended = work, threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):
                self._work()

    def end(self) -> None:
        """Ends the thread, after waiting for a call in progress."""
        self._ended.set()
        self._thread.join()


def _checkpoint_files(sizes: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if is_of_checkpoint(name)}


def _mark(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_mtime_ns, about.st_size
