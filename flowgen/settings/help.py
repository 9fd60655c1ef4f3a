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
    """A field of a config, as `settings` lists it.

    name: dotted name, such as "train.steps".
    value: the field's value. For a group with several possible types, it is the name of the group's type. For a
    user-defined object, it is the name of the object or of its class, if there is one.
    about: the field's entry in the docstring of its config.
    choices: the allowed values, in words.
    is_type: whether the field is a group, whose own fields are listed after it.
    """

    name: str
    value: Any
    about: str
    choices: str
    is_type: bool


def settings(config: Any, path: str = "") -> list[Setting]:
    """Returns all fields of a config, including the fields of its groups.

    A group that is None has one entry; its `choices` list the group's possible types or, if there is only one, the
    fields of that type. Any other group with only one possible type has no entry of its own, only those of its fields.
    path: dotted name of the config, if it is a group itself.

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
    """Returns each field's entry in the docstrings of a dataclass and its base classes, by the name of the field.

    In a docstring, the entry of a field begins with the field's name and a colon at the start of a line, and ends
    before the next entry or an empty line.

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
