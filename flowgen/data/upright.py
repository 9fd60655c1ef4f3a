"""Reads the orientation of images (right-angle turns and mirroring) from EXIF, even if other metadata are malformed."""

from __future__ import annotations

import dataclasses
import re
import struct
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

if TYPE_CHECKING:
    from PIL.Image import Image

_ORIENTATION = 0x0112
# Unsigned and signed integers of one, two and four bytes.
_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}
_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
_EXIF = b"Exif\0\0"
_TIFF = {b"II*\0": "<", b"MM\0*": ">"}
# TIFF tags that affect the pixels, including the orientation.
_TIFF_PIXELS = {
    *(254, 255, 256, 257, 258, 259, 262, 263, 266, 273, _ORIENTATION, 277, 278, 279, 284, 292, 293, 317, 320),
    *(322, 323, 324, 325, 330, 338, 339, 347, 512, 513, 514, 530, 531, 532),
}
# PNG chunks that affect the pixels.
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


@dataclasses.dataclass(frozen=True)
class Turn:
    """One of the eight orientations of an image: rows and columns may be swapped, and then each axis may be mirrored.

    Example:
        clockwise = Turn(swap=True, mirror_x=True)
        upright = clockwise.apply(pixels)
    """

    swap: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    def apply(self, pixels: UInt8[np.ndarray, "height width c"]) -> UInt8[np.ndarray, "new_height new_width c"]:
        """Returns a view of the turned pixels."""
        pixels = pixels.swapaxes(0, 1) if self.swap else pixels
        return pixels[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1]

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Returns (height, width) after the turn."""
        return (width, height) if self.swap else (height, width)


# The turns by EXIF orientation number.
_TURNS = {
    1: Turn(),
    2: Turn(mirror_x=True),
    3: Turn(mirror_x=True, mirror_y=True),
    4: Turn(mirror_y=True),
    5: Turn(swap=True),
    6: Turn(swap=True, mirror_x=True),
    7: Turn(swap=True, mirror_x=True, mirror_y=True),
    8: Turn(swap=True, mirror_y=True),
}


def exif_turn(exif: bytes) -> Turn:
    """Returns the turn that an EXIF block's orientation tag (0x112) specifies, or the identity without a valid tag.

    Example:
        turn = exif_turn(image.info.get("exif", b""))
    """
    while exif.startswith(_EXIF):
        exif = exif[len(_EXIF) :]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 10:
        return Turn()
    (at,) = struct.unpack_from(f"{order}I", exif, 4)
    if at + 2 > len(exif):
        return Turn()
    (count,) = struct.unpack_from(f"{order}H", exif, at)
    for entry in range(at + 2, min(at + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
        if tag == _ORIENTATION and kind in _INTEGERS:
            (number,) = struct.unpack_from(order + _INTEGERS[kind], exif, entry + 8)
            return _TURNS.get(number, Turn())
    return Turn()


def image_turn(image: Image) -> Turn:
    """Returns the turn in the metadata of an open image, from EXIF or, if there is no EXIF, from the same tag in XMP.

    For TIFF files, returns the identity, because Pillow itself turns TIFF images.

    Example:
        turn = image_turn(image)
    """
    if image.format == "TIFF":
        return Turn()
    if image.format == "PNG" and "exif" not in image.info:
        image.load()  # EXIF may follow the pixels.
    exif = image.info.get("exif", b"")
    # ImageMagick writes EXIF into PNG as lines of text: a name, a length, and hexadecimal digits.
    profile = str(image.info.get("Raw profile type exif", "")).split("\n", 3)[-1]
    if not exif and re.fullmatch(r"(\s*[0-9a-fA-F]{2})+\s*", profile):
        exif = bytes.fromhex(profile)
    if exif:
        return exif_turn(exif)
    xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
    found = re.search(rb'tiff:Orientation(="|>)([1-8])', xmp.encode() if isinstance(xmp, str) else xmp)
    return _TURNS[int(found[2])] if found else Turn()


def without_metadata(content: bytes) -> tuple[bytes, Turn] | None:
    """Removes the metadata that do not affect the pixels from a JPEG, PNG or TIFF file.

    Returns the file's new content and its EXIF turn, or None for other formats.

    Example:
        plain, turn = without_metadata(Path("cat.jpg").read_bytes())
    """
    if content.startswith(_JPEG):
        kept, exif = _plain_jpeg(content)
    elif content.startswith(_PNG):
        kept, exif = _plain_png(content)
    elif content[:4] in _TIFF:
        kept, exif = _plain_tiff(content, _TIFF[content[:4]]), b""
    else:
        return None
    return kept, exif_turn(exif)


def _plain_jpeg(content: bytes) -> tuple[bytes, bytes]:
    kept, exif, at = [_JPEG], b"", len(_JPEG)
    while content[at : at + 1] == b"\xff" and at + 4 <= len(content):
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker == 0xDA:  # start of the pixels
            break
        segment, at = content[at : at + 2 + length], at + 2 + length
        if marker == 0xE1 and segment[4:].startswith(_EXIF):
            exif = exif or segment[4:]
        # JFIF (0xE0) and Adobe (0xEE) specify the colour space. Other application segments and comments are left out.
        if not (0xE1 <= marker <= 0xEF or marker == 0xFE) or marker == 0xEE:
            kept.append(segment)
    return b"".join(kept) + content[at:], exif


def _plain_png(content: bytes) -> tuple[bytes, bytes]:
    kept, exif, at = [_PNG], b"", len(_PNG)
    while at + 12 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        name = content[at + 4 : at + 8]
        if name in _PNG_PIXELS:
            kept.append(content[at:end])
        elif name == b"eXIf":
            exif = content[at + 8 : end - 4]
        at = end
    return b"".join(kept), exif


def _plain_tiff(content: bytes, order: str) -> bytes:
    """Returns the file with only those tags of its first directory that affect the pixels."""
    if len(content) < 8 or (at := struct.unpack_from(f"{order}I", content, 4)[0]) + 2 > len(content):
        return content
    (count,) = struct.unpack_from(f"{order}H", content, at)
    end = min(at + 2 + 12 * count, len(content))
    entries = [content[place : place + 12] for place in range(at + 2, end - 11, 12)]
    kept = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in _TIFF_PIXELS]
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept)
    return content[:at] + directory.ljust(end + 4 - at, b"\0") + content[end + 4 :]
