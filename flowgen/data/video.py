"""Reads and writes clips as video files, using PyAV and Pillow. Clips can be read at any frame rate."""

from __future__ import annotations

import io
import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from flowgen.data.image_files import Crop, fit
from flowgen.data.media import atomic_file, check_writable, pillow
from flowgen.data.stored import AnyFile, size_of
from flowgen.data.upright import Turn
from flowgen.data.video_frames import BT709, LIMITED_RANGE, frame_pixels, frame_turn, to_bt709
from flowgen.data.video_streams import SAME_TIME, UnreadableVideo, av, last_end, opened, shown_frames

VIDEO_SUFFIXES = (".mp4", ".gif")  # for writing
READABLE = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".gif"),
    *(".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".asf", ".flv", ".ogv"),
)
# The constant rate factor of H.264. This value is close to visually lossless.
_CRF = "16"
# A video may have this many more frames than its file has bytes, because frames may be repeated.
_TIMES = 1 << 16


def video_length(path: AnyFile) -> tuple[float, float]:
    """Returns a video's duration in seconds and its frame rate. Raises UnreadableVideo if the file is not a video.

    The duration is that from the first key frame to the end of the last complete frame; the header may state another.

    Example:
        seconds, fps = video_length("clip.mp4")
    """
    with opened(path) as video:
        return last_end(path), video.rate


def video_size(path: AnyFile) -> tuple[int, int]:
    """Returns the (height, width) at which a video is displayed. Raises UnreadableVideo if the file is not a video.

    Example:
        height, width = video_size("clip.mp4")
    """
    frames = shown_frames(path)  # this open iterator keeps the file open
    (frame, _, _), video = next(frames)
    return frame_turn(frame).size(frame.height, max(1, round(frame.width * video.pixel_aspect)))


def frame_times(path: AnyFile, *, fps: float | int | None = None) -> Float[np.ndarray, " n"]:
    """Returns the times in seconds of the frames that `read_clip` can return. The first key frame is at time 0.

    If fps is None, the times are those of the video's own frames, which are found without decoding. Otherwise, they are
    i / fps, up to the video's duration.

    Raises UnreadableVideo if the file is not a video, is damaged at its end, or claims a duration that is impossible
    for its size.

    Example:
        starts = frame_times("clip.mp4", fps=8)[:-16]  # starts of clips of 17 frames
    """
    if fps is None:
        with opened(path) as video:
            return np.array([at for at, _ in video.whole_packets()])
    seconds = last_end(path)
    # Up to a quarter of a frame may be missing at the end, because some containers round times to milliseconds.
    count = math.floor(seconds * fps + 0.25)
    if count > size_of(path) + _TIMES:
        reason = f"claims to last {seconds:.3g} seconds, which at {fps:g} frames per second is impossible for its size"
        raise UnreadableVideo(path, reason, "convert it again")
    return np.arange(count) / fps


def read_clip(
    path: AnyFile,
    frames: int,
    image_size: tuple[int, int],
    channels: int,
    *,
    fps: float | int | None = None,
    start: float | int = 0.0,
    crop: Crop = "center",
) -> UInt8[np.ndarray, "frames height width c"]:
    """Returns the frames that a video shows at `start` + i / `fps` seconds, resized and cropped to `image_size`.

    fps: frames per second; None returns the video's consecutive frames from `start` on.

    Frames are turned and mirrored as the file specifies, and resampled to square pixels.

    Raises UnreadableVideo if the file is not a video, is damaged in the part that is read, or is too short (see
    `frame_times`).

    Example:
        clip = read_clip("clip.mp4", 17, (64, 64), 3, fps=8)
    """
    out: list[np.ndarray] = []
    times: np.ndarray | None = None
    turn: Turn | None = None
    for (frame, at, until), video in shown_frames(path, start):
        # As in FFmpeg, the turn of the first frame applies to all frames. Only the first frame is queried, because a
        # queried frame stays in memory until garbage collection.
        turn = frame_turn(frame) if turn is None else turn
        if fps is not None and times is None:
            # The times are shifted by up to half a frame, to allow for rounded frame times.
            times = start + np.arange(frames) / fps + 0.5 / max(video.rate, fps)
        count = int(at > start - SAME_TIME if times is None else (times[len(out) :] < until).sum())
        if count:
            out += [_upright(frame, turn, video.pixel_aspect, image_size, channels, crop)] * count
        if len(out) == frames:
            return np.stack(out)
    at_fps = "" if fps is None else f" at {fps:g} fps"
    reason = f"is too short for {frames} frames{at_fps} from second {start:g}"
    raise UnreadableVideo(path, reason, "give a longer video")


def write_video(
    path: str | os.PathLike[str], frames: UInt8[np.ndarray, "frames height width c"], *, fps: float | int = 8.0
) -> None:
    """Writes frames atomically, as H.264 in an mp4 file or as a looping GIF, depending on the suffix.

    The sides of an mp4 must be even, so the last row or column is repeated if a side is odd. The colours of an mp4 are
    tagged as BT.709. In a GIF, times are rounded to hundredths of a second.

    Raises:
        ValueError: the suffix is unknown, there are no frames, or the frame rate is not positive.
        OSError: the path is not writable; see `check_writable`.
        ModuleNotFoundError: PyAV or Pillow is not installed.

    Example:
        write_video("clip.mp4", to_uint8(clip), fps=16)
    """
    check_video_path(path)
    if len(frames) == 0 or not 0 < fps < math.inf:
        raise ValueError(
            f"a video needs at least one frame and a positive frame rate, not {len(frames)} frames at fps={fps}."
        )
    colour = frames.repeat(3, axis=3) if frames.shape[3] == 1 else frames
    if Path(path).suffix.lower() == ".gif":
        stills = [pillow().fromarray(frame) for frame in colour]
        with atomic_file(path) as file:
            # Durations are multiples of 10 ms, rounded so that no frame begins more than 5 ms early or late.
            durations = (10 * np.diff(np.round(100 / fps * np.arange(len(frames) + 1)))).tolist()
            stills[0].save(file, "GIF", save_all=True, append_images=stills[1:], duration=durations, loop=0)
        return
    odd = [(0, length % 2) for length in colour.shape[1:3]]
    colour = np.pad(colour, ((0, 0), *odd, (0, 0)), mode="edge")
    encoded = io.BytesIO()  # PyAV does not pass on errors of the disk
    with av().open(encoded, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": _CRF})
        stream.height, stream.width = colour.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        for pixels in colour:
            container.mux(stream.encode(to_bt709(np.ascontiguousarray(pixels))))
        container.mux(stream.encode())
    with atomic_file(path) as file:
        file.write(encoded.getbuffer())


def check_video_path(path: str | os.PathLike[str]) -> None:
    """Raises any error that `write_video` would raise for this path, before there is a video to write.

    Example:
        check_video_path(arguments.out)
    """
    suffix = Path(path).suffix.lower()
    if suffix not in VIDEO_SUFFIXES:
        raise ValueError(f"the path '{path}' must end in one of {', '.join(VIDEO_SUFFIXES)}.")
    pillow() if suffix == ".gif" else av()
    check_writable(path)


def _upright(
    frame: Any, turn: Turn, aspect: float, size: tuple[int, int], channels: int, crop: Crop
) -> UInt8[np.ndarray, "height width c"]:
    """Returns a frame resized to `size`, upright and with square pixels."""
    image = pillow().fromarray(np.ascontiguousarray(turn.apply(frame_pixels(frame, max(size)))))
    if channels == 1:
        image = image.convert("L")
    fitted = fit(image, size, crop, pixel_aspect=1 / aspect if turn.swap else aspect)
    return np.asarray(fitted, dtype=np.uint8).reshape(*size, channels)
