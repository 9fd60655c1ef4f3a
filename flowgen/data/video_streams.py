"""Opens video files, and reads their complete packets and frames with display times."""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import itertools
import math
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flowgen.data.stored import AnyFile, ChangedData, OpenedFile, StoredFile, stored
from flowgen.data.unreadable import Unreadable
from flowgen.data.video_losses import Losses
from flowgen.packages import need

# FFmpeg's names for the supported containers. Formats that refer to other files, such as playlists, are left out.
_CONTAINERS = "mov,matroska,avi,gif,mpeg,mpegts,mpegvideo,asf,flv,ogg"
# Maximum number of pixels in a frame: 8192 x 4096.
_MOST_PIXELS = 1 << 25
# Seeking uses decoding times. In H.264, these may be this many frames earlier than the display times.
_REORDERED = 16
# Tolerance for rounding errors in the time of a frame, in seconds.
SAME_TIME = 1e-6
_NO_FRAMES = ("has no frames that can be decoded", "give another video")


class UnreadableVideo(Unreadable):
    """Raised if a video cannot be decoded. The message contains the path, the reason and a remedy.

    Example:
        raise UnreadableVideo("clip.mp4", "is damaged", "convert it again or remove it")
    """

    def __init__(self, path: AnyFile, reason: str, remedy: str) -> None:
        super().__init__(f"'{path}' {reason}; {remedy}.")
        self._named = f"'{path}' {reason}"

    @property
    def named(self) -> str:
        return self._named


class Shown(NamedTuple):
    """A decoded frame and its display interval, in seconds from the start of the video."""

    frame: Any
    at: float
    until: float


class Packet(NamedTuple):
    """A packet, and whether data are missing between the previous packet and this one."""

    packet: Any
    follows_loss: bool


@dataclasses.dataclass(frozen=True)
class Video:
    """An open video file. The video begins at its first key frame, because earlier frames cannot be decoded.

    start: start of the stream, in seconds. rate: frames per second. counts_packets: whether the container numbers
    packets instead of storing time stamps. ahead: packets that were read when the file was opened. losses: detects
    losses between packets.

    Example:
        with opened("clip.mp4") as video: ...
    """

    path: AnyFile
    container: Any
    stream: Any
    start: float
    rate: float
    counts_packets: bool
    ahead: list[Packet]
    losses: Losses

    @property
    def pixel_aspect(self) -> float:
        """The ratio of a pixel's displayed width to its displayed height."""
        return float(self.stream.sample_aspect_ratio or 1)

    def time_of(self, part: Any) -> float:
        """Returns the time in seconds at which a packet or a frame is first shown."""
        return float(_stamp(part) * (part.time_base or self.stream.time_base)) - self.start

    def lasts(self, part: Any) -> float:
        """Returns the display duration of a packet or a frame in seconds, or 1 / rate if the file does not state it.

        Most files state a duration for the last frame only.
        """
        known = part.duration is not None and part.duration > 0
        return float(part.duration * (part.time_base or self.stream.time_base)) if known else 1 / self.rate

    def packets(self) -> Iterator[Packet]:
        """Yields packets from the container's current position, including packets of frames that are not shown.

        The iterator ends where the file is truncated or where FFmpeg cannot read any further.
        """
        yield from self.ahead
        self.ahead.clear()
        yield from _packets(self.container, self.stream, self.losses)

    def whole_packets(self) -> list[tuple[float, float]]:
        """Returns the display intervals of all frames that have complete packets after the current position.

        If damage is not followed by a key frame, the frames after it are left out, because they cannot be decoded.
        """
        found: list[tuple[float, float]] = []
        end = math.inf
        for packet, _ in self.packets():
            if packet.is_keyframe and not packet.is_corrupt:
                end = math.inf
            if packet.is_corrupt:
                end = min(end, self.time_of(packet))
            elif not packet.is_discard:
                found.append((self.time_of(packet), self.lasts(packet)))
        whole = sorted((at, min(at + lasts, end)) for at, lasts in found if -SAME_TIME < at < end - SAME_TIME)
        if whole and self.losses.behind(whole[-1][1] + self.start):
            raise UnreadableVideo(self.path, *_damaged(whole[-1][1]))
        return whole

    def seek(self, second: float) -> bool:
        """Seeks to a key frame before the given second, and returns whether this succeeded.

        Fails if the file is not seekable, or if frames are reordered and have no time stamps, because such frames can
        only be counted from the beginning.
        """
        if self.counts_packets and self.stream.codec_context.has_b_frames:
            return False
        try:
            self.container.seek(round((second + self.start) / self.stream.time_base), stream=self.stream)
        except av().FFmpegError:
            return False
        self.ahead.clear()
        self.losses.forget()
        return True


def av() -> Any:
    """Returns the module `av` (PyAV), or raises a ModuleNotFoundError that names the package.

    Example:
        container = av().open("clip.mp4")
    """
    return need("av", "Reading and writing video")


@contextlib.contextmanager
def opened(path: AnyFile) -> Generator[Video]:
    """Yields the video in a file. Does not open other files to which this file refers.

    Raises UnreadableVideo if the container is not supported, if there is no video or frame rate, or if frames have more
    than 8192 x 4096 pixels.

    Example:
        with opened("clip.mp4") as video: ...
    """
    with _container(path) as (container, file):
        stream = _stream(path, container)
        rate = float(stream.average_rate or stream.base_rate or 0)
        if not 0 < rate < math.inf:
            raise UnreadableVideo(path, "does not state its frame rate", "convert it to mp4")
        # Reordered frames in an AVI begin later than the file states.
        counts_packets = container.format.name == "avi"
        losses = Losses(file, container, stream, rate)
        decodable = itertools.dropwhile(_leans, _packets(container, stream, losses))
        ahead = list(itertools.islice(decodable, _REORDERED if counts_packets else 1))
        if not ahead:
            raise UnreadableVideo(path, *_NO_FRAMES)
        # An edit list may set the start. Key frames before it are decoded but not shown.
        first = min((_stamp(packet) for packet, _ in ahead if not packet.is_discard), default=stream.start_time or 0)
        yield Video(path, container, stream, float(first * stream.time_base), rate, counts_packets, ahead, losses)


@contextlib.contextmanager
def _container(path: AnyFile) -> Generator[tuple[Any, OpenedFile]]:
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}
    with _opened(stored(path)) as file:
        try:
            container = av().open(file, container_options=options, metadata_errors="replace")
        except ChangedData:
            raise
        except (av().FFmpegError, ValueError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UnreadableVideo(path, f"is not a readable video ({reason})", "convert it to mp4") from error
        with container:
            yield container, file


def _opened(file: StoredFile) -> OpenedFile:
    if not isinstance(file, Path):
        return file.open("rb")
    if not file.is_file():
        raise FileNotFoundError(f"'{file}' is not a file; give the path of a video, such as clip.mp4.")
    # FFmpeg is given an open file without a name, because it would interpret protocols and patterns in a name.
    return os.fdopen(os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0)), "rb")


def _stream(path: AnyFile, container: Any) -> Any:
    """Returns a container's first decodable video stream that is not cover art."""
    cover = av().stream.Disposition.attached_pic
    shown = (stream for stream in container.streams.video if not stream.disposition & cover)
    stream = next((stream for stream in shown if stream.codec_context is not None), None)
    if stream is None:
        raise UnreadableVideo(path, *_NO_FRAMES)
    context = stream.codec_context
    if context.width * context.height > _MOST_PIXELS:
        size = f"{context.width} x {context.height} pixels"
        raise UnreadableVideo(path, f"has frames of {size}, but the limit is 8192 x 4096", "scale it down")
    context.options = {"max_pixels": str(_MOST_PIXELS)}
    return stream


def _packets(container: Any, stream: Any, losses: Losses) -> Iterator[Packet]:
    # PyAV raises an IndexError after the last packet if a stream is missing from the header.
    with contextlib.suppress(av().FFmpegError, IndexError):
        for packet in container.demux(*losses.watched):
            follows_loss = bool(packet.size) and losses.before(packet)
            if packet.size and packet.stream_index == stream.index and _has_time(packet):
                yield Packet(packet, follows_loss)


def _leans(packet: Packet) -> bool:
    """Returns whether a packet is not a key frame."""
    return not packet.packet.is_keyframe


def _stamp(part: Any) -> int:
    return part.dts if part.pts is None else part.pts


def _has_time(part: Any) -> bool:
    return part.pts is not None or part.dts is not None


def last_end(path: AnyFile) -> float:
    """Returns the time at which a video's last complete frame ends, according to its packets rather than its header."""
    # This time is determined by the packets from the last key frame on, and seeking to the end leads to that key frame.
    # In MPEG-TS, however, seeking can lead to any packet, and the frame shown last may precede others in packet order.
    # The target is therefore some frames before the end.
    for searched in (True, False):
        with opened(path) as video:
            if searched:
                claimed = video.container.duration
                if not claimed or claimed < 0 or not video.seek(max(0.0, claimed / 1e6 - _REORDERED / video.rate)):
                    continue
            # If frames are reordered, only the frame shown last reliably has the duration that its packet states.
            whole = video.whole_packets()
            if whole and whole[-1][1] > 0:
                return whole[-1][1]
    return 0.0


def shown_frames(path: AnyFile, start: float | int = 0.0) -> Iterator[tuple[Shown, Video]]:
    """Yields the frames of a video, beginning with the one that is shown at `start` seconds.

    Raises UnreadableVideo if there are no frames from `start` on, or if one of them is damaged.

    Example:
        for (frame, at, until), video in shown_frames("clip.mp4"): ...
    """
    # Without an index, seeking may overshoot the target. In that case, the video is read from its beginning.
    for searched in (True, False):
        with opened(path) as video:
            begin = start - _REORDERED / video.rate if searched else 0
            if begin > 0 and not video.seek(begin):
                continue
            frames = _shown(video, start)
            first = next(frames, None)
            if first is None or first.at > max(start, 0) + SAME_TIME:
                if begin > 0:
                    continue
                reason = f"has no decodable frame at second {start:.3g}"
                raise UnreadableVideo(path, reason, "convert it again or remove it")
            yield first, video
            yield from ((frame, video) for frame in frames)
            return


def _shown(video: Video, start: float | int) -> Iterator[Shown]:
    lost: list[float] = []
    last, tainted = None, False
    for frame, at in _decoded(video, lost):
        # Frames predicted from a damaged frame are damaged too.
        tainted = frame.is_corrupt or (tainted and not frame.key_frame)
        if last is not None:
            yield _whole(Shown(*last, at), video, lost, start)
        if tainted:
            lost.append(at)
        last = (frame, at)
    if last is not None:
        frame, at = last
        yield _whole(Shown(frame, at, at + video.lasts(frame)), video, lost, start)


def _decoded(video: Video, lost: list[float]) -> Iterator[tuple[Any, float]]:
    """Yields frames and their times, and records the times of damaged packets."""
    waiting: list[float] = []
    # Frames that depend on frames before the first key frame cannot be decoded, but some decoders return grey frames
    # instead.
    packets = itertools.dropwhile(_leans, video.packets())
    begin = repaired = before = -math.inf
    broken = False

    def timed(frames: list[Any]) -> Iterator[tuple[Any, float]]:
        for frame in frames:
            # An AVI counts packets instead of storing time stamps. Frames are decoded in the order of their times.
            if video.counts_packets and waiting:
                yield frame, heapq.heappop(waiting)
            elif _has_time(frame) and video.time_of(frame) > begin - SAME_TIME:
                yield frame, video.time_of(frame)

    for packet, follows_loss in packets:
        at = video.time_of(packet)
        begin = at if begin == -math.inf else begin
        if follows_loss:
            lost.append(before)
            broken = True
        before = at
        if packet.is_corrupt:
            lost.append(at)
            broken = True
            continue
        if broken and packet.is_keyframe:
            broken, repaired = False, at
        if video.counts_packets and not packet.is_discard:
            heapq.heappush(waiting, at)
        try:
            yield from timed(packet.decode())
        except av().FFmpegError:
            lost.append(at)
            broken = True
            waiting = sorted(time for time in waiting if time != at)
        # A loss affects all frames up to the next key frame. It also affects frames that follow this key frame in the
        # file but are shown before it.
        if broken or at < repaired:
            lost.append(at)
    with contextlib.suppress(av().FFmpegError, EOFError):
        yield from timed(video.stream.decode(None))


def _whole(shown: Shown, video: Video, lost: list[float], start: float | int) -> Shown:
    damaged = [time for time in lost if shown.at - SAME_TIME <= time < shown.until - SAME_TIME]
    if damaged and shown.until > start + SAME_TIME:
        raise UnreadableVideo(video.path, *_damaged(min(damaged)))
    return shown


def _damaged(second: float) -> tuple[str, str]:
    return f"is damaged at second {second:.3g}", "convert it again or remove it"
