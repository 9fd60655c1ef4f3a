"""Reads files in a bucket."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from flowgen.data.stored import ChangedData
from flowgen.places import RemoteFolder


@dataclass(frozen=True)
class BucketFile:
    """A file in a bucket. Reading always fetches the whole file. size: number of bytes when the file was listed.

    Example:
        image = read_image(BucketFile(RemoteFolder("gs://bucket"), "cat.png", 1000), size=(64, 64), ...)
    """

    folder: RemoteFolder
    name: str
    size: int

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"

    def read_bytes(self) -> bytes:
        """Returns the content of the file. Raises ChangedData if the file cannot be read or has changed."""
        return _whole(self, self.size, lambda: self.folder.read(self.name))

    def open(self, mode: Literal["rb"], /) -> io.BytesIO:
        """Reads the file, and returns its content as a stream."""
        return io.BytesIO(self.read_bytes())


@dataclass(frozen=True)
class BucketShard:
    """A tar file in a bucket. Reading fetches only ranges of bytes. size: number of bytes when the file was listed.

    Example:
        content = shard.read_range(512, 1000)
    """

    folder: RemoteFolder
    name: str
    size: int
    ahead: ClassVar[int] = 1 << 20

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"

    def read_range(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset`, or fewer at the end. Raises ChangedData if they cannot all be read."""
        end = min(offset + size, self.size)
        if offset >= end:
            return b""
        return _whole(self, end - offset, lambda: self.folder.read(self.name, offset, end))


class BucketFolder:
    """A folder in a bucket. `folder / name` returns one of its files. sizes: number of bytes of each file, by name.

    Example:
        file = BucketFolder(RemoteFolder("gs://bucket/photos"), {"cat/1.png": 1000}) / "cat/1.png"
    """

    def __init__(self, folder: RemoteFolder, sizes: Mapping[str, int]) -> None:
        self._folder, self._sizes = folder, sizes

    def __str__(self) -> str:
        return str(self._folder)

    def __truediv__(self, name: str) -> BucketFile:
        return BucketFile(self._folder, name, self._sizes[name])


def bucket_file(url: str) -> BucketFile:
    """Returns the file at this URL. Raises FileNotFoundError if it does not exist.

    Example:
        file = bucket_file("gs://bucket/shapes.npz")
    """
    place, _, name = url.rpartition("/")
    folder = RemoteFolder(place)
    sizes = folder.sizes(name)
    if name not in sizes:
        raise FileNotFoundError(f"'{url}' is not a file; check the name of the bucket and the path.")
    return BucketFile(folder, name, sizes[name])


def _whole(file: BucketFile | BucketShard, size: int, read: Callable[[], bytes]) -> bytes:
    # Even where unreadable files are skipped, a file that cannot be reached must not be: this would change the data.
    try:
        content = read()
    except OSError as error:
        raise ChangedData(f"{error} Run the command again.") from error
    if len(content) != size:
        raise ChangedData(f"'{file}' has changed since it was listed; run the command again.")
    return content
