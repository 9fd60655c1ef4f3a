"""Reads single files inside uncompressed tar files (shards)."""

from __future__ import annotations

import functools
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from flowgen.data.stored import ChangedData
from flowgen.data.tar_headers import ByteRanges
from flowgen.printable import printable

# Files up to this size are read at once. Of larger ones, such as videos, only the part in use is kept in memory.
_AT_ONCE, _BUFFER = 1 << 22, 1 << 18
# Each open shard uses a file descriptor; a process can usually open about a thousand.
_OPEN_SHARDS = 256


@dataclass(frozen=True)
class LocalShard:
    """A local tar file, which is read in ranges of bytes. written: modification time in nanoseconds.

    Example:
        content = shard.read_range(512, 1000)
    """

    path: Path
    size: int
    written: int
    ahead: ClassVar[int] = 2048

    def __str__(self) -> str:
        return str(self.path)

    def read_range(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset`, or fewer at the end of the file.

        Raises ChangedData if the file has changed since it was listed.
        """
        opened = _descriptor(self)  # Held until the end, because another thread may drop it from the cache.
        number = opened.number
        about = os.fstat(number)
        if (about.st_size, about.st_mtime_ns) != (self.size, self.written):
            raise ChangedData(f"'{self}' has changed since it was opened; run the command again.")
        content = os.pread(number, size, offset)
        while len(content) < size and (more := os.pread(number, size - len(content), offset + len(content))):
            content += more
        return content


class _Descriptor:
    """An open file, which is closed when the last reference to this object is deleted."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@functools.lru_cache(maxsize=_OPEN_SHARDS)
def _descriptor(shard: LocalShard) -> _Descriptor:
    return _Descriptor(shard.path)


@dataclass(frozen=True)
class TarFile:
    """A file in a shard. offset, size: position and length of its content in the shard, in bytes.

    Example:
        image = read_image(shards / "cat/1.png", size=(64, 64), channels=3, crop="center")
    """

    shard: ByteRanges
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{printable(self.name)}"

    def read_bytes(self) -> bytes:
        """Returns the content of the file."""
        return self.shard.read_range(self.offset, self.size)

    def open(self, mode: Literal["rb"], /) -> io.BytesIO | io.BufferedReader:
        """Opens the file as a seekable stream."""
        return io.BytesIO(self.read_bytes()) if self.size <= _AT_ONCE else io.BufferedReader(_Window(self), _BUFFER)


class _Window(io.RawIOBase):
    """A stream of the content of a file in a shard."""

    def __init__(self, file: TarFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence])
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        count = max(0, min(len(buffer), self._file.size - self._at))
        content = self._file.shard.read_range(self._file.offset + self._at, count)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)
