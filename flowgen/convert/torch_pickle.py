"""Reads the pickles in the files of `torch.save`, without torch or the module `pickle`, and without executing code.

A pickle is a program for a small stack machine. This module implements a machine that supports only the instructions
that `torch.save` writes. A program can call functions by name. The machine accepts only the names that a dictionary of
dense tensors needs, and replaces each with a function in this file. The cost of a program is bounded: the number of
instructions and of integer keys is limited, and a dictionary is never larger than the data from which it is created.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

# The pickles of the largest published models describe a thousand tensors with thirty thousand instructions.
MAX_INSTRUCTIONS = 1 << 21
# The maximum number of axes of a NumPy array.
MAX_AXES = 64
MAX_ARGUMENTS = 8
# An optimizer's state has one integer key per parameter. The number of integer keys is limited, because a malicious
# file could use integers whose hashes collide, which makes look-ups slow. The hashes of strings are unpredictable.
MAX_NUMBER_KEYS = 1 << 14

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
    """Raised to refuse a file; the message is a clause that gives the reason."""


class Damage(Exception):
    """Raised if a file is malformed; the message is a clause that describes the damage."""


class Storage(NamedTuple):
    """A sequence of `count` elements of one dtype, used by one or more tensors; `key` identifies it in the file."""

    key: str
    dtype: str
    count: int

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self.count * DTYPES[self.dtype].itemsize


class StoredTensor(NamedTuple):
    """A description of a tensor as a view of a storage; offset and strides are in elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mapping(dict):
    """Replaces dictionary classes whose objects have attributes, such as OrderedDict, and drops the attributes."""


class _Name(NamedTuple):
    """A global name in a program: `call` is its replacement, or None for the name of a dtype or storage class."""

    text: str
    call: Callable[..., Any] | None = None


class TensorUnpickler:
    """Reads consecutive pickles as plain Python values, with a `StoredTensor` in place of every tensor.

    storages: the storages that the tensors use, by key.
    position: offset in the content at which the most recently read pickle ends.

    Raises Refusal if a pickle does more than a dictionary of tensors requires, and Damage if it is malformed.

    Example:
        saved = TensorUnpickler(content).load()
    """

    def __init__(self, content: Any, position: int = 0):
        self.content = memoryview(content)
        self.position = position
        self.storages: dict[str, Storage] = {}
        self._instructions = self._number_keys = 0

    def load(self) -> Any:
        """Returns the object that the next pickle describes."""
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        try:
            while (code := self.take(1)[0]) != _STOP:
                self._instructions += 1
                if self._instructions > MAX_INSTRUCTIONS:
                    raise Refusal(
                        f"the pickle has more than {MAX_INSTRUCTIONS:,} instructions, far more than weights need; "
                        "save only the weights, with torch.save(model.state_dict(), file)"
                    )
                if code not in _INSTRUCTIONS:
                    raise Damage(f"the pickle has an instruction {bytes([code])!r} that torch.save does not write")
                _INSTRUCTIONS[code](self)
            (value,) = self.stack
        except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
            raise Damage(f"the pickle is malformed at byte {self.position} ({type(error).__name__})") from error
        return value

    def take(self, count: int) -> memoryview:
        """Returns the next `count` bytes."""
        start, self.position = self.position, self.position + count
        if self.position > len(self.content):
            raise Damage("the pickle is cut off")
        return self.content[start : self.position]

    def number(self, form: str) -> Any:
        """Returns the next number, decoded with the `struct` format `form`."""
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return value

    def text(self, count: int) -> str:
        """Returns the next `count` bytes, decoded as UTF-8."""
        return bytes(self.take(count)).decode("utf-8")

    def line(self) -> str:
        """Returns the text up to the next newline, which is how names are stored."""
        window = bytes(self.content[self.position : self.position + 1024])
        end = window.find(b"\n")
        if end < 0:
            raise Damage("the pickle has an unterminated name")
        return self.text(end + 1)[:-1]

    def key(self, value: Any) -> Any:
        """Returns a key of a dictionary or set, which must be a string or an integer below 2^61.

        Raises Refusal for any other key, and if there are too many integer keys.
        """
        if type(value) is str:
            return value
        if type(value) is not int or abs(value) >= sys.hash_info.modulus:
            raise Refusal(
                f"the pickle has a dictionary or set with the key {_shown(value)}, which is neither text nor an "
                "integer below 2^61; save only the weights"
            )
        self._number_keys += 1
        if self._number_keys > MAX_NUMBER_KEYS:
            raise Refusal(
                f"the pickle has more than {MAX_NUMBER_KEYS:,} integer keys; save only the weights, without "
                "the optimizer"
            )
        return value

    def since_mark(self) -> list[Any]:
        """Pops and returns the values pushed since the last mark."""
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values


def _push(make: Callable[[TensorUnpickler], Any]) -> Callable[[TensorUnpickler], None]:
    return lambda machine: machine.stack.append(make(machine))


def _memorise(index: Callable[[TensorUnpickler], int]) -> Callable[[TensorUnpickler], None]:
    def run(machine: TensorUnpickler) -> None:
        machine.memo[index(machine)] = machine.stack[-1]

    return run


def _last(count: int) -> Callable[[TensorUnpickler], None]:
    def run(machine: TensorUnpickler) -> None:
        values = tuple(machine.stack[-count:])
        if len(values) != count:
            raise Damage("the pickle pops more values than the stack contains")
        machine.stack[-count:] = [values]

    return run


def _add(machine: TensorUnpickler, values: list[Any]) -> None:
    holder = machine.stack[-1]
    if type(holder) is set:
        holder.update(map(machine.key, values))
    elif type(holder) is list:
        holder.extend(values)
    else:
        raise Damage("the pickle adds values to something that is not a list")


def _set(machine: TensorUnpickler, values: list[Any]) -> None:
    holder = machine.stack[-1]
    if type(holder) not in (dict, _Mapping) or len(values) % 2:
        raise Damage("the pickle sets items on something that is not a dictionary")
    for name, value in zip(values[::2], values[1::2], strict=True):
        holder[machine.key(name)] = value


def _global(machine: TensorUnpickler) -> _Name:
    return _named(machine.line(), machine.line())


def _stack_global(machine: TensorUnpickler) -> _Name:
    name, module = machine.stack.pop(), machine.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise Damage("the pickle has a name that is not a string")
    return _named(module, name)


def _named(module: str, name: str) -> _Name:
    full = f"{module}.{name}"
    if full in _CALLABLES:
        return _Name(full, _CALLABLES[full])
    if (module in ("torch", "torch.storage") and name in _STORAGES) or (module == "torch" and name in DTYPES):
        return _Name(name)
    raise Refusal(
        f"the pickle uses {_shown(full)}, which a dictionary of dense tensors does not need; "
        "save only the weights, with torch.save(model.state_dict(), file)"
    )


def _reduce(machine: TensorUnpickler) -> Any:
    arguments, name = machine.stack.pop(), machine.stack.pop()
    if type(name) is not _Name or name.call is None or type(arguments) is not tuple or len(arguments) > MAX_ARGUMENTS:
        raise Damage("the pickle calls something that is not a function")
    return name.call(*arguments)


def _build(machine: TensorUnpickler) -> None:
    machine.stack.pop()
    if type(machine.stack[-1]) is not _Mapping:
        raise Damage("the pickle sets attributes on an object that has none")


def _persistent(machine: TensorUnpickler) -> Storage:
    reference = machine.stack.pop()
    if type(reference) is not tuple or len(reference) > MAX_ARGUMENTS:
        raise Damage("the pickle refers to something that is not a storage")
    tag, kind, key, _, count, *view = reference
    if type(tag) is not str or tag != "storage" or type(key) is not str or any(part is not None for part in view):
        raise Refusal(f"the pickle refers to {_shown(tag)} in a form that torch.save no longer writes")
    if type(kind) is not _Name or kind.text not in _STORAGES:
        raise Damage("the pickle has a storage of an unknown type")
    storage = Storage(key, _STORAGES[kind.text], _natural(count))
    if machine.storages.setdefault(key, storage) != storage:
        raise Refusal(f"storage {_shown(key)} has two conflicting descriptions")
    return storage


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise Refusal(f"a tensor's size, stride or offset is {_shown(value)}, which is invalid")
    return value


def _shown(value: Any) -> str:
    """Returns a description of a value from an untrusted file, for an error message.

    A container is described only by its type, because it may contain anything.
    """
    if value is not None and type(value) not in (str, int, float, bool):
        return f"a {type(value).__name__}"
    text = repr(value[:80] if type(value) is str else value)
    return text if len(text) <= 120 else text[:117] + "..."


def _stored_tensor(storage: Any, dtype: Any, offset: Any, shape: Any, strides: Any, metadata: Any) -> StoredTensor:
    layout = type(shape) is type(strides) is tuple and len(shape) == len(strides) <= MAX_AXES
    if not isinstance(storage, Storage) or dtype not in DTYPES or not layout:
        raise Damage("the pickle has a tensor with an invalid storage, dtype or strides")
    if metadata:
        raise Refusal("a tensor is stored as a lazy view, conjugate or negative; call .clone() on it and save it again")
    sizes, steps = tuple(map(_natural, shape)), tuple(map(_natural, strides))
    return StoredTensor(storage, dtype, _natural(offset), sizes, steps)


def _rebuild_tensor(storage, offset, shape, strides, _grad=False, _hooks=None, metadata=None) -> StoredTensor:
    """Replaces torch._utils._rebuild_tensor and _rebuild_tensor_v2, which has further arguments after the strides."""
    return _stored_tensor(storage, getattr(storage, "dtype", None), offset, shape, strides, metadata)


def _rebuild_untyped(storage, offset, shape, strides, _grad, _hooks, dtype, metadata=None) -> StoredTensor:
    """Replaces torch._utils._rebuild_tensor_v3, whose storage is untyped and whose dtype is a separate argument."""
    name = dtype.text if type(dtype) is _Name else None
    return _stored_tensor(storage, name, offset, shape, strides, metadata)


def _rebuild_parameter(tensor, *_):
    """Replaces torch._utils._rebuild_parameter; returns the tensor and ignores the other arguments."""
    return tensor


def _ordered_dict(pairs=()) -> _Mapping:
    """Replaces collections.OrderedDict; its argument, if any, is a list of (name, value) pairs, as in Python 2."""
    if pairs == ():
        return _Mapping()
    if type(pairs) is not list:
        raise Damage("the pickle creates a dictionary from something other than a list of pairs")
    made = _Mapping({name: value for name, value in pairs if type(name) is str})
    if len(made) != len(pairs):
        raise Damage("the pickle creates a dictionary whose names are repeated or are not strings")
    pairs.clear()  # A list can be used only once; otherwise, a short program could create many large dictionaries.
    return made


def _size(values=()):
    """Replaces torch.Size; returns the tuple."""
    if type(values) is not tuple or len(values) > MAX_AXES:
        raise Damage("the pickle has an invalid tensor size")
    return values


_CALLABLES: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_untyped,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.Size": _size,
}

_STOP = ord(".")
# The supported instructions, by code: those that pickle protocols 2 to 5 use for plain values, tuples, lists, sets,
# dictionaries and tensors.
_INSTRUCTIONS: dict[int, Callable[[TensorUnpickler], Any]] = {
    0x80: lambda machine: machine.take(1),  # the protocol
    0x95: lambda machine: machine.take(8),  # the length of a frame
    ord("("): lambda machine: machine.marks.append(len(machine.stack)),
    ord("0"): lambda machine: machine.stack.pop(),
    ord("1"): lambda machine: machine.since_mark(),
    ord("N"): _push(lambda machine: None),
    0x88: _push(lambda machine: True),
    0x89: _push(lambda machine: False),
    ord("J"): _push(lambda machine: machine.number("<i")),
    ord("K"): _push(lambda machine: machine.number("<B")),
    ord("M"): _push(lambda machine: machine.number("<H")),
    0x8A: _push(lambda machine: int.from_bytes(machine.take(machine.number("<B")), "little", signed=True)),
    ord("G"): _push(lambda machine: machine.number(">d")),
    ord("X"): _push(lambda machine: machine.text(machine.number("<I"))),
    0x8C: _push(lambda machine: machine.text(machine.number("<B"))),
    0x8D: _push(lambda machine: machine.text(machine.number("<Q"))),
    ord("T"): _push(lambda machine: machine.text(machine.number("<I"))),
    ord("U"): _push(lambda machine: machine.text(machine.number("<B"))),
    ord("B"): _push(lambda machine: bytes(machine.take(machine.number("<I")))),
    ord("C"): _push(lambda machine: bytes(machine.take(machine.number("<B")))),
    0x8E: _push(lambda machine: bytes(machine.take(machine.number("<Q")))),
    ord("}"): _push(lambda machine: {}),
    ord("]"): _push(lambda machine: []),
    ord(")"): _push(lambda machine: ()),
    0x8F: _push(lambda machine: set()),
    ord("t"): _push(lambda machine: tuple(machine.since_mark())),
    0x85: _last(1),
    0x86: _last(2),
    0x87: _last(3),
    ord("a"): lambda machine: _add(machine, [machine.stack.pop()]),
    ord("e"): lambda machine: _add(machine, machine.since_mark()),
    0x90: lambda machine: _add(machine, machine.since_mark()),
    ord("s"): lambda machine: _set(machine, [machine.stack.pop(), machine.stack.pop()][::-1]),
    ord("u"): lambda machine: _set(machine, machine.since_mark()),
    ord("h"): _push(lambda machine: machine.memo[machine.number("<B")]),
    ord("j"): _push(lambda machine: machine.memo[machine.number("<I")]),
    ord("q"): _memorise(lambda machine: machine.number("<B")),
    ord("r"): _memorise(lambda machine: machine.number("<I")),
    0x94: _memorise(lambda machine: len(machine.memo)),
    ord("c"): _push(_global),
    0x93: _push(_stack_global),
    ord("R"): _push(_reduce),
    ord("b"): _build,
    ord("Q"): _push(_persistent),
}
