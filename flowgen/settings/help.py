"""Lists the fields of a config for users, each with its dotted name, value, help and allowed values."""

from __future__ import annotations

import functools
import inspect
from dataclasses import is_dataclass
from typing import Any, NamedTuple

from flowgen.settings.annotations import (
    OWN_NAME,
    choices,
    configs_of,
    describe,
    hints_of,
    is_own,
    members,
    takes_own,
    type_name,
)
from flowgen.settings.named import name_of


class Setting(NamedTuple):
    """A field: its dotted name, its value, its docstring entry, and its allowed values.

    For a group with several possible types, the value is the name of its type, and the fields of the group are listed
    after it. For a user-defined object, the value is the object's name if it has one.
    """

    name: str
    value: Any
    about: str
    choices: str
    is_type: bool


def settings(config: Any, path: str = "") -> list[Setting]:
    """Returns all fields of a config and its groups.

    A group that is None has one entry, whose allowed values list its fields.

    Example:
        print("\\n".join(f"--{field.name} {field.value}  # {field.about}" for field in settings(experiment)))
    """
    found, about = [], help_of(type(config))
    for field, annotation in hints_of(type(config)).items():
        value, name, line = getattr(config, field), f"{path}.{field}" if path else field, about.get(field, "")
        is_group, own = is_dataclass(value), is_own(annotation, value)
        if (kinds := choices(annotation)) or (own and is_group):
            allowed = [*kinds, *["none"] * (type(None) in members(annotation)), *[OWN_NAME] * takes_own(annotation)]
            kind = (name_of(type(value) if is_group else value) if own else None) or type_name(value)
            found.append(Setting(name, kind, line, " or ".join(allowed), is_group or not own))
        elif own:
            found.append(Setting(name, name_of(value) or value, line, _allowed(annotation), False))
        elif value is None and (kinds := configs_of(annotation)):
            inside = ", ".join(inner for kind in kinds.values() for inner in hints_of(kind))
            found.append(Setting(name, None, line, f"none, or set its {inside}", True))
        elif not is_group:
            found.append(Setting(name, value, line, _allowed(annotation), False))
        if is_group:
            found += settings(value, name)
    return found


def _allowed(annotation: Any) -> str:
    return f"{describe(annotation)} ({OWN_NAME})" if takes_own(annotation) else describe(annotation)


def leaf_names(config: Any) -> list[str]:
    """Returns the dotted names of all fields that are not groups, omitting the fields of groups that are None.

    Example:
        print("\\n".join(leaf_names(experiment)))
    """
    return [setting.name for setting in settings(config) if not setting.is_type]


@functools.cache
def help_of(cls: type) -> dict[str, str]:
    """Returns each field's help from the docstrings of a dataclass and its bases.

    An entry begins with `name: ` and ends before the next entry or an empty line.

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
