"""Copies a run from a bucket to a temporary directory. Downloads each file only when it is needed."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flowgen.places import RemoteFolder, local_name
from flowgen.runs.checkpoints import EVALUATION, META
from flowgen.runs.directory import CHECKPOINTS
from flowgen.runs.files import read_json

# Number of files that are copied at a time.
AT_ONCE = 8


class Mirror:
    """A local copy of a run in a bucket. Later changes to the run are not copied.

    path: the directory of the copy. It contains all files of the checkpoints, so that a `CheckpointReader` can
    determine which checkpoints are complete, but each file is empty until it is fetched. Checkpoints without metadata
    are omitted, because their upload or deletion was interrupted. Files that the metadata do not list are omitted too:
    a process that lost the lock while it was suspended may have uploaded them. Files outside checkpoints are missing
    until they are fetched.

    Unless `keep` is called, the copy is removed when the object is deleted or the process ends.

    Example:
        mirror = Mirror("gs://bucket/run")
        mirror.fetch(["config.json"])
    """

    def __init__(self, url: str | os.PathLike[str]):
        self.remote = RemoteFolder(url)
        self.sizes = self.remote.sizes()
        self.path = Path(tempfile.mkdtemp(prefix="flowgen-"))
        self._remove = weakref.finalize(self, _remove, self.path, os.getpid())
        self._empty: set[str] = set()  # files that have not been fetched yet
        self._changing = threading.Lock()
        whole = self._whole
        listed = [name for name in self.sizes if is_of_checkpoint(name) and _folder_of(name) in whole]
        first = {name for name in listed if name.count("/") == 2 and name.endswith((f"/{META}", f"/{EVALUATION}"))}
        self.fetch(first)
        own = {folder: self._files_of(folder) for folder in whole}
        # Objects may have names that files cannot have, such as a file that is also a folder.
        for name in listed:
            files = own[_folder_of(name)]
            if name not in first and (files is None or name.removeprefix(_folder_of(name)) in files):
                with contextlib.suppress(OSError):
                    self._touch(name)

    @property
    def url(self) -> str:
        return self.remote.url

    @property
    def unfinished(self) -> list[str]:
        """The files of checkpoints whose upload or deletion was interrupted."""
        rest = [name for name in self.sizes if is_of_checkpoint(name) and _folder_of(name) not in self._whole]
        return [name for name in rest if name.split("/")[1].isdecimal()]

    @functools.cached_property
    def _whole(self) -> set[str]:
        """The folders of checkpoints that have metadata."""
        return {
            _folder_of(name) for name in self.sizes if is_of_checkpoint(name) and name == f"{_folder_of(name)}{META}"
        }

    def fetch(self, names: Iterable[str]) -> None:
        """Downloads the files `names`, except those that are not in the bucket or have been downloaded already."""
        with self._changing:
            wanted = [name for name in names if name in self._empty or (name in self.sizes and not self._has(name))]
        for_each(self._download, wanted)

    def fetch_checkpoint_files(self, names: Iterable[str]) -> None:
        """Downloads files, given their paths in the folder of checkpoints, such as "300/params/_METADATA"."""
        self.fetch(f"{CHECKPOINTS}/{name}" for name in names)

    def make_empty(self, names: Iterable[str]) -> None:
        """Empties copies of files that are also in the bucket."""
        for name in names:
            with self._changing:
                os.truncate(local_name(self.path, name), 0)
                self._empty.add(name)

    def free(self) -> None:
        """Frees the disk space of all arrays that were fetched."""
        self.make_empty(
            name
            for name in self.sizes
            if is_of_checkpoint(name) and name not in self._empty and name.count("/") > 2 and self._has(name)
        )

    def told(self, text: str) -> str:
        """Returns a text with the URL of the run in place of the path of the copy."""
        return text.replace(str(self.path), self.url)

    @contextlib.contextmanager
    def named(self) -> Generator[None]:
        """Returns a context in which error messages contain the URL of the run instead of the path of the copy."""
        try:
            yield
        except (OSError, ValueError) as error:
            error.args = tuple(self.told(part) if isinstance(part, str) else part for part in error.args)
            raise

    def keep(self) -> None:
        """Keeps the copy, even if the object is deleted or the process ends."""
        self._remove.detach()

    def close(self) -> None:
        """Removes the copy, unless it is kept."""
        self._remove()

    def _files_of(self, folder: str) -> dict[str, str] | None:
        """Returns the files that a checkpoint's metadata list, or None if the metadata are damaged."""
        try:
            files = read_json(local_name(self.path, folder) / META).get("files")
        except (OSError, ValueError):
            return None
        return files if isinstance(files, dict) else None

    def _has(self, name: str) -> bool:
        return local_name(self.path, name).exists()

    def _touch(self, name: str) -> None:
        path = local_name(self.path, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._empty.add(name)

    def _download(self, name: str) -> None:
        path = local_name(self.path, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.remote.download(name, path)
        with self._changing:
            self._empty.discard(name)


def for_each(work: Callable[[str], None], names: Iterable[str]) -> None:
    """Calls a function with each name, in several threads. After an error, starts no further calls.

    Example:
        for_each(folder.delete, ["a", "b"])
    """
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        for _ in pool.map(work, names):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def is_of_checkpoint(name: str) -> bool:
    """Returns whether a file of a run is in the folder of a checkpoint.

    Example:
        is_of_checkpoint("checkpoints/300/meta.json")
    """
    return name.startswith(f"{CHECKPOINTS}/") and name.count("/") > 1


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # and not a forked process, such as a data loader
        shutil.rmtree(path, ignore_errors=True)


def _folder_of(name: str) -> str:
    """Returns the folder of a checkpoint's file, such as "checkpoints/300/"."""
    return "/".join(name.split("/")[:2]) + "/"
