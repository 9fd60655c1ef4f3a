"""Finds the configs that the annotation of a field allows, and describes annotations in words."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal

from flowgen.settings.ranges import OneOf, Own, meant, shown

OWN_NAME = "module:object"

SIMPLE = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "none"}


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """Returns the annotations of a dataclass's fields, in order. Raises ValueError if one cannot be evaluated."""
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except NameError as error:
        raise ValueError(
            f"{cls.__module__}:{cls.__qualname__} uses {error.name!r} in an annotation, but this name is not "
            "defined at the top level of the module; define it there."
        ) from error
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}  # ty: ignore[invalid-argument-type]


def members(annotation: Any) -> tuple[Any, ...]:
    """Returns the members of a union; for any other annotation, only the annotation itself."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def unannotated(annotation: Any) -> Any:
    """Returns X for `Annotated[X, ...]`, and other annotations unchanged."""
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def configs_of(annotation: Any) -> dict[str, type]:
    """Returns the config types that an annotation allows, keyed by `type_name`."""
    return {type_name(member): member for member in members(annotation) if is_dataclass(member)}


def choices(annotation: Any) -> dict[str, type]:
    """Returns the result of `configs_of` if a field accepts more than one type of object, else an empty dict."""
    found = configs_of(annotation)
    return found if len(found) + takes_own(annotation) > 1 else {}


def takes_own(annotation: Any) -> bool:
    """Returns whether a field accepts user-defined objects: functions, or objects that an `Own` describes."""
    return any(is_function(member) or own_of(member) is not None for member in members(annotation))


def entry_of(annotation: Any) -> Any:
    """Returns the annotation of a dict's values, or None if the annotation is not that of a dict."""
    origin = typing.get_origin(annotation)
    return typing.get_args(annotation)[1] if isinstance(origin, type) and issubclass(origin, Mapping) else None


def item_of(annotation: Any) -> Any:
    """Returns the annotation of the items of a tuple of any length, or None if the annotation allows no such tuple."""
    tuples = (typing.get_args(member) for member in members(annotation) if typing.get_origin(member) is tuple)
    return next((arguments[0] for arguments in tuples if arguments[-1] is Ellipsis), None)


def written(annotation: Any, value: Any) -> str:
    """Returns an example of a tuple of numbers as it is written on a command line, such as "4,1".

    Returns "" if the annotation allows no tuple of numbers, or also allows a single number. value: the rejected value;
    if it is an integer, it becomes the first item.
    """
    kinds = [unannotated(member) for member in members(annotation)]
    tuples = [typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is tuple]
    items = next((items for items in tuples if unannotated(items[0]) in (int, float)), None)
    if items is None or int in kinds or float in kinds:
        return ""
    first = str(value) if type(value) is int else "4"
    return ",".join([first, *["1"] * (len(items) - 1)])


def is_function(annotation: Any) -> bool:
    """Returns whether an annotation is `Callable`, with or without arguments."""
    return annotation is Callable or typing.get_origin(annotation) is Callable


def own_of(annotation: Any) -> Own | None:
    """Returns the `Own` in an annotation's metadata, or None if there is none. The annotation must not be a union."""
    bounds = typing.get_args(annotation)[1:] if typing.get_origin(annotation) is Annotated else ()
    return next((bound for bound in bounds if isinstance(bound, Own)), None)


def is_own(annotation: Any, value: Any) -> bool:
    """Returns whether a field's value is user-defined: neither plain nor one of the field's declared configs."""
    plain = value is None or isinstance(value, bool | int | float | str)
    return takes_own(annotation) and not plain and type(value) not in configs_of(annotation).values()


def type_name(value: Any) -> str:
    """Returns the name of a class, or of the class of any other object, without the suffix "Config"; "none" for None.

    Example:
        type_name(TARFlowConfig(image_size=8))  # "TARFlow"
    """
    cls = value if isinstance(value, type) else type(value)
    return "none" if value is None else cls.__name__.removesuffix("Config")


def describe(annotation: Any) -> str:
    """Returns an annotation in words: "an integer", "'a' or 'b'", "a tuple of 2 integers"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in SIMPLE:
        return SIMPLE[annotation]
    if (own := own_of(annotation)) is not None:
        return own.about
    if origin is Annotated:
        names = [repr(name) for bound in arguments[1:] if isinstance(bound, OneOf) for name in bound.names]
        return " or ".join(names) or describe(arguments[0])
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if len(members(annotation)) > 1:
        return " or ".join(dict.fromkeys(map(describe, arguments)))
    if is_function(annotation):
        return "a function"
    if arguments == (str, Ellipsis):
        return "a tuple of texts, such as ('one', 'two')"
    if origin is tuple and (kinds := configs_of(arguments[0])):
        return f"a tuple whose items are {' or '.join(kinds)}"
    if origin is tuple:
        return f"a tuple of {_plural(arguments[0], '' if arguments[-1] is Ellipsis else len(arguments))}"
    if (entry := entry_of(annotation)) is not None:
        return f"a dict of {_plural(entry)} by name"
    name = str(getattr(annotation, "__name__", annotation))
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def mismatch(annotation: Any, value: Any) -> str:
    """Returns the part of an error message that follows a field's name if its value has the wrong type.

    If the annotation lists names, the message suggests a similar one, if there is one.
    """
    names = [name for member in members(annotation) for name in _names_of(member)]
    return f"is {shown(value)}; it must be {describe(annotation)}{meant(shown(value), map(repr, names))}"


def _names_of(annotation: Any) -> tuple[Any, ...]:
    """Returns the names that a Literal or a `OneOf` allows."""
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    bounds = typing.get_args(annotation)[1:] if typing.get_origin(annotation) is Annotated else ()
    return tuple(name for bound in bounds if isinstance(bound, OneOf) for name in bound.names)


def _plural(annotation: Any, count: int | str = "") -> str:
    """Returns the items of a tuple in words: "2 integers", "1 integer", "numbers or none"."""
    *kinds, last = members(annotation)
    if kinds:
        return " or ".join(dict.fromkeys(_plural(kind, count) for kind in (*kinds, last)))
    noun, of, rest = describe(annotation).removeprefix("an ").removeprefix("a ").partition(" of ")
    return f"{count} {noun}{'' if count == 1 or annotation in (bool, type(None)) else 's'}{of}{rest}".lstrip()
