"""Sorts the entries of a folder, a bucket or tar files into samples, their captions, and entries to leave out."""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int32

from flowgen.data.dataset import NO_LABEL
from flowgen.data.inventory import name_list, quoted
from flowgen.data.stored import Files, StoredFolder
from flowgen.printable import composed, printable

TEXT, CLASS = ".txt", ".cls"
_KINDS_NAMED = 8
# Why an entry is left out, in the order in which the reasons are told: a noun for the entry, and the reason.
TWICE = ("file", "already listed under another name")
FOLDER_TWICE = ("link", "to a folder already listed")
RUN = ("folder", "written by a flowgen run")
BROKEN = ("link", "to nothing")
SPECIAL = ("entry", "other than a file or a folder")


@dataclass(frozen=True)
class Listing:
    """A list of the samples under a folder, with their classes and captions.

    names: paths relative to `root`, separated by / and ordered by class and name. labels: indices into `class_names`;
    -1 for files without a class. captions: for each file, the name of its caption file, or None. class_files: for each
    file, the name of the file that contains its class, or None; empty if there are no such files. numbered: whether the
    classes are numbers, not names. left_out: descriptions of what was left out, such as "3 .xcf".

    Example:
        listing = list_files("photos", (".png", ".jpg"), "images")
    """

    root: StoredFolder
    names: tuple[str, ...]
    labels: Int32[np.ndarray, " n"]
    class_names: tuple[str, ...]
    captions: tuple[str | None, ...]
    class_files: tuple[str | None, ...] = ()
    numbered: bool = False
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def files(self) -> Files:
        return Files(self.root, self.names)


@dataclass
class Entries:
    """The entries found in a folder. `taken` maps each class, or "" for no class, to the names of its samples.

    suffixes: suffixes of the samples. kept_beside: suffixes of caption and class files, which have the same name as a
    sample.

    Example:
        entries = Entries((".png",))
        entries.take("cat/1.png", "cat")
        listing = entries.listing(Path("photos"), "images")
    """

    suffixes: tuple[str, ...]
    kept_beside: tuple[str, ...] = (TEXT,)
    taken: dict[str, list[str]] = field(default_factory=dict)
    # Files that describe samples, by folder and lower-case name; a list only if there are several.
    beside: dict[str, str | list[str]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    hidden: int = 0
    left_out: dict[tuple[str, str], list[str]] = field(
        default_factory=lambda: {reason: [] for reason in (TWICE, FOLDER_TWICE, RUN, BROKEN, SPECIAL)}
    )

    def take(self, name: str, owner: str) -> None:
        """Adds a file to the entries. owner: the class of the file."""
        suffix = suffix_of(name)
        if suffix in self.suffixes:
            self.taken.setdefault(owner, []).append(name)
        elif suffix in self.kept_beside:
            key = _alike(name)
            known = self.beside.get(key)
            self.beside[key] = name if known is None else [*_listed(known), name]
        else:
            self.others.append(name)

    def leave(self, name: str, reason: tuple[str, str]) -> None:
        """Records that an entry is left out for a reason, such as `BROKEN`."""
        self.left_out.setdefault(reason, []).append(name)

    def described(self, names: Sequence[str], suffix: str) -> Iterator[str | None]:
        """Yields each sample's caption or class file: for cat.png, cat.png.txt or cat.txt, in upper or lower case."""
        if not any(key.endswith(suffix) for key in self.beside):
            return iter((None,) * len(names))
        return (self._beside(name, suffix) for name in names)

    def _beside(self, name: str, suffix: str) -> str | None:
        for wanted in (f"{name}{suffix}", f"{without_suffix(name)}{suffix}"):
            if found := self.beside.get(_alike(wanted)):
                return wanted if wanted in _listed(found) else min(_listed(found))
        return None

    def listing(self, root: StoredFolder, what: str) -> Listing:
        """Returns the samples, ordered by class and name.

        what: plural noun for the samples, used in error messages.

        Raises ValueError if there are no samples, or if there are samples both in class folders and at the top level.
        """
        flat = self.taken.get("", [])
        filled = sorted(name for name, inside in self.taken.items() if name and inside)
        empty = sorted(self.taken.keys() - {"", *filled})
        if flat and filled:
            raise ValueError(
                f"data.path '{root}' has {what} both at the top level (such as {quoted(min(flat))}) and in sub-folders "
                f"(such as {quoted(filled[0])}); use one sub-folder per class, or one flat folder."
            )
        if not flat and not filled:
            left_out = "; ".join(self.told(what, (), empty))
            raise ValueError(
                f"data.path '{root}' has no {what}; put {', '.join(self.suffixes)} files in it, or in one sub-folder "
                f"per class{f' (it contains {left_out})' if left_out else ''}."
            )
        groups = [self.taken[name] for name in filled] or [flat]
        names = tuple(name for inside in groups for name in sorted(inside, key=by_parts))
        labels = np.repeat(np.arange(len(groups), dtype=np.int32), [len(inside) for inside in groups])
        captions = tuple(self.described(names, TEXT))
        class_files = tuple(self.described(names, CLASS)) if CLASS in self.kept_beside else ()
        return Listing(
            root,
            names,
            labels if filled else np.full(len(names), NO_LABEL, np.int32),
            tuple(filled),
            captions,
            class_files if any(class_files) else (),
            left_out=tuple(self.told(what, (*captions, *class_files), () if flat else empty)),
        )

    def told(self, what: str, used: Collection[str | None], empty: Sequence[str]) -> Iterator[str]:
        """Yields descriptions of what was left out. used: caption and class files. empty: classes without samples."""
        kinds = collections.Counter(suffix_of(name) or "without suffix" for name in self.others)
        kinds.update(suffix_of(name) for found in self.beside.values() for name in _listed(found))
        kinds.subtract(suffix_of(name) for name in {*used} if name)
        kinds = +kinds
        named = [f"{count:,} {printable(kind)}" for kind, count in kinds.most_common(_KINDS_NAMED)]
        if rest := sum(count for _, count in kinds.most_common()[_KINDS_NAMED:]):
            named.append(f"{rest:,} of other kinds")
        if named:
            yield ", ".join(named)
        for (noun, why), names in self.left_out.items():
            if names:
                yield f"{_count(len(names), noun)} {why} ({quoted(min(names))}{', ...' if names[1:] else ''})"
        if self.hidden:
            yield f"{self.hidden:,} hidden"
        if empty:
            yield f"{_count(len(empty), 'class folder')} without {what} ({name_list(empty)})"


def check_each_described(listing: Listing, files: Sequence[str | None], suffix: str, what: str) -> None:
    """Raises ValueError if some samples have no caption or class file.

    files: the caption or class file of each sample, or None.

    Example:
        check_each_described(listing, listing.captions, ".txt", "captions")
    """
    missing = [name for name, file in zip(listing.names, files, strict=True) if file is None]
    if missing:
        first = f"{listing.root}/{without_suffix(missing[0])}{suffix}"
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"data.path has {what} for only {len(listing) - len(missing)} of {len(listing)} files; "
            f"add '{first}'{more}, or remove the {suffix} files."
        )


def by_parts(name: str) -> tuple[list[str], str]:
    """Returns a sort key for paths: the parts between slashes, and then the path itself.

    Example:
        sorted(names, key=by_parts)
    """
    # Paths are compared part by part. The composed form of é sorts the same even if it is stored as e plus an accent.
    return composed(name).split("/"), name


def suffix_of(name: str) -> str:
    """Returns the suffix of a name in lower case, with its dot; "" if there is none.

    Example:
        suffix_of("cat/1.PNG")  # ".png"
    """
    dot = name.rfind(".")
    return name[dot:].lower() if dot > name.rfind("/") + 1 else ""


def without_suffix(name: str) -> str:
    """Returns a name without its suffix.

    Example:
        without_suffix("cat/1.PNG")  # "cat/1"
    """
    return name[: len(name) - len(suffix_of(name))]


def _alike(name: str) -> str:
    """Returns a path in composed Unicode form, with the file name in lower case."""
    folder, slash, base = composed(name).rpartition("/")
    return f"{folder}{slash}{base.lower()}"


def _listed(found: str | list[str]) -> list[str]:
    return [found] if isinstance(found, str) else found


def _count(number: int, noun: str) -> str:
    plural = noun if number == 1 else f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {plural}"
