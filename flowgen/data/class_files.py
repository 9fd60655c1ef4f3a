"""Classes in files next to the samples, as in the WebDataset layout: `1.cls` has the class of `1.jpg`."""

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
    """Returns the listing of entries. If files next to the samples contain their classes, folders are not classes.

    Each of these files contains a number or a name. If all of them contain numbers, the numbers are the labels; -1
    means no label. Otherwise, the contents are names of classes, which are ordered by name.

    Raises the same errors as `Entries.listing`, and ValueError if only some samples have such a file, or if a file
    contains no class.

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
    """Raises ValueError if names of classes are mixed with numbers, or with what may be a damaged number."""
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
    """Returns the names of classes that are numbered from 0."""
    largest = max(map(int, texts), default=NO_LABEL)
    if largest >= max(MOST_SPARSE, len(texts)):
        raise ValueError(
            f"a {CLASS} file in data.path '{folder}' contains {largest}, which is too large for {len(texts)} samples; "
            "number the classes from 0 without gaps."
        )
    return tuple(map(str, range(largest + 1)))


def _by_class(listing: Listing) -> Listing:
    """Returns the listing with its samples ordered by class, and within a class as before."""
    order: list[int] = np.argsort(listing.labels, kind="stable").tolist()
    names, captions, files = (
        tuple(column[i] for i in order) for column in (listing.names, listing.captions, listing.class_files)
    )
    return dataclasses.replace(listing, names=names, captions=captions, class_files=files, labels=listing.labels[order])
