"""Reads untrusted documents safely: limits the size and depth of JSON and YAML, and keeps file names inside a folder.

The cost of reading a document is bounded by its size. Nesting deeper than `MAX_DEPTH` is refused, so later code can
recurse safely. YAML aliases are refused, because a few bytes could expand to gigabytes.
"""

from __future__ import annotations

import json
import lzma
import math
import os
import re
import stat
import struct
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
PathLike = str | os.PathLike[str]

# The largest tokenizer.json in use is 33 MB. Python may need forty bytes of memory per byte of JSON.
MAX_BYTES = 1 << 24
MAX_TOKENIZER_BYTES = 1 << 26
MAX_YAML_BYTES = 1 << 16
_MAX_YAML_TEXT = 1 << 12  # characters; parsing a number takes quadratic time
MAX_DEPTH = 64
# Enough digits for any 64-bit integer and for 10^30, which means "no limit" in published tokenizers.
_MAX_DIGITS = 40
# The errors, besides OSError, that NumPy and zipfile raise for a damaged .npy or .npz. Array headers are Python source.
ARRAY_DAMAGE = (
    *(ValueError, EOFError, TypeError, SyntaxError, LookupError, AttributeError, OverflowError, MemoryError),
    *(RuntimeError, tokenize.TokenError, struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)
# The quantifier is possessive, and an unterminated string matches up to the end, so every byte is read only once.
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+\\?(?:"|\Z)', re.DOTALL)
# The change in depth that each byte causes outside strings.
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"{[")], _STEPS[list(b"}]")] = 1, -1


def read_json(path: PathLike, *, most: int = MAX_BYTES, fix: str = "download the file again") -> Any:
    """Returns the content of a JSON file.

    fix: the advice at the end of the message of a ValueError.

    Raises:
        FileNotFoundError, IsADirectoryError: the path does not exist or is a folder.
        ValueError: the file is not regular, has more than `most` bytes, is not JSON, is nested more than 64 levels
        deep, repeats a key in an object, or contains a number that is not finite or has over 40 digits. The message
        contains the path.

    Example:
        config = read_json("vae/config.json")
    """
    return _named(path, fix, lambda: parse_json(read_bytes(path, most=most)))


def parse_json(content: bytes) -> Any:
    """Parses JSON in UTF-8 bytes.

    Raises ValueError for the same invalid content as `read_json`.

    Example:
        header = parse_json(content[8 : 8 + length])
    """
    check_depth(content)
    return json.loads(
        content.decode("utf-8-sig"),
        object_pairs_hook=_once,
        parse_constant=_constant,
        parse_float=_float,
        parse_int=_integer,
    )


def check_depth(content: bytes) -> None:
    """Raises ValueError if JSON is nested more than 64 levels deep.

    Example:
        check_depth(Path("tokenizer.json").read_bytes())
    """
    steps = _STEPS[np.frombuffer(_STRING.sub(b"", content), np.uint8)]
    if (depth := np.cumsum(steps, dtype=np.int32).max(initial=0)) > MAX_DEPTH:
        raise ValueError(f"it is nested {depth} levels deep, but the limit is {MAX_DEPTH}")


def read_yaml(path: PathLike, *, fix: str = "download the file again") -> Any:
    """Returns the content of a YAML file: strings, numbers, lists and mappings.

    Raises the same errors as `read_json`. Also raises ValueError if the file contains aliases, tags or a string of more
    than 4,096 characters, or is larger than 64 KiB.

    Example:
        arguments = read_yaml("starflow_3B_t2i_256x256.yaml")["arguments"]
    """
    return _named(path, fix, lambda: _parse_yaml(read_bytes(path, most=MAX_YAML_BYTES)))


def _parse_yaml(content: bytes) -> Any:
    import yaml

    depth = 0
    try:
        text = content.decode("utf-8-sig")
        # The event parser does not recurse, but the constructor that creates values from events does.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("aliases (*) are not supported; write the values out")
            if isinstance(event, yaml.ScalarEvent) and len(event.value) > _MAX_YAML_TEXT:
                raise ValueError(f"a string has {len(event.value):,} characters, but the limit is {_MAX_YAML_TEXT:,}")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
            if getattr(event, "tag", None) is not None:
                raise ValueError(f"the tag {str(event.tag)[:40]} is not supported; leave it out")
        return yaml.load(text, Loader=_once_loader())
    # PyYAML raises Python's own errors for values that look like numbers or dates but are not.
    except (yaml.YAMLError, RecursionError, LookupError, AttributeError, ArithmeticError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())[:300] or type(error).__name__) from error


def _once_loader() -> Any:
    """Returns PyYAML's loader for plain values, extended to refuse repeated keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            _once([(self.construct_object(name, deep=True), None) for name, _ in node.value])
            return super().construct_mapping(node, deep=deep)

    return Loader


def read_bytes(path: PathLike, *, most: int = MAX_BYTES) -> bytes:
    """Returns the content of a regular file that has at most `most` bytes.

    Raises FileNotFoundError if the path does not exist, IsADirectoryError if it is a folder, and ValueError if the file
    is not regular or is too large.

    Example:
        content = read_bytes("tokenizer.json")
    """
    check_regular(path)
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"'{path}' is larger than {most:,} bytes; give a smaller file.")
    return content


def check_regular(path: PathLike) -> None:
    """Raises an error unless there is a regular file at `path`.

    Raises FileNotFoundError if nothing is there, IsADirectoryError for a folder, and ValueError for a FIFO, a socket or
    a device, because reading these may never end.

    Example:
        check_regular("model.safetensors")
    """
    mode = Path(path).stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"'{path}' is a folder; give the file inside it.")
    if not stat.S_ISREG(mode):
        raise ValueError(f"'{path}' is a FIFO, a socket or a device; give a regular file.")


def inside(folder: PathLike, name: Any, *, what: str) -> Path:
    """Returns `folder` / `name`, after checking that this untrusted name does not lead out of the folder.

    what: a description of the name for the error message.

    Links may lead to other files in the folder, or to the `blobs` folder of a Hugging Face cache.

    Raises ValueError if the name is not a string, is absolute, or leads out of the folder.

    Example:
        part = inside(folder, "model-00001-of-00002.safetensors", what="a part in model.safetensors.index.json")
    """
    plain = isinstance(name, str) and name not in ("", ".") and "\0" not in name
    if not plain or any(
        path.is_absolute() or path.drive or path.root or ".." in path.parts
        for path in (PurePosixPath(name), PureWindowsPath(name))
    ):
        raise ValueError(f"{what} is {name!r:.100}; it must be a path inside '{folder}'.")
    path, home = Path(folder) / name, Path(folder).resolve()
    places = [home, *(parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots")]
    try:
        target = path.resolve()
    except RuntimeError as error:  # circular links
        raise ValueError(
            f"{what} is {name!r:.100}, a link that leads back to itself; replace it with the file."
        ) from error
    if not any(target.is_relative_to(place) for place in places):
        raise ValueError(f"{what} is {name!r:.100}, a link that leads out of '{folder}'; replace it with the file.")
    return path


def _named(path: PathLike, fix: str, read: Callable[[], T]) -> T:
    kind = "YAML" if Path(path).suffix in (".yaml", ".yml") else "JSON"
    try:
        return read()
    except (ValueError, RecursionError) as error:
        if str(error).startswith(f"'{path}'"):
            raise
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:300]
        raise ValueError(f"{path} is not valid {kind} ({reason}); {fix}.") from error


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        twice, count = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {str(twice)[:80]!r} occurs {'twice' if count == 2 else f'{count} times'}")
    return table


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not allowed in JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number has too many digits ({len(text)})")
    return int(text)
