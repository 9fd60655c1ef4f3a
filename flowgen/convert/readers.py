"""Reads weight files as dictionaries of numpy arrays: safetensors, and both layouts of `torch.save`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowgen.convert.torch_files import PICKLE_MAGIC, ZIP_MAGIC, open_torch
from flowgen.convert.torch_pickle import StoredTensor
from flowgen.documents import check_regular
from flowgen.safetensors import read_safetensors

# The tensors of a file may be this many times as large as the file. The limit is above 1 because tied weights share
# bytes.
_MAX_VIEWS = 4
_MAX_LOOKED_AT = 100_000  # dictionary visits, including repeated ones, in the search for a state dict
_MAX_NAMED = 8  # maximum number of names in an error message
_MAX_DEPTH = 4  # maximum nesting depth of the search for a state dict
_LFS_POINTER = b"version https://git-lfs"


def check_weight_file(path: str | os.PathLike[str]) -> None:
    """Raises FileNotFoundError, IsADirectoryError or ValueError unless `path` is a regular file, without opening it.

    Example:
        check_weight_file("afhq_model_8_768_8_8_0.07.pth")
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"'{path}' is a folder; give the weight file inside it.")
    if not path.exists():
        raise FileNotFoundError(f"There is no file '{path}'; check the path.")
    check_regular(path)


def read_state_dict(path: str | os.PathLike[str], *, entry: str | None = None) -> dict[str, np.ndarray]:
    """Returns the tensors of a weight file by name, as read-only views of the file. Their dtypes are not converted.

    The supported formats are safetensors and both layouts of torch.save: a zip archive or, in older files, a sequence
    of pickles. The format is detected from the content of the file, and no code in the file is executed. In a file of
    torch.save, the dictionary of tensors may be nested in other dictionaries, as in {"model": {...}, "epoch": 3}.

    entry: dotted name of the nested dictionary of tensors to read, such as "ema" or "state.model". Required if a file
    of torch.save contains several such dictionaries; not allowed for safetensors.

    Raises:
        FileNotFoundError, IsADirectoryError: `path` does not exist, or is a folder.
        ValueError: the file is truncated, damaged, unsafe or in another format; `entry` is not the name of a dictionary
        of tensors; `entry` is None, but there is not exactly one such dictionary; or the tensors are more than four
        times as large as the file.

    Example:
        state_dict = read_state_dict("afhq_model_8_768_8_8_0.07.pth")
        state_dict["blocks.0.pos_embed"].shape  # (1024, 768)
    """
    path = Path(path)
    check_weight_file(path)
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith((ZIP_MAGIC, PICKLE_MAGIC)):
        opened = open_torch(path)
        tensors = {name: opened.read(tensor) for name, tensor in _select(opened.saved, path, entry).items()}
        _check_size(path, tensors)
        return tensors
    if start[8:9] == b"{":
        if entry is not None:
            raise ValueError(f"'{path}' is a flat safetensors file, so it has no entry '{entry}'; leave out entry.")
        return read_safetensors(path)
    if start.startswith(_LFS_POINTER):
        raise ValueError(f"'{path}' is a Git LFS pointer, not the weights; fetch them with git lfs pull.")
    raise ValueError(
        f"'{path}' is neither a safetensors nor a torch.save file (it begins with {start[:16]!r}); "
        "give the weight file itself."
    )


def _select(saved: Any, path: Path, entry: str | None) -> dict[str, StoredTensor]:
    choices = _state_dicts(saved, path)
    if entry is not None and entry in choices:
        return choices[entry]
    if entry is None and len(choices) == 1:
        return next(iter(choices.values()))
    names = _listed(choices)
    if entry is not None:
        raise ValueError(f"'{path}' has no state dict '{entry}'; it has {names or 'none'}.")
    if choices:
        raise ValueError(f"'{path}' has {len(choices)} state dicts; choose one with entry: {names}.")
    found = type(saved).__name__.lstrip("_")
    if isinstance(saved, Mapping):
        found = "dictionary with " + (_listed(saved) or "nothing in it")
    raise ValueError(
        f"'{path}' contains a {found}, not a dictionary of tensors; save only the weights, "
        "with torch.save(model.state_dict(), file)."
    )


def _listed(names: Iterable[Any]) -> str:
    first = itertools.islice(names, _MAX_NAMED)
    return ", ".join(repr(name if not isinstance(name, str) else name[:80]) for name in first)


def _state_dicts(saved: Any, path: Path) -> dict[str, dict[str, StoredTensor]]:
    """Returns every nested dictionary that contains only tensors, by its dotted name.

    The search is bounded, because a malicious file can give one dictionary a huge number of names.
    """
    found: dict[str, dict[str, StoredTensor]] = {}
    inner: dict[int, list[tuple[str, Any]] | None] = {}  # the result of `_dictionaries` for each dictionary
    looked_at = 0

    def look(value: Any, trail: tuple[str, ...], ancestors: tuple[int, ...]) -> None:
        nonlocal looked_at
        looked_at += 1
        if looked_at > _MAX_LOOKED_AT:
            raise ValueError(f"'{path}' has more than {_MAX_LOOKED_AT:,} nested dictionaries; save only the weights.")
        if id(value) not in inner:
            inner[id(value)] = _dictionaries(value)
        dictionaries = inner[id(value)]
        if dictionaries is None:
            found[".".join(trail)] = value
        elif len(trail) < _MAX_DEPTH and id(value) not in ancestors:
            for name, part in dictionaries:
                look(part, (*trail, name), (*ancestors, id(value)))

    if isinstance(saved, dict):
        look(saved, (), ())
    return found


def _dictionaries(value: dict[Any, Any]) -> list[tuple[str, Any]] | None:
    """Returns the (name, value) pairs in which the value is a dictionary.

    Returns None if all values are tensors, and [] if the dictionary is empty or has a name that is not a string.
    """
    if not value or not all(isinstance(name, str) for name in value):
        return []
    if all(isinstance(part, StoredTensor) for part in value.values()):
        return None
    return [(name, part) for name, part in value.items() if isinstance(part, dict)]


def _check_size(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError if the tensors have more than four times as many bytes as the file.

    This is possible because tensors may share storages or have strides of 0.
    """
    described, size = sum(tensor.nbytes for tensor in tensors.values()), path.stat().st_size
    if described > _MAX_VIEWS * size:
        raise ValueError(
            f"'{path}' has {size:,} bytes, but its tensors take {described:,}, more than {_MAX_VIEWS} times as many; "
            "call .clone() on every tensor and save them again."
        )
