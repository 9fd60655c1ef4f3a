"""Reads classes from files next to the samples, as in the WebDataset layout: `1.cls` contains the class of `1.jpg`."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from flowgen.data.dataset import NO_LABEL
from flowgen.data.entries import CLASS, Entries, Listing, check_each_described
from flowgen.data.npz import MOST_SPARSE
from flowgen.data.stored import StoredFolder, read_limited
from flowgen.printable import composed

_MOST_BYTES = 1 << 12
_NUMBER = re.compile("-1|[0-9]{1,9}")
_LIKE_A_NUMBER = re.compile(r"[-+]?[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?")


def listed_with_classes(folder: StoredFolder, entries: Entries, what: str) -> Listing:
    """Returns a listing of the entries. If samples have .cls files, these define the classes instead of the folders.

    A .cls file contains a number or a name. If all of them contain numbers, the numbers are the labels; -1 means no
    label. Otherwise, all of them must contain class names, and the classes are sorted by name.

    Raises ValueError in the same cases as `Entries.listing`, if only some samples have a .cls file, if such a file does
    not contain exactly one class, or if a number is malformed, too large or mixed with names.

    Example:
        listing = listed_with_classes(folder, entries, "images")
    """
    names = [name for inside in entries.taken.values() for name in inside]
    if not any(entries.described(names, CLASS)):
        return entries.listing(folder, what)
    entries.taken = {"": names}
    listing = entries.listing(folder, what)
    check_each_described(listing, listing.class_files, CLASS, "classes")
    texts = [_class_in(folder, file) for file in listing.class_files if file]
    numbered = all(map(_NUMBER.fullmatch, texts))
    if not numbered:
        _check_names(texts, listing)
    class_names = _numbers(texts, folder) if numbered else tuple(sorted({*texts}))
    number_of = {name: number for number, name in enumerate(class_names)}
    labels = np.array([int(text) if numbered else number_of[text] for text in texts], np.int32)
    return _by_class(dataclasses.replace(listing, labels=labels, class_names=class_names, numbered=numbered))


def _check_names(texts: list[str], listing: Listing) -> None:
    """Raises ValueError if only some of the texts look like numbers, or if a number is malformed."""
    like = [bool(_LIKE_A_NUMBER.fullmatch(text)) for text in texts]
    if not any(like):
        return
    if all(like):
        odd = next(position for position, text in enumerate(texts) if not _NUMBER.fullmatch(text))
    else:
        odd = like.index(2 * sum(like) <= len(like))  # the first of the rarer kind
    raise ValueError(
        f"'{listing.root}/{listing.class_files[odd]}' in data.path contains {texts[odd][:40]!r}, but classes must be "
        "either all numbers (from 0 without gaps, or -1 for none) or all names; correct it."
    )


def _class_in(folder: StoredFolder, name: str) -> str:
    where = f"'{folder / name}' in data.path"
    try:
        text = composed(read_limited(folder / name, most=_MOST_BYTES).decode("utf-8-sig").strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 ({error}); write a class number or a class name in it.") from error
    if not text or "\n" in text:
        raise ValueError(f"{where} is {text[:40]!r}; write one class number or one class name in it.")
    return text


def _numbers(texts: list[str], folder: StoredFolder) -> tuple[str, ...]:
    """Returns the class names "0", "1" and so on, up to the largest number."""
    largest = max(map(int, texts), default=NO_LABEL)
    if largest >= max(MOST_SPARSE, len(texts)):
        raise ValueError(
            f"a {CLASS} file in data.path '{folder}' contains {largest}, which is too large for {len(texts)} samples; "
            "number the classes from 0 without gaps."
        )
    return tuple(map(str, range(largest + 1)))


def _by_class(listing: Listing) -> Listing:
    """Returns the listing with its samples sorted by class. Within each class, they keep their order."""
    order: list[int] = np.argsort(listing.labels, kind="stable").tolist()
    names, captions, files = (
        tuple(column[i] for i in order) for column in (listing.names, listing.captions, listing.class_files)
    )
    return dataclasses.replace(listing, names=names, captions=captions, class_files=files, labels=listing.labels[order])
