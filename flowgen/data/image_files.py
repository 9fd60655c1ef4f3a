"""Reads image files of any colour mode and orientation into uint8 arrays of a requested shape."""

from __future__ import annotations

import contextlib
import io
import math
import struct
import threading
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from jaxtyping import UInt8

from flowgen.data.depths import Samples, grey_bytes, hide_by_value, samples_of, without_range
from flowgen.data.media import as_pillow, image_formats, pillow
from flowgen.data.stored import AnyFile, ChangedData, StoredFile, stored
from flowgen.data.unreadable import Unreadable
from flowgen.data.upright import Turn, image_turn, without_metadata

if TYPE_CHECKING:
    from PIL.Image import Image

Crop = Literal["center", "none"]
Box = tuple[float, float, float, float]
T = TypeVar("T")
# Errors that Pillow's decoders raise for damaged files; only OSError is documented.
_DECODE_ERRORS = (
    *(OSError, ValueError, SyntaxError, EOFError, TypeError, AttributeError, AssertionError, Warning),
    *(LookupError, ArithmeticError, RuntimeError, BufferError, MemoryError, struct.error, zlib.error),
)
# Pillow's own limit. Decoding an image of this size needs 0.7 GB of memory, or four times as much for WebP.
_MOST_PIXELS = 178_956_970
_MOST_OF_WEBP = _MOST_PIXELS // 4
# Larger images are decoded one at a time, to limit the total memory of all threads.
_LARGE = 1 << 26
_ONE_LARGE = threading.Lock()
# Number of pixels that are composited on white and resized at a time.
_BAND = 1 << 22


class UnreadableImage(Unreadable):
    """Raised if a file cannot be decoded. The message contains the file and the reason."""


def read_image(
    path: AnyFile, *, size: tuple[int, int], channels: int, crop: Crop
) -> UInt8[np.ndarray, "height width c"]:
    """Returns the image in a file, turned upright, as a uint8 array of shape (*size, channels).

    Transparent images are composited on white. Samples of more than 8 bits are reduced to their highest 8 bits. Only
    the first frame of an animation is read. Unreadable metadata are ignored. While reading a damaged TIFF file, libtiff
    may print a message.

    Raises:
        UnreadableImage: the pixels are damaged or truncated; the image has more than 178 million pixels (44 million for
        WebP); the format is not one of `image_formats`; or the range of the samples is unknown (see `without_range`).

    Example:
        image = read_image("cat.jpg", size=(64, 64), channels=3, crop="center")
    """

    def pixels(image: Image, turn: Turn) -> UInt8[np.ndarray, "height width c"]:
        samples = samples_of(image, path)
        file: Any = getattr(image, "fp", None)
        # Opening a file reads only its header, so a truncated file fails here.
        image.load()
        if samples.bits == 16 and image.mode == "RGB" and "transparency" in image.info:
            hide_by_value(image, file)
        asked = turn.size(*size)
        box = _box(image.size, asked, crop, turn)
        mode = "L" if channels == 1 else "RGB"
        fitted = _resized(image, asked, box, lambda part: _in_mode(_flatten(part, samples), mode))
        return np.ascontiguousarray(turn.apply(fitted.reshape(*asked, channels)))

    return _with_image(path, pixels)


def read_image_size(path: AnyFile) -> tuple[int, int]:
    """Returns the (height, width) of the image in a file, after turning it upright. Reads only the header.

    Raises UnreadableImage if the header alone shows that `read_image` would fail.

    Example:
        height, width = read_image_size("cat.jpg")
    """
    return _with_image(path, lambda image, turn: turn.size(image.height, image.width))


def is_colour(path: AnyFile) -> bool:
    """Returns whether the image in a file is stored in colour. Reads only the header.

    Raises UnreadableImage if the header alone shows that `read_image` would fail.

    Example:
        is_colour("cat.jpg")  # True
    """
    return _with_image(path, lambda image, turn: pillow().getmodebase(image.mode) != "L")


def _with_image(path: AnyFile, use: Callable[[Image, Turn], T]) -> T:
    """Applies `use` to an open image and its turn. If the image is unreadable, retries without metadata."""
    file = stored(path)
    if isinstance(file, Path) and file.exists() and not file.is_file():
        raise UnreadableImage(f"'{file}' (not a file)")
    try:
        with _opened(file) as image:
            return use(image, image_turn(image))
    except UnreadableImage:
        plain = None
        with contextlib.suppress(OSError):
            plain = without_metadata(file.read_bytes())
        if plain is None:
            raise
    content, turn = plain
    with _opened(file, content) as image:
        return use(image, turn)


@contextlib.contextmanager
def _opened(path: StoredFile, content: bytes | None = None) -> Generator[Image]:
    """Yields an open image. Converts Pillow's errors to UnreadableImage. content: bytes to read instead of the file."""
    module = pillow()
    import PIL

    try:
        # Given a name, Pillow would memory-map the file and then lose the orientation of a TIFF. The list of formats
        # excludes those, such as PostScript, for which Pillow starts external programs.
        with (
            path.open("rb") if content is None else io.BytesIO(content) as file,
            module.open(file, formats=image_formats()) as image,
        ):
            count, most = image.width * image.height, _MOST_OF_WEBP if image.format == "WEBP" else _MOST_PIXELS
            if count > most:
                raise module.DecompressionBombError(f"{count:,} pixels, but the limit is {most:,}")
            if reason := without_range(image):
                raise UnreadableImage(f"'{path}' ({reason})")
            with _ONE_LARGE if count > _LARGE else contextlib.nullcontext():
                yield image
    except (UnreadableImage, ChangedData):
        raise
    except PIL.UnidentifiedImageError as error:
        raise UnreadableImage(f"'{path}' (not in a supported image format)") from error
    except MemoryError as error:
        raise UnreadableImage(f"'{path}' (too large for the available memory)") from error
    except (*_DECODE_ERRORS, module.DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"'{path}' ({reason})") from error


def fit(image: Image, size: tuple[int, int], crop: Crop, *, pixel_aspect: float = 1.0) -> Image:
    """Returns the image resized to `size` (height, width) with antialiased bilinear resampling.

    If `crop` is "center", the image is scaled, with its aspect ratio unchanged, until it just covers `size`, and
    only the centre is kept. If `crop` is "none", everything is kept, and height and width are scaled independently.

    pixel_aspect: width of a pixel divided by its height, as displayed; 1 for square pixels. It has no effect if `crop`
    is "none".

    Example:
        image = fit(image, (64, 64), "center")
    """
    box = _box(image.size, size, crop, Turn(), pixel_aspect)
    return image.resize(size[::-1], pillow().Resampling.BILINEAR, box=box)


def fit_array(
    images: UInt8[np.ndarray, "b height width c"], size: tuple[int, int], crop: Crop
) -> UInt8[np.ndarray, "b new_height new_width c"]:
    """Returns the images resized to `size`. Pillow is required only if the images have another size.

    Example:
        images = fit_array(images, (16, 16), "center")
    """
    if images.shape[1:3] == size:
        return images
    fitted = [fit(as_pillow(image), size, crop) for image in images]
    return np.stack([np.asarray(image, dtype=np.uint8).reshape(*size, images.shape[-1]) for image in fitted])


def _box(image_size: tuple[int, int], size: tuple[int, int], crop: Crop, turn: Turn, pixel_aspect: float = 1.0) -> Box:
    """Returns left, top, right and bottom of the part that `fit` keeps, in pixels of the image before the turn."""
    (columns, rows), (height, width) = image_size, size
    if crop == "none":
        return 0.0, 0.0, float(columns), float(rows)
    shown = max(1, round(columns * pixel_aspect))
    wide = shown * height > rows * width
    scaled = (shown * height // rows, height) if wide else (width, rows * width // shown)
    # The crop's offsets are rounded in the displayed image, in which a turn may have mirrored the axes.
    mirrored = (turn.mirror_y, turn.mirror_x) if turn.swap else (turn.mirror_x, turn.mirror_y)
    spare = [scaled[0] - width, scaled[1] - height]
    left, top = (
        room - round(room / 2) if mirror else round(room / 2) for room, mirror in zip(spare, mirrored, strict=True)
    )
    across, down = columns / scaled[0], rows / scaled[1]
    return (
        left * across,
        top * down,
        min((left + width) * across, float(columns)),
        min((top + height) * down, float(rows)),
    )


def _resized(image: Image, size: tuple[int, int], box: Box, flat: Callable[[Image], Image]) -> UInt8[np.ndarray, "..."]:
    """Returns the part of an image in a box, composited on white and resized. Processes large images band by band."""
    left, top, right, bottom = box
    step = (bottom - top) / size[0]
    # The resampling filter extends to each side by one output pixel or, if the image is enlarged, by one input pixel.
    reach = [math.ceil(max(1.0, scale)) + 1 for scale in ((right - left) / size[1], step)]
    first, last = max(0, math.floor(left) - reach[0]), min(image.width, math.ceil(right) + reach[0])
    rows = max(1, math.floor(_BAND / ((last - first) * step))) if image.width * image.height > _BAND else size[0]
    bands = []
    for row in range(0, size[0], rows):
        begin, end = top + row * step, min(top + (row + rows) * step, bottom)
        high, low = max(0, math.floor(begin) - reach[1]), min(image.height, math.ceil(end) + reach[1])
        part = flat(image.crop((first, high, last, low)))
        inside = (left - first, max(0.0, begin - high), min(right - first, part.width), min(end - high, part.height))
        asked = (size[1], min(rows, size[0] - row))
        bands.append(np.asarray(part.resize(asked, pillow().Resampling.BILINEAR, box=inside), dtype=np.uint8))
    return np.concatenate(bands)


def _flatten(image: Image, samples: Samples) -> Image:
    """Returns the image composited on white, with samples of more than 8 bits reduced to their highest 8 bits."""
    clear = image.info.get("transparency")
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        grey = grey_bytes(levels, samples)
        return pillow().fromarray(grey if clear is None else np.where(levels == clear, np.uint8(255), grey))
    if image.has_transparency_data:
        if samples.bits != 8 and image.mode == "L":
            image.info["transparency"] = _eight_bit(image.info["transparency"], samples.bits)
        return on_white(image)
    return image


def _in_mode(image: Image, mode: str) -> Image:
    return image if image.mode == mode else image.convert(mode)  # otherwise, Pillow would copy the image


def on_white(image: Image) -> Image:
    """Returns an image composited on white.

    Example:
        image = on_white(image)
    """
    image = image.convert("RGBA")
    return pillow().alpha_composite(pillow().new("RGBA", image.size, "white"), image)


def _eight_bit(clear: int, depth: int) -> int:
    """Returns the transparent grey level of a PNG file, scaled to 8 bits as Pillow scales the pixels."""
    return clear * 255 // ((1 << depth) - 1)
