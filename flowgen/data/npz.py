"""Reads the user's own images from arrays in an .npz file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from flowgen.data.bucket_files import bucket_file
from flowgen.data.classes import checked_names, numbered_classes, with_classes
from flowgen.data.dataset import NO_LABEL, ArrayDataset, DataConfig
from flowgen.data.stored import StoredFile
from flowgen.documents import ARRAY_DAMAGE
from flowgen.places import is_remote

_ARRAYS = ("images", "labels", "class_names")
# A label at or above this value must be smaller than the number of labels. Otherwise, it is unlikely to be a class.
MOST_SPARSE = 1 << 16


def read_npz(config: DataConfig, size: tuple[int, int]) -> ArrayDataset:
    """Returns the images of an .npz file and, if present, their labels.

    The array `images` is uint8 of shape `n height width` or `n height width c`. The optional array `labels` contains
    one integer per image; -1 marks an image without a label. Images are not resized or converted. Other arrays are
    ignored. If the file has an array of strings `class_names`, labels are mapped to `config.classes` by name.
    Otherwise, labels are indices into `config.classes`. If `config.classes` is empty too, the classes are named "0",
    "1" and so on, up to the largest label.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an .npz file, an array is missing or has the wrong type or shape, or a label is not
        a class number.

    Example:
        np.savez("shapes.npz", images=images, labels=labels, class_names=["circle", "square"])
        dataset = read_npz(DataConfig("npz", path="shapes.npz"), (32, 32))
    """
    path = _file(config.path)
    arrays, names = _read_arrays(path, _ARRAYS)
    if "images" not in arrays:
        raise ValueError(
            f"data.path '{path}' has the arrays {names}, but no 'images'; "
            f"save it with np.savez(path, images=..., labels=...)."
        )
    images = arrays["images"]
    if images.ndim == 3:
        images = images[..., None]
    _check_images(path, images, size)
    if "labels" not in arrays:
        return ArrayDataset(images, np.full(len(images), NO_LABEL, np.int32))
    class_names = _named_classes(path, arrays, len(images))
    if "class_names" not in arrays and config.classes and class_names:
        absent = f"data.path '{path}' has no array 'class_names', so its labels are"
        class_names = numbered_classes(len(class_names), config.classes, f"'labels' in data.path '{path}'", absent)
    dataset = ArrayDataset(images, arrays["labels"].astype(np.int32), class_names=class_names)
    return with_classes(dataset, config.classes, f"data.path '{path}'")


def npz_classes(path: str) -> tuple[str, ...]:
    """Returns the class names in an .npz file, without reading its images. Raises the same errors as `read_npz`.

    Example:
        npz_classes("shapes.npz")  # ("circle", "square")
    """
    file = _file(path)
    arrays, _ = _read_arrays(file, ("labels", "class_names"))
    return _named_classes(file, arrays, None) if "labels" in arrays else ()


def npz_marks(path: str) -> dict[str, int]:
    """Returns the checksums that an .npz file stores for the arrays that `read_npz` reads.

    Example:
        npz_marks("shapes.npz")  # {"images.npy": 2774512934, "labels.npy": 1037565863}
    """
    with _file(path).open("rb") as opened, zipfile.ZipFile(opened) as file:
        return {part.filename: part.CRC for part in file.infolist() if Path(part.filename).stem in _ARRAYS}


def _file(path: str) -> StoredFile:
    return bucket_file(path) if is_remote(path) else Path(path)


def _named_classes(path: StoredFile, arrays: dict[str, np.ndarray], count: int | None) -> tuple[str, ...]:
    """Returns the class names into which the labels are indices. count: number of images, if known."""
    labels = arrays["labels"]
    _check_labels(path, labels, labels.size if count is None else count)
    largest = int(labels.max()) if labels.size else NO_LABEL
    names = arrays.get("class_names")
    if names is None:
        if largest >= max(MOST_SPARSE, labels.size):
            raise ValueError(
                f"'labels' in data.path '{path}' contains {largest}, which is too large for {labels.size} images; "
                "number the classes from 0 without gaps."
            )
        return tuple(map(str, range(largest + 1)))
    if names.dtype.kind != "U" or names.ndim != 1 or largest >= len(names):
        raise ValueError(
            f"'class_names' in data.path '{path}' is {names.dtype} of shape {names.shape}, but labels go up to "
            f"{largest}; save one string per class."
        )
    return checked_names(tuple(names.tolist()), f"'class_names' in data.path '{path}'")


def _read_arrays(path: StoredFile, names: tuple[str, ...]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the requested arrays that the file contains, and the names of all arrays in the file."""
    if isinstance(path, Path) and not path.is_file():
        raise FileNotFoundError(f"data.path '{path}' is not a file; give the path of an .npz file.")
    try:
        # np.load would try to unpickle any file that is not a zip archive, and it leaks files that it opens itself.
        with path.open("rb") as file, zipfile.ZipFile(file), np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names if name in arrays.files}, sorted(arrays.files)
    except (*ARRAY_DAMAGE, OSError) as error:
        raise ValueError(
            f"data.path '{path}' is not a readable .npz file of plain arrays ({error}); "
            f"save it with np.savez(path, images=..., labels=...)."
        ) from error


def _check_images(path: StoredFile, images: Shaped[np.ndarray, "..."], size: tuple[int, int]) -> None:
    where = f"'images' in data.path '{path}'"
    if np.issubdtype(images.dtype, np.floating):
        raise ValueError(
            f"{where} is {images.dtype}; save uint8 levels 0..255. flowgen.data.to_uint8 converts values in [-1, 1]."
        )
    if images.dtype != np.uint8:
        raise ValueError(f"{where} is {images.dtype}; save uint8 levels 0..255.")
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(
            f"{where} has shape {images.shape}; save at least one image, as an array (n, height, width) "
            f"or (n, height, width, channels)."
        )
    if images.shape[1:3] != size:
        raise ValueError(
            f"{where} has images of {images.shape[1]}x{images.shape[2]}, but model.image_size is {size[0]}x{size[1]}; "
            f"resize them, or set model.image_size to ({images.shape[1]}, {images.shape[2]})."
        )


def _check_labels(path: StoredFile, labels: Shaped[np.ndarray, "..."], count: int) -> None:
    where = f"'labels' in data.path '{path}'"
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise ValueError(
            f"{where} is {labels.dtype} of shape {labels.shape}; save integers of shape ({count},), one per image."
        )
    if (smallest := int(labels.min(initial=0))) < NO_LABEL:
        raise ValueError(f"{where} contains {smallest}; labels start at 0, and -1 marks an image without a label.")
