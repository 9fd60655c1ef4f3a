"""Frames of video files as they are shown: whole packets, times, upright square pixels in the right colours."""

from __future__ import annotations

import contextlib
import math
import os
import struct
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from flowgen.data.media import pillow
from flowgen.data.pictures import on_white
from flowgen.data.unreadable import Unreadable
from flowgen.data.upright import Turn
from flowgen.packages import missing

# FFmpeg's names of the containers that are read, and of nothing that names other files, such as lists and patterns.
_CONTAINERS = "mov,matroska,avi,gif,mpeg,mpegts,mpegvideo,asf,flv,ogg"
# Of one frame: 8192 x 4096.
_MOST_PIXELS = 1 << 25
# Files are searched by when frames are decoded, which H.264 may do so many frames before they are shown.
_REORDERED = 16
# Seconds by which the time of a frame may be missed in arithmetic.
SAME_TIME = 1e-6
# Numbers of colour spaces in FFmpeg's frames and, behind the colon, in its scaler.
_SPACES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
BT709, _BT601 = 1, 5
LIMITED_RANGE, _FULL_RANGE = 1, 2


class UnreadableVideo(Unreadable):
    """A video that cannot be decoded: its path, why, and what to do about it.

    Example:
        raise UnreadableVideo("clip.mp4", "is damaged", "convert it again or remove it")
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, remedy: str) -> None:
        super().__init__(f"'{path}' {reason}; {remedy}.")
        self._named = f"'{path}' {reason}"

    @property
    def named(self) -> str:
        return self._named


class Shown(NamedTuple):
    """A decoded frame, and from when until when it is shown, in seconds from the beginning of the video."""

    frame: Any
    at: float
    until: float


def av() -> Any:
    """Returns the module `av` (PyAV), or raises ModuleNotFoundError naming the package.

    Example:
        container = av().open("clip.mp4")
    """
    try:
        import av as module
    except ModuleNotFoundError as error:
        raise missing("Reading and writing video", "av") from error
    return module


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Generator[tuple[Any, Any]]:
    """Yields the container and the video stream of a file. No other file is opened, whatever it says.

    Raises UnreadableVideo: content of other containers than we list, no video in it, or frames beyond 8192 x 4096.

    Example:
        with opened("clip.mp4") as (container, stream): ...
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no video '{path}'; give a file such as clip.mp4.")
    # FFmpeg gets no name, for it would guess protocols and patterns of files in it.
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none", "max_pixels": str(_MOST_PIXELS)}
    with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), "rb") as file:
        try:
            container = av().open(file, options=options, metadata_errors="replace")
        except (av().FFmpegError, ValueError, OSError) as error:
            reason = f"is no video that can be read ({_reason(error)})"
            raise UnreadableVideo(path, reason, "convert it to mp4") from error
        with container:
            streams = [stream for stream in container.streams.video if stream.codec_context is not None]
            if not streams:
                raise UnreadableVideo(path, "has no pictures in it that can be decoded", "give a video")
            context = streams[0].codec_context
            if context.width * context.height > _MOST_PIXELS:
                size = f"{context.width} x {context.height} pixels"
                raise UnreadableVideo(path, f"has frames of {size}, more than 8192 x 4096", "convert it to fewer")
            context.options = {"max_pixels": str(_MOST_PIXELS)}
            yield container, streams[0]


def rate_of(stream: Any, path: str | os.PathLike[str]) -> float:
    """Returns frames per second of a stream. Raises UnreadableVideo if the file does not say."""
    rate = float(stream.average_rate or stream.base_rate or 0)
    if not 0 < rate < math.inf:
        raise UnreadableVideo(path, "does not say its frame rate", "convert it to mp4")
    return rate


def time_of(stream: Any, part: Any) -> float | None:
    """Returns seconds from the beginning of a video to a packet or a frame of it; None if it has no time."""
    stamp = part.dts if part.pts is None else part.pts
    if stamp is None:
        return None
    return float(stamp * (part.time_base or stream.time_base) - (stream.start_time or 0) * stream.time_base)


def end_of(stream: Any, part: Any, rate: float) -> float:
    """Returns the second at which a packet or a frame with a time is no longer shown."""
    at = time_of(stream, part) or 0.0
    known = part.duration is not None and part.duration > 0
    return at + (float(part.duration * (part.time_base or stream.time_base)) if known else 1 / rate)


def packets(container: Any, stream: Any) -> Iterator[tuple[Any, bool]]:
    """Yields the packets of frames from where a container stands, and whether each is whole. A file that is cut off, or
    that its container loses track of, ends there."""
    try:
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard and time_of(stream, packet) is not None:
                yield packet, not packet.is_corrupt
    except av().FFmpegError:
        return


def shown_frames(path: str | os.PathLike[str], start: float | int = 0.0) -> Iterator[tuple[Shown, Any]]:
    """Yields the frames of a video from one before second `start` on, with their stream.

    Raises UnreadableVideo: damage in what is shown from `start` on.
    """
    # Of files without an index, a search may end behind what it was for.
    for searched in (True, False):
        with opened(path) as (container, stream):
            begin = start - _REORDERED / rate_of(stream, path) if searched else 0
            if begin > 0 and not _sought(container, stream, begin):
                continue
            frames = _shown(container, stream, path, start)
            first = next(frames, None)
            if begin > 0 and (first is None or first.at > start + SAME_TIME):
                continue
            if first is not None:
                yield first, stream
                yield from ((frame, stream) for frame in frames)
            return


def _sought(container: Any, stream: Any, second: float) -> bool:
    try:
        container.seek((stream.start_time or 0) + int(second / stream.time_base), stream=stream)
    except av().FFmpegError:
        return False
    return True


def last_end(container: Any, stream: Any, path: str | os.PathLike[str]) -> float:
    """Returns the second at which the last whole frame of a video ends, by its packets, whatever the file claims."""
    rate = rate_of(stream, path)

    def end() -> float:
        return max((end_of(stream, packet, rate) for packet, whole in packets(container, stream) if whole), default=0.0)

    claimed = container.duration
    if claimed and claimed > 0:
        with contextlib.suppress(av().FFmpegError):
            container.seek(claimed)
            if (found := end()) > 0:
                return found
    with opened(path) as (container, stream):
        return end()


def _shown(container: Any, stream: Any, path: str | os.PathLike[str], start: float | int) -> Iterator[Shown]:
    rate, lost = rate_of(stream, path), []
    last, tainted = None, False
    for frame in _decoded(container, stream, lost):
        at = time_of(stream, frame)
        if at is None:
            continue
        # What is predicted from a damaged frame is damaged, too.
        tainted = frame.is_corrupt or (tainted and not frame.key_frame)
        if last is not None:
            yield _whole(Shown(last, time_of(stream, last) or 0.0, at), lost, start, path)
        if tainted:
            lost.append(at)
        last = frame
    if last is not None:
        yield _whole(Shown(last, time_of(stream, last) or 0.0, end_of(stream, last, rate)), lost, start, path)


def _decoded(container: Any, stream: Any, lost: list[float]) -> Iterator[Any]:
    """Yields frames, and notes the times of packets that are damaged. What is damaged at the end is left out."""
    for packet, whole in packets(container, stream):
        if not whole:
            lost.append(time_of(stream, packet) or 0.0)
            continue
        try:
            yield from packet.decode()
        except av().FFmpegError:
            lost.append(time_of(stream, packet) or 0.0)
    with contextlib.suppress(av().FFmpegError, EOFError):
        yield from stream.decode(None)


def _whole(shown: Shown, lost: list[float], start: float | int, path: str | os.PathLike[str]) -> Shown:
    damaged = [time for time in lost if shown.at - SAME_TIME <= time < shown.until - SAME_TIME]
    if damaged and shown.until > start + SAME_TIME:
        raise UnreadableVideo(path, f"is damaged at second {damaged[0]:.3g}", "convert it again or remove it")
    return shown


def pixel_aspect(stream: Any) -> float:
    """Returns the width of a pixel over its height, as they are stored."""
    return float(stream.sample_aspect_ratio or 1)


def frame_turn(frame: Any) -> Turn:
    """Returns the turn and mirror of a frame's display matrix, to the nearest right angle."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            # A point (x, y) is shown at (a x + c y, b x + d y).
            a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data))
            if abs(a) + abs(d) >= abs(b) + abs(c):
                return Turn(mirror_x=a < 0, mirror_y=d < 0)
            return Turn(swap=True, mirror_x=c < 0, mirror_y=b < 0)
    return Turn()


def frame_pixels(frame: Any) -> UInt8[np.ndarray, "height width 3"]:
    """Returns the RGB pixels of a frame as they are stored, on white where they are transparent.

    The matrix between YCbCr and RGB is the one that the frame names; without a name it is BT.709 for high definition
    (1280 x 577 and up) and BT.601 below, as players have it.
    """
    high = frame.width >= 1280 or frame.height > 576
    full = frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj")
    colours = {
        "src_colorspace": _SPACES.get(frame.colorspace, BT709 if high else _BT601),
        "dst_colorspace": _BT601,
        "src_color_range": _FULL_RANGE if full else LIMITED_RANGE,
        "dst_color_range": _FULL_RANGE,
    }
    if not frame.format.has_palette and not any(part.is_alpha for part in frame.format.components):
        return frame.to_ndarray(format="rgb24", **colours)
    image = pillow().fromarray(frame.to_ndarray(format="rgba", **colours))
    return np.asarray(on_white(image).convert("RGB"))


def to_bt709(pixels: UInt8[np.ndarray, "height width 3"]) -> Any:
    """Returns a frame of RGB pixels in YCbCr, by the matrix of BT.709 in its limited range."""
    frame = (
        av()
        .VideoFrame.from_ndarray(pixels, format="rgb24")
        .reformat(
            format="yuv420p",
            src_colorspace=_BT601,
            dst_colorspace=BT709,
            src_color_range=_FULL_RANGE,
            dst_color_range=LIMITED_RANGE,
        )
    )
    frame.colorspace, frame.color_range = BT709, LIMITED_RANGE
    return frame


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
