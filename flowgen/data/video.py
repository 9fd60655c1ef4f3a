"""Video files: clips out of them at a frame rate of one's own, and clips as files, by PyAV and Pillow."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from flowgen.data.media import atomic_file, check_writable, pillow
from flowgen.data.pictures import Crop, fit_array

VIDEO_SUFFIXES = (".mp4", ".gif")  # that are written
READABLE = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".gif"),
    *(".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".asf", ".flv", ".ogv"),
)
# Constant quality of H.264, near what the eye can tell.
_CRF = "16"
# Seconds by which the time of a frame may be missed in arithmetic.
_SAME_TIME = 1e-6
# Files are searched by when frames are decoded, which H.264 may do so many frames before they are shown.
_REORDERED = 16


class UnreadableVideo(ValueError):
    """A file that cannot be decoded, with its name in the message."""


def av() -> Any:
    """Returns the module `av` (PyAV), or raises ModuleNotFoundError naming the extra that brings it.

    Example:
        container = av().open("clip.mp4")
    """
    try:
        import av as module
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Reading and writing video needs the package av; install it with: pip install "flowgen[video]".'
        ) from error
    return module


def video_length(path: str | os.PathLike[str]) -> tuple[float, float]:
    """Returns seconds and frames per second of a video. Raises UnreadableVideo where the file is none.

    Example:
        seconds, fps = video_length("clip.mp4")
    """
    with _opened(path) as container:
        stream, rate = container.streams.video[0], _rate(container, path)
        if stream.duration:
            return _end(stream, None, rate), rate
        ends = [_end(stream, packet, rate) for packet in _packets(container, path)]
        return max(ends, default=0.0), rate


def video_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Returns (height, width) of a video as it is shown. Raises UnreadableVideo where the file is none.

    Example:
        height, width = video_size("clip.mp4")
    """
    with _opened(path) as container:
        for frame, _, _ in _shown(container, path):
            height, width, _ = _upright(frame, container.streams.video[0], channels=1).shape
            return height, width
    raise UnreadableVideo(f"'{path}' has no pictures in it; give a video.")


def frame_times(path: str | os.PathLike[str], *, fps: float | int | None = None) -> Float[np.ndarray, " n"]:
    """Returns the seconds at which `read_clip` finds frames in a video: i / fps for as long as it lasts, or with fps
    None those of its own frames, read without decoding them. Raises UnreadableVideo where the file is none.

    Example:
        starts = frame_times("clip.mp4", fps=8)[:-16]  # of clips of 17 frames
    """
    if fps is None:
        with _opened(path) as container:
            stream = container.streams.video[0]
            return np.array(sorted(_at(stream, packet) for packet in _packets(container, path)))
    seconds, _ = video_length(path)
    # A quarter of a frame may be missing at the end, of which files that count milliseconds round off some.
    return np.arange(math.floor(seconds * fps + 0.25)) / fps


def read_clip(
    path: str | os.PathLike[str],
    frames: int,
    image_size: tuple[int, int],
    channels: int,
    *,
    fps: float | int | None = None,
    start: float | int = 0.0,
    crop: Crop = "center",
) -> UInt8[np.ndarray, "frames height width c"]:
    """Returns frames of a video at times start + i / fps seconds, the nearest before each, resized and cropped.

    fps: None takes every frame from `start` on, however long each is shown. Frames are turned upright, and their pixels
    made square. Raises UnreadableVideo where the file is none, damaged, or ends before; see `frame_times`.

    Example:
        clip = read_clip("clip.mp4", 17, (64, 64), 3, fps=8)
    """
    out: list[np.ndarray] = []
    with _opened(path) as container:
        stream, rate = container.streams.video[0], _rate(container, path)
        # Asked for up to half a frame late, against rounding of the frames' times.
        times = None if fps is None else start + np.arange(frames) / fps + 0.5 / max(rate, fps)
        for frame, at, until in _shown(container, path, start):
            count = int(at > start - _SAME_TIME if times is None else (times[len(out) :] < until).sum())
            if count:
                out += [fit_array(_upright(frame, stream, channels)[None], image_size, crop)[0]] * count
            if len(out) == frames:
                return np.stack(out)
    at_fps = "" if fps is None else f" at {fps:g} fps"
    raise UnreadableVideo(f"'{path}' ends before {frames} frames{at_fps} from second {start:g}; give a longer video.")


def write_video(
    path: str | os.PathLike[str], frames: UInt8[np.ndarray, "frames height width c"], *, fps: float | int = 8.0
) -> None:
    """Writes frames as H.264 in mp4, or as a GIF that repeats, by the suffix. The file appears whole or not at all.

    mp4 needs even sides; an odd one is filled up by repeating the last line. GIF counts time in hundredths of a second.

    Raises:
        ValueError: unknown suffix, no frames, or a frame rate that is not positive.
        OSError: as `check_writable`. ModuleNotFoundError: PyAV or Pillow is missing.

    Example:
        write_video("clip.mp4", to_uint8(clip), fps=16)
    """
    check_video_path(path)
    if len(frames) == 0 or not 0 < fps < math.inf:
        raise ValueError(f"a video of {len(frames)} frames at {fps} frames per second cannot be; give both above 0.")
    colour = frames.repeat(3, axis=3) if frames.shape[3] == 1 else frames
    if Path(path).suffix.lower() == ".gif":
        pictures = [pillow().fromarray(frame) for frame in colour]
        with atomic_file(path) as file:
            # In hundredths of a second, rounded so that no frame begins more than half a hundredth off.
            durations = (10 * np.diff(np.round(100 / fps * np.arange(len(frames) + 1)))).tolist()
            pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
        return
    odd = [(0, length % 2) for length in colour.shape[1:3]]
    colour = np.pad(colour, ((0, 0), *odd, (0, 0)), mode="edge")
    with atomic_file(path) as file, av().open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": _CRF})
        stream.height, stream.width = colour.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in colour:
            container.mux(stream.encode(av().VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def check_video_path(path: str | os.PathLike[str]) -> None:
    """Raises the sentence that `write_video` would raise for this path, before anything has been computed.

    Example:
        check_video_path(arguments.out)
    """
    suffix = Path(path).suffix.lower()
    if suffix not in VIDEO_SUFFIXES:
        raise ValueError(f"'{path}' has no video suffix; use one of {', '.join(VIDEO_SUFFIXES)}.")
    pillow() if suffix == ".gif" else av()
    check_writable(path)


def _rate(container: Any, path: str | os.PathLike[str]) -> float:
    """Frames per second of an open video."""
    stream = container.streams.video[0]
    rate = float(stream.average_rate or stream.base_rate or 0)
    if not rate:
        raise UnreadableVideo(f"'{path}' does not say its frame rate; convert it to mp4.")
    return rate


def _at(stream: Any, part: Any) -> float:
    """Seconds from the beginning of a video to a packet or a frame of it."""
    return float(part.pts * part.time_base - (stream.start_time or 0) * stream.time_base)


def _end(stream: Any, last: Any, rate: float) -> float:
    """Seconds to the end of a video, as its file says, or else to that of its last packet or frame."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return _at(stream, last) + (float(last.duration * last.time_base) if last.duration else 1 / rate)


def _packets(container: Any, path: str | os.PathLike[str]) -> Iterator[Any]:
    """Yields what the frames of an open video are decoded from."""
    try:
        for packet in container.demux(container.streams.video[0]):
            if packet.pts is not None and not packet.is_discard:
                yield packet
    except av().FFmpegError as error:
        raise _damaged(path, error) from error


def _shown(
    container: Any, path: str | os.PathLike[str], start: float | int = 0.0
) -> Iterator[tuple[Any, float, float]]:
    """Yields frames of an open video from one before second `start` on, with from when until when each is shown."""
    stream, rate, last = container.streams.video[0], _rate(container, path), None
    try:
        if (before := start - _REORDERED / rate) > 0:
            container.seek((stream.start_time or 0) + int(before / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if last is not None:
                yield last, _at(stream, last), _at(stream, frame)
            last = frame
    except av().FFmpegError as error:
        raise _damaged(path, error) from error
    if last is not None:
        yield last, _at(stream, last), _end(stream, last, rate)


def _upright(frame: Any, stream: Any, channels: int) -> UInt8[np.ndarray, "height width c"]:
    """The pixels of a frame, made square and turned as the file says."""
    width = round(frame.width * (stream.sample_aspect_ratio or 1))
    pixels = frame.to_ndarray(format="gray" if channels == 1 else "rgb24", width=width)
    # Both turn against the clock.
    return np.rot90(pixels.reshape(*pixels.shape[:2], channels), round(frame.rotation / 90))


def _damaged(path: str | os.PathLike[str], error: Exception) -> UnreadableVideo:
    return UnreadableVideo(f"'{path}' is damaged ({error}); convert it again or remove it.")


def _opened(path: str | os.PathLike[str]) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no video '{path}'; give a file such as clip.mp4.")
    try:
        container = av().open(os.fspath(path))
    except av().FFmpegError as error:
        raise UnreadableVideo(f"'{path}' is no video that can be read ({error}); convert it to mp4.") from error
    if not container.streams.video:
        container.close()
        raise UnreadableVideo(f"'{path}' has no pictures in it; give a video.")
    return container
