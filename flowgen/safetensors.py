"""Reads and writes safetensors files.

A file consists of the header's length as a little-endian uint64, the header as JSON, and the tensors without gaps
between them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flowgen.documents import MAX_BYTES, parse_json

# Maximum size of a header, in bytes. The format allows headers six times as large, but the largest models have headers
# a hundred times smaller.
_MAX_HEADER = MAX_BYTES
_METADATA = "__metadata__"
_ALIGNMENT = 8  # of the first tensor, in bytes
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read_safetensors(path: str | os.PathLike[str], *, fix: str = "download the file again") -> dict[str, np.ndarray]:
    """Returns the tensors of a safetensors file by name, as read-only views of the file.

    The tensors must fill the file without gaps, so they never need more memory than the file.

    fix: the advice at the end of the message about a damaged file.

    Raises OSError if the file cannot be read, or ValueError if it is truncated, damaged or in another format.

    Example:
        tensors = read_safetensors("exported/model.safetensors")
    """
    path = Path(path)
    if path.stat().st_size < 8:  # An empty file cannot be mapped.
        raise ValueError(f"'{path}' is truncated or not a safetensors file: it has fewer than 8 bytes; {fix}.")
    content = np.memmap(path, np.uint8, mode="r")
    length = int.from_bytes(content[:8].tobytes(), "little")
    if length > min(_MAX_HEADER, content.size - 8):
        raise ValueError(
            f"'{path}' is truncated or not a safetensors file: its header claims to have {length} bytes, but may have "
            f"at most {min(_MAX_HEADER, content.size - 8)}; {fix}."
        )
    try:
        header = parse_json(content[8 : 8 + length].tobytes())
        spans = [
            (
                *_naturals(spec["data_offsets"]),
                name,
                jnp.dtype(_DTYPES[spec["dtype"]]),
                _naturals(spec["shape"]),
            )
            for name, spec in header.items()
            if name != _METADATA
        ]
        spans.sort(key=lambda span: span[:2])
        body, position, tensors = content[8 + length :], 0, {}
        described = max((stop for _, stop, *_ in spans), default=0)
        if described != body.size:
            raise ValueError(f"it has {body.size} bytes of tensors, but its header describes {described}")
        for start, stop, name, dtype, shape in spans:
            if start != position or stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(
                    f"tensor {name[:80]!r} does not start where the previous one ends, or has the wrong size"
                )
            tensors[name] = body[start:stop].view(np.ndarray).view(dtype).reshape(shape)
            position = stop
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"'{path}' is damaged or not a safetensors file ({type(error).__name__}: {str(error)[:200]}); {fix}."
        ) from error
    return {name: tensors[name] for name in header if name in tensors}


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors to a new safetensors file. Tensors of the widest dtypes are written first, so that all tensors are
    aligned.

    metadata: text by name, for the file's header.

    Raises FileExistsError if the file exists, or ValueError if a dtype has no name in safetensors.

    Example:
        write_safetensors("model.safetensors", {"kernel": np.ones((2, 3), np.float32)})
    """
    unknown = [f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype.name not in _NAMES]
    if unknown:
        raise ValueError(f"safetensors files cannot hold some dtypes ({unknown[0]}); convert the tensors first.")
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    position = 0
    for name, tensor in ordered:
        span = [position, position := position + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            little = tensor.dtype.newbyteorder("<") if tensor.dtype.kind in "fiu" else tensor.dtype
            file.write(np.ascontiguousarray(tensor, little).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _naturals(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 1 << 63 for value in values):
        raise ValueError(f"{values!r:.80} is not a list of sizes")
    return tuple(values)
