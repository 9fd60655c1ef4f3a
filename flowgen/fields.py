"""Frozen dataclasses as plain values: JSON, command-line overrides, and what differs between two of them.

Knows nothing of flowgen. A value is checked against its annotation: bool, int, float, str, None, Literal,
tuple, dict with str keys, unions of these, and dataclasses of these. A field that may be one of several dataclasses
carries its choice as "type": the name of the class without "Config".
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import difflib
import functools
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

T = TypeVar("T")
TYPE = "type"
MAX_WHOLE_FLOAT = 10**300
MAX_SHOWN = 200  # letters of a value in a message


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """Returns the annotations of the fields of a dataclass, in order.

    Example:
        hints_of(TrainConfig)["steps"]  # int
    """
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # ty: ignore[invalid-argument-type]
    return {name: hints[name] for name in names}


def to_plain(value: Any) -> Any:
    """Returns dataclasses and mappings as dicts and tuples as lists, ready for JSON.

    Example:
        text = json.dumps(to_plain(config), allow_nan=False)
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = hints_of(type(value))
        return {name: _plain_field(hints[name], getattr(value, name)) for name in _field_names(value)}
    if isinstance(value, Mapping):
        return {name: to_plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def from_plain(cls: type[T], data: Any, *, path: str = "") -> T:
    """Returns the dataclass `cls` from what `to_plain` gave. A field left out takes its default.

    Raises:
        ValueError: an unknown field, a missing one without default, or a value of the wrong type, by name.

    Example:
        config = from_plain(TrainConfig, {"steps": 100, "batch_size": 8}, path="train")
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{path or cls.__name__} is {_shown(data)}; it must be a group of fields.")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # ty: ignore[invalid-argument-type]
    for name in data:
        if name not in fields:
            raise ValueError(_unknown(_join(path, name), [_join(path, known) for known in fields]))
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise ValueError(f"{_join(path, name)} is missing; give it a value.")
    values = {}
    for name, value in data.items():
        default = fields[name].default
        if choices(hints[name]) and isinstance(value, Mapping) and TYPE not in value:
            value = {**value, TYPE: type_name(default) if dataclasses.is_dataclass(default) else None}
        values[name] = check(hints[name], value, path=_join(path, name))
    return built(lambda: cls(**values), path)


def choices(annotation: Any) -> dict[str, type]:
    """Returns the dataclasses by name that a field may be one of; empty unless there are several.

    Example:
        choices(Circle | Square | None)  # {"Circle": Circle, "Square": Square}
    """
    found = [member for member in typing.get_args(annotation) if dataclasses.is_dataclass(member)]
    return {type_name(member): member for member in found} if _is_union(annotation) and len(found) > 1 else {}


def type_name(value: Any) -> str:
    """Returns the name of a dataclass or of its instance, without "Config".

    Example:
        type_name(TARFlowConfig(image_size=8))  # "TARFlow"
    """
    return (value if isinstance(value, type) else type(value)).__name__.removesuffix("Config")


def check(annotation: Any, value: Any, *, path: str) -> Any:
    """Returns `value` as its annotation says: a whole number as int or float, a list as tuple; never a bool as int.

    Raises:
        ValueError: naming path, value and what is expected; a float must be finite.

    Example:
        size = check(int | tuple[int, int], [32, 48], path="model.image_size")    # (32, 48)
    """
    try:
        return _convert(annotation, value, path)
    except _Mismatch:
        raise ValueError(f"{path} is {_shown(value)}; it must be {describe(annotation)}.") from None


def override(config: T, arguments: Sequence[str]) -> T:
    """Returns `config` with fields replaced by `--group.field value` or `--group.field=value` arguments.

    Values: numbers, true or false, none, (8, 12) or [8, 12], and text as it stands. A group that may be of several
    types takes the name of one, which stands for its defaults; fields of the group are set after it.

    Raises:
        ValueError: an unknown field (with the closest known one), a group, a missing or an unfitting value.

    Example:
        experiment = override(experiment, ["--optim.lr", "3e-4", "--model.image_size=(32, 48)"])
    """
    words, given = list(arguments), {}
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise ValueError(f"'{word}' is not understood; overrides look like --optim.lr 3e-4.")
        path, equals, text = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ValueError(f"--{path} has no value; write --{path} VALUE.")
            text = words.pop(0)
        given[path] = text
    chosen = {path: text for path, text in given.items() if _is_choice(config, path.split("."))}
    for values in (chosen, {path: text for path, text in given.items() if path not in chosen}):
        changes = _Changes()
        for path, text in values.items():
            group = changes
            *groups, name = path.split(".")
            for part in groups:
                group = group.setdefault(part, _Changes())
            group[name] = _value_of(config, path, path.split("."), text, leaf_names(config))
        config = _replaced(config, changes)
    return config


def leaf_names(config: Any) -> list[str]:
    """Returns the dotted names of all fields that hold a value and no group; a group that is absent has none.

    Example:
        print("\\n".join(leaf_names(experiment)))
    """
    return [name for name, _, _, _, is_type in walk(config) if not is_type]


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Returns lines such as "train.batch_size: 64 -> 32" between two plain values, in order of the first.

    Example:
        changed = differences(to_plain(old), to_plain(new))
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        absent = _Absent()
        names = [*old, *(name for name in new if name not in old)]
        pairs = [(name, old.get(name, absent), new.get(name, absent)) for name in names]
        return [line for name, a, b in pairs for line in differences(a, b, _join(path, name))]
    same = type(old) is type(new) and old == new
    return [] if same else [f"{path}: {old!r} -> {new!r}"]


def describe(annotation: Any) -> str:
    """Returns an annotation in words: "an integer", "'a' or 'b'", "a tuple of 2 integers"."""
    simple = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    if annotation in simple:
        return simple[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if _is_union(annotation):
        return " or ".join(map(describe, arguments))
    if origin is Callable:
        return "a function"
    if origin is tuple:
        items = _plural(arguments[0])
        if arguments == (str, Ellipsis):
            return "a tuple of texts, such as ('one', 'two')"
        return f"a tuple of {items}" if arguments[-1] is Ellipsis else f"a tuple of {len(arguments)} {items}"
    if origin in (dict, Mapping) or typing.get_origin(annotation) is Mapping:
        return f"a table of names to {_plural(arguments[1])}"
    return f"a {getattr(annotation, '__name__', annotation)}"


def _plural(annotation: Any) -> str:
    return describe(annotation).removeprefix("an ").removeprefix("a ") + "s"


def walk(config: Any, path: str = "") -> Iterator[tuple[str, Any, type, str, bool]]:
    """Yields fields in order: dotted name, value, the dataclass that has them and their name in it, and whether the
    value is the type of a group that may be of several.

    Example:
        names = [name for name, *_ in walk(experiment)]
    """
    owner = type(config)
    for field, annotation in hints_of(owner).items():
        value, name = getattr(config, field), _join(path, field)
        if choices(annotation):
            yield name, "none" if value is None else type_name(value), owner, field, True
        if dataclasses.is_dataclass(value):
            yield from walk(value, name)
        elif not (value is None and any(map(dataclasses.is_dataclass, typing.get_args(annotation)))):
            yield name, value, owner, field, False


class _Mismatch(Exception):
    """The value does not fit the annotation; the caller knows how to say so."""


class _Absent:
    """Stands in a difference for a field that one side does not have."""

    def __repr__(self) -> str:
        return "(absent)"


def _convert(annotation: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if choices(annotation) and isinstance(value, Mapping):
        return _convert_choice(choices(annotation), dict(value), path)
    if _is_union(annotation):
        return _convert_union(arguments, value, path)
    if origin is Literal:
        return _require(any(type(value) is type(choice) and value == choice for choice in arguments), value)
    if origin is tuple:
        _require(isinstance(value, list | tuple), value)
        items = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        _require(len(items) == len(value), value)
        return tuple(_convert(item, part, path) for item, part in zip(items, value, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _require(isinstance(value, Mapping) and all(isinstance(name, str) for name in value), value)
        return {name: _convert(arguments[1], item, path) for name, item in value.items()}
    if origin is Callable:
        return _require(callable(value), value)
    if dataclasses.is_dataclass(annotation):
        if isinstance(value, typing.cast(type, annotation)):
            return value
        return from_plain(typing.cast(type, annotation), value, path=path)
    if annotation in (int, float):
        return _convert_number(annotation, value)
    if annotation is type(None):
        return _require(value is None, value)
    return _require(type(value) is annotation, value)


def _convert_number(annotation: type, value: Any) -> int | float:
    if getattr(value, "shape", None) == ():
        value = value.item()  # of an array library
    _require(isinstance(value, numbers.Real) and not isinstance(value, bool), value)
    if isinstance(value, int):  # of any size
        return value if annotation is int else float(_require(abs(value) < MAX_WHOLE_FLOAT, value))
    _require(math.isfinite(value), value)
    _require(annotation is float or value == int(value), value)
    return annotation(value)


def _convert_choice(known: dict[str, type], value: dict[str, Any], path: str) -> Any:
    name = value.pop(TYPE, None)
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{_join(path, TYPE)} is {_shown(name)}; choose one of {', '.join(known)}.")
    return from_plain(known[name], value, path=path)


def _convert_union(members: tuple[Any, ...], value: Any, path: str) -> Any:
    if any(dataclasses.is_dataclass(member) and isinstance(value, typing.cast(type, member)) for member in members):
        return value
    # An exact type wins over a conversion: 3 stays an int in `float | int`.
    for member in sorted(members, key=lambda member: member is not type(value)):
        try:
            return _convert(member, value, path)
        except _Mismatch:
            continue
    raise _Mismatch


def _shown(value: Any) -> str:
    """A value in a message, short whatever it is."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # Python writes nothing nested too deep, and no number of over 4,300 digits.
        return f"a {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _require(fits: bool, value: Any) -> Any:
    if not fits:
        raise _Mismatch
    return value


def _value_of(config: Any, path: str, names: list[str], text: str, known: list[str]) -> Any:
    """The value that a text means for the field at a path."""
    name, *rest = names
    if name not in {field.name for field in dataclasses.fields(config)}:
        raise ValueError(_unknown(path, known))
    value, annotation = getattr(config, name), hints_of(type(config))[name]
    if not rest and text in choices(annotation):
        return _convert_choice(choices(annotation), {TYPE: text}, path)
    if dataclasses.is_dataclass(value):
        if not rest:
            raise ValueError(_no_value(path, value, choices(annotation), text))
        if rest[0] not in _field_names(value) and choices(annotation):
            raise ValueError(_no_field_of_type(path, rest[0], value, choices(annotation), known))
        return _value_of(value, path, rest, text, known)
    if rest:
        raise ValueError(_unknown(path, known))
    return _parse(annotation, text, path)


def _is_choice(config: Any, names: list[str]) -> bool:
    """Whether a path leads to a group that may be of several types."""
    name, *rest = names
    if name not in _field_names(config):
        return False
    if rest:
        value = getattr(config, name)
        return dataclasses.is_dataclass(value) and _is_choice(value, rest)
    return bool(choices(hints_of(type(config))[name]))


def _replaced(config: T, changes: dict[str, Any], path: str = "") -> T:
    """All changes at once, since values that depend on each other are checked together."""
    values = {
        name: _replaced(getattr(config, name), change, _join(path, name)) if isinstance(change, _Changes) else change
        for name, change in changes.items()
    }
    return built(lambda: dataclasses.replace(config, **values), path)  # ty: ignore[invalid-argument-type]


def built(make: Callable[[], T], path: str) -> T:
    """What `make` makes; an error of a group that does not know where it stands gets its path in front."""
    try:
        return make()
    except ValueError as error:
        if path and not str(error).startswith(path.partition(".")[0]):
            raise ValueError(f"{path}.{error}") from error
        raise


class _Changes(dict[str, Any]):
    """What changes within a group."""


def _field_names(config: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(config)]


def _plain_field(annotation: Any, value: Any) -> Any:
    plain = to_plain(value)
    return {TYPE: type_name(value), **plain} if choices(annotation) and dataclasses.is_dataclass(value) else plain


def _parse(annotation: Any, text: str, path: str) -> Any:
    """The value of a command-line text: none if the field may be none, text itself if it may be text, or a literal."""
    literal = _literal(text)
    if literal is None and type(None) in typing.get_args(annotation):
        return None
    listed = words_of(text, path) if annotation == tuple[str, ...] and isinstance(literal, str) else text
    for candidate in (text, literal, listed):
        try:
            return _convert(annotation, candidate, path)
        except _Mismatch:
            continue
    raise ValueError(f"{path} is {_shown(text)}; it must be {describe(annotation)}.")


def words_of(text: str, path: str) -> list[str]:
    """Returns texts that commas part; one with a comma in it stands in double quotes. path: of the option, in errors.

    Example:
        words_of('cat,"dog, small"', "--classes")  # ["cat", "dog, small"]
    """
    try:
        return next(csv.reader([text], skipinitialspace=True), [])
    except csv.Error as error:
        raise ValueError(f"{path} is {_shown(text)}; give texts with commas between them ({error}).") from error


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _no_value(path: str, value: Any, types: dict[str, type], text: str) -> str:
    """Why a group cannot be set to a text."""
    inside = [name for name in types if text and text.lower() in name.lower()]
    close = (inside or difflib.get_close_matches(text, types, n=1, cutoff=0.6))[:1]
    what = f"a group, and {text!r} is no type of it" if types else "a group"
    what += f" (did you mean {close[0]}?)" if close else ""
    fields = ", ".join(f"--{path}.{field}" for field in _field_names(value))
    ways = [f"name its type, {', '.join(types)}"] * bool(types) + [f"set one of {fields}"] * bool(fields)
    return f"--{path} is {what}; {', or '.join(ways)}."


def _no_field_of_type(path: str, field: str, value: Any, types: dict[str, type], known: list[str]) -> str:
    """Why a group of several possible types has no field of a name: another type may have it."""
    owners = [name for name, cls in types.items() if field in _field_names(cls)]
    if not owners:
        return _unknown(path, known)
    group = path.rpartition(".")[0]
    return (
        f"{path} is not a field of {type_name(value)}, which {group} is; {' and '.join(owners)} "
        f"{'has' if len(owners) == 1 else 'have'} it, so give --{group} {owners[0]} too."
    )


def _unknown(path: str, known: list[str]) -> str:
    groups = {name[:end] for name in known for end, letter in enumerate(name) if letter == "."}
    close = difflib.get_close_matches(path, [*known, *sorted(groups)], n=1, cutoff=0.75)
    same_end = [name for name in known if name.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]]
    best = (same_end or close)[:1]
    return f"{path} is not a field of this config" + (f"; did you mean {best[0]}?" if best else ".")


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
