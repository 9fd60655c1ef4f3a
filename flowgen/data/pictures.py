"""From a picture of any size, mode and orientation to bytes of the asked shape."""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Generator
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import UInt8

from flowgen.data.media import pillow

if TYPE_CHECKING:
    from PIL.Image import Image

Crop = Literal["center", "none"]
_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
# What Pillow's decoders raise on damaged files, besides the OSError it documents.
_DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error)


class UnreadablePicture(ValueError):
    """Raised for a file that cannot be decoded; its text names the file and the reason."""


def read_picture(
    path: str | os.PathLike[str], *, size: tuple[int, int], channels: int, crop: Crop
) -> UInt8[np.ndarray, "height width c"]:
    """Returns the picture in a file as uint8 of shape (*size, channels), turned upright, on white.

    Transparency is laid on white, 16-bit grey keeps its high byte, an animation gives its first frame.

    Raises:
        UnreadablePicture: damaged, truncated, absurdly large or foreign file.

    Example:
        image = read_picture("cat.jpg", size=(64, 64), channels=3, crop="center")
    """
    with _opened(path) as file:
        import PIL.ImageOps

        # Opening reads the header alone; a truncated file only fails here.
        file.load()
        image = PIL.ImageOps.exif_transpose(file)
    image = fit(_flatten(image).convert("L" if channels == 1 else "RGB"), size, crop)
    return np.asarray(image, dtype=np.uint8).reshape(*size, channels)


def picture_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Returns (height, width) of the picture in a file, turned upright; reads its header alone.

    Raises UnreadablePicture: a foreign file, or a damaged header.

    Example:
        height, width = picture_size("cat.jpg")
    """
    with _opened(path) as file:
        sideways = file.getexif().get(_EXIF_ORIENTATION, 1) in _SIDEWAYS
        return (file.width, file.height) if sideways else (file.height, file.width)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Generator[Image]:
    """Yields an open picture; what Pillow raises meanwhile becomes UnreadablePicture."""
    module = pillow()
    import PIL

    try:
        with module.open(path) as file:
            yield file
    except PIL.UnidentifiedImageError as error:
        raise UnreadablePicture(f"'{path}' (no picture inside)") from error
    except (*_DECODE_ERRORS, module.DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadablePicture(f"'{path}' ({reason})") from error


def fit(image: Image, size: tuple[int, int], crop: Crop) -> Image:
    """Returns the image at `size` (height, width) with antialiased bilinear resampling.

    "center" scales until the image covers `size` and cuts the middle out (short side to S, then centre crop),
    as the published models were trained. "none" cuts nothing and stretches each side by itself.

    Example:
        image = fit(image, (64, 64), "center")
    """
    height, width = size
    bilinear = pillow().Resampling.BILINEAR
    if crop == "none":
        return image.resize((width, height), bilinear)
    if image.width * height <= image.height * width:
        scaled = (width, image.height * width // image.width)
    else:
        scaled = (image.width * height // image.height, height)
    image = image.resize(scaled, bilinear)
    left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
    return image.crop((left, top, left + width, top + height))


def fit_array(
    images: UInt8[np.ndarray, "b height width c"], size: tuple[int, int], crop: Crop
) -> UInt8[np.ndarray, "b new_height new_width c"]:
    """Returns every image at `size`; the array itself, without Pillow, where it already has that size.

    Example:
        images = fit_array(images, (16, 16), "center")
    """
    if images.shape[1:3] == size:
        return images
    fitted = [
        fit(pillow().fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image), size, crop) for image in images
    ]
    return np.stack([np.asarray(image, dtype=np.uint8).reshape(*size, images.shape[-1]) for image in fitted])


def _flatten(image: Image) -> Image:
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        return pillow().fromarray((np.clip(levels, 0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = pillow().new("RGBA", image.size, "white")
        return pillow().alpha_composite(paper, image)
    return image
