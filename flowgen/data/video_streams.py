"""Video files, opened so that they open no others; their whole packets, and frames with the times they are shown."""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import itertools
import math
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from flowgen.data.unreadable import Unreadable
from flowgen.data.video_losses import Losses
from flowgen.packages import need

# FFmpeg's names of the containers that are read, and of nothing that names other files, such as lists and patterns.
_CONTAINERS = "mov,matroska,avi,gif,mpeg,mpegts,mpegvideo,asf,flv,ogg"
# Of one frame: 8192 x 4096.
_MOST_PIXELS = 1 << 25
# Files are searched by when frames are decoded, which H.264 may do so many frames before they are shown.
_REORDERED = 16
# Seconds by which the time of a frame may be missed in arithmetic.
SAME_TIME = 1e-6
_NO_PICTURES = ("has no pictures in it that can be decoded", "give a video")


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


class Packet(NamedTuple):
    """A packet, and whether something is missing between it and the one before."""

    packet: Any
    follows_loss: bool


@dataclasses.dataclass(frozen=True)
class Video:
    """An open file with a video stream, which begins at its first key frame: what comes before cannot be decoded.

    start: of the stream, in seconds. rate: frames per second. counts_packets: it has no times of its own.
    ahead: packets that were read when it was opened. losses: what is missing between packets.

    Example:
        with opened("clip.mp4") as video: ...
    """

    path: str | os.PathLike[str]
    container: Any
    stream: Any
    start: float
    rate: float
    counts_packets: bool
    ahead: list[Packet]
    losses: Losses

    @property
    def pixel_aspect(self) -> float:
        """Width of a pixel over its height, as they are stored."""
        return float(self.stream.sample_aspect_ratio or 1)

    def time_of(self, part: Any) -> float:
        """Returns the second at which a packet or a frame is first shown."""
        return float(_stamp(part) * (part.time_base or self.stream.time_base)) - self.start

    def lasts(self, part: Any) -> float:
        """Returns for how many seconds a packet or a frame is shown, which of most only the last one tells."""
        known = part.duration is not None and part.duration > 0
        return float(part.duration * (part.time_base or self.stream.time_base)) if known else 1 / self.rate

    def packets(self) -> Iterator[Packet]:
        """Yields packets from where the container stands, also of frames that are decoded but not shown.

        A file that is cut off, or that its container loses track of, ends there.
        """
        yield from self.ahead
        self.ahead.clear()
        yield from _packets(self.container, self.stream, self.losses)

    def whole_packets(self) -> list[tuple[float, float]]:
        """Returns from when until when the frames are shown whose packets are whole, from where the container stands.

        What follows the first damage behind the last key frame is left out, for it cannot be decoded.
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
        """Goes to a key frame before a second, if the file can be searched.

        Without times of their own, frames that are reordered can only be counted from the beginning.
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
    """Returns the module `av` (PyAV), or raises ModuleNotFoundError naming the package.

    Example:
        container = av().open("clip.mp4")
    """
    return need("av", "Reading and writing video")


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Generator[Video]:
    """Yields the video in a file. No other file is opened, whatever this one says.

    Raises UnreadableVideo: content of other containers than we list, no video in it, no frame rate, or frames beyond
    8192 x 4096.

    Example:
        with opened("clip.mp4") as video: ...
    """
    with _container(path) as (container, file):
        stream = _stream(path, container)
        rate = float(stream.average_rate or stream.base_rate or 0)
        if not 0 < rate < math.inf:
            raise UnreadableVideo(path, "does not say its frame rate", "convert it to mp4")
        # Frames that are reordered in an AVI begin later than it says.
        counts_packets = container.format.name == "avi"
        losses = Losses(file, container, stream, rate)
        decodable = itertools.dropwhile(_leans, _packets(container, stream, losses))
        ahead = list(itertools.islice(decodable, _REORDERED if counts_packets else 1))
        if not ahead:
            raise UnreadableVideo(path, *_NO_PICTURES)
        # Key frames before the beginning that an edit list sets are decoded, but not shown.
        first = min((_stamp(packet) for packet, _ in ahead if not packet.is_discard), default=stream.start_time or 0)
        yield Video(path, container, stream, float(first * stream.time_base), rate, counts_packets, ahead, losses)


@contextlib.contextmanager
def _container(path: str | os.PathLike[str]) -> Generator[tuple[Any, BinaryIO]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no video '{path}'; give a file such as clip.mp4.")
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}
    # FFmpeg gets no name, for it would guess protocols and patterns of files in it.
    with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), "rb") as file:
        try:
            container = av().open(file, container_options=options, metadata_errors="replace")
        except (av().FFmpegError, ValueError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UnreadableVideo(path, f"is no video that can be read ({reason})", "convert it to mp4") from error
        with container:
            yield container, file


def _stream(path: str | os.PathLike[str], container: Any) -> Any:
    """The first video of a container that can be decoded, and is no cover of a piece of music."""
    cover = av().stream.Disposition.attached_pic
    shown = (stream for stream in container.streams.video if not stream.disposition & cover)
    stream = next((stream for stream in shown if stream.codec_context is not None), None)
    if stream is None:
        raise UnreadableVideo(path, *_NO_PICTURES)
    context = stream.codec_context
    if context.width * context.height > _MOST_PIXELS:
        size = f"{context.width} x {context.height} pixels"
        raise UnreadableVideo(path, f"has frames of {size}, more than 8192 x 4096", "convert it to fewer")
    context.options = {"max_pixels": str(_MOST_PIXELS)}
    return stream


def _packets(container: Any, stream: Any, losses: Losses) -> Iterator[Packet]:
    # PyAV raises an IndexError behind the last packet, if there was a stream that the header does not tell of.
    with contextlib.suppress(av().FFmpegError, IndexError):
        for packet in container.demux(*losses.watched):
            follows_loss = bool(packet.size) and losses.before(packet)
            if packet.size and packet.stream_index == stream.index and _has_time(packet):
                yield Packet(packet, follows_loss)


def _leans(packet: Packet) -> bool:
    """Whether a packet leans on one before."""
    return not packet.packet.is_keyframe


def _stamp(part: Any) -> int:
    return part.dts if part.pts is None else part.pts


def _has_time(part: Any) -> bool:
    return part.pts is not None or part.dts is not None


def last_end(path: str | os.PathLike[str]) -> float:
    """Returns the second at which the last whole frame of a video ends, by its packets, whatever the file claims."""
    # What stands behind the last key frame tells it, and a search for the end leads there. MPEG-TS is searched to any
    # packet: in the order of packets, the frame that is shown last may stand before others.
    for searched in (True, False):
        with opened(path) as video:
            if searched:
                claimed = video.container.duration
                if not claimed or claimed < 0 or not video.seek(max(0.0, claimed / 1e6 - _REORDERED / video.rate)):
                    continue
            # Of frames that are reordered, only the one that is shown last is known to last as long as its packet says.
            whole = video.whole_packets()
            if whole and whole[-1][1] > 0:
                return whole[-1][1]
    return 0.0


def shown_frames(path: str | os.PathLike[str], start: float | int = 0.0) -> Iterator[tuple[Shown, Video]]:
    """Yields the frames of a video from one that is shown at second `start` on.

    Raises UnreadableVideo: damage in what is shown from `start` on, or no frame then.

    Example:
        for (frame, at, until), video in shown_frames("clip.mp4"): ...
    """
    # Of files without an index, a search may end behind what it was for.
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
                reason = f"has no frame at second {start:.3g} that can be decoded"
                raise UnreadableVideo(path, reason, "convert it again or remove it")
            yield first, video
            yield from ((frame, video) for frame in frames)
            return


def _shown(video: Video, start: float | int) -> Iterator[Shown]:
    lost: list[float] = []
    last, tainted = None, False
    for frame, at in _decoded(video, lost):
        # What is predicted from a damaged frame is damaged, too.
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
    """Yields frames and their times, and notes the times of packets that are damaged."""
    waiting: list[float] = []
    # What leans on frames before the first key frame cannot be decoded, even if some decoders give grey for it.
    packets = itertools.dropwhile(_leans, video.packets())
    begin = repaired = before = -math.inf
    broken = False

    def timed(frames: list[Any]) -> Iterator[tuple[Any, float]]:
        for frame in frames:
            # An AVI counts packets and knows no times: the frames, which come in order, have theirs in order.
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
        # Until a key frame, all leans on what is lost, and so do frames that come behind it to be shown before.
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
