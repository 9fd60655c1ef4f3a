"""Reports files that cannot be decoded, and classes without any readable sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int32

from flowgen.data.inventory import name_list, tell

OnCorrupt = Literal["refuse", "skip"]


class Unreadable(ValueError):
    """Raised if a file cannot be decoded. named: the file and the reason, for use in a list of files."""

    @property
    def named(self) -> str:
        return str(self)


def tell_lost_classes(
    before: Int32[np.ndarray, " n"], after: Int32[np.ndarray, " m"], class_names: Sequence[str], sentence: str
) -> None:
    """Warns about classes that have no samples left. sentence: the warning, with {} in place of the class names.

    Example:
        tell_lost_classes(labels, labels[kept], names, "No image of {} is left.")
    """
    if lost := [class_names[label] for label in np.setdiff1d(before, after) if label >= 0]:
        tell(sentence.format(name_list(lost)))
