"""Files of `torch.save` in both layouts: the zip archive of PyTorch 1.6 and later, and the pickles before it.

Either way a pickle describes tensors as (storage, offset, shape, strides), and the storages' bytes stand
apart and uncompressed, so that tensors are views of the mapped file.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowgen.convert.torch_pickle import DTYPES, Refusal, Storage, StoredTensor, TensorUnpickler

ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_ANOTHER_BYTE_ORDER = "it was written on a big-endian machine; save it again on a little-endian one"

# What unpickling and unzipping bytes that are not what they should be is known to raise.
_DAMAGE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, NotImplementedError),
    *(AttributeError, ImportError, LookupError, TypeError, ValueError, OverflowError),
    *(RecursionError, MemoryError),
)


class TorchFile(NamedTuple):
    """The saved object with a `StoredTensor` for every tensor, and the function that reads one."""

    saved: Any
    read: Callable[[StoredTensor], np.ndarray]


def open_torch(path: str | os.PathLike[str]) -> TorchFile:
    """Returns what `torch.save` wrote; tensors are read on demand, as read-only views of the file.

    Checksums are verified where the file records them (the zip layout does, by default).

    Raises:
        ValueError: damaged or truncated, not written by torch.save, big-endian, or it names anything but
            tensors and plain Python values. `TorchFile.read` raises it too.

    Example:
        file = open_torch("model.pth")
        weight = file.read(file.saved["proj_in.weight"])
    """
    path = Path(path)
    content = np.memmap(path, np.uint8, mode="r")

    def guarded(function, *arguments):
        try:
            return function(*arguments)
        except Refusal as refusal:
            raise ValueError(f"'{path}' is not read: {refusal}.") from None
        except _DAMAGE as error:
            raise ValueError(
                f"'{path}' is damaged or not written by torch.save ({type(error).__name__}: {error}); "
                "get the file again."
            ) from error

    zipped = content[: len(ZIP_MAGIC)].tobytes() == ZIP_MAGIC
    saved, storage_bytes = guarded(_open_zip if zipped else _open_legacy, path, content)
    return TorchFile(saved, lambda tensor: guarded(_view, tensor, storage_bytes))


def _view(tensor: StoredTensor, storage_bytes: Callable[[Storage], np.ndarray]) -> np.ndarray:
    dtype, raw = DTYPES[tensor.dtype], storage_bytes(tensor.storage)
    if math.prod(tensor.shape) == 0:
        return np.empty(tensor.shape, dtype)
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if (last + 1) * dtype.itemsize > raw.size:
        raise Refusal(f"a tensor of shape {tensor.shape} reaches beyond its storage {tensor.storage.key!r}")
    strides = [
        # The stride of an axis of length 1 is arbitrary in PyTorch.
        stride * dtype.itemsize if n > 1 else 0
        for n, stride in zip(tensor.shape, tensor.strides, strict=True)
    ]
    return np.ndarray(tensor.shape, dtype, raw.data, tensor.offset * dtype.itemsize, strides)


def _open_zip(path: Path, content: np.ndarray) -> tuple[Any, Callable[[Storage], np.ndarray]]:
    """Layout: <root>/data.pkl, and <root>/data/<key> for every storage, all of them stored uncompressed."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Refusal("it is a zip archive without data.pkl, so torch.save did not write it")
    root = pickles[0].removesuffix("data.pkl")

    def entry_bytes(name: str) -> np.ndarray:
        if root + name not in entries:
            raise Refusal(f"its entry '{name}' is missing; get the file again")
        return _entry_bytes(entries[root + name], content)

    if root + "byteorder" in entries and entry_bytes("byteorder").tobytes() != b"little":
        raise Refusal(_ANOTHER_BYTE_ORDER)

    def storage_bytes(storage: Storage) -> np.ndarray:
        raw = entry_bytes(f"data/{storage.key}")
        if raw.size != storage.size:
            raise Refusal(f"its storage {storage.key!r} has {raw.size} bytes where {storage.size} are described")
        return raw

    return TensorUnpickler(io.BytesIO(entry_bytes("data.pkl").tobytes())).load(), storage_bytes


def _entry_bytes(entry: zipfile.ZipInfo, content: np.ndarray) -> np.ndarray:
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise Refusal(f"its entry {entry.filename!r} is compressed or encrypted, which torch.save never does")
    header = content[entry.header_offset : entry.header_offset + 30].tobytes()
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    start = entry.header_offset + 30 + name_length + extra_length
    raw = content[start : start + entry.file_size]
    if not header.startswith(ZIP_MAGIC) or raw.size != entry.file_size:
        raise Refusal(f"its entry {entry.filename!r} is truncated; get the file again")
    # torch.serialization.set_crc32_options(False) writes 0 for "not computed".
    if entry.CRC and zlib.crc32(raw.data) != entry.CRC:
        raise Refusal(f"its entry {entry.filename!r} does not match its checksum; get the file again")
    return raw


def _open_legacy(path: Path, content: np.ndarray) -> tuple[Any, Callable[[Storage], np.ndarray]]:
    """Layout: five pickles (magic number, protocol, machine, object, storage keys), then the storages.

    Each storage, in the order of its key, is an int64 count and the elements.
    """
    with path.open("rb") as file:
        if TensorUnpickler(file).load() != _LEGACY_MAGIC or TensorUnpickler(file).load() != _LEGACY_PROTOCOL:
            raise Refusal("it is a pickle that torch.save did not write; give a file that it did")
        if not TensorUnpickler(file).load()["little_endian"]:
            raise Refusal(_ANOTHER_BYTE_ORDER)
        unpickler = TensorUnpickler(file)
        saved = unpickler.load()
        keys = TensorUnpickler(file).load()
        position = file.tell()
    starts = {}
    for key in keys:
        storage = unpickler.storages[key]
        (count,) = struct.unpack_from("<q", content[position : position + 8].tobytes())
        starts[key] = position + 8
        position += 8 + storage.size
        if count != storage.count or position > content.size:
            raise Refusal(f"its storage {key!r} is truncated; get the file again")
    return saved, lambda storage: content[starts[storage.key] : starts[storage.key] + storage.size]
