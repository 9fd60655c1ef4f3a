"""Sets fields of a config from command-line arguments of the form `--group.field value`."""

from __future__ import annotations

import ast
import csv
import difflib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, TypeVar

from flowgen.settings.annotations import (
    OWN_NAME,
    choices,
    configs_of,
    entry_of,
    hints_of,
    is_own,
    mismatch,
    takes_own,
    type_name,
    unannotated,
    written,
)
from flowgen.settings.help import leaf_names
from flowgen.settings.named import import_object, is_name
from flowgen.settings.plain import TYPE, FieldError, check, fits, from_plain
from flowgen.settings.ranges import meant, shown

T = TypeVar("T")
WORDS = {"true": True, "false": False, "none": None, "null": None}


def override(config: T, arguments: Sequence[str]) -> T:
    """Returns a copy of `config` with the fields set by `--group.field value` or `--group.field=value` arguments.

    A value is a number, true, false, none, a tuple such as (8, 12) or [8, 12], or plain text. If a field needs a tuple,
    a single number becomes a tuple of one number. If a group can have several types, give the name of one as its value,
    such as --model TARFlow; the group then has the defaults of this type, apart from the fields that other arguments
    set. If a group is None and has only one type, setting one of its fields creates the group, with defaults for its
    other fields. To set a field to a user-defined object, write "package.module:object"; this imports the module. The
    fields of a user-defined frozen dataclass, and the entries of a dict, are set in the same way as the fields of a
    group.

    Raises:
        ValueError: a field is unknown, or a value is missing or invalid. If a field with a similar name is known, the
            message suggests it.

    Example:
        experiment = override(experiment, ["--optim.lr", "3e-4", "--model.image_size=(32, 48)"])
    """
    given, fields = _pairs(arguments), _opened(None, config)
    # If the type of a group is given, the group may have different fields afterwards.
    known = [name for name in leaf_names(config) if not any(name.startswith(f"{path}.") for path in given)]
    for path in sorted(given, key=lambda path: path.count(".")):  # sets the type of a group before its fields
        if path.split(".")[0] not in fields:
            raise ValueError(_unknown(path, known))
        _set(fields, type(config), path.split("."), given[path], path, known)
    return from_plain(type(config), fields)


def same_end(path: str, known: Sequence[str], prefix: str = "") -> str:
    """Returns up to three known names with the same last part as `path`, joined by "or"; "" if there are none.

    Example:
        same_end("seed", ["train.seed", "train.steps"], "--")  # "--train.seed"
    """
    last = path.rpartition(".")[2]
    *others, found = [f"{prefix}{name}" for name in known if name.rpartition(".")[2] == last][:3] or [""]
    return f"{', '.join(others)} or {found}" if others else found


def words_of(text: str, path: str) -> list[str]:
    """Splits `text` at commas, as the value of a command-line option; texts with commas must be double-quoted.

    path: the name of the option, for error messages.

    Example:
        words_of('cat,"dog, small"', "--classes")  # ["cat", "dog, small"]
    """
    try:
        return next(csv.reader([text], skipinitialspace=True), [])
    except csv.Error as error:
        raise ValueError(f"{path} is {shown(text)}; separate the texts with commas ({error}).") from error


def _pairs(arguments: Sequence[str]) -> dict[str, str]:
    words, given = list(arguments), {}
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise ValueError(f"'{word}' is not an override; write overrides like --optim.lr 3e-4.")
        path, equals, text = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ValueError(f"--{path} has no value; write --{path} VALUE.")
            text = words.pop(0)
        given[path] = text
    return given


def _set(fields: dict[str, Any], cls: type, names: list[str], text: str, path: str, known: list[str]) -> None:
    """Sets the field at the path `names` in `fields`, which `_opened` has returned for a config of type `cls`."""
    name, *rest = names
    annotation, value = hints_of(cls)[name], fields.get(name, getattr(cls, name, None))
    kinds, group = choices(annotation), _group_type(annotation, value)
    if not rest and is_name(text) and takes_own(annotation):
        try:
            found = import_object(text)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from error
        fields[name] = {TYPE: found} if isinstance(found, type) else found
    elif not rest:
        fields[name] = {TYPE: text} if text in kinds else _parse(annotation, text, path, group)
    elif len(rest) == 1 and (entry := entry_of(annotation)) is not None:
        literal = _literal(text)  # If an entry may be text or a number, text that looks like a number means the number.
        fields[name] = {**(value or {}), rest[0]: literal if fits(entry, literal) else _parse(entry, text, path, None)}
    elif group is not None and rest[0] in hints_of(group):
        fields[name] = dict(value) if isinstance(value, Mapping) else _opened(annotation, value)
        _set(fields[name], group, rest, text, path, known)
    else:
        raise ValueError(_no_such_field(path, rest[0], group, kinds, known))


def _opened(annotation: Any, value: Any) -> dict[str, Any]:
    """Returns the fields of a config as input for `from_plain`; for None, {}, so that all fields get defaults."""
    if value is None:
        return {}
    own: dict[str, Any] = {TYPE: type(value)} if is_own(annotation, value) else {}
    kind = own or ({TYPE: type_name(value)} if choices(annotation) else {})
    return kind | {name: getattr(value, name) for name in hints_of(type(value))}


def _group_type(annotation: Any, value: Any) -> type | None:
    """Returns the type of the config in a field; for None, the only type that the field allows, or None if several."""
    kinds = configs_of(annotation)
    if isinstance(value, Mapping) and TYPE in value:
        return value[TYPE] if isinstance(value[TYPE], type) else kinds[value[TYPE]]
    if value is None or isinstance(value, Mapping):
        return next(iter(kinds.values())) if len(kinds) == 1 else None
    return type(value) if is_dataclass(value) else None


def _parse(annotation: Any, text: str, path: str, group: type | None) -> Any:
    """Returns the value of a command-line text, the first that fits of these: None, the text, a literal, a list of
    texts, a tuple of one number.
    """
    literal = _literal(text)
    if literal is None and fits(annotation, None):
        return None
    listed = words_of(text, path) if unannotated(annotation) == tuple[str, ...] and isinstance(literal, str) else text
    groups = configs_of(annotation)
    single = (literal,) if type(literal) in (int, float) else text
    for candidate in (text, literal, listed, single):
        if fits(annotation, candidate) and not (groups and isinstance(candidate, Mapping)):
            return candidate
    if groups:
        own = [OWN_NAME] * takes_own(annotation)
        raise ValueError(_no_value(path, group, [*choices(annotation), *own], text))
    raise ValueError(f"{path} {_misfit(annotation, text, literal, path)}")


def _misfit(annotation: Any, text: str, literal: Any, path: str) -> str:
    """Returns the part of an error message that follows a field's name if text is not a valid value of the field."""
    if entry_of(annotation) is not None:
        name, _, value = text.partition("=")
        entry = f"{name} {shlex.quote(value)}" if name.isidentifier() and value else "NAME VALUE"
        return f"is {shown(text)}; set its entries one by one, as in --{path}.{entry}."
    problem = mismatch(annotation, text)
    example = written(annotation, literal)
    if example and not _allowed(annotation, example):
        example = written(annotation, None)
    return f"{problem.removesuffix('.')}, as in --{path} {example}." if example else problem


def _allowed(annotation: Any, text: str) -> bool:
    """Returns whether a text of one or more numbers is a valid tuple, also within the bounds of the field."""
    literal = _literal(text)
    try:
        check(annotation, literal if isinstance(literal, tuple) else (literal,), path="value")
    except FieldError:
        return False
    return True


def _literal(text: str) -> Any:
    word = text.strip()
    if word.lower() in WORDS:
        return WORDS[word.lower()]
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _no_value(path: str, group: type | None, types: list[str], text: str) -> str:
    """Returns the error message for text that is not a valid value of a group."""
    inside = [name for name in types if text and text.lower() in name.lower()]
    close = (inside or difflib.get_close_matches(text, types, n=1, cutoff=0.6))[:1]
    what = f"a group, and {text!r} is not one of its types" if types else "a group"
    what += f" (did you mean {close[0]}?)" if close else ""
    fields = ", ".join(f"--{path}.{field}" for field in hints_of(group)) if group else ""
    ways = [f"give {', '.join(types)}"] * bool(types) + [f"set one of {fields}"] * bool(fields)
    return f"--{path} is {what}; {', or '.join(ways)}."


def _no_such_field(path: str, field: str, group: type | None, types: dict[str, type], known: list[str]) -> str:
    """Returns the error message for an unknown field of a group. The message lists types of the group that have it."""
    owners = [name for name, cls in types.items() if field in hints_of(cls)]
    place = path.rpartition(".")[0]
    if not owners or (group is not None and group not in types.values()):
        fields = [f"{place}.{name}" for name in (hints_of(group) if group else ())]
        return _unknown(path, list(dict.fromkeys(known + fields)))
    return (
        f"{path} is not a field of {type_name(group)}, the type of {place}; {' and '.join(owners)} "
        f"{'has' if len(owners) == 1 else 'have'} it, so add --{place} {owners[0]}."
    )


def _unknown(path: str, known: list[str]) -> str:
    groups = {name[:end] for name in known for end, letter in enumerate(name) if letter == "."}
    alike = same_end(path, known)
    end = f"; did you mean {alike}?" if alike else meant(path, [*known, *sorted(groups)])
    place = path.rpartition(".")[0]
    if end == "." and place in groups:
        inside = f"{place}."
        end = f"; {place} has {', '.join(name.removeprefix(inside) for name in known if name.startswith(inside))}."
    return f"{path} is not a field of this config{end}"
