"""Videos for tests, written as others write them."""

from fractions import Fraction

import numpy as np

from flowgen.data.video import av

# What H.264 at a high quality loses of blocks of 8 pixels in many colours, of 255.
LOSSY = 40
SIZE = (32, 48)


def blocks(count, seed=0):
    """Frames of which none is like another, in blocks that compress well."""
    colours = np.random.default_rng(seed).integers(0, 256, (count, SIZE[0] // 8, SIZE[1] // 8, 1))
    return colours.repeat(8, axis=1).repeat(8, axis=2).repeat(3, axis=3).astype(np.uint8)


def encode(path, frames, codec="libx264", pixels="yuv420p", *, rate=10, at=None, container=(), **options):
    """Writes frames as others do, at times of their own in milliseconds if they are given."""
    with av().open(path, "w", options=dict(container)) as file:
        stream = file.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        if at is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av().VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if at is not None:
                frame.pts, frame.time_base = at[number], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def is_close(clip, frames, atol=LOSSY):
    return np.abs(clip.astype(int) - frames).max() <= atol


FORTY = blocks(40)
FINE = {"crf": "4", "g": "10"}
