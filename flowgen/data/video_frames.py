"""Converts decoded frames to RGB pixels and back, and determines the orientation of frames."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from jaxtyping import UInt8

from flowgen.data.image_files import on_white
from flowgen.data.media import pillow
from flowgen.data.upright import Turn
from flowgen.data.video_streams import av

# Maps the numbers of colour spaces in FFmpeg's frames to their numbers in FFmpeg's scaler.
_SPACES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
BT709, _BT601 = 1, 5
LIMITED_RANGE, _FULL_RANGE = 1, 2
# Frames with more pixels than 4096 x 2048 are shrunk before they are resized.
_LARGE = 1 << 23


def frame_turn(frame: Any) -> Turn:
    """Returns the turn that a frame's display matrix specifies, rounded to the nearest right angle."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            # A point (x, y) is shown at (a x + c y, b x + d y).
            a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data))
            if abs(a) + abs(d) >= abs(b) + abs(c):
                return Turn(mirror_x=a < 0, mirror_y=d < 0)
            return Turn(swap=True, mirror_x=c < 0, mirror_y=b < 0)
    return Turn()


def frame_pixels(frame: Any, least: int | None = None) -> UInt8[np.ndarray, "height width 3"]:
    """Returns the RGB pixels of a frame, composited on white. Does not turn the frame.

    least: if not None, a frame with more than 4096 x 2048 pixels is shrunk by an integer factor to save memory, but its
    sides remain at least twice this long.

    Pixels are converted from YCbCr to RGB with the matrix that the frame specifies. If the frame specifies no matrix,
    BT.709 is used for high-definition frames and BT.601 for others, as in video players. A frame is high-definition if
    its width is at least 1280 or its height is at least 577.
    """
    high = frame.width >= 1280 or frame.height > 576
    full = frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj")
    colours: dict[str, Any] = {
        "src_colorspace": _SPACES.get(frame.colorspace, BT709 if high else _BT601),
        "dst_colorspace": _BT601,
        "src_color_range": _FULL_RANGE if full else LIMITED_RANGE,
        "dst_color_range": _FULL_RANGE,
    }
    if least is not None and frame.width * frame.height > _LARGE:
        shrink = max(1, min(frame.width, frame.height) // (2 * least))
        colours |= {"width": frame.width // shrink, "height": frame.height // shrink, "interpolation": "AREA"}
    if not frame.format.has_palette and not any(part.is_alpha for part in frame.format.components):
        return frame.to_ndarray(format="rgb24", **colours)
    image = pillow().fromarray(frame.to_ndarray(format="rgba", **colours))
    return np.asarray(on_white(image).convert("RGB"))


def to_bt709(pixels: UInt8[np.ndarray, "height width 3"]) -> Any:
    """Converts RGB pixels to a YCbCr frame in BT.709 with limited range."""
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
