"""Reads the files of a dataset on all cores, and reports all unreadable files in one error or skips them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Int

from flowgen.data.inventory import tell
from flowgen.data.stored import StoredFile
from flowgen.data.unreadable import OnCorrupt
from flowgen.data.workers import Failure, Job, Workers

T = TypeVar("T")
_NAMED_IN_ERRORS = 5
# Number of files that are read at a time when all are read.
_AT_ONCE = 128


class FileReader(Generic[T]):
    """Reads files by position in a list. `on_corrupt` decides whether unreadable files cause an error or are skipped.

    job: a function that maps a position to a function without arguments, which reads the file there or raises
    `Unreadable`.
    on_corrupt: "refuse" raises a ValueError that lists such files; "skip" leaves them out with a warning.
    what: singular and plural noun for the files, used in messages. split: the split to which the files belong.
    replaces: whether another file may replace a skipped one. workers: the threads or processes that read the files.

    Example:
        reader = FileReader(job, files, "skip", what=("image", "images"), split="train")
        (position, image), *_ = reader.read([7, 3])
    """

    def __init__(
        self,
        job: Callable[[int], Job[T]],
        files: Sequence[StoredFile],
        on_corrupt: OnCorrupt,
        *,
        what: tuple[str, str],
        split: str,
        replaces: bool = True,
        workers: Workers | None = None,
    ) -> None:
        self._job, self._files, self._on_corrupt, self._what = job, files, on_corrupt, what
        self._split = split
        self._replaces = replaces
        self._workers = workers or Workers(0)
        # Files that a warning has named. This set only prevents repeated warnings; results do not depend on it.
        self._warned: set[StoredFile] = set()

    @property
    def skips(self) -> bool:
        """Whether unreadable files are skipped."""
        return self._on_corrupt == "skip"

    def read(self, positions: Sequence[int]) -> list[tuple[int, T]]:
        """Returns a pair (position, content) for the file at each position.

        If files may be skipped, an unreadable file is replaced by the next readable one; the search wraps around at the
        end.

        Raises ValueError if an unreadable file may not be skipped, or no file is readable.
        """
        contents = self._workers.read([self._job(position) for position in positions])
        return [
            self._replaced(position, content) if isinstance(content, Failure) else (position, content)
            for position, content in zip(positions, contents, strict=True)
        ]

    def check_any(self) -> None:
        """Raises ValueError if files may be skipped but none is readable. Stops at the first readable file."""
        if self._on_corrupt == "skip" and self._replaces:
            self.read([0])

    def read_all(self, keep: Callable[[int, T], None], *, may_be_empty: bool = False) -> Int[np.ndarray, " kept"]:
        """Calls `keep` with the position and content of each readable file, and returns these positions.

        may_be_empty: whether to return no positions, instead of raising an error, if no file is left.
        """
        failures: dict[StoredFile, Failure] = {}
        kept = []
        for start in range(0, len(self._files), _AT_ONCE):
            positions = range(start, min(start + _AT_ONCE, len(self._files)))
            contents = self._workers.read([self._job(position) for position in positions])
            for position, content in zip(positions, contents, strict=True):
                if isinstance(content, Failure):
                    failures.setdefault(self._files[position], content)
                else:
                    keep(position, content)
                    kept.append(position)
        if failures and (self._on_corrupt == "refuse" or not (kept or may_be_empty)):
            raise self._refusal(failures)
        if failures:
            tell(f"Left out {self._listed(failures)}.")
        return np.array(kept, np.int64)

    def _replaced(self, position: int, failure: Failure) -> tuple[int, T]:
        """Returns the position and content of the next readable file after an unreadable one."""
        failures = {self._files[position]: failure}
        if self.skips and self._replaces:
            self._tell_left_out(position, failure)
            for step in range(1, len(self._files)):
                other = (position + step) % len(self._files)
                (content,) = self._workers.read([self._job(other)])
                if not isinstance(content, Failure):
                    return other, content
                failures.setdefault(self._files[other], content)
                self._tell_left_out(other, content)
        raise self._refusal(failures)

    def _tell_left_out(self, position: int, failure: Failure) -> None:
        if self._files[position] not in self._warned:
            self._warned.add(self._files[position])
            tell(f"Left out the unreadable {self._what[0]} {failure.named}.")

    def _refusal(self, failures: dict[StoredFile, Failure]) -> ValueError:
        refuse = self._on_corrupt == "refuse"
        skip = ", or set data.on_corrupt to 'skip'" if refuse and self._replaces else ""
        none = f"data.on_corrupt is 'skip', but no file in the split '{self._split}' is readable. "
        none = "" if refuse or not self._replaces else none
        them = "it" if len(failures) == 1 else "them"
        return ValueError(f"{none}data.path has {self._listed(failures)}; repair or remove {them}{skip}.")

    def _listed(self, failures: dict[StoredFile, Failure]) -> str:
        errors, (one, several) = list(failures.values()), self._what
        count = f"1 {one}" if len(errors) == 1 else f"{len(errors):,} {several}"
        more = f" and {len(errors) - _NAMED_IN_ERRORS:,} more" if len(errors) > _NAMED_IN_ERRORS else ""
        named = ", ".join(error.named for error in errors[:_NAMED_IN_ERRORS])
        return f"{count} that cannot be read: {named}{more}"
