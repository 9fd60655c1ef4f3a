"""Reads and writes a run's files. Writes are atomic."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from flowgen.data.media import atomic_file
from flowgen.documents import parse_json

DIGEST = "sha256"
_TEMPORARY = re.compile(r"\.(.+)\.[0-9]+-[0-9a-f]{8}\.tmp")  # names of unfinished files of `atomic_file`


def read_json(path: str | Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: the file is not regular, is not JSON, is too deeply nested, or does not contain an object; the
        message names the file.

    Example:
        config = read_json("runs/digits/config.json")
    """
    content = read_bytes(path)
    try:
        value = parse_json(content)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not valid JSON ({reason[:200]}); restore it from a copy.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not contain a JSON object; restore it from a copy.")
    return value


def read_bytes(path: str | Path) -> bytes:
    """Returns the bytes of a regular file. Raises ValueError for other files, such as pipes, which could block.

    Example:
        content = read_bytes("runs/digits/metrics.jsonl")
    """
    with _open_regular(path) as file:
        return file.read()


def digest_of_file(path: str | Path) -> str:
    """Returns the SHA-256 digest of a regular file. Raises ValueError for anything else.

    Example:
        same = digest_of_file("a") == digest_of_file("b")
    """
    with _open_regular(path) as file:
        return hashlib.file_digest(file, DIGEST).hexdigest()


def is_regular(path: str | Path) -> bool:
    """Returns whether there is a regular file at `path`, or a link to one.

    Example:
        is_regular("runs/digits/config.json")
    """
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def signed(value: dict[str, Any]) -> dict[str, Any]:
    """Returns the values together with their digest, which `verified` checks.

    Example:
        write_json(path, signed({"step": 3}))
    """
    return {**value, DIGEST: _digest_of_json(value)}


def verified(value: dict[str, Any]) -> dict[str, Any]:
    """Returns the values without their digest. Raises ValueError if the digest is missing or does not match.

    Example:
        verified(signed({"step": 3})) == {"step": 3}
    """
    rest = {name: item for name, item in value.items() if name != DIGEST}
    try:
        same = value.get(DIGEST) == _digest_of_json(rest)
    except RecursionError:
        same = False
    if not same:
        raise ValueError("has changed since it was saved")
    return rest


def write_json(path: str | Path, value: dict[str, Any]) -> None:
    """Writes an object to a JSON file atomically.

    Example:
        write_json("runs/digits/config.json", signed(config))
    """
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file atomically. An existing file or link at `path` is replaced, not written to.

    Example:
        write_bytes("runs/digits/metrics.jsonl", b"")
    """
    with atomic_file(path) as file:
        file.write(content)


def is_temporary(name: str, of: str | None = None) -> bool:
    """Returns whether a name is one that `atomic_file` gives to unfinished files.

    of: the name that the finished file would have; None for any name.

    Example:
        is_temporary(".config.json.123-0a1b2c3d.tmp")
    """
    found = _TEMPORARY.fullmatch(name)
    return found is not None and of in (None, found[1])


def remove_temporaries(directory: str | Path) -> None:
    """Removes the unfinished files that killed processes have left in a directory.

    Example:
        remove_temporaries("runs/digits")
    """
    if Path(directory).is_dir():
        for entry in Path(directory).iterdir():
            if is_temporary(entry.name) and (entry.is_symlink() or entry.is_file()):
                entry.unlink(missing_ok=True)


def sync(path: str | Path) -> None:
    """Waits until the system reports that a file or directory is on disk.

    Example:
        sync("runs/digits/config.json")
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_regular(path: str | Path) -> Any:
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file; remove it.")
    return os.fdopen(descriptor, "rb")


def _digest_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()
