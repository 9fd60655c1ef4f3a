"""Ranges of numbers, declared in the types of a dataclass's fields and checked by one function.

A range is what can be meant, far beyond what anybody has trained, so that a number that cannot be is refused before a
model of that size is built. `int` with a range is an `int` to everything else.
"""

from __future__ import annotations

import functools
import numbers
import typing
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Within:
    """Least and most value of a number, both allowed.

    Example:
        Width = Annotated[int, Within(1, 65_536)]
    """

    least: float | int
    most: float | int


@dataclass(frozen=True)
class AtMost:
    """Most items of a tuple.

    Example:
        layers: Annotated[tuple[Layers, ...], AtMost(128)]
    """

    items: int


INT32 = (1 << 31) - 1

# Of one sample. Published: images of 1,024 pixels a side, clips of 33,390 tokens.
Side = Annotated[int, Within(1, 1 << 14)]
Frames = Annotated[int, Within(1, 1 << 16)]
OtherFrames = Annotated[int, Within(0, 1 << 16)]
Channels = Annotated[int, Within(1, 1 << 16)]
Classes = Annotated[int, Within(0, 1 << 24)]
TextLength = Annotated[int, Within(0, 1 << 16)]
TextDim = Annotated[int, Within(0, 1 << 16)]
MAX_TOKENS = 1 << 19
Tokens = Annotated[int, Within(1, MAX_TOKENS)]
# Of a network. Published: 8 blocks, 28 layers of width 4,096, heads of 256.
Width = Annotated[int, Within(1, 1 << 16)]
Hidden = Annotated[int, Within(1, 1 << 18)]
HeadDim = Annotated[int, Within(1, 1 << 9)]
Heads = Annotated[int, Within(1, 1 << 12)]
Expansion = Annotated[int, Within(1, 1 << 8)]
Groups = Annotated[int, Within(1, 1 << 16)]
Vocabulary = Annotated[int, Within(1, 1 << 24)]
# What is scanned is compiled once; what is looped over is compiled as often as there is of it.
Layers = Annotated[int, Within(1, 1 << 10)]
MaybeLayers = Annotated[int, Within(0, 1 << 10)]
Loops = Annotated[int, Within(1, 1 << 5)]
Blocks = Annotated[int, Within(1, 1 << 7)]
MAX_BLOCKS = 1 << 7
MAX_LEVELS = 1 << 3
# Of a run. Steps are counted in 32 bits.
Steps = Annotated[int, Within(1, INT32)]
Every = Annotated[int, Within(0, INT32)]
Batch = Annotated[int, Within(1, 1 << 20)]
Samples = Annotated[int, Within(1, 1 << 24)]
Bytes = Annotated[int, Within(0, 1 << 60)]


def check_ranges(config: Any, group: str = "") -> None:
    """Raises ValueError where fields of a dataclass are outside the range in their type, or have too many items, naming
    each field, its value and its range.

    group: where the config stands, put before the field; empty where the caller does that.

    Example:
        check_ranges(config, "model")
    """
    wrong = []
    for name, annotation in _annotations(type(config)).items():
        path, value = f"{group}.{name}" if group else name, getattr(config, name)
        try:
            _check_range(path, value, annotation)
        except ValueError as error:
            wrong.append(str(error).removesuffix("."))
    if wrong:
        raise ValueError(f"{', and '.join(wrong)}.")


def _check_range(path: str, value: Any, annotation: Any) -> None:
    bounds, most = _find(annotation, Within), _find(annotation, AtMost)
    items = value if isinstance(value, tuple | list) else (value,)
    if most is not None and len(items) > most.items:
        raise ValueError(f"{path} has {len(items)} entries; give at most {most.items}.")
    for item in items if bounds is not None else ():
        if item is not None:
            check_within(path, item, bounds)


def check_within(path: str, value: Any, bounds: Within) -> None:
    """Raises ValueError where a value is no number, or outside a range, naming path, value and range.

    Example:
        check_within("arguments.blocks", blocks, Within(1, 128))
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{path} is {value!r:.80}; it must be a number.")
    if value < bounds.least:
        least = f"at least {bounds.least}" if bounds.least else "0 or more"
        raise ValueError(f"{path} is {_short(value)}; it must be {least}.")
    if not value <= bounds.most:
        raise ValueError(f"{path} is {_short(value)}; it must be from {bounds.least} to {bounds.most}.")


def _short(value: Any) -> str:
    # Python writes no whole number of over 4,300 digits.
    if isinstance(value, int) and (digits := abs(value).bit_length() * 3 // 10) > 100:
        return f"{'over ' if value > 0 else 'below -'}10^{digits}"
    return str(value)


@functools.cache
def _annotations(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _find(annotation: Any, kind: type) -> Any:
    """The first range, or bound on items, in an annotation."""
    for found in getattr(annotation, "__metadata__", ()):
        if isinstance(found, kind):
            return found
    inside = (annotation.__origin__,) if hasattr(annotation, "__metadata__") else typing.get_args(annotation)
    return next((found for part in inside if (found := _find(part, kind)) is not None), None)
