"""Converts grey levels of more than 8 bits to bytes, and detects images whose range of values is unknown.

In most formats, the number of bits determines the range of the samples. A PGM file instead states its largest value,
and Pillow scales the samples accordingly. Floating-point, signed and 32-bit samples may be in any unit, so the values
of black and white are unknown.
"""

from __future__ import annotations

from io import BufferedIOBase
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Integer, UInt8

from flowgen.data.media import pillow
from flowgen.data.stored import AnyFile, stored

if TYPE_CHECKING:
    from PIL.Image import Image

# TIFF tags, and two tag values.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2
_PNG_BITS_AT = 24
_CONVERT = "; convert it to unsigned 8 or 16 bits"


class Samples(NamedTuple):
    """The format of an image's samples, which are the values of its channels at each pixel.

    bits: number of bits per sample: in the file for PNG, but after decoding by Pillow for other formats.
    white_is_zero: whether the value 0 means white and the largest value black, as in some TIFF files.

    Example:
        samples = Samples(bits=12)
    """

    bits: int = 8
    white_is_zero: bool = False


def samples_of(image: Image, path: AnyFile) -> Samples:
    """Returns the bits per sample of an open image, and whether zero means white.

    path: the image file, which is read again because Pillow does not expose the whole header.

    Example:
        samples = samples_of(image, "cat.tif")
    """
    if image.format == "PNG":
        with stored(path).open("rb") as file:
            return Samples(file.read(_PNG_BITS_AT + 1)[_PNG_BITS_AT])
    if not image.mode.startswith("I"):
        return Samples()
    if image.format == "TIFF":
        # At 8 bits or fewer, Pillow itself inverts images in which zero is white.
        return Samples(_tag(image, _BITS, 1), _tag(image, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO)
    # Pillow scales the grey levels of JPEG 2000 and PGM images to 16 bits.
    return Samples(16)


def without_range(image: Image) -> str:
    """Returns the reason why the range of an image's samples is unknown, and a remedy; "" if the range is known.

    Example:
        without_range(image)  # "has floating-point samples, ...; convert it to unsigned 8 or 16 bits"
    """
    if image.mode == "F":
        return f"has floating-point samples, whose range is unknown{_CONVERT}"
    if image.format != "TIFF":
        return ""
    bits = _tag(image, _BITS, 1)
    if _tag(image, _SAMPLE_FORMAT, 1) == _SIGNED:
        return f"has signed {bits}-bit samples, whose range is unknown{_CONVERT}"
    if image.mode.startswith("I") and bits > 16:
        return f"has {bits}-bit samples, whose range is unknown{_CONVERT}"
    return ""


def grey_bytes(levels: Integer[np.ndarray, "height width"], samples: Samples) -> UInt8[np.ndarray, "height width"]:
    """Returns the highest 8 bits of grey levels, inverted if necessary so that 0 is black.

    Example:
        grey_bytes(np.array([[0x9C4]]), Samples(bits=12))  # 0x9C
    """
    high = (np.clip(levels, 0, (1 << samples.bits) - 1) >> (samples.bits - 8)).astype(np.uint8)
    return np.invert(high) if samples.white_is_zero else high


def hide_by_value(image: Image, file: BufferedIOBase) -> None:
    """Makes each pixel of a 16-bit colour PNG transparent if all 16 bits of each sample match the transparent colour.

    image: the high bytes of the samples, as decoded by Pillow. file: the file from which Pillow read the image.

    Example:
        hide_by_value(image, file)
    """
    clear = image.info.pop("transparency")
    file.seek(0)
    with pillow().open(file, formats=("PNG",)) as low:
        # If the samples are read as little-endian, Pillow keeps the low bytes instead of the high ones.
        low.tile = [(*tile[:3], "RGB;16L") for tile in low.tile]
        low.load()
        alpha = pillow().new("L", image.size, 0)
        for band, level in enumerate(clear):
            for part, byte in ((image, level >> 8), (low, level & 0xFF)):
                other = part.getchannel(band).point([0 if value == byte else 255 for value in range(256)])
                alpha.paste(255, mask=other)
    image.putalpha(alpha)


def _tag(image: Image, number: int, default: int) -> int:
    """Returns the first value of a TIFF tag."""
    value = getattr(image, "tag_v2", {}).get(number, default)
    return int(value[0] if isinstance(value, tuple) else value)
