"""Detects bytes that are missing from a video, because containers and decoders do not report them."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from flowgen.data.stored import OpenedFile

# Containers that store packets consecutively, without an index of their positions.
_IN_ORDER = ("matroska,webm", "flv")
# The format name of programme streams (MPEG-PS), and the codecs that have a frame at every tick of the frame rate.
_PROGRAMME, _STEADY = "mpeg", ("mpeg1video", "mpeg2video")
# Number of bytes, such as headers, that may lie between two packets.
_BETWEEN = 128
# If packets are more frames apart than this, data between them is lost. In programme streams, times may be off by one
# frame.
_JUMP, _JUMP_OF_PROGRAMME = 1.75, 2.75
# Transport streams (MPEG-TS): the sync byte of packets, the number of header bytes, and the possible packet lengths,
# each with the number of bytes before the sync byte.
_TS, _SYNC, _TS_HEAD, _TS_STEPS = "mpegts", 0x47, 6, ((188, 0), (192, 4), (204, 0))
_TS_MOST = 10  # Largest number of bytes from the start of a packet to the end of its header.


class Losses:
    """Detects losses between the packets of a video while they are read in order.

    The signs of a loss depend on the container. In Matroska and FLV, a loss causes a gap in the time stamps and leaves
    bytes that belong to no packet. In MPEG-TS, it causes a wrong continuity counter or sync byte in a transport packet.
    In MPEG-PS, it causes a gap in the time stamps.

    Example:
        losses = Losses(file, container, stream, rate)
        for packet in container.demux(*losses.watched):
            missing = losses.before(packet)
    """

    def __init__(self, file: OpenedFile, container: Any, stream: Any, rate: float) -> None:
        self._file, self._stream, self._rate = file, stream, rate
        self._kind: str = container.format.name
        self._claimed = (container.duration or 0) / 1e6
        self.watched = () if self._kind in _IN_ORDER else (stream,)
        self._largest = 0
        self.forget()

    def forget(self) -> None:
        """Forgets earlier packets. Must be called after a seek."""
        self._end, self._passed = 0, 0  # End of the last packet; largest gap since the video's last packet.
        self._at: int | None = None
        self._before: Any = None

    def before(self, packet: Any) -> bool:
        """Returns whether data are missing between the previous packet of the video and this one."""
        at = packet.pos
        if at is not None:
            if self._at is not None and at > self._at:
                self._passed = max(self._passed, at - self._end)
            self._end = packet.size + (self._end if at == self._at else at)
            self._at = at
        self._largest = max(self._largest, packet.size)
        if packet.stream_index != self._stream.index:
            return False
        before, passed = self._before, self._passed
        self._before, self._passed = packet, 0
        if before is None:
            return False
        if self._kind == _TS and not self._is_continuous(before.pos, at):
            return True
        if self._kind == _PROGRAMME and self._stream.codec_context.name in _STEADY:
            return self._frames_between(before, packet) > _JUMP_OF_PROGRAMME
        return self._kind in _IN_ORDER and passed > _BETWEEN and self._frames_between(before, packet) > _JUMP

    def behind(self, end: float) -> bool:
        """Returns whether data are missing after the last packet. end: time stamp of this packet's end, in seconds."""
        if self._kind not in _IN_ORDER or self._at is None or (self._claimed - end) * self._rate < _JUMP:
            return False
        # A truncated file ends in the middle of the next packet.
        stands = self._file.tell()
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(stands)
        return size - self._end > 2 * self._largest + _BETWEEN

    def _frames_between(self, before: Any, packet: Any) -> float:
        """Returns the number of frames from one packet to a later one."""
        stamps = (before.dts, packet.dts) if None not in (before.dts, packet.dts) else (before.pts, packet.pts)
        return 0.0 if None in stamps else float((stamps[1] - stamps[0]) * self._stream.time_base) * self._rate

    def _is_continuous(self, begin: int | None, end: int | None) -> bool:
        """Returns whether a transport stream's packets between two positions are consecutive."""
        if begin is None or end is None or end <= begin:
            return True
        stands = self._file.tell()
        self._file.seek(begin)
        content = np.frombuffer(self._file.read(end - begin + _TS_MOST), np.uint8)
        self._file.seek(stands)
        fitting = [step for step in _TS_STEPS if sum(step) < len(content) and content[sum(step)] == _SYNC]
        if not fitting or (end - begin) % fitting[0][0] or len(content) != end - begin + _TS_MOST:
            return False
        step, mark = fitting[0]
        heads = content[np.arange(mark, end - begin + mark + 1, step)[:, None] + np.arange(_TS_HEAD)].astype(int)
        if (heads[:, 0] != _SYNC).any():
            return False
        mine = heads[((heads[:, 1] & 0x1F) << 8 | heads[:, 2]) == self._stream.id]
        # A packet may declare in its adaptation field that its number does not continue the count.
        if ((mine[:, 3] & 0x20 > 0) & (mine[:, 4] > 0) & (mine[:, 5] & 0x80 > 0)).any():
            return True
        numbers = mine[mine[:, 3] & 0x10 > 0, 3] & 0x0F
        return bool((np.diff(numbers) % 16 <= 1).all())
