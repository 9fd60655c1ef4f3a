"""How the pixels of a video are shown: display matrix, colour standard, transparency, and shape of pixels."""

import struct

import numpy as np
import pytest
from video_files import FINE, FORTY, SIZE, encode, is_close

from flowgen.data.video import av, read_clip, video_size, write_video

# What H.264 at a high quality loses of wide stripes, of 255.
LOSSY_COLOUR = 4


SIGNS = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
MATRICES = [(a, 0, 0, d) for a, d in SIGNS] + [(0, b, c, 0) for b, c in SIGNS]


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_the_whole_display_matrix_is_applied(tmp_path, matrix):
    """All eight turns and mirrors: pixel (x, y) is shown at (a x + c y, b x + d y), moved back into the image."""
    a, b, c, d = matrix
    frames = np.zeros((2, 32, 64, 3), np.uint8)
    frames[:, :8] = 255
    frames[:, :, :24] //= 2
    frames[:, 24:, 48:] = 200
    path = tmp_path / "a.mp4"
    write_video(path, frames)
    content = bytearray(path.read_bytes())
    begin = content.index(b"tkhd") + 44
    values = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    content[begin : begin + 36] = struct.pack(">9i", *values)
    path.write_bytes(content)
    y, x = np.indices((32, 64))
    right, down = a * x + c * y, b * x + d * y
    right, down = right - right.min(), down - down.min()
    upright = np.zeros((down.max() + 1, right.max() + 1, 3), np.uint8)
    upright[down, right] = frames[0]
    assert video_size(path) == upright.shape[:2]
    assert is_close(read_clip(path, 2, upright.shape[:2], 3), upright, 20)


# Stripes of 16 pixels, and how much red and blue count for in the luma of each standard.
STRIPES = np.array(
    [
        [255, 0, 0],
        [0, 255, 0],
        [0, 0, 255],
        [255, 255, 0],
        [0, 255, 255],
        [255, 0, 255],
        [128, 128, 128],
        [255, 255, 255],
    ]
)
BT601, BT709, BT2020 = (0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)
COLOURS = {
    "BT.601": (BT601, 6, False, (64, 128)),
    "BT.470": (BT601, 5, False, (64, 128)),
    "BT.709": (BT709, 1, False, (64, 128)),
    "BT.2020": (BT2020, 9, False, (64, 128)),
    "BT.601, full range": (BT601, 6, True, (64, 128)),
    "BT.709, full range": (BT709, 1, True, (64, 128)),
    "small, unnamed": (BT601, None, False, (64, 128)),
    "high definition, unnamed": (BT709, None, False, (720, 1280)),
    "high definition, BT.601": (BT601, 6, False, (720, 1280)),
}


def striped(path, luma, space, full, size):
    """Writes stripes in YCbCr that was calculated here, in float64."""
    (red, blue), (height, width) = luma, size
    to_y = np.array([red, 1 - red - blue, blue])
    rgb = STRIPES.repeat(width // 8, axis=0) / 255
    y = rgb @ to_y
    cb, cr = (rgb[:, 2] - y) / (2 * (1 - blue)), (rgb[:, 0] - y) / (2 * (1 - red))
    ranges = ((255, 0), (255, 128), (255, 128)) if full else ((219, 16), (224, 128), (224, 128))
    frame = av().VideoFrame(width, height, "yuv420p")
    for number, (plane, levels) in enumerate(zip(frame.planes, (y, cb, cr), strict=True)):
        scale, offset = ranges[number]
        row = np.clip(np.rint(levels * scale + offset), 0, 255).astype(np.uint8)[:: 2 if number else 1]
        rows = np.zeros((plane.height, plane.line_size), np.uint8)
        rows[:, : plane.width] = row
        plane.update(rows)
    with av().open(path, "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        if space is not None:
            frame.colorspace = stream.codec_context.colorspace = space
            frame.color_range = stream.codec_context.color_range = 2 if full else 1
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("name", COLOURS)
def test_colours_are_those_of_the_standard_that_a_video_names(tmp_path, name):
    path, size = tmp_path / "a.mp4", COLOURS[name][-1]
    striped(path, *COLOURS[name])
    middles = read_clip(path, 1, size, 3)[0, size[0] // 2, size[1] // 16 :: size[1] // 8]
    assert np.abs(middles.astype(int) - STRIPES).max() <= LOSSY_COLOUR
    grey = read_clip(path, 1, size, 1)[0, size[0] // 2, size[1] // 16 :: size[1] // 8, 0]
    assert np.abs(grey - STRIPES @ (0.299, 0.587, 0.114)).max() <= LOSSY_COLOUR  # as of images


@pytest.mark.parametrize("size", [(64, 128), (720, 1280)])
def test_what_is_written_names_its_colours_and_has_them(tmp_path, size):
    path = tmp_path / "a.mp4"
    frames = np.broadcast_to(STRIPES.repeat(size[1] // 8, axis=0), (2, *size, 3)).astype(np.uint8)
    write_video(path, frames)
    with av().open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (1, 1)
        luma = frame.to_ndarray()[size[0] // 2, size[1] // 16 : size[1] : size[1] // 8]
    assert np.abs(luma - (16 + 219 / 255 * STRIPES @ (0.2126, 0.7152, 0.0722))).max() <= LOSSY_COLOUR
    middles = read_clip(path, 1, size, 3)[0, size[0] // 2, size[1] // 16 :: size[1] // 8]
    assert np.abs(middles.astype(int) - STRIPES).max() <= LOSSY_COLOUR


def test_transparent_pixels_of_a_video_are_white(tmp_path):
    pixels = np.full((1, *SIZE, 4), 80, np.uint8)
    pixels[:, :, :24, 3], pixels[:, :, 24:, 3] = 0, 255
    with av().open(tmp_path / "a.mov", "w") as container:
        stream = container.add_stream("qtrle", rate=8)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "argb"
        container.mux(stream.encode(av().VideoFrame.from_ndarray(pixels[0], format="rgba")))
        container.mux(stream.encode())
    clip = read_clip(tmp_path / "a.mov", 1, SIZE, 3)[0]
    assert (clip[:, :24] == 255).all()
    assert (clip[:, 24:] == 80).all()


def test_pixels_of_any_aspect_are_made_square(tmp_path):
    path = encode(tmp_path / "a.mp4", FORTY[:2], **FINE, **{"x264-params": "sar=16/1"})
    assert video_size(path) == (32, 768)
    assert read_clip(path, 2, (16, 16), 3).shape == (2, 16, 16, 3)
