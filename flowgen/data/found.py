"""Finds the class names of data without opening images, and summarises opened data."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from flowgen.data.clips import ClipsConfig
from flowgen.data.crafter import CLASS_NAMES
from flowgen.data.dataset import (
    OF_FILES,
    BucketedDataset,
    DataConfig,
    Dataset,
    buckets_of,
    check_opens,
    hold_out_files,
    image_set,
)
from flowgen.data.entries import Listing
from flowgen.data.file_dataset import FileDataset
from flowgen.data.folder import listed
from flowgen.data.image_files import UnreadableImage, read_image_size
from flowgen.data.inventory import Inventory
from flowgen.data.latent_files import INDEX_FILE, LatentsConfig, read_index
from flowgen.data.latents import LatentDataset, kind_of
from flowgen.data.media import IMAGE_FORMATS
from flowgen.data.named import DIGIT_NAMES
from flowgen.data.npz import npz_classes, npz_marks
from flowgen.data.stored import StoredFile, size_of
from flowgen.data.tar import TarFolder
from flowgen.data.video import READABLE, UnreadableVideo, video_size

_CLIP_CLASSES = {"bouncing": DIGIT_NAMES, "crafter": CLASS_NAMES, "real": ()}
# Number of files whose sizes in pixels are read. It is smaller for videos, which take longer to open.
_IMAGES_SIZED, _VIDEOS_SIZED = 32, 4

# Number of bytes at the beginning of a latent file from which its digest is computed.
_MARKED_BYTES = 1 << 16

Marks = Mapping[str, int | str]
F = TypeVar("F")


def found_classes(config: DataConfig | ClipsConfig | LatentsConfig) -> tuple[str, ...]:
    """Returns the class names in the data that `config` selects, ordered by label. Opens no images or videos.

    `config.classes` is ignored. The result is empty if the data have no classes.

    Raises the same errors as `load`, `load_clips` and `read_latents` if the data do not exist or labels are invalid.

    Example:
        found_classes(DataConfig("folder", path="photos"))  # ("cat", "dog", "fox")
    """
    if isinstance(config, LatentsConfig):
        return read_index(config.path).class_names
    if config.name in OF_FILES:
        return _listed(config).class_names
    if config.name == "npz":
        return npz_classes(config.path)
    check_opens(config.name)
    named = image_set(config.name)
    return _CLIP_CLASSES[config.name] if named is None else named.class_names


def take_inventory(
    config: DataConfig | ClipsConfig | LatentsConfig,
    train: Dataset | BucketedDataset,
    held_out: Dataset | BucketedDataset | None = None,
) -> Inventory:
    """Returns a summary of the data of a run, and the sizes or checksums of the data files.

    config: the config with which `train` and `held_out` were loaded. held_out: None if nothing is held out.

    If `config.flip` is set and `train` contains latents, those of mirrored samples are not counted.

    Example:
        print(take_inventory(config, train, held_out).line())
    """
    whole, beside = _apart(train)
    kind = "images" if kind_of(whole[0]) == "image" else "clips"
    mirrored = 2 if isinstance(whole[0], LatentDataset) and getattr(config, "flip", False) else 1
    listing, sizes = None, ()
    if not isinstance(config, LatentsConfig):
        listing = _listed(config) if config.name in OF_FILES else None
        named = image_set(config.name)
        known = () if named is None or named.image_hw is None else (named.image_hw,)
        sizes = known if listing is None else _sizes(config, listing)
    train_files, held_files = _marks(config, listing)
    left_out = () if listing is None else listing.left_out
    if kind == "images" and listing is not None:
        read = sum(map(len, whole)) + (len(held_files) if held_out is None else len(held_out))
        if unreadable := len(train_files) + len(held_files) - read:
            left_out = (*left_out, f"{unreadable:,} unreadable (still listed among the files)")
    return Inventory(
        f"latents of {kind}" if isinstance(config, LatentsConfig) else kind,
        sum(map(len, whole)) // mirrored,
        0 if held_out is None else len(held_out),
        sizes,
        tuple(dict.fromkeys(b.event_shape if isinstance(b, LatentDataset) else b.event_shape[-3:-1] for b in whole)),
        train.class_names,
        train_files,
        held_files,
        left_out,
        stills=sum(map(len, beside)) // mirrored,
        at_most=(_at_most(train), held_out is not None and _at_most(held_out)),
    )


def _listed(config: DataConfig | ClipsConfig) -> Listing:
    if isinstance(config, ClipsConfig):
        return listed(config, READABLE, "videos")
    return listed(config, tuple(IMAGE_FORMATS), "images")


def _apart(dataset: Dataset | BucketedDataset) -> tuple[list[Dataset], list[Dataset]]:
    """Returns the buckets of images or whole clips, and those of images that are trained on in addition to clips."""
    buckets = buckets_of(dataset)
    whole = [bucket for bucket in buckets if kind_of(bucket) in ("image", "clip")]
    return whole, [bucket for bucket in buckets if kind_of(bucket) == "still"]


def _at_most(dataset: Dataset | BucketedDataset) -> bool:
    """Returns whether the number of samples may include unreadable files, which are detected only when read."""
    return any(isinstance(b, FileDataset) and b.reader.skips for b in buckets_of(dataset))


def _sizes(config: DataConfig | ClipsConfig, listing: Listing) -> tuple[tuple[int, int], ...]:
    """Returns the (height, width) of up to 32 images or 4 videos, without the unreadable ones."""
    is_video = isinstance(config, ClipsConfig)
    most = min(_VIDEOS_SIZED if is_video else _IMAGES_SIZED, len(listing))
    files = [listing.files[i] for i in np.linspace(0, len(listing) - 1, most).astype(int)]

    def size(file: StoredFile) -> tuple[int, int] | None:
        try:
            return video_size(file) if is_video else read_image_size(file)
        except (UnreadableImage, UnreadableVideo):
            return None

    with ThreadPoolExecutor() as pool:
        return tuple(found for found in pool.map(size, files) if found is not None)


def _marks(config: DataConfig | ClipsConfig | LatentsConfig, listing: Listing | None) -> tuple[Marks, Marks]:
    """Returns each split's file sizes or checksums, by name. Files used by both splits count as training files."""
    if isinstance(config, LatentsConfig):
        folder = Path(config.path)
        files = [folder / INDEX_FILE, *sorted(folder.glob("*/*.npy"))]
        return _marks_of(files, [file.relative_to(folder).as_posix() for file in files], _mark), {}
    if config.name == "npz":
        return npz_marks(config.path), {}
    train: dict[str, int | str] = {}
    held_out: dict[str, int | str] = {}
    if listing is not None:
        positions = hold_out_files(listing.names, config.eval_fraction, "eval") if config.eval_fraction else ()
        held = {listing.names[position] for position in positions}
        in_memory = isinstance(listing.root, TarFolder)  # Their sizes are known, so threads would only cost time.
        sizes = map(size_of, listing.files) if in_memory else _marks_of(listing.files, listing.names, size_of).values()
        for name, mark in zip(listing.names, sizes, strict=True):
            (held_out if name in held else train)[name] = mark
    if isinstance(config, ClipsConfig) and (images := config.images) is not None:
        listing = _listed(images) if images.name in OF_FILES else None
        for files, more in zip((train, held_out), _marks(images, listing), strict=True):
            files.update({f"{images.path}/{name}": mark for name, mark in more.items()})
    return train, held_out


def _marks_of(files: Iterable[F], names: Sequence[str], mark: Callable[[F], int]) -> dict[str, int]:
    """Returns `mark` of each file, by name. Files are read in parallel, because network file systems are slow."""
    with ThreadPoolExecutor(max_workers=32) as pool:
        return dict(zip(names, pool.map(mark, files), strict=True))


def _mark(file: Path) -> int:
    """Returns a checksum of a file's size and first 64 KiB."""
    with file.open("rb") as opened:
        return zlib.crc32(opened.read(_MARKED_BYTES), file.stat().st_size)
