"""Images of other depths than 8 bits: every level the byte that it stands for, or a refusal that says what to do."""

import io
import struct
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from flowgen.data.image_files import UnreadableImage, read_image, read_image_size

# Samples of two pixels side by side; of the first the highest 8 bits are 0x9C, of the second 0x20.
LEVELS = {bits: (0x9C << (bits - 8) | 3, 0x20 << (bits - 8)) for bits in (10, 12, 14, 16)}
BYTES = [0x9C, 0x20]
TURNED = [255 - level for level in BYTES]


def packed(levels, bits):
    """Levels one behind the other, each with its highest bit first, as TIFF packs 10, 12 and 14 bits."""
    line = "".join(f"{level:0{bits}b}" for level in levels)
    line += "0" * (-len(line) % 8)
    return int(line, 2).to_bytes(len(line) // 8, "big")


def tiff(body, bits, *, order="<", photometric=1, sample_format=None, samples=1):
    """A TIFF of two pixels, by the letter of its specification."""
    entries = [
        *((256, 4, 1, 2), (257, 4, 1, 1), (258, 3, samples, bits), (259, 3, 1, 1), (262, 3, 1, photometric)),
        *((273, 4, 1, 0), (277, 3, 1, samples), (278, 4, 1, 1), (279, 4, 1, len(body))),
        *(() if sample_format is None else ((339, 3, samples, sample_format),)),
    ]
    after = 8 + 2 + 12 * len(entries) + 4
    extra, out = b"", b""
    for tag, kind, count, value in entries:
        if tag == 273:
            value = after + 2 * samples * 2
        if kind == 3 and count > 2:
            extra, value = extra + struct.pack(f"{order}{count}H", *[value] * count), after + len(extra)
            out += struct.pack(f"{order}HHII", tag, kind, count, value)
        else:
            out += struct.pack(f"{order}HHI", tag, kind, count)
            out += struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return head + out + struct.pack(f"{order}I", 0) + extra.ljust(4 * samples, b"\0") + body


def numbers(kind, *levels, order="<"):
    return struct.pack(f"{order}{len(levels)}{kind}", *levels)


def pgm(largest, plain=False):
    # Of the two levels, as near as the largest one allows.
    levels = [round(byte / 255 * largest) for byte in BYTES]
    text = f"{'P2' if plain else 'P5'} 2 1 {largest}\n".encode()
    return text + (" ".join(map(str, levels)).encode() if plain else numbers("H", *levels, order=">"))


def ppm(largest):
    levels = [round(byte / 255 * largest) for byte in BYTES for _ in range(3)]
    return f"P6 2 1 {largest}\n".encode() + numbers("H", *levels, order=">")


def jpeg_2000(bits):
    """Grey of so many bits, as FFmpeg writes it, of 16 x 16 pixels in two halves."""
    av = pytest.importorskip("av")
    levels = np.repeat(np.array(LEVELS[bits], np.uint16), 8)[None].repeat(16, axis=0)
    context = av.CodecContext.create("jpeg2000", "w")
    context.width = context.height = 16
    context.pix_fmt = "gray16le" if bits == 16 else f"gray{bits}le"
    context.time_base = Fraction(1, 25)
    context.options = {"pred": "1", "format": "jp2"}
    frame = av.VideoFrame(16, 16, context.pix_fmt)
    frame.planes[0].update(np.pad(levels, ((0, 0), (0, frame.planes[0].line_size // 2 - 16))).tobytes())
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode()])


def pillow(levels, name, **options):
    file = io.BytesIO()
    Image.fromarray(np.array([levels])).save(file, name, **options)
    return file.getvalue()


READ = {
    "TIFF of 12 bits": (tiff(packed(LEVELS[12], 12), 12), BYTES),
    "TIFF of 16 bits": (tiff(numbers("H", *LEVELS[16]), 16), BYTES),
    "TIFF of 16 bits, big-endian": (tiff(numbers("H", *LEVELS[16], order=">"), 16, order=">"), BYTES),
    "TIFF of 16 bits, white is zero": (tiff(numbers("H", *LEVELS[16]), 16, photometric=0), TURNED),
    "TIFF of 8 bits": (tiff(bytes(BYTES), 8), BYTES),
    "TIFF of 8 bits, white is zero": (tiff(bytes(BYTES), 8, photometric=0), TURNED),
    "TIFF of 16 bits, compressed": (pillow(np.uint16(LEVELS[16]), "TIFF", compression="tiff_lzw"), BYTES),
    "TIFF of 16 bits in colour": (
        tiff(numbers("H", *np.repeat(LEVELS[16], 3)), 16, photometric=2, samples=3),
        BYTES,
    ),
    "PGM to 1023": (pgm(1023), BYTES),
    "PGM to 4095": (pgm(4095), BYTES),
    "PGM to 65535": (pgm(65535), BYTES),
    "PGM to 1023 as text": (pgm(1023, plain=True), BYTES),
    "PPM to 1023": (ppm(1023), BYTES),
    "PPM to 65535": (ppm(65535), BYTES),
    "PNG of 16 bits": (pillow(np.uint16(LEVELS[16]), "PNG"), BYTES),
}


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_level_is_the_byte_that_it_stands_for(tmp_path, kind, channels):
    content, expected = READ[kind]
    (tmp_path / "a.png").write_bytes(content)
    pixels = read_image(tmp_path / "a.png", size=(1, 2), channels=channels, crop="none")
    # Of levels to 1023, the nearest to a byte's may be that of its neighbour; others are exact.
    assert np.abs(pixels[0].astype(int) - np.array(expected)[:, None]).max() <= ("1023" in kind or "4095" in kind)


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_jpeg_2000_of_any_depth_is_scaled(tmp_path, bits):
    (tmp_path / "a.jp2").write_bytes(jpeg_2000(bits))
    pixels = read_image(tmp_path / "a.jp2", size=(16, 16), channels=1, crop="none")
    assert (
        np.abs(pixels[:, [4, 12], 0].astype(int) - BYTES).max() <= 1
    )  # FFmpeg's encoder loses some of the lowest bits.


REFUSED = {
    "TIFF of floats": (tiff(numbers("f", 0.6, 0.1), 32, sample_format=3), "floating-point"),
    "TIFF of floats, white is zero": (
        tiff(numbers("f", 0.6, 0.1), 32, photometric=0, sample_format=3),
        "floating-point",
    ),
    "PFM": (b"Pf\n2 1\n-1.0\n" + numbers("f", 0.6, 0.1), "floating-point"),
    "TIFF of 32 bits": (tiff(numbers("I", 1 << 31, 1 << 20), 32), "has 32-bit samples, whose range"),
    "TIFF of 32 bits with a sign": (tiff(numbers("i", 1 << 30, -5), 32, sample_format=2), "signed 32-bit samples"),
    "TIFF of 16 bits with a sign": (tiff(numbers("h", 1 << 14, -5), 16, sample_format=2), "signed 16-bit samples"),
    "TIFF of 8 bits with a sign": (tiff(numbers("b", 100, -5), 8, sample_format=2), "signed 8-bit samples"),
    "TIFF of 10 bits": (tiff(packed(LEVELS[10], 10), 10), "not in a supported image format"),
    "TIFF of 14 bits": (tiff(packed(LEVELS[14], 14), 14), "not in a supported image format"),
    "TIFF of doubles": (tiff(numbers("d", 0.6, 0.1), 64, sample_format=3), "not in a supported image format"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("read", [read_image_size, lambda path: read_image(path, size=(1, 2), channels=1, crop="none")])
def test_samples_of_which_no_file_states_a_range_are_refused(tmp_path, kind, read):
    content, reason = REFUSED[kind]
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(UnreadableImage, match=reason) as caught:
        read(tmp_path / "a.tif")
    assert str(caught.value).count("a.tif") == 1
    assert "not in a supported image format" in reason or "convert it to unsigned 8 or 16 bits" in str(caught.value)
