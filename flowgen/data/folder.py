"""Reads the user's own image files, from one sub-folder per class or from a flat folder without labels."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from flowgen.data.bucket import bucket_shards, list_bucket
from flowgen.data.classes import numbered_classes, tell_held_out, with_classes
from flowgen.data.dataset import ArrayDataset, BucketedDataset, DataConfig, Dataset, Split, hold_out_files
from flowgen.data.entries import CLASS, TEXT, Listing, check_each_described
from flowgen.data.file_dataset import FileDataset
from flowgen.data.file_reader import FileReader
from flowgen.data.image_files import UnreadableImage, is_colour, read_image, read_image_size
from flowgen.data.inventory import tell, tell_converted
from flowgen.data.listing import list_files
from flowgen.data.media import IMAGE_FORMATS, pillow
from flowgen.data.stored import Files, StoredFile, read_limited
from flowgen.data.tar import list_shards, list_tar
from flowgen.data.unreadable import OnCorrupt, tell_lost_classes
from flowgen.data.workers import Job, workers_of
from flowgen.places import is_remote
from flowgen.text import ASPECTS, aspect_size, nearest_aspect

_log = logging.getLogger(__name__)
_WHAT = ("image", "images")
# Number of files whose headers tell whether a folder has colour images.
_LOOKED_AT = 32


def read_folder(
    config: DataConfig, *, image_size: tuple[int, int], channels: int, split: Split, multiple: int = 1
) -> Dataset | BucketedDataset:
    """Returns one split of the images under `config.path`, resized to `image_size` with 1 or 3 channels.

    Each first-level sub-folder that contains images, at any depth, is a class (see `list_files` and `config.classes`).
    If there are no classes, all images have label -1. The split depends only on the file names, so an unreadable file
    never moves another file between splits (see `hold_out_files`). Images are decoded once and kept in memory, or, if
    they need more than `config.in_memory_bytes`, decoded for every batch. A warning states what was left out, and why.

    The caption of `cat.png` is read from `cat.png.txt` or, if there is no such file, from `cat.txt` in the same folder.
    Either all images or none must have captions.

    If `config.aspects` is set, each image goes to the bucket with the nearest aspect ratio. All images of a bucket are
    resized to one shape, which has about as many pixels as `image_size` and whose sides are multiples of `multiple`.

    Raises:
        FileNotFoundError, NotADirectoryError: `config.path` is not a folder.
        PermissionError: a folder below `config.path` cannot be read.
        ValueError: there are no images, some images are in class folders and others at the top level, a class is not
        one of `config.classes`, `channels` is not 1 or 3, only some images have captions, images have captions and
        `config.on_corrupt` is "skip", or files are unreadable and it is "refuse". All files are checked, and the
        message lists the first five unreadable ones.

    Example:
        config = DataConfig("folder", path="photos")
        dataset = read_folder(config, image_size=(64, 64), channels=3, split="train")
    """
    if channels not in (1, 3):
        raise ValueError(
            f"model.channels is {channels}; set it to 1 (grey) or 3 (colour) for data.name '{config.name}'."
        )
    pillow()
    listing = opened(config, tuple(IMAGE_FORMATS), "images")
    labels, class_names = listing.labels, listing.class_names
    chosen = hold_out_files(listing.names, config.eval_fraction, split)
    captions = read_captions(listing)
    if split == "train":
        tell_held_out(labels, chosen, class_names, "images")
    if captions and config.on_corrupt == "skip":
        raise ValueError("data.on_corrupt is 'skip', but images with captions cannot be skipped; set it to 'refuse'.")
    _tell_converted(config, Files(listing.root, [listing.names[i] for i in chosen]), channels)
    in_memory = len(chosen) * math.prod(image_size) * channels <= config.in_memory_bytes
    if not in_memory:
        _log.info("Decoding '%s' batch by batch, because its images need more than data.in_memory_bytes.", config.path)

    workers = workers_of(config.workers, config.path)

    def dataset(kept: list[int], size: tuple[int, int]) -> ArrayDataset | FileDataset:
        names = tuple(listing.names[i] for i in kept)
        files = Files(listing.root, names)

        def job(position: int) -> Job[UInt8[np.ndarray, "height width c"]]:
            return partial(read_image, files[position], size=size, channels=channels, crop=config.crop)

        found = FileDataset(
            FileReader(job, files, config.on_corrupt, what=_WHAT, split=split, workers=workers),
            labels[kept],
            event_shape=(*size, channels),
            class_names=class_names,
            captions=tuple(captions[i] for i in kept) if captions else (),
            file_names=names if in_memory or config.on_corrupt == "refuse" else (),  # others may take their places
        )
        return found.decoded(may_be_empty=config.aspects) if in_memory else found.checked(may_be_empty=config.aspects)

    def told(datasets: Sequence[ArrayDataset | FileDataset]) -> None:
        kept = np.concatenate([dataset.labels for dataset in datasets])
        lost = f"No image of {{}} is left in the split '{split}', because none can be read."
        tell_lost_classes(labels[chosen], kept, class_names, lost)

    if not config.aspects:
        whole = dataset(chosen.tolist(), image_size)
        told([whole])
        return whole
    side = math.sqrt(math.prod(image_size))
    aspects = _aspects(Files(listing.root, [listing.names[i] for i in chosen]), config.on_corrupt, split)
    sizes = {name: aspect_size(name, round(side), multiple) for name in ASPECTS}
    members = {
        name: [i for i, aspect in zip(chosen.tolist(), aspects, strict=True) if aspect == name] for name in ASPECTS
    }
    buckets = [dataset(kept, sizes[name]) for name, kept in members.items() if kept]
    readable = tuple(bucket for bucket in buckets if len(bucket))
    if not readable:
        raise ValueError(f"data.path '{config.path}' has no readable images in the split '{split}'; add some.")
    told(readable)
    return BucketedDataset(readable)


def _tell_converted(config: DataConfig, files: Sequence[StoredFile], channels: int) -> None:
    """Warns if colour images become grey, or if all images are grey but the model is not. Checks up to 32 images."""
    some = [files[i] for i in np.linspace(0, len(files) - 1, min(_LOOKED_AT, len(files))).astype(int)]

    def colour(file: StoredFile) -> bool | None:
        try:
            return is_colour(file)
        except UnreadableImage:
            return None

    with ThreadPoolExecutor() as pool:
        found = {answer for answer in pool.map(colour, some) if answer is not None}
    if (True in found) if channels == 1 else found == {False}:
        tell_converted(f"The {'colour' if channels == 1 else 'grey'} images of data.path '{config.path}'", channels)


@runtime_checkable
class OfFiles(Protocol):
    """A config that selects files. name: `folder` or `tar`."""

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def classes(self) -> tuple[str, ...]: ...


def listed(config: OfFiles, suffixes: tuple[str, ...], what: str) -> Listing:
    """Lists the files with these suffixes that a config selects. `config.path` may be a URL.

    Example:
        listing = listed(DataConfig("folder", path="photos"), (".png",), "images")
    """
    if is_remote(config.path):
        if config.name == "tar":
            return list_shards(bucket_shards(config.path, what), suffixes, what)
        return list_bucket(config.path, suffixes, what)
    return (list_tar if config.name == "tar" else list_files)(config.path, suffixes, what)


def opened(config: OfFiles, suffixes: tuple[str, ...], what: str) -> Listing:
    """Returns the result of `listed`, with labels mapped to `config.classes` by name. Warns about entries left out.

    If `config.classes` is empty, the labels are not mapped.

    Example:
        listing = opened(DataConfig("folder", path="photos", classes=("cat", "dog")), (".png",), "images")
    """
    listing, where = listed(config, suffixes, what), f"data.path '{config.path}'"
    if listing.left_out:
        tell(f"Left out of {where}: {'; '.join(listing.left_out)}.")
    if listing.numbered and config.classes:
        count, files = len(listing.class_names), f"{CLASS} files in {where}"
        names = numbered_classes(count, config.classes, f"one of the {files}", f"The numbers in the {files} are")
        return dataclasses.replace(listing, class_names=names)
    return with_classes(listing, config.classes, where)


def read_captions(listing: Listing) -> tuple[str, ...]:
    """Returns the captions of the listed files, each as one line. Returns an empty tuple if no file has a caption.

    Raises ValueError if only some files have captions, or if a caption is not UTF-8.

    Example:
        captions = read_captions(list_files("photos", (".png",), "images"))
    """
    if not any(listing.captions):
        return ()
    check_each_described(listing, listing.captions, TEXT, "captions")
    return tuple(_caption(listing.root / caption) for caption in listing.captions if caption is not None)


def _caption(path: StoredFile) -> str:
    try:
        return " ".join(read_limited(path).decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise ValueError(f"the caption '{path}' in data.path is not UTF-8 ({error}); convert it to UTF-8.") from error


def _aspects(files: Sequence[StoredFile], on_corrupt: OnCorrupt, split: Split) -> list[str | None]:
    """Returns the nearest aspect ratio of each image according to its header, or None if the image is skipped."""
    found: list[str | None] = [None] * len(files)
    reader = FileReader(
        lambda i: lambda: nearest_aspect(*read_image_size(files[i])), files, on_corrupt, what=_WHAT, split=split
    )
    reader.read_all(found.__setitem__, may_be_empty=True)
    return found
