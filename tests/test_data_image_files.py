"""Images keep their proportions, their middle and their upright side, whatever file they come from."""

import numpy as np
import pytest
from PIL import Image

from flowgen.data.image_files import fit, fit_array, read_image


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_centre_crop_covers_the_size_and_keeps_the_middle():
    """An image with a red left, green middle and blue right third loses the sides, never the proportions."""
    stripes = np.zeros((30, 90, 3), np.uint8)
    for i in range(3):
        stripes[:, 30 * i : 30 * (i + 1), i] = 255
    image = Image.fromarray(stripes)
    np.testing.assert_array_equal(np.asarray(fit(image, (30, 30), "center")), stripes[:, 30:60])
    stretched = np.asarray(fit(image, (30, 30), "none"))
    np.testing.assert_array_equal(stretched[15, [3, 15, 26]], np.eye(3) * 255)
    for size in ((7, 5), (5, 7), (64, 3), (1, 1)):
        assert fit(image, size, "center").size == size[::-1]


def test_resizing_is_antialiased():
    checkers = Image.fromarray((np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8))
    small = np.asarray(fit(checkers, (8, 8), "center")).astype(int)
    assert abs(small - 127.5).max() < 10


def test_arrays_of_the_right_size_are_untouched(rng):
    images = rng.integers(0, 256, (3, 6, 4, 1), dtype=np.uint8)
    assert fit_array(images, (6, 4), "center") is images
    assert fit_array(images, (4, 8), "center").shape == (3, 4, 8, 1)


def test_images_are_upright_opaque_and_eight_bit(tmp_path, rng):
    def read(image, channels=3, **options):
        image.save(tmp_path / "a.png", **options)
        size = (image.height, image.width)
        return read_image(tmp_path / "a.png", size=size, channels=channels, crop="center")

    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert (read(clear) == 255).all()
    half = Image.new("LA", (4, 4), (0, 128))
    assert (read(half, channels=1) == 127).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 0, 255, 0])
    np.testing.assert_array_equal(read(palette)[0, 0], [0, 255, 0])
    assert (read(palette, transparency=1) == 255).all()
    deep = np.array([[0, 256, 32768, 65535]], np.uint16)
    np.testing.assert_array_equal(read(Image.fromarray(deep), channels=1)[0, :, 0], [0, 1, 128, 255])
    pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3
    np.testing.assert_array_equal(read(Image.fromarray(pixels), exif=exif), pixels[::-1, ::-1])
    grey = read(Image.fromarray(pixels), channels=1)
    assert grey.shape == (6, 6, 1)
