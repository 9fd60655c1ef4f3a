"""Handles unreadable files, either by reporting all of them in one error or by skipping them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Literal, TypeVar

import numpy as np
from jaxtyping import Int, Int32

from flowgen.data.inventory import name_list, tell
from flowgen.data.stored import StoredFile

T = TypeVar("T")
OnCorrupt = Literal["refuse", "skip"]
_NAMED_IN_ERRORS = 5


class Unreadable(ValueError):
    """Raised if a file cannot be decoded. named: the file and the reason, for use in a list of files."""

    @property
    def named(self) -> str:
        return str(self)


def tell_lost_classes(
    before: Int32[np.ndarray, " n"], after: Int32[np.ndarray, " m"], class_names: Sequence[str], sentence: str
) -> None:
    """Warns about classes that have no samples left. sentence: the warning, with {} where the class names go.

    Example:
        tell_lost_classes(labels, labels[kept], names, "No image of {} is left.")
    """
    if lost := [class_names[label] for label in np.setdiff1d(before, after) if label >= 0]:
        tell(sentence.format(name_list(lost)))


class FileReader(Generic[T]):
    """Reads files by their position in a list, and handles files for which `read` raises `Unreadable`.

    on_corrupt: "refuse" raises a ValueError that names such files; "skip" leaves them out, with one warning for each.
    what: singular and plural noun for the files, used in messages. split: the split to which the files belong.
    replaces: whether another file may replace a skipped one.

    Example:
        reader = FileReader(read, files, "skip", what=("image", "images"), split="train")
        position, image = reader.next_readable(7)
    """

    def __init__(
        self,
        read: Callable[[int], T],
        files: Sequence[StoredFile],
        on_corrupt: OnCorrupt,
        *,
        what: tuple[str, str],
        split: str,
        replaces: bool = True,
    ) -> None:
        self._read, self._files, self._on_corrupt, self._what = read, files, on_corrupt, what
        self._split = split
        self._replaces = replaces
        # Files that a warning has named. This set only prevents repeated warnings; results do not depend on it.
        self._warned: set[StoredFile] = set()

    @property
    def skips(self) -> bool:
        """Whether unreadable files are skipped."""
        return self._on_corrupt == "skip"

    def next_readable(self, position: int) -> tuple[int, T]:
        """Returns the position and content of the next readable file, starting at this position and wrapping around."""
        failures: dict[StoredFile, Unreadable] = {}
        for step in range(len(self._files)):
            candidate = (position + step) % len(self._files)
            file = self._files[candidate]
            try:
                return candidate, self._read(candidate)
            except Unreadable as error:
                failures.setdefault(file, error)
                if self._on_corrupt == "refuse" or not self._replaces:
                    break
                if file not in self._warned:
                    self._warned.add(file)
                    tell(f"Left out the unreadable {self._what[0]} {error.named}.")
        raise self._refusal(failures)

    def check_any(self) -> None:
        """If skipping files is allowed, raises ValueError if no file is readable. Stops at the first readable file."""
        if self._on_corrupt == "skip" and self._replaces:
            self.next_readable(0)

    def read_all(self, keep: Callable[[int, T], None], *, may_be_empty: bool = False) -> Int[np.ndarray, " kept"]:
        """Calls `keep` with each readable position and its content, and returns these positions.

        may_be_empty: whether to return no positions, instead of raising an error, if no file is left.
        """
        errors: dict[int, Unreadable] = {}

        def read(position: int) -> None:
            try:
                keep(position, self._read(position))
            except Unreadable as error:
                errors[position] = error

        with ThreadPoolExecutor() as pool:
            list(pool.map(read, range(len(self._files))))
        failures: dict[StoredFile, Unreadable] = {}
        for position in sorted(errors):
            failures.setdefault(self._files[position], errors[position])
        none_left = len(errors) == len(self._files) and not may_be_empty
        if failures and (self._on_corrupt == "refuse" or none_left):
            raise self._refusal(failures)
        if failures:
            tell(f"Left out {self._listed(failures)}.")
        return np.setdiff1d(np.arange(len(self._files)), sorted(errors))

    def _refusal(self, failures: dict[StoredFile, Unreadable]) -> ValueError:
        refuse = self._on_corrupt == "refuse"
        skip = ", or set data.on_corrupt to 'skip'" if refuse and self._replaces else ""
        none = f"data.on_corrupt is 'skip', but no file in the split '{self._split}' is readable. "
        none = "" if refuse or not self._replaces else none
        return ValueError(f"{none}data.path has {self._listed(failures)}; repair or remove them{skip}.")

    def _listed(self, failures: dict[StoredFile, Unreadable]) -> str:
        errors, (one, several) = list(failures.values()), self._what
        count = f"1 {one}" if len(errors) == 1 else f"{len(errors):,} {several}"
        more = f" and {len(errors) - _NAMED_IN_ERRORS:,} more" if len(errors) > _NAMED_IN_ERRORS else ""
        named = ", ".join(error.named for error in errors[:_NAMED_IN_ERRORS])
        return f"{count} that cannot be read: {named}{more}"
