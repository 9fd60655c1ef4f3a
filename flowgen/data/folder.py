"""The user's own picture files: one class per sub-folder, or a flat folder without labels."""

from __future__ import annotations

import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int, Int32, UInt8

from flowgen.data.buckets import BucketedSource
from flowgen.data.media import IMAGE_SUFFIXES, pillow
from flowgen.data.pictures import Crop, UnreadablePicture, picture_size, read_picture
from flowgen.data.sources import NO_LABEL, ArraySource, Batch, DataConfig, Source, Split, hold_out
from flowgen.prompts import ASPECTS, aspect_size, nearest_aspect

_log = logging.getLogger(__name__)
_NAMED_IN_ERRORS = 5


def read_folder(
    config: DataConfig, *, image_size: tuple[int, int], channels: int, split: Split, multiple: int = 1
) -> Source | BucketedSource:
    """Returns one split of the pictures under `config.path`, resized to `image_size` and 1 or 3 channels.

    First-level sub-folders that hold pictures, at any depth, are the classes in alphabetical order; without
    them the pictures have label -1. The split is drawn over the sorted file names before anything is decoded,
    so an unreadable file never moves another from one split to the other. Pictures are decoded once, unless
    they would need more than `config.in_memory_bytes`; then each batch is decoded when asked for.
    A file `cat.txt` beside `cat.png` holds its caption; all pictures have one or none has.
    With `config.aspects` each picture goes to the bucket of the nearest aspect ratio, whose sides are multiples of
    `multiple`; the area is that of `image_size`.

    Raises:
        FileNotFoundError, NotADirectoryError: `config.path` is no folder.
        ValueError: no pictures, pictures beside class folders, channels other than 1 or 3, captions of some
            pictures alone, or unreadable files where `config.on_corrupt` is "refuse" (all are looked at; the first
            five are named).

    Example:
        config = DataConfig("folder", path="photos")
        source = read_folder(config, image_size=(64, 64), channels=3, split="train")
    """
    if channels not in (1, 3):
        raise ValueError(f"model.channels is {channels}; data.source 'folder' gives 1 (grey) or 3 (colour).")
    pillow()
    files, labels, class_names = find_files(config.path)
    chosen = hold_out(len(files), config.eval_fraction, split)
    captions = read_captions(files)
    if captions and config.on_corrupt == "skip":
        raise ValueError(
            "data.on_corrupt is 'skip', but pictures with captions cannot be left out; remove the unreadable ones."
        )
    in_memory = len(chosen) * math.prod(image_size) * channels <= config.in_memory_bytes
    if not in_memory:
        _log.info("Decoding '%s' batch by batch: it needs more than data.in_memory_bytes.", config.path)

    def source(kept: list[int], size: tuple[int, int]) -> Source:
        found = FolderSource(
            [files[i] for i in kept],
            labels[kept],
            class_names=class_names,
            captions=tuple(captions[i] for i in kept) if captions else (),
            image_shape=(*size, channels),
            crop=config.crop,
            on_corrupt=config.on_corrupt,
        )
        return found.decoded(may_be_empty=config.aspects) if in_memory else found

    if not config.aspects:
        return source(chosen.tolist(), image_size)
    side = math.sqrt(math.prod(image_size))
    aspects = _aspects([files[i] for i in chosen], config.on_corrupt)
    sizes = {name: aspect_size(name, round(side), multiple) for name in ASPECTS}
    members = {
        name: [i for i, aspect in zip(chosen.tolist(), aspects, strict=True) if aspect == name] for name in ASPECTS
    }
    buckets = [source(kept, sizes[name]) for name, kept in members.items() if kept]
    readable = tuple(bucket for bucket in buckets if len(bucket))
    if not readable:
        raise ValueError(f"data.path '{config.path}' holds no picture that can be read; add some.")
    return BucketedSource(readable)


def read_captions(files: list[Path]) -> tuple[str, ...]:
    """Returns the captions of pictures, `cat.txt` beside `cat.png`, on one line each; empty where no picture has one.

    Raises ValueError where some pictures have captions and others none, or one is not UTF-8.

    Example:
        captions = read_captions([Path("photos/cat.png")])
    """
    beside = [file.with_suffix(".txt") for file in files]
    missing = [path for path in beside if not path.is_file()]
    if len(missing) == len(beside):
        return ()
    if missing:
        raise ValueError(
            f"data.path has captions of {len(beside) - len(missing)} of {len(beside)} pictures; add '{missing[0]}' "
            f"and {len(missing) - 1} more, or remove the .txt files."
        )
    try:
        return tuple(" ".join(path.read_text(encoding="utf-8").split()) for path in beside)
    except UnicodeDecodeError as error:
        raise ValueError(f"a caption in data.path is not UTF-8 text ({error}); correct that file.") from error


def find_files(
    path: str | os.PathLike[str], suffixes: tuple[str, ...] = IMAGE_SUFFIXES, what: str = "pictures"
) -> tuple[list[Path], Int32[np.ndarray, " n"], tuple[str, ...]]:
    """Returns the files under a folder in sorted order, their labels and the class names. what: they are, in errors.

    Hidden files and folders are passed over; links to folders are followed.

    Example:
        files, labels, class_names = find_files("photos")
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"data.path '{root}' does not exist; give the folder that holds the {what}.")
    if not root.is_dir():
        raise NotADirectoryError(f"data.path '{root}' is a file; give the folder that holds the {what}.")
    flat = sorted(entry for entry in root.iterdir() if entry.is_file() and _is_one(entry.name, suffixes))
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    classes = {folder.name: inside for folder in folders if (inside := _files_below(folder, suffixes))}
    if flat and classes:
        raise ValueError(
            f"data.path '{root}' holds {what} both directly (such as '{flat[0].name}') and in sub-folders "
            f"(such as '{next(iter(classes))}'); use one sub-folder per class, or one flat folder."
        )
    if not flat and not classes:
        raise ValueError(
            f"data.path '{root}' holds no {what}; put {', '.join(suffixes)} files in it, "
            f"or in one sub-folder per class."
        )
    if flat:
        return flat, np.full(len(flat), NO_LABEL, np.int32), ()
    files = [file for inside in classes.values() for file in inside]
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(inside) for inside in classes.values()])
    return files, labels, tuple(classes)


class FolderSource:
    """Picture files decoded anew for every batch, by as many threads as there are cores.

    With on_corrupt="skip" an unreadable file is named once in a warning and answered by the next readable one
    of the same split, with that one's label: the answer depends on the position alone.

    Example:
        source = FolderSource(files, labels, class_names=("cat", "dog"), image_shape=(64, 64, 3))
        batch = source[np.arange(32)]
    """

    def __init__(
        self,
        files: list[Path],
        labels: Int32[np.ndarray, " n"],
        *,
        class_names: tuple[str, ...],
        captions: tuple[str, ...] = (),
        image_shape: tuple[int, int, int],
        crop: Crop = "center",
        on_corrupt: Literal["refuse", "skip"] = "refuse",
    ) -> None:
        self.files = files
        self.labels = labels
        self.class_names = class_names
        self.captions = captions
        self.image_shape = image_shape
        self.crop: Crop = crop
        self.on_corrupt = on_corrupt
        # Which files were warned about; it spares a second warning and changes no answer.
        self._warned: set[Path] = set()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch:
        with ThreadPoolExecutor() as pool:
            answers = list(pool.map(self._readable, indices.tolist()))
        positions = np.array([position for position, _ in answers])
        return {"image": np.stack([image for _, image in answers]), "label": self.labels[positions]}

    def decoded(self, *, may_be_empty: bool = False) -> ArraySource:
        """Returns the same pictures in memory; unreadable files are refused all at once, or left out.

        may_be_empty: leave them out even where none is left.
        """
        images = np.empty((len(self.files), *self.image_shape), np.uint8)
        unreadable: dict[int, UnreadablePicture] = {}

        def decode(position: int) -> None:
            try:
                images[position] = self._read(position)
            except UnreadablePicture as error:
                unreadable[position] = error

        with ThreadPoolExecutor() as pool:
            list(pool.map(decode, range(len(self.files))))
        bad = [unreadable[position] for position in sorted(unreadable)]
        none_left = len(bad) == len(self.files) and not may_be_empty
        if bad and (self.on_corrupt == "refuse" or none_left):
            raise ValueError(_refusal(bad))
        for error in bad:
            _warn_left_out(error)
        kept = np.setdiff1d(np.arange(len(self.files)), sorted(unreadable)) if bad else slice(None)
        return ArraySource(images[kept], self.labels[kept], class_names=self.class_names, captions=self.captions)

    def _read(self, position: int) -> UInt8[np.ndarray, "height width c"]:
        height, width, channels = self.image_shape
        return read_picture(self.files[position], size=(height, width), channels=channels, crop=self.crop)

    def _readable(self, position: int) -> tuple[int, UInt8[np.ndarray, "height width c"]]:
        failures = []
        for step in range(len(self.files)):
            candidate = (position + step) % len(self.files)
            try:
                return candidate, self._read(candidate)
            except UnreadablePicture as error:
                failures.append(error)
                if self.on_corrupt == "refuse":
                    break
                if self.files[candidate] not in self._warned:
                    self._warned.add(self.files[candidate])
                    _warn_left_out(error)
        raise ValueError(_refusal(failures))


def _aspects(files: list[Path], on_corrupt: str) -> list[str | None]:
    """The nearest aspect of each picture, by its header alone; None for one that is left out for having none."""

    def aspect(file: Path) -> str | None:
        try:
            return nearest_aspect(*picture_size(file))
        except UnreadablePicture as error:
            if on_corrupt == "refuse":
                raise ValueError(_refusal([error])) from error
            _warn_left_out(error)
            return None

    with ThreadPoolExecutor() as pool:
        return list(pool.map(aspect, files))


def _files_below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if _is_one(name, suffixes)]
    return sorted(found)


def _is_one(name: str, suffixes: tuple[str, ...]) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in suffixes


def _warn_left_out(error: UnreadablePicture) -> None:
    _log.warning("Left out the unreadable picture %s.", error)


def _refusal(errors: list[UnreadablePicture]) -> str:
    named = ", ".join(str(error) for error in errors[:_NAMED_IN_ERRORS])
    more = f" and {len(errors) - _NAMED_IN_ERRORS} more" if len(errors) > _NAMED_IN_ERRORS else ""
    files = "1 picture" if len(errors) == 1 else f"{len(errors)} pictures"
    return (
        f"data.path holds {files} that cannot be read: {named}{more}; "
        f"repair or remove them, or set data.on_corrupt to 'skip'."
    )
