"""Writes evaluations to new JSON files, and their images and arrays to files beside them. Never overwrites a file."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowgen.data.media import as_pillow, check_writable, naming
from flowgen.places import RemoteFolder, is_remote

EVALUATIONS = "evaluations"
NEIGHBOURS, ANOMALY = "neighbours.png", "anomaly.npz"  # the suffixes of files beside an evaluation


def evaluation_path(run_dir: str | os.PathLike[str], step: int) -> str:
    """Returns a path for a new evaluation of a step: <run_dir>/evaluations/<step>-<date>-<time>.json.

    Date and time are the current ones in UTC. If this file exists already on this machine, a number is added to the
    name.

    Example:
        path = evaluation_path("runs/digits", 1800)  # runs/digits/evaluations/1800-20260102-030405.json
    """
    stem = f"{os.fspath(run_dir).rstrip('/')}/{EVALUATIONS}/{step}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    number, path = 1, f"{stem}.json"
    while not is_remote(path) and Path(path).exists():
        number += 1
        path = f"{stem}-{number}.json"
    return path


def check_new_evaluation(path: str, suffixes: Iterable[str] = ()) -> None:
    """Raises ValueError if `path` does not end in .json, or OSError if an evaluation cannot be written there.

    Writing is impossible if, for example, one of the files of the evaluation exists already.

    suffixes: those of the other files that belong to the evaluation, such as "neighbours.png" (see `save_evaluation`).

    Example:
        check_new_evaluation("results/digits.json")
    """
    if not path.endswith(".json"):
        raise ValueError(f"--out is '{path}'; it must end in .json.")
    if is_remote(path):
        known = _remote(path)[0].sizes()
    else:
        check_writable(path)
        known = os.listdir(Path(path).parent) if Path(path).parent.is_dir() else ()
    for made in (path, *(f"{path.removesuffix('.json')}.{suffix}" for suffix in suffixes)):
        if made.rpartition("/")[2] in known:
            raise FileExistsError(
                f"'{made}' exists already, and evaluations are never overwritten; give another --out."
            )


def save_evaluation(path: str, record: Mapping[str, Any], files: Mapping[str, Any]) -> list[str]:
    """Writes an evaluation to a new JSON file, and returns the paths of all files written.

    path: the JSON file. record: the contents of the JSON file.
    files: maps suffixes to the contents of further files: a uint8 image `height width c`, which is written as PNG, or a
    dict of arrays, which is written as npz. If `path` is "a.json", the file for the suffix "neighbours.png" is
    "a.neighbours.png". The JSON file lists these files. It is written last, so that every file that it lists exists.

    Raises FileExistsError if one of the files already exists. Raises ValueError, and writes nothing, if a number in the
    record is not finite.

    Example:
        save_evaluation("digits.json", {"metrics": {}}, {"neighbours.png": grid})
    """
    stem = path.removesuffix(".json")
    paths = {f"{stem}.{suffix}": value for suffix, value in files.items()}
    names = [other.rpartition("/")[2] for other in paths]
    # All contents are made before any file, because a file without its JSON would prevent another attempt.
    last = (json.dumps({**record, "files": names}, indent=2, allow_nan=False) + "\n").encode()
    made = {other: _npz(value) if isinstance(value, Mapping) else _png(value) for other, value in paths.items()}
    for one, content in {**made, path: last}.items():
        _create(one, content)
    return [path, *paths]


def _png(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    as_pillow(image).save(content, format="PNG")
    return content.getvalue()


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    return content.getvalue()


def _remote(path: str) -> tuple[RemoteFolder, str]:
    folder, _, name = path.rpartition("/")
    return RemoteFolder(f"{folder}/"), name


def _create(path: str, content: bytes) -> None:
    """Writes a new file. Raises FileExistsError if the file already exists."""
    if is_remote(path):
        folder, name = _remote(path)
        if not folder.create(name, content):
            raise FileExistsError(f"'{path}' exists already; it was not overwritten.")
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        with naming(path), open(path, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as error:
        raise FileExistsError(f"'{path}' exists already; it was not overwritten.") from error
