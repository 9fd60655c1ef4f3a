"""Lists each file in a user's folder once, with its class and caption, and reports the files that were left out."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from flowgen.data.entries import BROKEN, FOLDER_TWICE, RUN, SPECIAL, TWICE, Entries, Listing, suffix_of
from flowgen.data.inventory import quoted
from flowgen.printable import composed


def list_files(path: str | os.PathLike[str], suffixes: Collection[str], what: str) -> Listing:
    """Lists the files with these suffixes under a folder.

    The first-level sub-folders that contain such files, at any depth, are the classes, in alphabetical order. If there
    are no classes, all files have label -1. Links are followed, but each folder and each file is listed only once. A
    file that can be reached both directly and through a link is listed under its real path. Hidden files and folders
    are skipped. Folders that a flowgen run has written are also skipped, because they contain generated samples.

    what: plural noun for the files, used in error messages.

    Raises:
        FileNotFoundError, NotADirectoryError: `path` is not a folder.
        PermissionError, OSError: a folder or a link below `path` cannot be read.
        ValueError: no files have these suffixes, or there are such files both in class folders and at the top level.

    Example:
        listing = list_files("photos", (".png", ".jpg"), "images")
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"data.path '{root}' does not exist; give the folder that contains the {what}.")
    if not root.is_dir():
        tar = ", or set data.name to 'tar'" if root.suffix.lower() == ".tar" else ""
        raise NotADirectoryError(f"data.path '{root}' is a file; give the folder that contains the {what}{tar}.")
    walk = _Walk(os.path.join(root, ""), Entries(tuple(suffixes)))
    walk.through()
    if not any(walk.entries.taken.values()) and any(name.lower().endswith(".tar") for name in walk.entries.others):
        raise ValueError(f"data.path '{root}' has no {what}, but .tar files; set data.name to 'tar' to read these.")
    return walk.entries.listing(root, what)


@dataclass
class _Walk:
    """Finds the entries in a folder. Follows links only after all real entries are known."""

    root: str
    entries: Entries
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
                self.entries.hidden += 1
            elif _is_folder(entry):
                (linked if entry.is_symlink() else classes).append(entry.path)
            else:
                self._meet(entry, "")
        for folder in (*classes, *linked):
            if self._is_run(folder):
                continue
            name = composed(os.path.basename(folder))
            if name in self.entries.taken:
                raise ValueError(f"data.path '{self.root}' has two folders named {quoted(name)}; rename one.")
            self.entries.taken[name] = []
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
                self.entries.leave(self._name(place), FOLDER_TWICE)
                continue
            deeper = []
            for entry in _entries(place):
                if entry.name.startswith("."):
                    self.entries.hidden += 1
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
            self.entries.leave(self._name(folder), RUN)
        return trained

    def _enters(self, folder: str) -> bool:
        """Records a folder. Returns whether it is new."""
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
            self.entries.leave(self._name(entry.path), SPECIAL)

    def _follow(self, path: str, owner: str) -> None:
        try:
            about = os.stat(path)
        except PermissionError as error:
            raise _unreadable(path, error) from error
        except OSError:  # A broken or circular link.
            self.entries.leave(self._name(path), BROKEN)
            return
        if stat.S_ISDIR(about.st_mode):
            self._below(path, owner)
        elif stat.S_ISREG(about.st_mode):
            self._take(path, owner, about.st_ino, linked=True)
        else:
            self.entries.leave(self._name(path), SPECIAL)

    def _take(self, path: str, owner: str, inode: int, *, linked: bool = False) -> None:
        name = self._name(path)
        is_sample = suffix_of(name) in self.entries.suffixes
        if is_sample and self._is_known(path, inode, linked):
            self.entries.leave(name, TWICE)
        else:
            self.entries.take(name, owner)

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
