"""The user's own pictures as arrays in an .npz file."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from flowgen.data.sources import NO_LABEL, ArraySource, DataConfig


def read_npz(config: DataConfig, size: tuple[int, int]) -> ArraySource:
    """Returns the arrays `images` (uint8 `n h w` or `n h w c`) and, if present, `labels` (integers `n`).

    Nothing is resized or converted, for arrays mean what they say. Class names are the numbers up to the
    largest label, and -1 marks a picture without label.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no .npz file, a missing array, or one of another type or shape than stated.

    Example:
        np.savez("shapes.npz", images=images, labels=labels)
        source = read_npz(DataConfig("npz", path="shapes.npz"), (32, 32))
    """
    path = Path(config.path)
    if not path.is_file():
        raise FileNotFoundError(f"data.path '{path}' is no file; give the path of an .npz file.")
    arrays = _read_arrays(path)
    if "images" not in arrays:
        raise ValueError(
            f"data.path '{path}' holds the arrays {sorted(arrays)} but no 'images'; "
            f"save it with np.savez(path, images=..., labels=...)."
        )
    images = arrays["images"]
    if images.ndim == 3:
        images = images[..., None]
    _check_images(path, images, size)
    labels = arrays.get("labels")
    if labels is None:
        return ArraySource(images, np.full(len(images), NO_LABEL, np.int32))
    _check_labels(path, labels, len(images))
    names = tuple(str(label) for label in range(labels.max() + 1))
    return ArraySource(images, labels.astype(np.int32), class_names=names)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        # Zip alone: given anything else, np.load would try to unpickle it. It also leaks files that it opens.
        with path.open("rb") as file, zipfile.ZipFile(file), np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"data.path '{path}' is no readable .npz file of plain arrays ({error}); "
            f"save it with np.savez(path, images=..., labels=...)."
        ) from error


def _check_images(path: Path, images: Shaped[np.ndarray, "..."], size: tuple[int, int]) -> None:
    where = f"'images' in data.path '{path}'"
    if np.issubdtype(images.dtype, np.floating):
        raise ValueError(
            f"{where} is {images.dtype}; save uint8 levels 0..255, for example with flowgen.data.to_uint8 "
            f"if the values are in [-1, 1]."
        )
    if images.dtype != np.uint8:
        raise ValueError(f"{where} is {images.dtype}; save uint8 levels 0..255.")
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(
            f"{where} has shape {images.shape}; save at least one picture as (n, height, width) "
            f"or (n, height, width, channels)."
        )
    if images.shape[1:3] != size:
        raise ValueError(
            f"{where} is {images.shape[1]}x{images.shape[2]} but model.image_size is {size[0]}x{size[1]}; "
            f"resize the array or set model.image_size to ({images.shape[1]}, {images.shape[2]})."
        )


def _check_labels(path: Path, labels: Shaped[np.ndarray, "..."], count: int) -> None:
    where = f"'labels' in data.path '{path}'"
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (count,):
        raise ValueError(
            f"{where} is {labels.dtype} of shape {labels.shape}; save integers of shape ({count},), "
            f"one for each picture."
        )
    if labels.min() < NO_LABEL:
        raise ValueError(f"{where} contains {labels.min()}; labels start at 0, and -1 marks a picture without.")
