"""The arrays that a new run copies or maps from another run, and the table that reports them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np

SHOWN = 8  # the most groups of arrays that a row lists


class Transfer(NamedTuple):
    """How an array is obtained: "taken" unchanged, "mapped" by `function`, or "new". about: describes `function`."""

    kind: Literal["taken", "mapped", "new"]
    about: str = ""
    function: Callable[[np.ndarray], np.ndarray] | None = None


def table_of(found: Mapping[str, Transfer], sizes: Mapping[str, int], left_out: Mapping[str, int]) -> list[str]:
    """Returns the rows of a table that shows how many values and arrays are taken, mapped, new or left out.

    found: how each array is obtained. sizes: number of values in each array. left_out: number of values in each array
    of the old run that is not used.

    Example:
        table_of({"params/w": Transfer("new")}, {"params/w": 3}, {})  # ["  new    3 values in 1 array: w"]
    """
    rows = []
    for kind in ("taken", "mapped", "new"):
        abouts = dict.fromkeys(how.about for how in found.values() if how.kind == kind)
        for about in abouts:
            names = [name for name, how in found.items() if how.kind == kind and how.about == about]
            # Most arrays are taken, so their row lists only the names of their modules.
            shown = dict.fromkeys(_module(name) for name in names) if kind == "taken" else names
            rows.append(_row(kind, {name: sizes[name] for name in names}, shown, about))
    return rows + ([_row("left out", left_out, left_out, "")] if left_out else [])


def _row(kind: str, sizes: Mapping[str, int], names: Iterable[str], about: str) -> str:
    arrays = f"{len(sizes)} array{'s' * (len(sizes) != 1)}"
    text = f"  {kind:<8} {sum(sizes.values()):>14,} values in {arrays}: {grouped(names)}"
    return f"{text} ({about})" if about else text


def grouped(names: Iterable[str]) -> str:
    """Returns names of arrays in one line. Names that differ only in the number of a module are combined.

    Example:
        grouped(["params/blocks_0/pos_embed", "params/blocks_1/pos_embed"])  # "blocks_0-1/pos_embed"
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        parts = re.fullmatch(r"(\D*)(\d*)(.*)", name.removeprefix("params/"), re.DOTALL)
        assert parts is not None
        numbers = groups.setdefault((parts[1], parts[3]), [])
        if parts[2]:
            numbers.append(int(parts[2]))
    told = [f"{head}{_ranges(numbers)}{tail}" for (head, tail), numbers in groups.items()]
    return ", ".join(told[:SHOWN]) + (f" and {len(told) - SHOWN} more" if len(told) > SHOWN else "")


def _ranges(numbers: Iterable[int]) -> str:
    """Returns numbers as text, with consecutive numbers written as ranges, such as "0-3,5"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _module(name: str) -> str:
    """Returns the name of an array's outermost module or, if the array is not a parameter, of its collection."""
    return "/".join(name.split("/")[: 2 if name.startswith("params/") else 1])
