"""Reads files written by `torch.save`, in both layouts: zip archives (PyTorch 1.6 and later) and older pickles.

In both layouts, a pickle describes each tensor as (storage, offset, shape, strides). The bytes of the storages follow
separately and uncompressed, so tensors can be read as views of the memory-mapped file.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowgen.convert.torch_pickle import DTYPES, Damage, Refusal, Storage, StoredTensor, TensorUnpickler
from flowgen.convert.zip_entries import read_entries
from flowgen.documents import check_regular

ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_ANOTHER_BYTE_ORDER = "it was written on a big-endian machine; save it again on a little-endian one"
_MAX_PICKLE = 1 << 26  # bytes

# The errors that malformed bytes can cause.
_DAMAGE = (Damage, struct.error, LookupError, TypeError, ValueError, OverflowError, MemoryError)


class TorchFile(NamedTuple):
    """The contents of a file written by `torch.save`.

    saved: the saved object, with a `StoredTensor` in place of every tensor.
    read: a function that returns the array for a `StoredTensor`.
    """

    saved: Any
    read: Callable[[StoredTensor], np.ndarray]


def open_torch(path: str | os.PathLike[str]) -> TorchFile:
    """Opens a file written by `torch.save`. Tensors are read on demand, as read-only views of the file.

    Checksums are verified if the file contains them; by default, only zip archives do.

    Raises:
        ValueError: the file is damaged, truncated, big-endian or not written by torch.save, or it contains anything
        other than tensors and plain Python values. `TorchFile.read` may also raise this error.

    Example:
        file = open_torch("model.pth")
        weight = file.read(file.saved["proj_in.weight"])
    """
    path = Path(path)
    check_regular(path)
    content = np.memmap(path, np.uint8, mode="r")

    def guarded(function, *arguments):
        try:
            return function(*arguments)
        except Refusal as refusal:
            raise ValueError(f"'{path}' cannot be imported: {refusal}.") from None
        except _DAMAGE as error:
            reason = error if isinstance(error, Damage) else f"{type(error).__name__}: {error}"
            raise ValueError(
                f"'{path}' is damaged or not written by torch.save ({reason}); download the file again."
            ) from error

    zipped = content[: len(ZIP_MAGIC)].tobytes() == ZIP_MAGIC
    saved, storage_bytes = guarded(_open_zip if zipped else _open_legacy, content)
    return TorchFile(saved, lambda tensor: guarded(_view, tensor, storage_bytes))


def _view(tensor: StoredTensor, storage_bytes: Callable[[Storage], np.ndarray]) -> np.ndarray:
    dtype, raw = DTYPES[tensor.dtype], storage_bytes(tensor.storage)
    if math.prod(tensor.shape) == 0:
        return np.empty(tensor.shape, dtype)
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if (last + 1) * dtype.itemsize > raw.size:
        raise Refusal(f"a tensor of shape {tensor.shape} extends beyond its storage {tensor.storage.key!r}")
    strides = [
        # In PyTorch, an axis of length 1 may have any stride.
        stride * dtype.itemsize if n > 1 else 0
        for n, stride in zip(tensor.shape, tensor.strides, strict=True)
    ]
    return np.ndarray(tensor.shape, dtype, raw.data, tensor.offset * dtype.itemsize, strides)


def _open_zip(content: np.ndarray) -> tuple[Any, Callable[[Storage], np.ndarray]]:
    """Returns the saved object in a zip archive, and a function that returns the bytes of a storage.

    The archive contains <root>/data.pkl and, for every storage, <root>/data/<key>, all uncompressed.
    """
    entries = read_entries(content)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Refusal("it is a zip archive without data.pkl, so torch.save did not write it")
    root = pickles[0].removesuffix("data.pkl")
    if entries[pickles[0]].size > _MAX_PICKLE:
        raise Refusal(f"the pickle has more than {_MAX_PICKLE:,} bytes; save only the weights")

    def entry_bytes(name: str) -> np.ndarray:
        if root + name not in entries:
            raise Refusal(f"the entry {name[:80]!r} is missing; download the file again")
        return entries[root + name].read(content)

    if root + "byteorder" in entries and entry_bytes("byteorder")[:8].tobytes() != b"little":
        raise Refusal(_ANOTHER_BYTE_ORDER)

    verified: dict[str, np.ndarray] = {}

    def storage_bytes(storage: Storage) -> np.ndarray:
        if storage.key not in verified:
            raw = entry_bytes(f"data/{storage.key}")
            if raw.size != storage.size:
                raise Refusal(f"storage {storage.key[:80]!r} has {raw.size} bytes instead of {storage.size}")
            verified[storage.key] = raw
        return verified[storage.key]

    return TensorUnpickler(entry_bytes("data.pkl").tobytes()).load(), storage_bytes


def _open_legacy(content: np.ndarray) -> tuple[Any, Callable[[Storage], np.ndarray]]:
    """Returns the saved object in a file of the older layout, and a function that returns the bytes of a storage.

    The file begins with five pickles: a magic number, the protocol version, a description of the machine, the object,
    and the keys of the storages. The storages follow, in the order of the keys. Each consists of the number of elements
    as an int64, followed by the elements.
    """
    unpickler = TensorUnpickler(content)
    if unpickler.load() != _LEGACY_MAGIC or unpickler.load() != _LEGACY_PROTOCOL:
        raise Refusal("it is a pickle that torch.save did not write; give a file written by torch.save")
    if not unpickler.load()["little_endian"]:
        raise Refusal(_ANOTHER_BYTE_ORDER)
    saved, keys = unpickler.load(), unpickler.load()
    if type(keys) is not list:
        raise Damage("the list of storages is missing")
    starts, position = {}, unpickler.position
    for key in keys:
        storage = unpickler.storages[key]
        (count,) = struct.unpack_from("<q", content[position : position + 8].tobytes())
        starts[key] = position + 8
        position += 8 + storage.size
        if count != storage.count or position > content.size:
            raise Refusal(f"storage {storage.key[:80]!r} is truncated; download the file again")
    return saved, lambda storage: content[starts[storage.key] : starts[storage.key] + storage.size]
