"""Fields of a config as a user reads them: by name, with value, help and what they may be."""

from __future__ import annotations

import functools
import inspect
import typing
from typing import Any, NamedTuple

from flowgen.fields import choices, describe, hints_of, walk


class Setting(NamedTuple):
    """A field by its dotted name: its value, what its docstring says of it, and what it may be."""

    name: str
    value: Any
    about: str
    choices: str


def settings(config: Any) -> list[Setting]:
    """Returns all fields with their help; a group of several possible types comes with the name of its own.

    Example:
        print("\\n".join(f"--{field.name} {field.value}  # {field.about}" for field in settings(experiment)))
    """
    return [
        Setting(name, value, help_of(owner).get(field, ""), _choices_of(owner, field))
        for name, value, owner, field, _ in walk(config)
    ]


@functools.cache
def help_of(cls: type) -> dict[str, str]:
    """Returns what the docstring of a dataclass and those of its bases say of each field.

    In lines that begin with `name: `, each up to the next such line or an empty one.

    Example:
        help_of(OptimConfig)["lr"]  # "learning rate after the warm-up; positive."
    """
    known, found = set(hints_of(cls)), {}
    for base in reversed(cls.__mro__):
        label = None
        for line in inspect.cleandoc(base.__dict__.get("__doc__") or "").splitlines():
            name, colon, text = line.partition(": ")
            if colon and name in known:
                label, found[name] = name, text.strip()
            elif not line.strip():
                label = None
            elif label is not None:
                found[label] += " " + line.strip()
    return found


def _choices_of(cls: type, field: str) -> str:
    annotation = hints_of(cls)[field]
    types = [*choices(annotation), *["none"] * (type(None) in typing.get_args(annotation))]
    return " or ".join(types) if choices(annotation) else describe(annotation)
