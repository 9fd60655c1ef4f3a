"""Maps the labels of a dataset to the class numbers of a run by matching class names."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32

from flowgen.data.inventory import name_list, quoted, tell
from flowgen.printable import composed
from flowgen.settings import words_of

T = TypeVar("T")


@runtime_checkable
class HasClasses(Protocol):
    """Data whose labels are indices into `class_names`."""

    @property
    def class_names(self) -> tuple[str, ...]: ...


def checked_names(classes: object, field: str = "classes") -> tuple[str, ...]:
    """Returns the class names in composed Unicode form (see `composed`).

    Raises ValueError, with `field` in the message, unless `classes` is a tuple of distinct names.

    Example:
        checked_names(("cat", "dog"))  # ("cat", "dog")
    """
    if not isinstance(classes, tuple) or not all(isinstance(name, str) and name for name in classes):
        raise ValueError(f"{field} is {classes!r}; it must be a tuple of names, such as ('cat', 'dog').")
    names = tuple(map(composed, classes))
    if len({*names}) < len(names):
        twice = next(name for position, name in enumerate(names) if name in names[:position])
        raise ValueError(f"{field} contains {quoted(twice)} twice; list each name once.")
    return names


def tell_held_out(
    labels: Int[np.ndarray, " n"], kept: Int[np.ndarray, " m"], names: tuple[str, ...], what: str
) -> None:
    """Warns about classes whose samples are all held out.

    kept: positions of the samples in the training split. what: plural noun for the samples, used in the warning.

    Example:
        tell_held_out(np.array([0, 1, 1]), np.array([1, 2]), ("cat", "dog"), "images")  # warns about cat
    """
    if lost := sorted({*labels.tolist()} - {*labels[kept].tolist()} - {-1}):
        tell(
            f"All {what} of {name_list([names[label] for label in lost])} are held out, so none are left to train on; "
            "add more."
        )


def with_classes(found: T, classes: tuple[str, ...], where: str) -> T:
    """Returns the data with each label replaced by the index of its class name in `classes`.

    Warns about classes without examples.

    found: a dataclass with `labels` and `class_names`. It is returned unchanged if it has no class names or if
    `classes` is empty. where: the origin of the data, used in messages.

    Raises ValueError if the data have a class that is not in `classes`.

    Example:
        dataset = with_classes(dataset, ("cat", "dog", "fox"), "data.path 'photos'")
    """
    thing: Any = found
    numbers = class_numbers(thing.class_names, classes, where)
    if numbers is None:
        return found
    return dataclasses.replace(thing, labels=renumbered(thing.labels, numbers), class_names=classes)


def numbered_classes(count: int, classes: tuple[str, ...], where: str, told: str) -> tuple[str, ...]:
    """Returns `classes`, after checking that they cover the labels of data without class names.

    Warns unless the first `count` names are "0", "1" and so on.

    count: number of classes in the data. where: the origin of the labels, used in the error message. told: the start of
    the warning, such as "The labels are".

    Raises ValueError if there are fewer names than classes.

    Example:
        numbered_classes(1, ("cat", "dog"), "'labels' in data.path 'a.npz'", "The labels are")  # ("cat", "dog")
    """
    if count > len(classes):
        raise ValueError(
            f"{where} contains {count - 1}, but data.classes lists only {len(classes)} names ({name_list(classes)}), "
            "numbered from 0; correct the labels."
        )
    if classes[:count] != tuple(map(str, range(count))):
        tell(f"{told} read as positions in data.classes (0 is {classes[0]}).")
    return classes


def renumbered(labels: Int[np.ndarray, " n"], numbers: Int[np.ndarray, " found"]) -> Int32[np.ndarray, " n"]:
    """Returns numbers[labels], except that a label of -1 stays -1.

    Example:
        renumbered(np.array([0, -1, 1]), np.array([1, 2]))  # 1, -1, 2
    """
    return np.where(labels < 0, labels, numbers[labels]).astype(np.int32)


def class_numbers(found: tuple[str, ...], classes: tuple[str, ...], where: str) -> Int32[np.ndarray, " found"] | None:
    """Returns the index in `classes` of each name in `found`, or None if labels need no mapping.

    Warns and raises errors in the same cases as `with_classes`.

    Example:
        class_numbers(("dog", "fox"), ("cat", "dog", "fox"), "data.path 'photos'")  # 1, 2
    """
    if not classes or not found or found == classes:
        return None
    known = {name: number for number, name in enumerate(classes)}
    if unknown := [name for name in found if name not in known]:
        close = difflib.get_close_matches(unknown[0], classes, n=1)
        meant = f" (is {quoted(unknown[0])} meant to be {quoted(close[0])}?)" if close else ""
        raise ValueError(
            f"{where} has the class{'es' * (len(unknown) > 1)} {name_list(unknown)}, but data.classes lists only "
            f"{name_list(classes)}{meant}; rename or remove the unknown classes."
        )
    if missing := [name for name in classes if name not in {*found}]:
        tell(f"{where} has no examples of {name_list(missing)}, although data.classes lists them.")
    return np.array([known[name] for name in found], np.int32)


def check_classes(dataset: HasClasses, num_classes: int) -> None:
    """Checks that a model can be trained on the labels of a dataset.

    num_classes: number of classes of the model; 0 if labels are not used, in which case any dataset is accepted.

    Raises ValueError if the dataset has no classes, or more than `num_classes`. Warns if it has fewer.

    Example:
        check_classes(dataset, num_classes=10)
    """
    count = len(dataset.class_names)
    if num_classes and not count:
        raise ValueError(
            f"model.num_classes is {num_classes}, but the data have no labels; sort the images into one folder per "
            "class, set model.num_classes to 0 to train without classes, or evaluate with --unconditional."
        )
    if 0 < num_classes < count:
        raise ValueError(
            f"model.num_classes is {num_classes}, but the data have {count} classes; "
            f"set model.num_classes to {count}, or to 0 to train without classes."
        )
    if num_classes > count:
        unused = f"class number {count} is"
        if num_classes > count + 1:
            unused = f"class numbers {count} to {num_classes - 1} are"
        tell(
            f"model.num_classes is {num_classes}, but the data have {count} classes "
            f"({name_list(dataset.class_names)}): {unused} unused; set model.num_classes to {count}."
        )


def parse_classes(text: str, names: tuple[str, ...], num_classes: int) -> list[int]:
    """Returns the class numbers that the option `--classes` selects.

    text: names or numbers separated by commas; a name that contains a comma must be double-quoted. An entry is read as
    a number only if no class has that name. If any class name is itself a number, such as "10", entries cannot be class
    numbers, except -1 (unconditional).

    Raises ValueError if an entry is not a class of the model. The message lists the class names.

    Example:
        parse_classes("dog,0", ("cat", "dog"), 2)  # [1, 0]
    """
    known = {name: number for number, name in enumerate(names)}
    words = [composed(word.strip()) for word in words_of(text, "--classes")]
    if not words:
        raise ValueError("--classes is empty; give classes by name or number, such as 0,1,2.")
    return [known[word] if word in known else _class_number(word, names, num_classes) for word in words]


def _class_number(word: str, names: tuple[str, ...], num_classes: int) -> int:
    numbered = any(name.isdecimal() for name in names)
    spelled = [f'"{name}"' if "," in name else name for name in names]  # as `--classes` needs them
    try:
        number, close = int(word), []
    except ValueError:
        number, close = num_classes, difflib.get_close_matches(word, spelled, n=1)
    if numbered and number != -1:
        raise ValueError(
            f"--classes has {word!r}, which is not a class of this model; its class names are themselves numbers, so "
            f"give one of {name_list(spelled, 20)}, or -1 for unconditional."
        )
    if not -1 <= number < num_classes:
        meant = f" (did you mean {close[0]}?)" if close else ""
        which = f"names ({name_list(spelled, 20)}) or " if names else ""
        raise ValueError(
            f"--classes has {word!r}, which is not a class of this model{meant}; give {which}numbers from 0 to "
            f"{num_classes - 1}, or -1 for unconditional."
        )
    return number
