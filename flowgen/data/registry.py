"""Loads datasets of images by name."""

from __future__ import annotations

import dataclasses
import typing

import numpy as np
from jaxtyping import UInt8

from flowgen.arrays import check_count, shown
from flowgen.data.classes import tell_held_out, with_classes
from flowgen.data.dataset import (
    OF_FILES,
    BucketedDataset,
    DataConfig,
    Dataset,
    Split,
    check_choice,
    check_opens,
    hold_out,
    image_set,
)
from flowgen.data.folder import read_folder
from flowgen.data.inventory import tell_converted
from flowgen.data.npz import read_npz
from flowgen.nn.checks import ImageSize, image_sides

_WITH_PATH = (*OF_FILES, "npz")


def load(
    config: DataConfig, *, image_size: ImageSize, channels: int, split: Split, multiple: int = 1
) -> Dataset | BucketedDataset:
    """Returns the images that `config` selects for training ("train") or evaluation ("eval"), or both ("all").

    image_size: side of square images, or (height, width), in pixels. channels: number of channels; with 3, grey images
    get 3 equal channels; with 1, colour images of `folder` or `tar` are converted to grey, but other colour images
    raise an error. multiple: if `config.aspects` is set, the height and width of every image are multiples of this
    number; otherwise, it has no effect.

    Labels are indices into the dataset's `class_names`; -1 marks an image without a label. The class names are
    `config.classes` or, if this is empty, those of the data.

    Raises:
        ValueError: `config.name` is `own`; the data cannot provide this shape; the split is empty; a class is not one
            of `config.classes`; or a file cannot be read and may not be skipped (see `config.on_corrupt`).
        FileNotFoundError, NotADirectoryError: `config.path` does not exist, or is not the folder or file that
            `config.name` requires.
        ModuleNotFoundError: reading the data needs a package that is not installed; the message gives the command that
            installs it.

    Example:
        dataset = load(DataConfig("mnist"), image_size=(28, 28), channels=1, split="eval")
        print(len(dataset), dataset.class_names)
    """
    if not isinstance(config, DataConfig):
        raise ValueError(f"config is {shown(config)}; give a DataConfig.")
    check_choice("split", split, typing.get_args(Split))
    check_opens(config.name)
    sides = image_sides(image_size, "image_size")
    check_count("channels", channels)
    check_count("multiple", multiple)
    if config.name in _WITH_PATH and not config.path:
        raise ValueError(f"data.path is empty, but data.name '{config.name}' reads from it; set data.path.")
    if config.name not in _WITH_PATH and config.path:
        raise ValueError(
            f"data.path is '{config.path}', but data.name '{config.name}' does not read from a path; "
            f"set data.name to 'folder', 'tar' or 'npz', or leave data.path empty."
        )
    if config.name in OF_FILES:
        return read_folder(config, image_size=sides, channels=channels, split=split, multiple=multiple)
    named = image_set(config.name)
    dataset = read_npz(config, sides) if named is None else named.read(config, sides)
    dataset = with_classes(dataset, config.classes, f"data.name '{config.name}'")
    chosen = hold_out(len(dataset), config.eval_fraction, split)
    if split == "train":
        tell_held_out(dataset.labels, chosen, dataset.class_names, "images")
    dataset = dataset.select(chosen)
    return dataclasses.replace(dataset, x=_match_channels(dataset.x, channels, config.name))


def _match_channels(
    images: UInt8[np.ndarray, "n height width c"], channels: int, name: str
) -> UInt8[np.ndarray, "n height width channels"]:
    given = images.shape[-1]
    if given == channels:
        return images
    if given == 1 and channels == 3:
        tell_converted(f"The grey images of data.name '{name}'", channels)
        return images.repeat(3, axis=-1)
    raise ValueError(
        f"model.channels is {channels}, but the images of data.name '{name}' have {given} channels; "
        f"set model.channels to {'1 or 3' if given == 1 else given}."
    )
