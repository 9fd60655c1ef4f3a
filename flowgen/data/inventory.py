"""Summarises a run's data, and records the data files to detect later changes.

This module does not import the code that loads data, so the training loop can import it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from flowgen.printable import composed, printable

_log = logging.getLogger("flowgen.data")
# If there are more files than this, a run stores only a digest of the list.
MOST_FILES = 100_000
_NAMED, _CLASSES_NAMED = 3, 10
_told: ContextVar[set[str] | None] = ContextVar("told", default=None)


@contextlib.contextmanager
def told_once() -> Generator[None]:
    """Returns a context manager within which each warning about the data is logged only once.

    Without it, opening a second split of the same data repeats the warnings.

    Example:
        with told_once():
            train, held_out = (load(config, **shape, split=split) for split in ("train", "eval"))
    """
    token = _told.set(set())
    try:
        yield
    finally:
        _told.reset(token)


def tell(sentence: str) -> None:
    """Logs a warning about the data.

    Example:
        tell("Left out of data.path 'photos': 3 .xcf.")
    """
    told = _told.get()
    if told is not None:
        if sentence in told:
            return
        told.add(sentence)
    _log.warning("%s", sentence)


def tell_converted(images: str, channels: int) -> None:
    """Warns that images are converted to the model's number of channels, 1 or 3.

    images: noun phrase for the images, with which the message begins.

    Example:
        tell_converted("The colour images of data.path 'photos'", 1)
    """
    how = "are converted to grey" if channels == 1 else "get 3 equal channels"
    tell(f"{images} {how}, because the model's samples have {channels} channel{'s' * (channels > 1)}.")


def quoted(name: str) -> str:
    """Returns a name in quotes, escaped so that it is safe to print to a terminal.

    Example:
        quoted("cat")  # "'cat'"
    """
    return f"'{printable(name)}'"


def name_list(names: Sequence[str], most: int = _CLASSES_NAMED) -> str:
    """Returns the first `most` names separated by commas, followed by the number of further names, if any.

    Example:
        name_list(("cat", "dog", "fox"))  # "cat, dog, fox"
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(printable(name) for name in names[:most]) + more


@dataclass(frozen=True)
class Inventory:
    """A summary of a run's data, and a record of the data files, by which later changes are detected.

    what: plural noun for the samples, such as "images" or "latents of clips". train, held_out: number of samples to
    train on, and number held out for evaluation. before: original (height, width) of some of the images or videos, in
    pixels; may be empty. after: each (height, width) to which samples are resized, or each shape of latents. classes:
    class names. train_files, held_out_files: for each file, by name, its size in bytes or a checksum; empty for data
    that come with a package. left_out: one phrase for each kind of file that was left out, such as "3 .xcf". stills:
    number of images to train on in addition to clips. at_most: whether `train`, and whether `held_out`, may be too high
    because unreadable files are still counted.

    Example:
        inventory = Inventory("images", 1080, 120, ((48, 48),), ((32, 32),), ("cat", "dog", "fox"))
        inventory.line()  # "images: 1,080 train, 120 held out, 48 x 48 -> 32 x 32, classes: cat, dog, fox"
    """

    what: str
    train: int
    held_out: int
    before: tuple[tuple[int, ...], ...] = ()
    after: tuple[tuple[int, ...], ...] = ()
    classes: tuple[str, ...] = ()
    train_files: Mapping[str, int | str] = field(default_factory=dict)
    held_out_files: Mapping[str, int | str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    stills: int = 0
    at_most: tuple[bool, bool] = (False, False)

    def line(self) -> str:
        """Returns the numbers of samples, their sizes and the class names as one line of text."""
        count = f"{len(self.classes):,} " if len(self.classes) > _CLASSES_NAMED else ""
        classes = f"{count}classes: {name_list(self.classes)}" if self.classes else "no classes"
        stills = f" and {self.stills:,} images" if self.stills else ""
        most, most_held = ("up to " if at_most else "" for at_most in self.at_most)
        counts = (f"{most}{self.train:,} train{stills}", f"{most_held}{self.held_out:,} held out")
        parts = [*counts, self._sizes(), classes]
        return f"{self.what}: " + ", ".join(part for part in parts if part)

    def _sizes(self) -> str:
        after = _shown(self.after[0]) if len(self.after) == 1 else f"{len(self.after)} shapes"
        before = sorted(set(self.before) - ({self.after[0]} if len(self.after) == 1 else set()), key=_area)
        if not self.after or not before:
            return after if self.after else ""
        if len(set(self.before)) == 1:
            return f"{_shown(before[0])} -> {after}"
        ordered = sorted(self.before, key=_area)
        some = " or so" if len(self.before) < self.train + self.held_out else ""
        return f"{_shown(ordered[0])} to {_shown(ordered[-1])}{some} -> {after}"

    def digest(self) -> str:
        """Returns a SHA-256 digest, in hexadecimal, of `train_files` and `held_out_files`."""
        content = hashlib.sha256()
        for files in (self.train_files, self.held_out_files):
            content.update(json.dumps(sorted(files.items())).encode())
        return content.hexdigest()

    def record(self) -> dict[str, Any]:
        """Returns a summary, as a dict of JSON values, that a run stores and later passes to `changes`.

        It lists the files, or, if there are more than 100,000, only their digest.

        Example:
            json.dumps(inventory.record())
        """
        files = {"train": dict(self.train_files), "held_out": dict(self.held_out_files)}
        return {
            "found": self.line(),
            "left_out": list(self.left_out),
            "train": self.train,
            "held_out": self.held_out,
            "classes": list(self.classes),
            "digest": self.digest(),
            "files": files if sum(map(len, files.values())) <= MOST_FILES else None,
        }

    def changes(self, known: Mapping[str, Any]) -> str:
        """Returns one sentence that says how the data files differ from those in `known`.

        Returns "" if they do not differ, or if this inventory has no files.

        known: what `record` returned when the run was last started.

        Raises ValueError if `known` lacks the digest or the list of files.

        Example:
            inventory.changes(inventory.record())  # ""
        """
        if not self.train_files and not self.held_out_files:
            return ""
        try:
            digest, files = known["digest"], known["files"]
            parts = None if files is None else tuple(_in_one_form(files[split]) for split in ("train", "held_out"))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("has no list of files") from error
        if digest == self.digest():
            return ""
        if parts is None:
            return "The data files have changed since the run was last started; there are too many to list."
        now = (_in_one_form(files) for files in (self.train_files, self.held_out_files))
        differences = _differences(*parts, *now)
        return f"The data have changed since the run was last started: {differences}." if differences else ""


def _in_one_form(files: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the mapping with names in composed Unicode form, except for names that would then be equal."""
    forms = Counter(map(composed, files))
    return {composed(name) if forms[composed(name)] == 1 else name: mark for name, mark in files.items()}


def _differences(
    train: Mapping[str, Any], held: Mapping[str, Any], train_now: Mapping[str, Any], held_now: Mapping[str, Any]
) -> str:
    """Returns a description of how the files of the two splits have changed."""
    before, now = {**train, **held}, {**train_now, **held_now}
    cases = {
        "added": [name for name in now if name not in before],
        "removed": [name for name in before if name not in now],
        "with changed content": [name for name in now if name in before and before[name] != now[name]],
        "previously held out, now trained on": [name for name in train_now if name in held],
        "previously trained on, now held out": [name for name in held_now if name in train],
    }
    return "; ".join(f"{len(names):,} {case} ({_examples(names)})" for case, names in cases.items() if names)


def _examples(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _NAMED else ""
    return ", ".join(map(quoted, sorted(names)[:_NAMED])) + more


def _shown(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _area(shape: Sequence[int]) -> tuple[int, ...]:
    area = 1
    for length in shape:
        area *= length
    return area, *shape
