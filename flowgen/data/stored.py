"""The interfaces of the files and folders from which data are read, such as local paths and members of tar files."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, SupportsIndex, TypeAlias, overload, runtime_checkable

from flowgen.documents import MAX_BYTES, read_bytes
from flowgen.places import check_local


@runtime_checkable
class OpenedFile(Protocol):
    """A binary file that is open for reading, such as the result of `pathlib.Path.open` or an `io.BytesIO`.

    Example:
        with file.open("rb") as opened:
            opened.seek(16)
    """

    def read(self, size: int = -1, /) -> bytes: ...

    def seek(self, offset: int, whence: int = 0, /) -> int: ...

    def tell(self) -> int: ...

    def __enter__(self) -> Any: ...

    def __exit__(self, kind: Any, error: Any, trace: Any, /) -> Any: ...


@runtime_checkable
class StoredFile(Protocol):
    """A file that can be read, such as a `pathlib.Path` or a member of a tar file. Its `str` is shown in messages.

    It is hashable, and may be read from several threads at once.

    Example:
        with file.open("rb") as content:
            first = content.read(16)
    """

    def open(self, mode: Literal["rb"], /) -> OpenedFile:
        """Opens the file as a seekable stream. Raises OSError if the file cannot be opened."""
        ...

    def read_bytes(self) -> bytes:
        """Returns the content of the file."""
        ...


@runtime_checkable
class StoredFolder(Protocol):
    """A folder that returns its files by name, such as a `pathlib.Path` or a set of tar files.

    Example:
        file = folder / "cat/1.png"
    """

    def __truediv__(self, name: str, /) -> StoredFile:
        """Returns the file with this name. Folders in the name are separated by /."""
        ...


class ChangedData(ValueError):
    """Raised if a file has changed since it was listed, or if a file in a bucket cannot be read.

    Such files raise this error even if unreadable files are to be skipped.
    """


AnyFile: TypeAlias = str | os.PathLike[str] | StoredFile


def stored(file: AnyFile) -> StoredFile:
    """Returns the file as a `StoredFile`. A string or an `os.PathLike` is taken as the path of a local file.

    Example:
        content = stored("cat.png").read_bytes()
    """
    if isinstance(file, str) or (isinstance(file, os.PathLike) and not isinstance(file, StoredFile)):
        check_local("the file", file)
        return Path(file)
    return file


def size_of(file: AnyFile) -> int:
    """Returns the size of a file in bytes.

    Example:
        size_of("cat.png")
    """
    file = stored(file)
    if isinstance(file, Path):
        return file.stat().st_size
    if isinstance(known := getattr(file, "size", None), int):
        return known
    with file.open("rb") as content:
        return content.seek(0, os.SEEK_END)


def read_limited(file: AnyFile, *, most: int = MAX_BYTES) -> bytes:
    """Returns the content of a file. Raises ValueError if the file has more than `most` bytes.

    Example:
        text = read_limited("cat.txt").decode()
    """
    file = stored(file)
    if isinstance(file, Path):
        return read_bytes(file, most=most)
    with file.open("rb") as opened:
        content = opened.read(most + 1)
    if len(content) > most:
        raise ValueError(f"'{file}' is larger than {most:,} bytes; give a smaller file.")
    return content


class Files(Sequence[StoredFile]):
    """The files with given names in a folder. Each file is looked up on access, so a long sequence needs little memory.

    Example:
        files = Files(Path("photos"), ("cat/1.png", "dog/1.png"))
        files[1].read_bytes()
    """

    def __init__(self, folder: StoredFolder, names: Sequence[str]) -> None:
        self._folder, self._names = folder, names

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> StoredFile: ...

    @overload
    def __getitem__(self, index: slice, /) -> Files: ...

    def __getitem__(self, index: SupportsIndex | slice, /) -> StoredFile | Files:
        if isinstance(index, slice):
            return Files(self._folder, self._names[index])
        return self._folder / self._names[operator.index(index)]

    def __len__(self) -> int:
        return len(self._names)
