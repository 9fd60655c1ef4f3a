"""Arrays arrive unchanged, and what would have to be guessed is refused in one sentence."""

import io

import numpy as np
import pytest

from flowgen.data import DataConfig, load

GREY = np.arange(10 * 6 * 4, dtype=np.uint8).reshape(10, 6, 4)


def write_npz(folder, **arrays):
    np.savez(folder / "a.npz", **arrays)
    return DataConfig("npz", path=str(folder / "a.npz"))


def load_all(config):
    return load(config, image_size=(6, 4), channels=1, split="all")


def test_npz_gives_its_arrays_unchanged(tmp_path):
    labels = np.array([0, -1, 2, 1, 0, 0, 0, 0, 0, 0], np.int64)
    dataset = load_all(write_npz(tmp_path, images=GREY, labels=labels, other=GREY))
    np.testing.assert_array_equal(dataset.x[..., 0], GREY)
    np.testing.assert_array_equal(dataset.labels, labels)
    assert dataset.class_names == ("0", "1", "2")
    unlabelled = load_all(write_npz(tmp_path, images=GREY))
    assert (unlabelled.class_names, set(unlabelled.labels.tolist())) == ((), {-1})


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"images": GREY / 255}, "is float64; save uint8 levels 0..255. flowgen.data.to_uint8"),
        ({"images": GREY.astype(np.int32)}, "is int32; save uint8"),
        ({"images": GREY[0]}, r"has shape \(6, 4\)"),
        ({"images": GREY[:0]}, r"has shape \(0, 6, 4, 1\)"),
        ({"images": GREY[:, :3]}, r"has images of 3x4, but model.image_size is 6x4; .* to \(3, 4\)"),
        (
            {"images": GREY[..., None].repeat(2, -1)},
            "model.channels is 1, .* have 2 channels; set model.channels to 2",
        ),
        ({"photos": GREY}, r"\['photos'\], but no 'images'"),
        (
            {"images": GREY, "labels": np.zeros(9, int)},
            r"int64 of shape \(9,\); save integers of shape \(10,\)",
        ),
        ({"images": GREY, "labels": np.zeros(10)}, "is float64"),
        ({"images": GREY, "labels": np.full(10, -2)}, "contains -2"),
        ({"images": np.array([{}])}, "not a readable .npz file"),
    ],
)
def test_npz_refuses_what_it_would_have_to_guess(tmp_path, arrays, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_all(write_npz(tmp_path, **arrays))


def test_npz_refuses_damaged_and_foreign_files(tmp_path):
    config = write_npz(tmp_path, images=GREY)
    path = tmp_path / "a.npz"
    whole = path.read_bytes()
    plain = io.BytesIO()
    np.save(plain, GREY)
    for content in (whole[:-50], whole[:60], b"", b"text", plain.getvalue()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"not a readable \.npz file of plain arrays"):
            load_all(config)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load_all(config)
