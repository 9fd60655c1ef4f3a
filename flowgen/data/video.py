"""Video files: clips out of them at a frame rate of one's own, and clips as files, by PyAV and Pillow."""

from __future__ import annotations

import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from flowgen.data.media import atomic_file, check_writable, pillow
from flowgen.data.pictures import Crop, fit_array

VIDEO_SUFFIXES = (".mp4", ".gif")
READABLE = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
# Constant quality of H.264, near what the eye can tell.
_CRF = "16"


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
        if stream.duration is not None:
            return float(stream.duration * stream.time_base), rate
        if container.duration is not None:
            return container.duration / 1e6, rate
        return sum(1 for _ in container.decode(stream)) / rate, rate


def video_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Returns (height, width) of a video. Raises UnreadableVideo where the file is none.

    Example:
        height, width = video_size("clip.mp4")
    """
    with _opened(path) as container:
        return container.streams.video[0].height, container.streams.video[0].width


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

    fps: None takes every frame. Raises UnreadableVideo where the file is none, damaged, or ends before.

    Example:
        clip = read_clip("clip.mp4", 17, (64, 64), 3, fps=8)
    """
    out: list[np.ndarray] = []

    def show(frame: Any, until: float) -> None:
        if len(out) < frames and times[len(out)] < until:
            picture = frame.to_ndarray(format="gray" if channels == 1 else "rgb24")
            while len(out) < frames and times[len(out)] < until:
                out.append(picture)

    with _opened(path) as container:
        stream, rate = container.streams.video[0], _rate(container, path)
        # Asked for half a frame late, against rounding of the frames' times.
        times = start + np.arange(frames) / (fps or rate) + 0.5 / rate
        container.seek(int(start / stream.time_base), stream=stream)
        begin, shown = (stream.start_time or 0) * stream.time_base, None
        try:
            for frame in container.decode(stream):
                at = float(frame.pts * frame.time_base - begin)
                if shown is not None:
                    show(shown, at)
                if len(out) == frames:
                    break
                shown = frame
            if shown is not None:
                show(shown, float(shown.pts * shown.time_base - begin) + 1 / rate)
        except av().FFmpegError as error:
            raise UnreadableVideo(f"'{path}' is damaged ({error}); convert it again or remove it.") from error
    if len(out) < frames:
        raise UnreadableVideo(f"'{path}' ends before {frames} frames at {fps or rate:g} fps from second {start:g}.")
    stacked = np.stack(out)
    return fit_array(stacked[..., None] if channels == 1 else stacked, image_size, crop)


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
            duration = round(1000 / fps)
            pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0)
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
