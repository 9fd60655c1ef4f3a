"""Lists each file in a user's folder once, with its class and caption, and reports what was left out, and why."""

from __future__ import annotations

import collections
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from flowgen.data.dataset import NO_LABEL
from flowgen.data.inventory import name_list, quoted
from flowgen.data.stored import Files, StoredFolder
from flowgen.printable import composed, printable

_TEXT = ".txt"
_KINDS_NAMED = 8


@dataclass(frozen=True)
class Listing:
    """A list of the files under a folder.

    names: paths relative to `root`, with / between folders, ordered by class and name. labels: indices into
    `class_names`; -1 for files directly in the folder. captions: for each file, the name of its caption file, or None.
    left_out: descriptions of what was left out, such as "3 .xcf".

    Example:
        listing = list_files("photos", (".png", ".jpg"), "images")
    """

    root: StoredFolder
    names: tuple[str, ...]
    labels: Int32[np.ndarray, " n"]
    class_names: tuple[str, ...]
    captions: tuple[str | None, ...]
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def files(self) -> Files:
        return Files(self.root, self.names)


def list_files(path: str | os.PathLike[str], suffixes: Collection[str], what: str) -> Listing:
    """Lists the files with these suffixes under a folder.

    The first-level sub-folders that contain such files, at any depth, are the classes, in alphabetical order. If there
    are none, all files have label -1. Links are followed, but each folder and each file is listed only once. If a file
    can be reached both directly and through a link, its real path is listed. Hidden files and folders are skipped. The
    directories of flowgen's runs are also skipped, because they contain generated samples.

    what: plural noun for the files, used in error messages.

    Raises:
        FileNotFoundError, NotADirectoryError: `path` is not a folder.
        PermissionError, OSError: a folder or a link below `path` cannot be read.
        ValueError: no files have these suffixes, or there are such files both in class folders and next to them.

    Example:
        listing = list_files("photos", (".png", ".jpg"), "images")
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"data.path '{root}' does not exist; give the folder that contains the {what}.")
    if not root.is_dir():
        raise NotADirectoryError(f"data.path '{root}' is a file; give the folder that contains the {what}.")
    walk = _Walk(os.path.join(root, ""), frozenset(suffixes))
    walk.through()
    flat = walk.taken.pop("", [])
    filled = sorted(name for name, inside in walk.taken.items() if inside)
    if flat and filled:
        raise ValueError(
            f"data.path '{root}' has {what} both at the top level (such as {quoted(min(flat))}) and in sub-folders "
            f"(such as {quoted(filled[0])}); use one sub-folder per class, or one flat folder."
        )
    if not flat and not filled:
        left_out = "; ".join(walk.left_out(what, (), sorted(walk.taken)))
        raise ValueError(
            f"data.path '{root}' has no {what}; put {', '.join(suffixes)} files in it, or in one sub-folder per "
            f"class{f' (it contains {left_out})' if left_out else ''}."
        )
    groups = [walk.taken[name] for name in filled] or [flat]
    names = tuple(name for inside in groups for name in sorted(inside, key=_by_parts))
    labels = np.repeat(np.arange(len(groups), dtype=np.int32), [len(inside) for inside in groups])
    captions = walk.captions(names)
    return Listing(
        root,
        names,
        labels if filled else np.full(len(names), NO_LABEL, np.int32),
        tuple(filled),
        captions,
        tuple(walk.left_out(what, captions, empty=() if flat else sorted(walk.taken.keys() - {*filled}))),
    )


def _by_parts(name: str) -> tuple[list[str], str]:
    # Paths are compared part by part. The composed form of é sorts the same even if it is stored as e plus an accent.
    return composed(name).split("/"), name


def _alike(folder: str, base: str) -> tuple[str, str]:
    """Returns a key that all caption files of an image have in common."""
    return composed(folder), composed(base).lower()


@dataclass
class _Walk:
    """The entries that were found in a folder. Links are followed once all real entries are known."""

    root: str
    suffixes: frozenset[str]
    taken: dict[str, list[str]] = field(default_factory=dict)  # names by class
    texts: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # caption files by folder and lower-case name
    others: list[str] = field(default_factory=list)
    hidden: int = 0
    broken: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    folders_twice: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    links: list[tuple[str, str]] = field(default_factory=list)  # path and class
    folders: set[tuple[int, int]] = field(default_factory=set)
    # The first file with each inode number. Devices are compared only if another file has the same inode number.
    inodes: dict[int, str | None] = field(default_factory=dict)
    known: set[tuple[int, int]] = field(default_factory=set)

    def through(self) -> None:
        """Walks through the folder, its classes, and the targets of links."""
        self._enters(self.root)
        classes, linked = [], []
        for entry in _entries(self.root):
            if entry.name.startswith("."):
                self.hidden += 1
            elif _is_folder(entry):
                (linked if entry.is_symlink() else classes).append(entry.path)
            else:
                self._meet(entry, "")
        for folder in (*classes, *linked):
            if self._is_run(folder):
                continue
            name = composed(os.path.basename(folder))
            if name in self.taken:
                raise ValueError(f"data.path '{self.root}' has two folders named {quoted(name)}; rename one.")
            self.taken[name] = []
            self._below(folder, name)
        while self.links:
            waiting, self.links = sorted(self.links), []
            for path, owner in waiting:
                self._follow(path, owner)

    def _below(self, folder: str, owner: str) -> None:
        """Collects all files in a folder, at any depth."""
        waiting = [folder]
        while waiting:
            place = waiting.pop()
            if self._is_run(place):
                continue
            if not self._enters(place):
                self.folders_twice.append(self._name(place))
                continue
            deeper = []
            for entry in _entries(place):
                if entry.name.startswith("."):
                    self.hidden += 1
                elif entry.is_dir(follow_symlinks=False):
                    deeper.append(entry.path)
                else:
                    self._meet(entry, owner)
            waiting += reversed(deeper)

    def _is_run(self, folder: str) -> bool:
        """Returns whether a flowgen run wrote this folder."""
        from flowgen.runs import was_trained_in  # Imported here, because flowgen.runs imports flowgen.data.

        trained = was_trained_in(folder)
        if trained:
            self.runs.append(self._name(folder))
        return trained

    def _enters(self, folder: str) -> bool:
        """Records a folder. Returns whether it is seen for the first time."""
        about = _about(folder)
        place = about.st_dev, about.st_ino
        fresh = place not in self.folders
        self.folders.add(place)
        return fresh

    def _meet(self, entry: os.DirEntry[str], owner: str) -> None:
        if entry.is_symlink():
            self.links.append((entry.path, owner))
        elif entry.is_file(follow_symlinks=False):
            self._take(entry.path, owner, entry.inode())
        else:
            self.special.append(self._name(entry.path))

    def _follow(self, path: str, owner: str) -> None:
        try:
            about = os.stat(path)
        except PermissionError as error:
            raise _unreadable(path, error) from error
        except OSError:  # A broken or circular link.
            self.broken.append(self._name(path))
            return
        if stat.S_ISDIR(about.st_mode):
            self._below(path, owner)
        elif stat.S_ISREG(about.st_mode):
            self._take(path, owner, about.st_ino, linked=True)
        else:
            self.special.append(self._name(path))

    def _take(self, path: str, owner: str, inode: int, *, linked: bool = False) -> None:
        name = self._name(path)
        suffix = os.path.splitext(name)[1].lower()
        if suffix == _TEXT:
            folder, base = os.path.split(name)
            self.texts.setdefault(_alike(folder, base), []).append(name)
        elif suffix not in self.suffixes:
            self.others.append(name)
        elif self._is_known(path, inode, linked):
            self.twice.append(name)
        else:
            self.taken.setdefault(owner, []).append(name)

    def _is_known(self, path: str, inode: int, linked: bool) -> bool:
        """Returns whether a file was already listed under another name."""
        if inode not in self.inodes:
            self.inodes[inode] = path
            return False
        first = self.inodes[inode]
        if first is not None:
            about = _about(first)
            self.known.add((about.st_dev, about.st_ino))
            self.inodes[inode] = None
        about = _about(path)
        place = about.st_dev, about.st_ino
        # Some file systems give all files the same inode number, but a file with only one name cannot be listed twice.
        if place in self.known and (linked or about.st_nlink > 1):
            return True
        self.known.add(place)
        return False

    def _name(self, path: str) -> str:
        return path[len(self.root) :].replace(os.sep, "/")

    def captions(self, names: tuple[str, ...]) -> tuple[str | None, ...]:
        """Returns the caption file of each file: for cat.png, cat.png.txt or cat.txt, in upper or lower case."""
        return tuple(map(self._caption, names)) if self.texts else (None,) * len(names)

    def _caption(self, name: str) -> str | None:
        folder, base = os.path.split(name)
        for wanted in (f"{base}{_TEXT}", f"{os.path.splitext(base)[0]}{_TEXT}"):
            if found := self.texts.get(_alike(folder, wanted)):
                exact = f"{folder}/{wanted}" if folder else wanted
                return exact if exact in found else min(found)
        return None

    def left_out(self, what: str, captions: Collection[str | None], empty: Sequence[str]) -> Iterator[str]:
        """Yields what was left out, and why. captions: caption files that were used. empty: classes without files."""
        texts = [name for names in self.texts.values() for name in names]
        kinds = collections.Counter(os.path.splitext(name)[1].lower() or "without suffix" for name in self.others)
        if unused := len(texts) - len({*captions} - {None}):
            kinds[_TEXT] = unused
        named = [f"{count:,} {printable(kind)}" for kind, count in kinds.most_common(_KINDS_NAMED)]
        if rest := sum(count for _, count in kinds.most_common()[_KINDS_NAMED:]):
            named.append(f"{rest:,} of other kinds")
        if named:
            yield ", ".join(named)
        for names, noun, why in (
            (self.twice, "file", "already listed under another name"),
            (self.folders_twice, "link", "to a folder already listed"),
            (self.runs, "folder", "written by a flowgen run"),
            (self.broken, "link", "to nothing"),
            (self.special, "entry", "other than a file or a folder"),
        ):
            if names:
                yield f"{_count(len(names), noun)} {why} ({quoted(min(names))}{', ...' if names[1:] else ''})"
        if self.hidden:
            yield f"{self.hidden:,} hidden"
        if empty:
            yield f"{_count(len(empty), 'class folder')} without {what} ({name_list(empty)})"


def _count(number: int, noun: str) -> str:
    plural = noun if number == 1 else f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {plural}"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        raise _unreadable(entry.path, error) from error


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Returns the entries of a folder, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _about(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: OSError) -> OSError:
    kind = PermissionError if isinstance(error, PermissionError) else OSError
    return kind(f"data.path: cannot read {quoted(path)} ({error.strerror}); make it readable, or move it elsewhere.")
