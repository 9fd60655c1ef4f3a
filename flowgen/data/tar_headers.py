"""Reads the headers of an uncompressed tar file to find the position of each member's content.

Supports the formats ustar, pax and GNU (POSIX.1-2017, pax; the GNU tar manual, "Basic Tar Format"). Python's tarfile
module takes four times as long, and treats a damaged header as the end of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

from flowgen.data.inventory import quoted

BLOCK = 512
# The largest name or pax record that is read. Names of files have at most 4,096 bytes.
_MOST_EXTRA, _MOST_DIGITS = 1 << 20, 8
# Number of bytes read at a time after the end mark.
_REST = 1 << 20
_END = bytes(BLOCK)
_FILES = (b"0", b"\0", b"7")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")
_LONG_NAME, _LONG_LINK, _PAX, _PAX_OF_ALL = b"L", b"K", (b"x", b"X"), b"g"
# Sparse files: GNU's older type, whose header may go on in further blocks, and the prefix of its newer pax records.
_OLD_SPARSE, _SPARSE = b"S", b"GNU.sparse."
_SPARSE_GOES_ON, _MORE_SPARSE_GOES_ON = 482, 504
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
}

FILE, FOLDER, LINK, SPARSE, OTHER = "file", "folder", "link", "sparse file", "other"


class Member(NamedTuple):
    """A member of a tar file. kind: FILE, FOLDER, LINK, SPARSE or OTHER. offset, size: range of its content."""

    name: str
    kind: str
    offset: int
    size: int


@runtime_checkable
class ByteRanges(Protocol):
    """A file that is read in ranges of bytes. Its `str` is shown in messages.

    size: number of bytes in the file. ahead: number of bytes to read at once when headers are read in order, at least
    512. It is small for local files, and large if each read is a request to another machine.

    Example:
        magic = shard.read_range(257, 8)
    """

    @property
    def size(self) -> int: ...

    @property
    def ahead(self) -> int: ...

    def read_range(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset`, or fewer at the end of the file."""
        ...


def members(shard: ByteRanges) -> Iterator[Member]:
    """Yields the members of a tar file, in order.

    Raises ValueError if the file is compressed or not a tar file, if it is truncated, or if a header is damaged. The
    message contains the file, the last member before the damage, and a remedy.

    Example:
        for name, kind, offset, size in members(shard): ...
    """
    headers = _Headers(shard)
    at, long_name, pax = 0, "", {}
    while (block := headers.block(at)) != _END:
        kind, size = headers.checked(block, at)
        start = at + BLOCK
        more = kind == _OLD_SPARSE and block[_SPARSE_GOES_ON]
        while more:
            more, start = headers.block(start)[_MORE_SPARSE_GOES_ON], start + BLOCK
        at = start + (0 if kind in _WITHOUT_CONTENT else -(-size // BLOCK) * BLOCK)
        if kind in (_LONG_NAME, _LONG_LINK, *_PAX, _PAX_OF_ALL):
            extra = headers.extra(start, size)
            if kind == _LONG_NAME:
                long_name = _text(extra.partition(b"\0")[0])
            elif kind in _PAX:
                pax = headers.records(extra, start)
            continue
        name = long_name or _name(block, kind)
        if pax:
            name = _text(pax[b"path"]) if b"path" in pax else name
            if b"size" in pax and kind not in _WITHOUT_CONTENT:
                size = headers.number(pax[b"size"], start, base=10)
                at = start + -(-size // BLOCK) * BLOCK
        headers.last = name
        if at > shard.size:
            raise headers.damage(f"ends in the middle of {quoted(name)}", "it is truncated")
        yield Member(name, _kind(kind, name, pax), start, size)
        long_name, pax = "", {}
    headers.check_end(at)


def _kind(kind: bytes, name: str, pax: dict[bytes, bytes]) -> str:
    if kind == _OLD_SPARSE or any(key.startswith(_SPARSE) for key in pax):
        return SPARSE
    if kind in _FILES:  # The oldest format marks a folder by its name alone.
        return FOLDER if name.endswith("/") else FILE
    return {b"5": FOLDER, b"1": LINK, b"2": LINK}.get(kind, OTHER)


def _name(block: bytes, kind: bytes) -> str:
    name = block[:100].partition(b"\0")[0]
    # In GNU's older format, these bytes hold times instead.
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return _text(name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


class _Headers:
    """Reads the blocks of a tar file in order. last: name of the last member, for messages."""

    def __init__(self, shard: ByteRanges) -> None:
        self._shard = shard
        self._start, self._content = 0, b""
        self.last = ""

    def block(self, at: int) -> bytes:
        """Returns the block of 512 bytes at position `at`."""
        inside = at - self._start
        if not 0 <= inside <= len(self._content) - BLOCK:
            self._start, self._content, inside = at, self._shard.read_range(at, max(BLOCK, self._shard.ahead)), 0
        block = self._content[inside : inside + BLOCK]
        if len(block) < BLOCK:
            raise self.damage("has no end mark", "it is truncated") if at else self._not_tar(block)
        return block

    def check_end(self, at: int) -> None:
        """Raises ValueError if anything but zeros follows the end mark at `at`."""
        while at < self._shard.size:
            content = self._content[at - self._start :] or self._shard.read_range(at, _REST)
            if any(content):
                raise ValueError(
                    f"'{self._shard}' continues after its end mark, as if several tar files were joined with cat; keep "
                    "them apart, or join them with `tar --concatenate`."
                )
            at += len(content) or self._shard.size

    def checked(self, block: bytes, at: int) -> tuple[bytes, int]:
        """Returns the type and size in a header, after verifying its checksum."""
        field = block[148:156]
        try:
            stated = int(field.strip(b" \0") or b"0", 8)
        except ValueError:
            stated = -1
        found = sum(block) - sum(field) + 8 * 32
        if stated != found and stated != found - 256 * sum(byte > 127 for byte in block[:148] + block[156:]):
            raise self._not_tar(block) if at == 0 else self.damage("is damaged", f"a checksum at byte {at} is wrong")
        return block[156:157], self.number(block[124:136], at)

    def extra(self, start: int, size: int) -> bytes:
        """Returns the content of a header for a long name or pax records."""
        if size > _MOST_EXTRA:
            raise self.damage("is damaged", f"a header at byte {start - BLOCK} has {size:,} bytes")
        inside = start - self._start
        content = self._content[inside : inside + size]
        content = content if len(content) == size else self._shard.read_range(start, size)
        if len(content) < size:
            raise self.damage("ends in the middle of a header", "it is truncated")
        return content

    def records(self, content: bytes, start: int) -> dict[bytes, bytes]:
        """Returns the records "length key=value\\n" of a pax header."""
        found: dict[bytes, bytes] = {}
        at = 0
        while at < len(content):
            length = self.number(content[at : at + _MOST_DIGITS].partition(b" ")[0], start, base=10)
            key, equals, value = content[at : at + length].partition(b" ")[2].partition(b"=")
            at += length
            if not equals or at > len(content) or not value.endswith(b"\n"):
                raise self.damage("is damaged", f"a pax header at byte {start} is malformed")
            found[key] = value[:-1]
        return found

    def number(self, field: bytes, at: int, *, base: int = 8) -> int:
        """Parses a size, which is stored as digits or, if the first byte is 128, as a big-endian number."""
        try:
            number = (
                int.from_bytes(field[1:], "big") if field[:1] == b"\x80" else int(field.strip(b" \0") or b"0", base)
            )
        except ValueError:
            number = -1
        if number < 0:
            raise self.damage("is damaged", f"a header at byte {at} has no valid size")
        return number

    def damage(self, what: str, why: str) -> ValueError:
        after = f" after {quoted(self.last)}" if self.last and "middle of '" not in what else ""
        return ValueError(f"'{self._shard}' {what}{after} ({why}); pack or download it again.")

    def _not_tar(self, block: bytes) -> ValueError:
        for magic, (name, program) in _COMPRESSED.items():
            if block.startswith(magic):
                return ValueError(
                    f"'{self._shard}' is compressed with {name}, so its files cannot be read one by one; "
                    f"decompress it with `{program}`."
                )
        return ValueError(f"'{self._shard}' is not a tar file; pack it again with `tar cf`.")
