"""Image files as cameras, old programs and strangers make them: right pixels, or a refusal by name, never more."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from conftest import rows
from PIL import Image, ImageCms

from flowgen.data.image_files import UnreadableImage, fit, read_image, read_image_size

# Pillow says on the side what it passes over.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
# An image of which every turn looks different.
PIXELS = np.zeros((8, 12, 3), np.uint8)
PIXELS[:4] = 250
PIXELS[:, :6, 0] = 120
# What JPEG at its best quality loses of these, of 255.
LOSSY = 25
TURNS = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x.swapaxes(0, 1), 2),
    8: np.rot90,
}
FORMATS = {
    "JPEG": {"quality": 100, "subsampling": 0, "comment": b"a note"},
    "PNG": {"dpi": (72, 72)},
    "WEBP": {"lossless": True},
    "TIFF": {},
}


def exif_of(orientation=6, *, order="<", **odd):
    """A block of EXIF: orientation, and as the other tags say, (type, count, value or offset) by their number."""
    entries = [
        (0x0112, 3, 1, orientation << (16 if order == ">" else 0)),
        *((int(k[1:], 16), *v) for k, v in odd.items()),
    ]
    body = b"".join(struct.pack(f"{order}HHII", *entry) for entry in sorted(entries))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return b"Exif\0\0" + head + body + struct.pack(f"{order}I", 8)  # The next directory is this one again.


def saved(name, exif, **options):
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, name, exif=exif, **FORMATS[name], **options)
    return file.getvalue()


def read(path, content, size=(12, 8), channels=3, crop="none"):
    path.write_bytes(content)
    return read_image(path, size=size, channels=channels, crop=crop).astype(int)


ODD_EXIF = {
    "plain": {},
    "big-endian": {"order": ">"},
    "resolution as text": {"x011a": (2, 4, 0x30303100)},
    "offset beyond the file": {"x011a": (5, 1, 0xFFFFFFF0), "x010f": (2, 900, 0x7FFFFFFF)},
    "unknown type": {"x011b": (77, 3, 1)},
    "huge count": {"x0131": (2, 0xFFFFFFFF, 8)},
    "loop of directories": {"x8769": (4, 1, 8), "x8825": (4, 1, 8)},
    "pointer that is no number": {"x8769": (2, 4, 0x41414141), "x8825": (5, 1, 8)},
}


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("odd", ODD_EXIF)
def test_odd_exif_turns_images_and_refuses_none(tmp_path, name, odd):
    content = saved(name, exif_of(**ODD_EXIF[odd]))
    assert np.abs(read(tmp_path / "a.png", content) - TURNS[6](PIXELS)).max() <= LOSSY
    assert read_image_size(tmp_path / "a.png") == (12, 8)


@pytest.mark.parametrize("name", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_every_orientation_is_turned_upright(tmp_path, orientation, name):
    upright = TURNS[orientation](PIXELS)
    content = saved(name, exif_of(orientation))
    (tmp_path / "a.png").write_bytes(content)
    assert read_image_size(tmp_path / "a.png") == upright.shape[:2]
    np.testing.assert_array_equal(read(tmp_path / "a.png", content, upright.shape[:2]), upright)
    # Of an uneven rest that is cut away, the middle is the one of the upright image.
    expected = np.asarray(fit(Image.fromarray(np.ascontiguousarray(upright)), (5, 4), "center"))
    assert np.abs(read(tmp_path / "a.png", content, (5, 4), crop="center") - expected).max() <= 1


@pytest.mark.parametrize("name", rows(["JPEG", "PNG", "WEBP"], ("WEBP",)))
def test_bytes_of_metadata_may_be_anything(tmp_path, name):
    rng = np.random.default_rng(0)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x011A: (300, 1), 0x0131: "program"})
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    content, block = saved(name, exif, icc_profile=profile), exif.tobytes()[6:]
    begin = content.index(block)
    tags = begin + 10 + 12 * 3  # Behind the directory, whose orientation is its first entry.
    for _ in range(300):
        changed = bytearray(content)
        for place in rng.integers(tags, begin + len(block), 3):
            changed[place] = rng.choice([0, 1, 2, 5, 7, 12, 255, rng.integers(256)])
        assert np.abs(read(tmp_path / "a.png", changed) - TURNS[6](PIXELS)).max() <= LOSSY
        changed[rng.integers(begin, tags)] = rng.integers(256)
        read(tmp_path / "a.png", changed)


@pytest.mark.parametrize(
    "odd",
    [
        [(0x8769, 4, 1, 0xFFFFFFF0)],  # where EXIF is: beyond the file
        [(0x8769, 2, 4, 0x41414141)],  # as text
        [(0x8769, 4, 1, 8)],  # in this directory
        [(0x8649, 1, 0xFFFFFFF0, 8)],  # Photoshop's notes, huge
        [(0x011A, 2, 4, 0x303033), (0x011B, 2, 4, 0x303033), (0x0128, 3, 1, 3)],  # dots per centimetre as text
    ],
    ids=["beyond", "text", "loop", "huge", "resolution"],
)
def test_odd_tags_of_a_tiff_refuse_no_pixels(tmp_path, odd):
    """A directory by hand: of pixels without compression, turned, and one odd tag."""
    tags = [(256, 3, 1, 12), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 200)]
    tags += [(274, 3, 1, 6), (277, 3, 1, 1), (278, 3, 1, 8), (279, 4, 1, 96), *odd]
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags)) + bytes(4)
    content = (b"II*\0" + struct.pack("<I", 8) + body).ljust(200, b"\0") + PIXELS[..., 1].tobytes()
    np.testing.assert_array_equal(read(tmp_path / "a.tif", content, channels=1)[..., 0], TURNS[6](PIXELS[..., 1]))
    assert read_image_size(tmp_path / "a.tif") == (12, 8)


def chunk(name, body, crc=None):
    return (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body) if crc is None else crc)
    )


@pytest.mark.parametrize(
    "odd",
    [
        chunk(b"iCCP", b"no profile"),
        chunk(b"cHRM", b"\0"),
        chunk(b"pHYs", b"\0"),
        chunk(b"tEXt", b"note\0\xff", crc=1),
        chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(1 << 22))),
        chunk(b"iTXt", b"note\0\1\0\0\0broken"),
        chunk(b"acTL", b"\0"),
        chunk(b"gAMA", b""),
    ],
    ids=lambda odd: odd[4:8].decode(),
)
def test_odd_chunks_of_a_png_refuse_no_pixels(tmp_path, odd):
    content = saved("PNG", exif_of())
    at = 8 + 25  # Behind the signature and the header.
    np.testing.assert_array_equal(read(tmp_path / "a.png", content[:at] + odd + content[at:]), TURNS[6](PIXELS))


def test_exif_may_stand_behind_the_pixels_of_a_png(tmp_path):
    plain = saved("PNG", b"")
    content = plain[:-12] + chunk(b"eXIf", exif_of()[6:]) + plain[-12:]
    np.testing.assert_array_equal(read(tmp_path / "a.png", content), TURNS[6](PIXELS))
    assert read_image_size(tmp_path / "a.png") == (12, 8)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe1",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>",
        saved("PNG", exif_of())[:-30],
        saved("JPEG", exif_of())[:-300],
    ],
    ids=["empty", "head of a PNG", "head of a JPEG", "PostScript", "SVG", "cut PNG", "cut JPEG"],
)
def test_what_is_no_whole_image_is_refused_by_name(tmp_path, content):
    with pytest.raises(UnreadableImage, match=r"odd\.png") as error:
        read(tmp_path / "odd.png", content)
    assert "\n" not in str(error.value)


def test_no_file_starts_a_program(tmp_path):
    """PostScript asks for Ghostscript, which here would leave a mark."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\n: > {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    for suffix in (".png", ".jpg", ".eps"):
        (tmp_path / f"a{suffix}").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    code = (
        "import sys\nfrom flowgen.data.image_files import *\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_image(path, size=(8, 8), channels=3, crop='center')\n"
        "    except UnreadableImage: continue\n"
        "    raise SystemExit('read')"
    )
    files = [str(tmp_path / f"a{suffix}") for suffix in (".png", ".jpg", ".eps")]
    subprocess.run(
        [sys.executable, "-c", code, *files], check=True, env={"PATH": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    )
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1), (2, 30_000)])
@pytest.mark.parametrize("size", [(256, 256), (16, 64)])
def test_lines_cost_no_more_than_other_images(shape, size):
    line = np.linspace(0, 255, max(shape)).astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(line if shape[1] > shape[0] else line[:, None], shape).copy())
    middle = np.asarray(fit(image, size, "center"))
    assert middle.shape == size
    assert np.abs(middle.astype(int) - 127).max() <= 1


@pytest.mark.parametrize("shape", [(300, 401), (401, 300), (97, 1200), (31, 17), (2048, 2600)])
@pytest.mark.parametrize("size", [(32, 32), (17, 50)])
def test_the_middle_is_cut_out_as_if_all_had_been_resized(tmp_path, shape, size):
    """Short side to S, then centre crop: cropping first changes no level by more than rounding."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    scale = max(size[0] / shape[0], size[1] / shape[1])
    whole = image.resize(
        (max(size[1], int(shape[1] * scale + 1e-9)), max(size[0], int(shape[0] * scale + 1e-9))),
        Image.Resampling.BILINEAR,
    )
    left, top = round((whole.width - size[1]) / 2), round((whole.height - size[0]) / 2)
    expected = np.asarray(whole.crop((left, top, left + size[1], top + size[0]))).astype(int)
    image.save(tmp_path / "a.png", compress_level=0)
    result = read_image(tmp_path / "a.png", size=size, channels=3, crop="center")
    assert np.abs(result - expected).max() <= 1
    assert np.abs(np.asarray(fit(image, size, "center")) - expected).max() <= 1


def test_images_beyond_all_bounds_are_refused_before_they_are_decoded(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    for call in (lambda p: read_image(p, size=(8, 8), channels=1, crop="center"), read_image_size):
        with pytest.raises(UnreadableImage, match=r"bomb\.png.*pixels"):
            call(tmp_path / "bomb.png")


def test_too_little_memory_refuses_the_image_alone(tmp_path, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "resize", no_memory)
    with pytest.raises(UnreadableImage, match=r"a\.png.*memory"):
        read_image(tmp_path / "a.png", size=(4, 4), channels=3, crop="center")


def png(colour, depth, body, width, clear, palette=b""):
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"PLTE", palette) if palette else b"", chunk(b"tRNS", clear)]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*chunks, chunk(b"IDAT", zlib.compress(b"\0" + body)), chunk(b"IEND", b"")])


# Two pixels, of which the first is hidden by a transparent value; the level of the second.
HIDDEN = {
    "grey of 1 bit": (png(0, 1, b"\x40", 2, struct.pack(">H", 0)), 255),
    "grey of 2 bits": (png(0, 2, b"\x60", 2, struct.pack(">H", 1)), 170),
    "grey of 4 bits": (png(0, 4, b"\x36", 2, struct.pack(">H", 3)), 102),
    "grey of 8 bits": (png(0, 8, b"\x36\x40", 2, struct.pack(">H", 0x36)), 0x40),
    "grey of 16 bits": (png(0, 16, b"\x12\x34\x12\x35", 2, struct.pack(">H", 0x1234)), 0x12),
    "colour of 8 bits": (png(2, 8, b"\1\2\3\4\4\4", 2, struct.pack(">3H", 1, 2, 3)), 4),
    "colour of 16 bits": (png(2, 16, bytes([9, 1, 8, 2, 7, 3, 4, 4, 4, 4, 4, 4]), 2, bytes([9, 1, 8, 2, 7, 3])), 4),
    "colour of 16 bits, alike in the high bytes": (png(2, 16, b"\4\1\4\1\4\1\4\1\4\1\4\2", 2, b"\4\1" * 3), 4),
    "palette": (png(3, 8, b"\0\1", 2, b"\0", bytes([9, 9, 9, 30, 30, 30])), 30),
    "grey and alpha of 16 bits": (png(4, 16, b"\x20\0\0\0\x20\0\xff\xff", 2, b""), 0x20),
    "colour and alpha of 16 bits": (png(6, 16, b"\x20\0\x20\0\x20\0\0\0\x20\0\x20\0\x20\0\xff\xff", 2, b""), 0x20),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", HIDDEN)
def test_hidden_pixels_are_white_at_every_depth(tmp_path, kind, channels):
    content, level = HIDDEN[kind]
    pixels = read(tmp_path / "a.png", content, (1, 2), channels)
    assert (pixels[0, 0] == 255).all()
    assert (pixels[0, 1] == level).all()


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "", "nowhere.png"):
        for call in (lambda p: read_image(p, size=(8, 8), channels=1, crop="center"), read_image_size):
            with pytest.raises(UnreadableImage, match=str(tmp_path / name)):
                call(tmp_path / name)
