"""Validates configs, and converts them to and from plain values for JSON.

The annotation of a field may be bool, int, float, str, None, Literal, Callable, tuple, dict with str keys, a config, a
union of these, or `Annotated` with bounds such as those in `flowgen.settings.ranges`. If a field accepts several
configs, the plain value has an entry "type": the class name without "Config". A user-defined object is stored as its
name, "package.module:object". If it has no name but is an instance of a frozen dataclass, its fields are stored, with
the name of the class as "type".
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import numbers
import typing
from collections.abc import Callable, Generator, Mapping
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, TypeVar

from flowgen.settings.annotations import (
    OWN_NAME,
    choices,
    describe,
    entry_of,
    hints_of,
    is_function,
    is_own,
    item_of,
    members,
    mismatch,
    own_of,
    takes_own,
    type_name,
    unannotated,
)
from flowgen.settings.named import is_name, name_of, resolve
from flowgen.settings.ranges import Bound, meant, shown

T = TypeVar("T")
TYPE = "type"
MAX_WHOLE_FLOAT = 10**300


class FieldError(ValueError):
    """The errors in a config. Each argument is a sentence that begins with the name of a field.

    If the config is a group in another config, `within` and `in_group` prepend the group's name to these names.

    Example:
        raise FieldError("min_lr is 0.1, above lr 0.01; lower it.")
    """

    def __str__(self) -> str:
        return ", and ".join([*(problem.removesuffix(".") for problem in self.args[:-1]), *self.args[-1:]])

    def within(self, group: str) -> FieldError:
        """Returns this error with `group` and a dot prepended to each sentence, and so to the name of its field."""
        return FieldError(*(f"{group}.{problem}" for problem in self.args))


@contextlib.contextmanager
def in_group(group: str) -> Generator[None]:
    """Returns a context manager that prepends `group` to the field names in any `FieldError` raised inside it.

    Example:
        with in_group("sampling"):
            sampling = dataclasses.replace(sampling, num=0)  # "sampling.num is 0; it must be at least 1."
    """
    try:
        yield
    except FieldError as error:
        raise error.within(group) from error


@typing.overload
def config(cls: type[T]) -> type[T]: ...


@typing.overload
def config(*, kw_only: bool) -> Callable[[type[T]], type[T]]: ...


@typing.dataclass_transform(frozen_default=True)
def config(cls: type[T] | None = None, *, kw_only: bool = False) -> type[T] | Callable[[type[T]], type[T]]:
    """Returns the class as a frozen dataclass whose constructor checks the fields and converts them to their types.

    The constructor raises a `FieldError` that names all fields whose values have a wrong type or are out of range.
    After these checks, it calls the class's `__post_init__`, which may raise ValueError if fields contradict each
    other; the message must be a sentence that begins with the name of one of these fields.

    Example:
        @config
        class TrainConfig:
            steps: Annotated[int, Within(1, 10**6)] = 1000
    """
    if cls is None:
        return functools.partial(_config, kw_only=kw_only)
    return _config(cls, kw_only=kw_only)


def _config(cls: type[T], *, kw_only: bool) -> type[T]:
    own: Any = getattr(cls, "__post_init__", None)

    def __post_init__(self: Any) -> None:
        for name, value in _fitting(type(self), vars(self)).items():
            object.__setattr__(self, name, value)
        try:
            if own is not None:
                own(self)
        except FieldError:
            raise
        except ValueError as error:
            raise FieldError(str(error)) from error

    cls.__post_init__ = __post_init__  # ty: ignore[missing-attribute]
    return dataclasses.dataclass(frozen=True, kw_only=kw_only)(cls)


def to_plain(value: Any, annotation: Any = None) -> Any:
    """Returns `value` in a form that JSON can store: configs and mappings as dicts, and tuples as lists.

    annotation: the annotation of the field whose value this is; None for a whole config. If the annotation allows
    several configs, the dict of the config has an entry "type", with the name of its class without "Config".

    Raises FieldError if JSON cannot store the value of a field, or if the value is a user-defined object that cannot be
    named: neither the object nor its dataclass is defined at the top level of an imported module.

    Example:
        text = json.dumps(to_plain(config), allow_nan=False)
    """
    if is_own(annotation, value):
        return _own_to_plain(value)
    if is_dataclass(value):
        kind = {TYPE: type_name(value)} if choices(annotation) else {}
        return kind | _fields_to_plain(value)
    if isinstance(value, Mapping):
        return {name: to_plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item, item_of(annotation)) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise _Refusal(f"is {shown(value)}, which JSON cannot store; give a number, a text, or a tuple of these.")


def _fields_to_plain(value: Any) -> dict[str, Any]:
    plain = {}
    for name, annotation in hints_of(type(value)).items():
        try:
            plain[name] = to_plain(getattr(value, name), annotation)
        except _Refusal as refusal:
            raise FieldError(f"{name} {refusal}") from None
        except FieldError as error:
            raise error.within(name) from error
    return plain


def _own_to_plain(value: Any) -> Any:
    """Returns the name of a user-defined object; if it has none, its fields with the name of its class."""
    if (name := name_of(value)) is not None:
        return name
    if is_dataclass(value) and (name := name_of(type(value))) is not None:
        return {TYPE: name} | _fields_to_plain(value)
    raise _Refusal(
        f"is {shown(value)}, which config.json cannot refer to by name; define it, or its dataclass(frozen=True), "
        "at the top level of a module file, such as my_parts.py, and import it."
    )


def from_plain(cls: type[T], data: Any) -> T:
    """Returns a config of type `cls` with the fields in `data`, a dict as `to_plain` returns it.

    A field that is missing in `data` gets its default.

    Raises:
        FieldError: a field is unknown, has an invalid value, or is missing although it has no default; the message
            names the field.

    Example:
        config = from_plain(TrainConfig, {"steps": 100, "batch_size": 8})
    """
    if not isinstance(data, Mapping):
        raise FieldError(f"{cls.__name__} is {shown(data)}; it must be {describe(cls)}.")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # ty: ignore[invalid-argument-type]
    values = dict(data)
    for name in data:
        if name not in fields:
            raise FieldError(f"{name} is not a field of this config{meant(name, fields)}")
    for name, field in fields.items():
        if name not in data and field.default is field.default_factory is dataclasses.MISSING:
            raise FieldError(f"{name} is missing; give it a value.")
        if isinstance(data.get(name), Mapping) and choices(hints_of(cls)[name]):
            values[name] = {TYPE: type_name(field.default) if is_dataclass(field.default) else None, **data[name]}
    try:
        return cls(**_fitting(cls, values))
    except FieldError:
        raise
    except ValueError as error:  # from the user's dataclass
        raise FieldError(str(error)) from error


def _fitting(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the values of fields to their types. Raises a FieldError that names all fields that do not fit."""
    fitting, problems = {}, []
    for name, annotation in hints_of(cls).items():
        if name in values:
            try:
                fitting[name] = check(annotation, values[name], path=name)
            except FieldError as error:
                problems += error.args
    if problems:
        raise FieldError(*problems)
    return fitting


def check(annotation: Any, value: Any, *, path: str) -> Any:
    """Returns `value`, converted to the type that `annotation` describes.

    An int may become a float, a whole float may become an int, and a list may become a tuple. A bool is never converted
    to a number, nor a number to a bool.

    Raises:
        FieldError: the value has another type or is out of range, or is a float that is not finite; the message begins
            with `path` and states the value and what is expected.

    Example:
        size = check(int | tuple[int, int], [32, 48], path="image_size")  # (32, 48)
    """
    try:
        return _convert(annotation, value)
    except _Mismatch:
        raise FieldError(f"{path} {mismatch(annotation, value)}") from None
    except _Refusal as refusal:
        raise FieldError(f"{path} {refusal}") from None
    except FieldError as error:
        raise error.within(path) from error


def fits(annotation: Any, value: Any) -> bool:
    """Returns whether a value has an annotation's type, even if it is out of range."""
    try:
        _convert(annotation, value)
    except _Mismatch:
        return False
    except (_Refusal, FieldError):
        return True
    return True


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Returns the differences between two results of `to_plain` as lines such as "train.batch_size: 64 -> 32".

    Example:
        changed = differences(to_plain(old), to_plain(new))
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        absent = _Absent()
        pairs = [(name, old.get(name, absent), new.get(name, absent)) for name in {**old, **new}]
        return [line for name, a, b in pairs for line in differences(a, b, f"{path}.{name}" if path else name)]
    return [] if type(old) is type(new) and old == new else [f"{path}: {old!r} -> {new!r}"]


class _Absent:
    """Placeholder for a field that only one of two configs has."""

    def __repr__(self) -> str:
        return "(absent)"


class _Mismatch(Exception):
    """The value does not have the annotation's type; the caller writes the error message."""


class _Refusal(Exception):
    """The value has the right type but is not allowed; the message follows the field's name."""


def _convert(annotation: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if takes_own(annotation) and (found := _found(value)) is not value:
        with contextlib.suppress(_Mismatch):
            return _convert(annotation, found)
        raise _Refusal(mismatch(annotation, found))
    if own_of(annotation) is not None:
        return _convert_own(arguments[0], value)
    if origin is Annotated:
        return _bounded(value, *arguments)
    if isinstance(value, Mapping) and (kinds := choices(annotation)):
        return _chosen(kinds, value, own=takes_own(annotation))
    if len(members(annotation)) > 1:
        return _convert_union(arguments, value)
    if origin is Literal:
        return _require(any(type(value) is type(choice) and value == choice for choice in arguments), value)
    if origin is tuple:
        _require(isinstance(value, list | tuple), value)
        items = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        _require(len(items) == len(value), value)
        return tuple(_convert_entry(item, part) for item, part in zip(items, value, strict=True))
    if (entry := entry_of(annotation)) is not None:
        _require(isinstance(value, Mapping) and all(isinstance(name, str) for name in value), value)
        return {name: _convert(entry, item) for name, item in value.items()}
    if is_function(annotation):
        return _require(callable(value) and not isinstance(value, type), value)
    if is_dataclass(annotation):
        if isinstance(value, Mapping):
            return from_plain(annotation, value)
        return _require(isinstance(value, annotation), value)
    if annotation in (int, float):
        return _convert_number(annotation, value)
    return _require(value is None if annotation is type(None) else type(value) is annotation, value)


def _bounded(value: Any, annotation: Any, *bounds: Any) -> Any:
    # Entries are counted before any of them is checked.
    counted = typing.get_origin(annotation) is tuple and isinstance(value, list | tuple)
    converted = value if counted else _convert(annotation, value)
    given = value if type(value) is int else converted  # the form that a message shows
    for bound in bounds:
        if isinstance(bound, Bound) and (problem := bound.problem(given)):
            raise _Refusal(problem)
    return _convert(annotation, value) if counted else converted


def _convert_entry(annotation: Any, value: Any) -> Any:
    try:
        return _convert(annotation, value)
    except _Refusal as refusal:
        clause = str(refusal)
        clause = clause.removeprefix("is ") if clause.startswith("is ") else f"{shown(value)}, which {clause}"
        raise _Refusal(f"has the entry {clause}") from None


def _convert_number(annotation: type, value: Any) -> int | float:
    if getattr(value, "shape", None) == ():
        value = value.item()  # a scalar of an array library
    _require(isinstance(value, numbers.Real) and not isinstance(value, bool), value)
    if isinstance(value, int):  # integers may have any size
        return value if annotation is int else float(_require(abs(value) < MAX_WHOLE_FLOAT, value))
    if annotation is float and not math.isfinite(value):
        raise _Refusal(f"is {shown(value)}, which is not finite; give a finite number.")
    _require(math.isfinite(value) and (annotation is float or value == int(value)), value)
    return annotation(value)


def _chosen(kinds: dict[str, type], data: Mapping[str, Any], *, own: bool) -> Any:
    name = data.get(TYPE)
    if not isinstance(name, str) or name not in kinds:
        known = ", ".join([*kinds, *[OWN_NAME] * own])
        raise FieldError(f"{TYPE} is {shown(name)}; choose one of {known}{meant(str(name), kinds)}")
    return from_plain(kinds[name], {field: value for field, value in data.items() if field != TYPE})


def _found(value: Any) -> Any:
    """Returns the object named `value`, or an object of the class that a mapping has as "type"; else `value`."""
    named = value.get(TYPE) if isinstance(value, Mapping) else value
    opened = isinstance(value, Mapping) and isinstance(named, type)
    if not is_name(named) and not opened:
        return value
    try:
        found = named if opened else resolve(named)
    except ValueError as error:
        raise _Refusal(str(error)) from error
    if not isinstance(found, type):
        if isinstance(value, Mapping):
            raise _Refusal(
                f"has the type {shown(named)}, which is not a class; give only the object's name, without fields."
            )
        return _require(not is_name(found) and not isinstance(found, Mapping), found)
    if not (is_dataclass(found) and found.__dataclass_params__.frozen):
        raise _Refusal(f"is the class {found.__module__}:{found.__qualname__}; it must be a dataclass(frozen=True).")
    fields = value if isinstance(value, Mapping) else {}
    return from_plain(found, {field: item for field, item in fields.items() if field != TYPE})


def _convert_own(kind: Any, value: Any) -> Any:
    _require(isinstance(value, kind) and not isinstance(value, type), value)
    try:
        hash(value)
    except TypeError:
        raise _Refusal(f"is {shown(value)}, which is mutable; make its class a dataclass(frozen=True).") from None
    return value


def _convert_union(kinds: tuple[Any, ...], value: Any) -> Any:
    # An exact type takes precedence over a conversion: 3 stays an int in `float | int`.
    for kind in sorted(kinds, key=lambda kind: unannotated(kind) is not type(value)):
        with contextlib.suppress(_Mismatch):
            return _convert(kind, value)
    raise _Mismatch


def _require(fits: bool, value: Any) -> Any:
    if not fits:
        raise _Mismatch
    return value
