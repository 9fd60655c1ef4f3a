"""Bytes and floats invert each other, grids place what they are given, files appear whole or not at all."""

import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import one_sentence
from tolerances import FORMULA, assert_close

from flowgen.data import media
from flowgen.data.video import write_video

LEVELS = np.arange(256, dtype=np.uint8)


def test_every_level_survives_the_round_trip_and_the_ends_are_exact():
    x = media.from_uint8(LEVELS)
    assert x.dtype == np.float32
    assert (x[0], x[-1]) == (-1.0, 1.0)
    np.testing.assert_array_equal(media.to_uint8(x), LEVELS)


def test_from_uint8_is_the_same_inside_a_compiled_program():
    assert_close(jax.jit(media.from_uint8)(jnp.asarray(LEVELS)), media.from_uint8(LEVELS), FORMULA)


def test_to_uint8_rounds_clips_and_shows_nan_as_grey():
    x = np.array([-1.6 / 255, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, -7, 1e38, np.inf, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(media.to_uint8(x), [127, 0, 1, 0, 255, 255, 0, 128])
    np.testing.assert_array_equal(media.to_uint8(jnp.ones((2, 2), jnp.bfloat16)), np.full((2, 2), 255))


def test_grid_places_every_image_and_leaves_missing_cells_white(rng):
    images = rng.integers(0, 200, (5, 4, 6, 3), dtype=np.uint8)
    grid = media.image_grid(images, columns=2, padding=3, scale=2)
    assert grid.shape == (3 * (8 + 3) + 3, 2 * (12 + 3) + 3, 3)
    for i in range(5):
        top, left = 3 + (i // 2) * 11, 3 + (i % 2) * 15
        np.testing.assert_array_equal(grid[top : top + 8 : 2, left : left + 12 : 2], images[i])
        np.testing.assert_array_equal(grid[top + 1 : top + 8 : 2, left + 1 : left + 12 : 2], images[i])
    assert (grid < 255).sum() == images.size * 4
    assert media.image_grid(images, padding=0).shape == (8, 18, 3)


@pytest.mark.parametrize("options", [{"columns": 0}, {"scale": 0}, {"padding": -1}])
def test_grid_refuses_meaningless_layouts(options):
    with pytest.raises(ValueError, match="image grid needs"):
        media.image_grid(np.zeros((1, 2, 2, 1), np.uint8), **options)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_saved_image_reads_back(tmp_path, rng, shape):
    image = rng.integers(0, 256, shape, dtype=np.uint8)
    media.save_image(tmp_path / "a.PNG", image)
    with media.pillow().open(tmp_path / "a.PNG") as saved:
        np.testing.assert_array_equal(np.asarray(saved), image.squeeze())
    assert [path.name for path in tmp_path.iterdir()] == ["a.PNG"]


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"old")

    def fail():
        with media.atomic_file(path) as file:
            file.write(b"half of the new")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a.png", "a.gif", "a.mp4", "a.npz"])
def test_a_full_disk_is_told_with_the_path(tmp_path, monkeypatch, name):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(path):
        if path.suffix == ".npz":
            with media.atomic_file(path) as file:
                np.savez(file, x=np.zeros(3))
        elif path.suffix == ".png":
            media.save_image(path, np.zeros((4, 4), np.uint8))
        else:
            write_video(path, np.zeros((2, 16, 16, 3), np.uint8))

    monkeypatch.setattr(media.os, "fsync", full)
    with pytest.raises(OSError, match=rf"Cannot write '.*{name}': No space left on device; free some space") as error:
        write(tmp_path / name)
    one_sentence(error)
    assert list(tmp_path.iterdir()) == []


def test_a_short_write_of_numpy_is_told_with_the_path():
    with pytest.raises(OSError, match=r"Cannot write 'mean.npy': the disk may be full"), media.naming("mean.npy"):
        raise OSError("103488 requested and 2016 written")


@pytest.mark.parametrize(
    ("name", "error", "sentence"),
    [
        ("file/a.png", NotADirectoryError, "is a file, not a folder"),
        ("folder.png", IsADirectoryError, "is a folder; name a file"),
        ("a.gif", ValueError, "must end in one of .png"),
        ("a", ValueError, "must end in one of .png"),
    ],
)
def test_unwritable_output_is_refused_before_compute(tmp_path, name, error, sentence):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=sentence):
        media.check_image_path(tmp_path / name)
    with pytest.raises(error, match=sentence):
        media.save_image(tmp_path / name, np.zeros((2, 2), np.uint8))
    assert sorted(tmp_path.rglob("*")) == before


def test_write_protected_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(media.os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="permission denied"):
        media.check_writable(tmp_path / "a.png")


def test_save_image_refuses_floats(tmp_path):
    with pytest.raises(ValueError, match="to_uint8 converts floats"):
        media.save_image(tmp_path / "a.png", np.zeros((2, 2, 3)))


def test_missing_pillow_names_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pillow"):
        media.pillow()


@pytest.fixture
def rng():
    return np.random.default_rng(0)
