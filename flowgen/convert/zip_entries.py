"""Reads the uncompressed entries of a zip archive as views of the memory-mapped file.

Compressed, encrypted and multi-disk archives are not supported, because weight files do not need them. Python's
`zipfile` is not used, because it creates an object for every entry before any limit can be checked, and trusts the size
stated in the directory.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import numpy as np

from flowgen.convert.torch_pickle import Damage, Refusal

MAX_ENTRIES = 1 << 17
_LOCAL, _CENTRAL, _END, _END_64, _LOCATOR_64 = (b"PK" + tail for tail in (b"\3\4", b"\1\2", b"\5\6", b"\6\6", b"\6\7"))
_LOCAL_SIZE, _CENTRAL_SIZE, _END_SIZE, _LOCATOR_SIZE, _END_64_SIZE = 30, 46, 22, 20, 56
_MAX_COMMENT = 1 << 16
_MAX_DIRECTORY = 1 << 26  # bytes
_ALL_ONES = 0xFFFFFFFF
_ZIP64_EXTRA = 1
_ENCRYPTED = 1


class Entry(NamedTuple):
    """The location of an entry's bytes in the file, and their checksum, which is 0 if the file does not contain it."""

    name: str
    start: int
    size: int
    checksum: int

    def read(self, content: np.ndarray) -> np.ndarray:
        """Returns the bytes of the entry; raises Refusal if they do not match the checksum."""
        raw = content[self.start : self.start + self.size]
        if self.checksum and zlib.crc32(raw.data) != self.checksum:
            raise Refusal(f"the entry {self.name!r} does not match its checksum; download the file again")
        return raw


def read_entries(content: np.ndarray) -> dict[str, Entry]:
    """Returns the entries of a zip archive by name. Checks that no two entries share bytes.

    Raises Refusal if an entry is compressed, encrypted or truncated, if entries share bytes, or if there are too many.
    Raises Damage if the directory is malformed or contradicts the rest of the file.

    Example:
        entries = read_entries(np.memmap("model.pth", np.uint8, mode="r"))
    """
    count, size, start = _directory(content)
    directory = content[start : start + size].tobytes()
    entries: dict[str, Entry] = {}
    position = 0
    for _ in range(count):
        entry, position = _entry(directory, position, content, start)
        if entry.name in entries:
            raise Refusal(f"the entry {entry.name[:80]!r} appears twice")
        entries[entry.name] = entry
    reached = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.size)):
        if entry.start < reached:
            raise Refusal(f"the entry {entry.name[:80]!r} shares bytes with another entry")
        reached = entry.start + entry.size
    return entries


def _directory(content: np.ndarray) -> tuple[int, int, int]:
    """Returns the number of entries in the directory, its size in bytes, and its position in the file."""
    first = max(0, content.size - _END_SIZE - _MAX_COMMENT)
    tail = content[first:].tobytes()
    found = tail.rfind(_END)
    if found < 0 or found + _END_SIZE > len(tail):
        raise Damage("the zip archive is cut off")
    count, size, start = struct.unpack_from("<HII", tail, found + 10)
    end = first + found
    locator = content[max(0, end - _LOCATOR_SIZE) : end].tobytes()
    if locator.startswith(_LOCATOR_64):
        (end,) = struct.unpack_from("<Q", locator, 8)
        record = content[end : end + _END_64_SIZE].tobytes()
        if not record.startswith(_END_64) or len(record) < _END_64_SIZE:
            raise Damage("the zip archive is cut off")
        count, size, start = struct.unpack_from("<QQQ", record, 32)
    if count > MAX_ENTRIES:
        raise Refusal(f"the zip archive has {count:,} entries, but the limit is {MAX_ENTRIES:,}")
    if size > _MAX_DIRECTORY or start + size > end or count * _CENTRAL_SIZE > size:
        raise Damage("the directory of the zip archive is misplaced")
    return count, size, start


def _entry(directory: bytes, position: int, content: np.ndarray, end: int) -> tuple[Entry, int]:
    """Returns the entry that begins at a position in the directory, and the position of the next entry."""
    header = directory[position : position + _CENTRAL_SIZE]
    if len(header) < _CENTRAL_SIZE or not header.startswith(_CENTRAL):
        raise Damage("the directory of the zip archive is cut off")
    flags, method = struct.unpack_from("<HH", header, 8)
    checksum, packed, size, name_length, extra_length, comment_length = struct.unpack_from("<IIIHHH", header, 16)
    (start,) = struct.unpack_from("<I", header, 42)
    position += _CENTRAL_SIZE
    raw = directory[position : position + name_length]
    extra = directory[position + name_length : position + name_length + extra_length]
    name = raw.decode("utf-8", "backslashreplace")
    if method or flags & _ENCRYPTED:
        raise Refusal(f"the entry {name[:80]!r} is compressed or encrypted, which torch.save never does")
    size, packed, start = _large(extra, size, packed, start)
    local = content[start : start + _LOCAL_SIZE].tobytes()
    if len(local) < _LOCAL_SIZE or not local.startswith(_LOCAL):
        raise Refusal(f"the entry {name[:80]!r} is truncated; download the file again")
    local_name_length, local_extra_length = struct.unpack_from("<HH", local, 26)
    begin = start + _LOCAL_SIZE + local_name_length + local_extra_length
    if content[start + _LOCAL_SIZE : start + _LOCAL_SIZE + local_name_length].tobytes() != raw or packed != size:
        raise Damage(f"the entry {name[:80]!r} has two conflicting descriptions")
    if begin + size > end:
        raise Refusal(f"the entry {name[:80]!r} is truncated; download the file again")
    return Entry(name, begin, size, checksum), position + name_length + extra_length + comment_length


def _large(extra: bytes, size: int, packed: int, start: int) -> tuple[int, int, int]:
    """Returns size, packed and start; values that do not fit into 32 bits are read from the extra field."""
    values, position = [size, packed, start], 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        field = extra[position + 4 : position + 4 + length]
        if kind == _ZIP64_EXTRA:
            for index, value in enumerate(values):
                if value == _ALL_ONES:
                    if len(field) < 8:
                        raise Damage("the zip archive has an entry without a size field")
                    values[index], field = struct.unpack_from("<Q", field)[0], field[8:]
            break
        position += 4 + length
    return values[0], values[1], values[2]
