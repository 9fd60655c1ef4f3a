"""The pickles inside files of `torch.save`, loaded without torch and without executing anything.

A pickle is a program that may call whatever it names. The names allowed here are those that a dictionary of
dense tensors needs, and each resolves to an inert stand-in of this file. Stand-ins are strings, named tuples
and instances without attributes, because the BUILD instruction may set attributes of whatever it is given.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any, NamedTuple

import jax.numpy as jnp

DTYPES = {
    name: jnp.dtype(name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}


class Refusal(Exception):
    """One clause that says why a file is not read."""


class Storage(NamedTuple):
    """Bytes that tensors share: `count` elements of a dtype, under a key of the file."""

    key: str
    dtype: str
    count: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * DTYPES[self.dtype].itemsize


class StoredTensor(NamedTuple):
    """A view of a storage; offset and strides are counted in elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TensorUnpickler(pickle.Unpickler):
    """Unpickler of plain Python values and `StoredTensor`s; `storages` collects the storages they refer to.

    Example:
        saved = TensorUnpickler(file).load()
    """

    def __init__(self, file: Any):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = f"{module_name}.{global_name}"
        if name in _CALLABLES:
            return _CALLABLES[name]
        if module_name in ("torch", "torch.storage") and global_name in _STORAGES:
            return global_name
        if module_name == "torch" and global_name in DTYPES:
            return global_name
        raise Refusal(
            f"its pickle asks for {name!r}, which a dictionary of dense tensors does not need; "
            "save the weights alone, with torch.save(model.state_dict(), file)"
        )

    def persistent_load(self, pid: Any, /) -> Storage:
        tag, kind, key, _, count, *view = pid
        if tag != "storage" or not isinstance(key, str) or any(part is not None for part in view):
            raise Refusal(f"its pickle refers to {tag!r} in a way that torch.save no longer writes")
        storage = Storage(key, _STORAGES[kind], _natural(count))
        if self.storages.setdefault(key, storage) != storage:
            raise Refusal(f"its storage {key!r} is described twice, differently")
        return storage


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise Refusal(f"a tensor's size, stride or offset is {value!r}")
    return value


def _stored_tensor(storage, dtype, offset, shape, strides, metadata) -> StoredTensor:
    if not isinstance(storage, Storage) or dtype not in DTYPES or len(shape) != len(strides):
        raise Refusal("its pickle describes a tensor whose storage, dtype or strides make no sense")
    if metadata:
        raise Refusal(f"a tensor is stored as a lazy view ({metadata}); save it after .clone()")
    sizes, steps = tuple(map(_natural, shape)), tuple(map(_natural, strides))
    return StoredTensor(storage, dtype, _natural(offset), sizes, steps)


class _RebuildTensor:
    """torch._utils._rebuild_tensor and _v2: (storage, offset, shape, strides[, grad, hooks[, metadata]])."""

    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, _grad=False, _hooks=None, metadata=None):
        return _stored_tensor(storage, storage.dtype, offset, shape, strides, metadata)


class _RebuildUntyped:
    """torch._utils._rebuild_tensor_v3, whose storage is bytes: as above with a dtype before the metadata."""

    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, _grad, _hooks, dtype, metadata=None):
        return _stored_tensor(storage, dtype, offset, shape, strides, metadata)


class _RebuildParameter:
    """torch._utils._rebuild_parameter: (tensor, grad, hooks) -> tensor."""

    __slots__ = ()

    def __call__(self, tensor, *_):
        return tensor


class _Size:
    """torch.Size: a tuple."""

    __slots__ = ()

    def __call__(self, values=()):
        return tuple(values)


_CALLABLES = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor": _RebuildTensor(),
    "torch._utils._rebuild_tensor_v2": _RebuildTensor(),
    "torch._utils._rebuild_tensor_v3": _RebuildUntyped(),
    "torch._utils._rebuild_parameter": _RebuildParameter(),
    "torch.Size": _Size(),
}
