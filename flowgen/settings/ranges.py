"""Types that restrict the values of a field: ranges of numbers, lengths of tuples, and lists of names.

Ranges of sizes extend far beyond published models. They reject only mistakes, and do so before a model is built.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, runtime_checkable

MAX_SHOWN = 200  # characters of a value in a message


@runtime_checkable
class Bound(Protocol):
    """Metadata in an `Annotated` type that restricts its values."""

    def problem(self, value: Any) -> str:
        """Returns the problem with a value as a clause that follows the field's name, or "" if there is no problem."""
        ...


@dataclass(frozen=True)
class Within:
    """Restricts a number to at least `least` or above `above`, and to at most `most` or below `below`.

    Example:
        Width = Annotated[int, Within(1, 65_536)]
        Probability = Annotated[float, Within(0, below=1)]
    """

    least: float | int | None = None
    most: float | int | None = None
    above: float | int | None = None
    below: float | int | None = None

    def problem(self, value: Any) -> str:
        if (self.least is not None and value < self.least) or (self.above is not None and value <= self.above):
            return f"is {shown(value)}; it must be {self._lower()}."
        if self.most is not None and value > self.most:
            fitting = f"at most {self.most}" if self.least is None else f"from {self.least} to {self.most}"
            return f"is {shown(value)}; it must be {fitting}."
        if self.below is not None and value >= self.below:
            return f"is {shown(value)}; it must be below {self.below}."
        return ""

    def _lower(self) -> str:
        if self.above is not None:
            return f"above {self.above}" if self.above else "positive"
        return f"at least {self.least}" if self.least else "0 or more"


@dataclass(frozen=True)
class Entries:
    """Restricts the length of a tuple to at least `least` and at most `most`.

    Example:
        layers: Annotated[tuple[Layers, ...], Entries(1, 128)]
    """

    least: int
    most: int

    def problem(self, value: Any) -> str:
        if self.least <= len(value) <= self.most:
            return ""
        return f"has {len(value)} entries; it must have {f'{self.least} to' if self.least else 'at most'} {self.most}."


@dataclass(frozen=True)
class OneOf:
    """Restricts a value to the given names.

    Pass the names of an existing table to avoid repeating them in a Literal.

    Example:
        attention: Annotated[str, OneOf(CAUSAL_KERNEL_NAMES)] = "softmax"
    """

    names: tuple[str, ...]

    def problem(self, value: Any) -> str:
        if value in self.names:
            return ""
        return f"is {shown(value)}; choose one of {', '.join(self.names)}{meant(str(value), self.names)}"


@dataclass(frozen=True)
class Own:
    """Allows user-defined objects, which are written as "package.module:object" in commands and JSON.

    about: what an object must be, as a noun phrase for error messages.

    Example:
        coupling: Independent | MinibatchOT | Annotated[Coupling, Own("a function (key, x0, x1, cond) -> Coupled")]
    """

    about: str


def meant(word: str, known: Iterable[str]) -> str:
    """Returns the end of an error message about an unknown word. It suggests a similar known word, if there is one."""
    spelled = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(word).lower(), list(spelled), n=1, cutoff=0.75)
    return f"; did you mean {spelled[close[0]]}?" if close else "."


def shown(value: Any) -> str:
    """Returns a value as a short text for a message."""
    if isinstance(value, int) and (digits := abs(value).bit_length() * 3 // 10) > 100:
        return f"{'over ' if value > 0 else 'below -'}10^{digits}"
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # Python cannot print deep nesting or numbers of more than 4,300 digits.
        return f"a {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


Positive = Annotated[float, Within(above=0)]
NonNegative = Annotated[float, Within(0)]
Fraction = Annotated[float, Within(0, 1)]
ProperFraction = Annotated[float, Within(0, below=1)]
OpenFraction = Annotated[float, Within(above=0, below=1)]
INT32 = (1 << 31) - 1
# Counts, such as the steps of a run, are 32-bit integers.
Count = Annotated[int, Within(1, INT32)]
CountOrZero = Annotated[int, Within(0, INT32)]

# Sizes of one sample. Published models use images with sides of 1,024 pixels, and clips of 33,390 tokens.
Side = Annotated[int, Within(1, 1 << 14)]
Frames = Annotated[int, Within(1, 1 << 16)]
OtherFrames = Annotated[int, Within(0, 1 << 16)]
Channels = Annotated[int, Within(1, 1 << 16)]
Classes = Annotated[int, Within(0, 1 << 24)]
TextLength = Annotated[int, Within(0, 1 << 16)]
TextDim = Annotated[int, Within(0, 1 << 16)]
MAX_TOKENS = 1 << 19
Tokens = Annotated[int, Within(1, MAX_TOKENS)]
# Sizes of a network. Published models have 8 blocks, 28 layers of width 4,096, and heads of size 256.
Width = Annotated[int, Within(1, 1 << 16)]
Hidden = Annotated[int, Within(1, 1 << 18)]
HeadDim = Annotated[int, Within(1, 1 << 9)]
Heads = Annotated[int, Within(1, 1 << 12)]
Expansion = Annotated[int, Within(1, 1 << 8)]
Groups = Annotated[int, Within(1, 1 << 16)]
Vocabulary = Annotated[int, Within(1, 1 << 24)]
# Scanned layers are compiled once; looped layers are compiled one by one.
Layers = Annotated[int, Within(1, 1 << 10)]
MaybeLayers = Annotated[int, Within(0, 1 << 10)]
Loops = Annotated[int, Within(1, 1 << 5)]
Blocks = Annotated[int, Within(1, 1 << 7)]
MAX_BLOCKS = 1 << 7
MAX_LEVELS = 1 << 3
# Settings of a run.
BatchSize = Annotated[int, Within(1, 1 << 20)]
Samples = Annotated[int, Within(1, 1 << 24)]
Bytes = Annotated[int, Within(0, 1 << 60)]
# Without 64-bit integers, JAX truncates larger seeds, so two different seeds could give the same samples.
Seed = Annotated[int, Within(0, (1 << 32) - 1)]
