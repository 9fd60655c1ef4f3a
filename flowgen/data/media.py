"""Converts pixels between floats and bytes, arranges images in grids, and writes image files."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from flowgen.arrays import check_bytes, check_floating
from flowgen.packages import need

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # for writing
# Suffixes for reading, and Pillow's names for their formats.
IMAGE_FORMATS = {
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    ".webp": "WEBP",
    **dict.fromkeys((".bmp", ".dib"), "BMP"),
    ".gif": "GIF",
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PPM"),
    **dict.fromkeys((".jp2", ".j2k"), "JPEG2000"),
    **dict.fromkeys((".tga",), "TGA"),
    ".pcx": "PCX",
    ".avif": "AVIF",
}
_GRID_COLOUR = 255


def to_uint8(x: Float[Array | np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Returns pixels in [-1, 1] as bytes: round(127.5 (x + 1)), clipped to 0..255.

    -inf becomes 0, inf becomes 255, and NaN becomes 128, so that a grid can show failed samples beside others.

    Example:
        pixels = to_uint8(samples)
    """
    check_floating("x", x)
    levels = (np.clip(np.asarray(x, dtype=np.float32), -1, 1) + 1) * 127.5
    return np.nan_to_num(np.rint(levels), nan=128).astype(np.uint8)


def from_uint8(
    images: UInt8[Array | np.ndarray, "*shape"],
) -> Float[Array | np.ndarray, "*shape"]:
    """Returns float32 pixels in [-1, 1]: images / 127.5 - 1, the convention of the published TARFlow weights.

    The values 0 and 255 become exactly -1 and 1, and `to_uint8` restores all values exactly. NumPy arrays yield NumPy
    arrays, and JAX arrays, also under `jax.jit`, yield JAX arrays.

    Example:
        x = from_uint8(batch.pixels)
    """
    check_bytes("images", images)
    return images.astype(np.float32) / 127.5 - 1


def image_grid(
    images: UInt8[np.ndarray, "b height width c"],
    columns: int | None = None,
    *,
    padding: int = 2,
    scale: int = 1,
) -> UInt8[np.ndarray, "grid_height grid_width c"]:
    """Arranges images row by row in a grid, with `padding` white pixels between and around them.

    `columns` is the number of images per row; None means ceil(sqrt(b)), which makes the grid roughly square. Images,
    but not the padding, are enlarged by the factor `scale`, for example to make 8×8 digits visible. Empty cells in the
    last row are white.

    Raises:
        ValueError: there are no images, `columns` or `scale` is below 1, or `padding` is negative.

    Example:
        grid = image_grid(to_uint8(samples), columns=10, scale=4)
    """
    count, height, width, channels = images.shape
    if columns is None:
        columns = math.ceil(math.sqrt(count))
    if count == 0 or columns < 1 or scale < 1 or padding < 0:
        raise ValueError(
            f"An image grid needs at least one image, columns >= 1, scale >= 1 and padding >= 0, "
            f"not {count} images, columns={columns}, scale={scale}, padding={padding}."
        )
    rows = math.ceil(count / columns)
    cells = np.full((rows * columns, height * scale, width * scale, channels), _GRID_COLOUR, np.uint8)
    cells[:count] = images.repeat(scale, axis=1).repeat(scale, axis=2)
    cells = np.pad(cells, ((0, 0), (padding, 0), (padding, 0), (0, 0)), constant_values=_GRID_COLOUR)
    rows_of_cells = cells.reshape(rows, columns, *cells.shape[1:])
    grid = rows_of_cells.transpose(0, 2, 1, 3, 4).reshape(rows * cells.shape[1], columns * cells.shape[2], channels)
    return np.pad(grid, ((0, padding), (0, padding), (0, 0)), constant_values=_GRID_COLOUR)


def save_image(path: str | os.PathLike[str], image: Shaped[np.ndarray, "..."]) -> None:
    """Writes a uint8 image in the format of the path's suffix: .png, .jpg, .jpeg, .webp or .bmp.

    After an error, no incomplete file is left, and an existing file is unchanged. Missing folders are created.

    Raises:
        ValueError: `path` has another suffix, or `image` is not a uint8 array of shape (height, width), (height, width,
            1) or (height, width, 3).
        OSError: `path` is not writable; see `check_writable`.
        ModuleNotFoundError: Pillow is not installed.

    Example:
        save_image("samples.png", image_grid(pixels))
    """
    check_image_path(path)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,)):
        raise ValueError(
            f"image is {image.dtype} of shape {image.shape}; save_image needs uint8 of shape (height, width), "
            "(height, width, 1) or (height, width, 3). to_uint8 converts floats."
        )
    saved = as_pillow(image)
    with atomic_file(path) as file:
        saved.save(file, format=pillow().registered_extensions()[Path(path).suffix.lower()])


def check_image_path(path: str | os.PathLike[str]) -> None:
    """Raises the error, if any, that `save_image` would raise because of this path or because Pillow is missing.

    Call it before a long computation of the image to save.

    Example:
        check_image_path(arguments.out)
    """
    if Path(path).suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"the path '{path}' must end in one of {', '.join(IMAGE_SUFFIXES)}.")
    pillow()
    check_writable(path)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises an OSError if no file can be written at `path`. Creates nothing.

    Folders of `path` may be missing, because `atomic_file` creates them.

    Raises:
        FileNotFoundError: one of the folders in the path is a link to a missing place.
        NotADirectoryError: one of the folders in the path is a file.
        IsADirectoryError: the path is a folder.
        PermissionError: the user may not write to the folder, or to the existing file at `path`.

    Example:
        check_writable("out/samples.npz")
    """
    path = Path(path)
    folder = nearest_place(path.parent)
    if not folder.is_dir():
        raise NotADirectoryError(f"Cannot write '{path}': '{folder}' is a file, not a folder; choose another path.")
    if path.is_dir():
        raise IsADirectoryError(f"Cannot write '{path}': it is a folder; name a file inside it.")
    if not os.access(folder, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise PermissionError(f"Cannot write '{path}': permission denied; choose a path you may write to.")


def nearest_place(path: Path) -> Path:
    """Returns the path or, if it does not exist, the nearest of its parents that exists.

    Raises FileNotFoundError if the path or one of its parents is a link to a missing place, such as an absent disk.

    Example:
        nearest_place(Path("runs/new"))  # "runs", where the new folder would be created
    """
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            raise FileNotFoundError(
                f"'{place}' is a link to '{os.readlink(place)}', which is missing; create it, or choose another path."
            )
    return next(place for place in (path, *path.absolute().parents) if place.exists())


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Generator[None]:
    """Returns a context that adds a path to errors of writing, such as that of a full disk, which lack it.

    Example:
        with naming("latents/mean.npy"):
            np.save("latents/mean.npy", mean)
    """
    try:
        yield
    except OSError as error:
        # NumPy reports a full disk without the error number of the system.
        if error.filename is not None or (error.errno is None and "requested and" not in str(error)):
            raise
        reason = error.strerror or "the disk may be full"
        raise OSError(f"Cannot write '{path}': {reason}; free some space, or choose another path.") from error


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Generator[IO[bytes]]:
    """Returns a context manager that opens a temporary file for writing bytes, and finally renames it to `path`.

    On any error, the temporary file is deleted, and an existing file at `path` stays as it is. Missing folders are
    created.

    Raises the same errors as `check_writable`.

    Raises OSError, with the path in its message, if the file cannot be written.

    Example:
        with atomic_file("samples.npz") as file:
            np.savez(file, images=images)
    """
    check_writable(path)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    # Mode "x" creates the file exclusively, so an existing file or link is never written to.
    with naming(path), temporary.open("xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def image_formats() -> tuple[str, ...]:
    """Returns Pillow's names of the image formats that can be read. Suffixes are not considered.

    Example:
        image = pillow().open("image.png", formats=image_formats())
    """
    return tuple(sorted(set(IMAGE_FORMATS.values()) & set(pillow().registered_extensions().values())))


def pillow() -> Any:
    """Returns the module `PIL.Image`, or raises a ModuleNotFoundError that names the package.

    Example:
        image = pillow().open("image.png")
    """
    return need("PIL.Image", "Reading and writing images", "pillow")


def as_pillow(image: UInt8[np.ndarray, "height width *c"]) -> Any:
    """Converts an array to a Pillow image, after removing the axis of a single channel.

    Raises ModuleNotFoundError if Pillow is missing.

    Example:
        as_pillow(np.zeros((8, 8, 1), np.uint8)).mode  # "L"
    """
    return pillow().fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
