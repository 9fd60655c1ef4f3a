"""Lists the images or videos in uncompressed tar files (shards), without unpacking them.

The headers of all shards are read once. Afterwards, files can be read in any order and from several threads, as from a
folder.
"""

from __future__ import annotations

import functools
import os
import stat
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from flowgen.data.class_files import listed_with_classes
from flowgen.data.entries import CLASS, SPECIAL, TEXT, TWICE, Entries, Listing, suffix_of, without_suffix
from flowgen.data.inventory import quoted, tell
from flowgen.data.tar_files import LocalShard, TarFile
from flowgen.data.tar_headers import FILE, FOLDER, LINK, SPARSE, ByteRanges, members
from flowgen.printable import composed

TAR = ".tar"
_COMPRESSED = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.zst", ".tar.bz2", ".tar.xz", ".tar.lz4", ".tar.z")
# Number of shards whose headers are read at the same time.
_READERS = 4
# Number of bytes by which two shards with the same names and sizes are compared.
_COMPARED = 1 << 16
# Why entries are left out, as in `flowgen.data.entries`.
_UNSAFE = ("entry", "with an absolute name, or with '..' in its name")
_REPLACED = ("file", "replaced by a later one of the same name")
_REASONS = {
    LINK: ("link", "not followed in a tar file"),
    SPARSE: ("sparse file", "not readable in a tar file"),
}
BESIDE = ("folder", "next to the .tar files")


@dataclass(frozen=True)
class Shards:
    """The shards of a dataset, with their names.

    others: names of files in the same folder that are not shards. left_out: names of other entries, and the reasons for
    leaving them out. hidden: number of hidden entries in the folder.

    Example:
        shards = local_shards("photos", "images")
    """

    path: str
    files: tuple[ByteRanges, ...]
    names: tuple[str, ...]
    others: tuple[str, ...] = ()
    left_out: tuple[tuple[str, tuple[str, str]], ...] = ()
    hidden: int = 0


class TarFolder:
    """A folder of the files in several shards, as if all shards were unpacked into one folder.

    If two shards contain an image, caption or class file of the same name, all names from the later shard are prefixed
    with the name of that shard.

    Example:
        content = (folder / "cat/1.png").read_bytes()
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._positions: dict[str, int] = {}
        self._offsets, self._sizes = array("q"), array("q")
        # For each shard: the shard, what its names begin with, and the number of files up to its end.
        self._shards: list[tuple[ByteRanges, str]] = []
        self._ends: list[int] = []

    def __str__(self) -> str:
        return self._path

    def __contains__(self, name: str) -> bool:
        return name in self._positions

    def __truediv__(self, name: str) -> TarFile:
        position = self._positions[name]
        shard, prefix = self._shards[bisect_right(self._ends, position)]
        return TarFile(shard, name[len(prefix) :], self._offsets[position], self._sizes[position])

    def add(self, shard: ByteRanges, prefix: str, contents: _Contents) -> None:
        """Adds the files of a shard. A file replaces any earlier file of the same name."""
        first = len(self._offsets)
        self._positions.update((prefix + name, first + position) for name, position in contents.positions.items())
        self._offsets.extend(contents.offsets)
        self._sizes.extend(contents.sizes)
        self._shards.append((shard, prefix))
        self._ends.append(len(self._offsets))


@dataclass
class _Contents:
    """The contents of a shard. positions: each file's index into `offsets` and `sizes`. folders: top-level folders."""

    positions: dict[str, int] = field(default_factory=dict)
    offsets: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    folders: set[str] = field(default_factory=set)
    hidden: set[str] = field(default_factory=set)
    left: list[tuple[str, tuple[str, str]]] = field(default_factory=list)

    def add(self, name: str, kind: str, offset: int, size: int) -> None:
        """Adds a member of the shard."""
        if name[:1] in ("/", ".", "") or "/." in name or "//" in name or name[-1] == "/":
            parts = [part for part in name.split("/") if part not in ("", ".")]
            if name[:1] == "/" or ".." in parts or (not parts and kind != FOLDER):
                self.left.append((name, _UNSAFE))
                return
            depth = next((i for i, part in enumerate(parts) if part[0] == "."), None)
            if depth is not None:
                self.hidden.add("/".join(parts[: depth + 1]))
                self.folders.update(parts[: min(depth, 1)])
                return
            name = "/".join(parts)
        first, slash, _ = name.partition("/")
        if name and (slash or kind == FOLDER):
            self.folders.add(first)
        if kind == FILE:
            if name in self.positions:
                self.left.append((name, _REPLACED))
            self.positions[name] = len(self.offsets)
            self.offsets.append(offset)
            self.sizes.append(size)
        elif kind != FOLDER:
            self.left.append((name, _REASONS.get(kind, SPECIAL)))

    @property
    def mark(self) -> int:
        """A hash of the names and sizes of all files."""
        return hash((*self.positions, *self.sizes))

    def first_of(self, shard: ByteRanges) -> bytes:
        """Returns the first 64 KiB of the first file in a shard that has these contents."""
        return shard.read_range(self.offsets[0], min(self.sizes[0], _COMPARED))

    def claimed(self, suffixes: tuple[str, ...]) -> set[str]:
        """Returns the names of the samples and of their caption and class files."""
        claimed: set[str] = set()
        bases: set[str] = set()
        beside: list[tuple[str, str]] = []
        for name in self.positions:
            suffix = suffix_of(name)
            base = without_suffix(name)
            if suffix in suffixes:
                claimed.add(name)
                bases.add(base)
            elif suffix in (TEXT, CLASS):
                beside.append((name, base))
        claimed.update([name for name, base in beside if base in claimed or base in bases])
        return claimed


def list_tar(path: str | os.PathLike[str], suffixes: Iterable[str], what: str) -> Listing:
    """Lists the files with these suffixes in a tar file, or in all tar files of a folder.

    The shards are listed by the rules of `list_files`, as if they were unpacked into one folder (see `TarFolder`), but
    links are not followed. If there are class files such as `1.cls`, these define the classes instead of the folders.

    what: plural noun for the files, used in error messages.

    Raises:
        FileNotFoundError: `path` does not exist or contains no tar files.
        ValueError: a shard is compressed, truncated or damaged, or there are no files with these suffixes.

    Example:
        listing = list_tar("photos", (".png", ".jpg"), "images")
    """
    return list_shards(local_shards(path, what), tuple(suffixes), what)


def local_shards(path: str | os.PathLike[str], what: str) -> Shards:
    """Returns the tar file at a path or, if the path is a folder, all tar files in the folder, ordered by name.

    Raises the same errors as `list_tar`.

    Example:
        shards = local_shards("photos", "images")
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(
            f"data.path '{root}' does not exist; give a .tar file of {what}, or a folder of .tar files."
        )
    if root.is_file():
        return Shards(str(root), (_local(root),), (root.name,))
    entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    shown = [entry for entry in entries if not entry.name.startswith(".")]
    files = [entry.name for entry in shown if entry.is_file()]
    check_uncompressed(str(root), files)
    names = tuple(name for name in files if name.lower().endswith(TAR))
    if not names:
        raise FileNotFoundError(
            f"data.path '{root}' has no .tar files; put some in it, or set data.name to 'folder' to read {what} that "
            "are not in tar files."
        )
    once = {os.path.realpath(root / name): name for name in reversed(names)}
    kept = {*once.values()}
    left_out = [(entry.name, BESIDE) for entry in shown if entry.is_dir()]
    left_out += [(name, TWICE) for name in names if name not in kept]
    names = tuple(sorted(kept))
    return Shards(
        str(root),
        tuple(_local(root / name) for name in names),
        names,
        others=tuple(name for name in files if not name.lower().endswith(TAR)),
        left_out=tuple(left_out),
        hidden=len(entries) - len(shown),
    )


def check_uncompressed(path: str, names: Iterable[str]) -> None:
    """Raises ValueError if one of these file names has the suffix of a compressed tar file.

    Example:
        check_uncompressed("photos", ["a.tar", "b.tar"])
    """
    if packed := [name for name in names if name.lower().endswith(_COMPRESSED)]:
        raise ValueError(
            f"data.path '{path}' has compressed tar files (such as {quoted(packed[0])}), whose files cannot be read "
            "one by one; decompress them, for example with gunzip or unzstd."
        )


def _local(path: Path) -> LocalShard:
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"data.path: '{path}' is not a regular file; give a .tar file.")
    return LocalShard(path, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def list_shards(shards: Shards, suffixes: tuple[str, ...], what: str) -> Listing:
    """Lists the files with these suffixes in shards. Caches the two latest results for the other splits of a dataset.

    Raises the same errors as `list_tar`.

    Example:
        listing = list_shards(local_shards("photos", "images"), (".png",), "images")
    """
    folder, entries = TarFolder(shards.path), Entries(suffixes, (TEXT, CLASS))
    for name in shards.others:
        entries.others.append(name)
    for name, reason in shards.left_out:
        entries.leave(name, reason)
    hidden: set[str] = set()
    seen: set[str] = set()
    alike: dict[int, tuple[ByteRanges, str]] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        for shard, name, contents in zip(shards.files, shards.names, pool.map(_read, shards.files), strict=True):
            claimed = contents.claimed(suffixes)
            prefix = "" if seen.isdisjoint(claimed) else f"{name}/"
            other, other_name = alike.setdefault(contents.mark, (shard, name))
            if prefix and other is not shard and contents.first_of(other) == contents.first_of(shard):
                tell(
                    f"{quoted(name)} in data.path '{shards.path}' seems to be a copy of {quoted(other_name)}; remove "
                    "it, because some of its files may be held out while the same files of the other are not."
                )
            seen |= claimed
            _sort_in(contents, prefix, folder, entries)
            hidden.update(prefix + name for name in contents.hidden)
            folder.add(shard, prefix, contents)
    entries.others.sort()
    entries.hidden = shards.hidden + len(hidden)
    return listed_with_classes(folder, entries, what)


def _read(shard: ByteRanges) -> _Contents:
    contents = _Contents()
    for member in members(shard):
        contents.add(*member)
    return contents


def _sort_in(contents: _Contents, prefix: str, folder: TarFolder, entries: Entries) -> None:
    """Sorts the files of a shard into entries. folder: the files of earlier shards."""
    for owner in contents.folders:
        entries.taken.setdefault(composed(owner), [])
    for name, reason in contents.left:
        entries.leave(name, reason)
    for name in contents.positions:
        first, slash, _ = name.partition("/")
        full = prefix + name
        if full in folder:
            entries.leave(full, _REPLACED)
        else:
            entries.take(full, composed(first) if slash else "")
