"""Every dataset gives the same contract, or one sentence; damaged files never pass silently."""

import logging

import numpy as np
import pytest
from image_sets import load_all, write_csv_mnist
from PIL import Image

from flowgen.data import ArrayDataset, Batch, DataConfig, check_classes, hold_out, told_once
from flowgen.data.file_dataset import FileDataset

HELD_OF_50 = [5, 12, 31, 37, 45]


@pytest.fixture
def photos(tmp_path, rng):
    """Six cats and six dogs of several formats and sizes, some deeper down, plus what must be passed over."""
    root = tmp_path / "photos"
    for name in ("dog", "cat"):
        (root / name / "deep").mkdir(parents=True)
        for i, suffix in enumerate([".jpg", ".png", ".webp", ".bmp", ".JPEG", ".png"]):
            height, width = rng.integers(20, 60, 2)
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / ("deep" if i % 2 else "") / f"{i}{suffix}")
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / "._0.jpg").write_text("no image")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "a.png").write_text("no image")
    (root / "empty").mkdir()
    return root


def everything(dataset):
    return dataset[np.arange(len(dataset))]


def pairs(dataset):
    batch = everything(dataset)
    return [(image.tobytes(), label) for image, label in zip(batch.x, batch.context, strict=True)]


def spoil(photos):
    """Truncates one image and replaces two others by text and by nothing; returns their names."""
    truncated, text, empty = (
        photos / "cat" / "0.jpg",
        photos / "dog" / "4.JPEG",
        photos / "dog" / "z.png",
    )
    truncated.write_bytes(truncated.read_bytes()[:-200])
    text.write_text("no image")
    empty.write_bytes(b"")
    return ["cat/0.jpg", "dog/4.JPEG", "dog/z.png"]


# The contract every dataset fulfils.


def write_npz(folder, **arrays):
    np.savez(folder / "a.npz", **arrays)
    return DataConfig("npz", path=str(folder / "a.npz"))


@pytest.fixture(params=["digits", "mnist", "npz", "folder in memory", "folder from disk"])
def config(request, tmp_path, packages, photos, rng):
    if request.param == "mnist":
        write_csv_mnist(packages, rng)
    if request.param == "npz":
        return write_npz(tmp_path, images=rng.integers(0, 256, (30, 16, 12), dtype=np.uint8), labels=np.arange(30))
    if request.param.startswith("folder"):
        limit = 0 if request.param == "folder from disk" else 2**20
        return DataConfig("folder", path=str(photos), eval_fraction=0.25, in_memory_bytes=limit)
    return DataConfig(request.param)


def test_contract(config):
    whole, train, held = (load_all(config, split=split) for split in ("all", "train", "eval"))
    for dataset in (whole, train, held):
        batch = dataset[np.array([2, 0, 2])]
        assert isinstance(batch, Batch)
        assert batch.x.dtype == np.uint8
        assert batch.context.dtype == np.int32
        assert batch.x.shape == (3, *dataset.event_shape) == (3, 16, 12, 3)
        assert batch.context.shape == (3,)
        assert (batch.context >= 0).all()
        assert (batch.context < len(dataset.class_names)).all()
        np.testing.assert_array_equal(batch.x[0], batch.x[2])
        assert dataset.class_names == whole.class_names
    assert len(held) == max(1, round(config.eval_fraction * len(whole)))
    assert sorted(pairs(train) + pairs(held)) == sorted(pairs(whole))
    np.testing.assert_array_equal(everything(held).x, everything(load_all(config, split="eval")).x)


# Hold-out.


def test_hold_out_is_disjoint_complete_and_frozen():
    train, held = hold_out(50, 0.1, "train"), hold_out(50, 0.1, "eval")
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held])), np.arange(50))
    # Recorded from the first release: another hold-out would make reported numbers incomparable.
    assert held.tolist() == HELD_OF_50
    np.testing.assert_array_equal(hold_out(50, 0.0, "train"), np.arange(50))
    np.testing.assert_array_equal(hold_out(50, 0.1, "all"), np.arange(50))
    assert len(hold_out(3, 0.01, "eval")) == 1


@pytest.mark.parametrize(("size", "fraction", "split"), [(9, 0.0, "eval"), (1, 0.1, "eval"), (1, 0.1, "train")])
def test_hold_out_refuses_an_empty_split(size, fraction, split):
    with pytest.raises(ValueError, match=r"data\.eval_fraction"):
        hold_out(size, fraction, split)


# Configuration and shape: one sentence naming field, value and fix.


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "cifar"}, "name is 'cifar'; choose one of digits, mnist"),
        ({"crop": "left"}, "crop is 'left'"),
        ({"on_corrupt": "ignore"}, "on_corrupt is 'ignore'"),
        ({"eval_fraction": 1.0}, "eval_fraction is 1.0"),
        ({"eval_fraction": -0.1}, "eval_fraction is -0.1"),
        ({"in_memory_bytes": -1}, "in_memory_bytes is -1"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_config_checks_its_fields(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        DataConfig(**options)


@pytest.mark.parametrize(
    ("config", "arguments", "sentence"),
    [
        (DataConfig("folder"), {}, "data.path is empty"),
        (DataConfig("npz"), {}, "data.path is empty"),
        (DataConfig("digits", path="x"), {}, "data.path is 'x', but data.name 'digits' does not read from a path"),
        (DataConfig(), {"channels": 4}, "model.channels is 4.*1 or 3"),
        (DataConfig("folder", path="x"), {"channels": 4}, "model.channels is 4"),
        (DataConfig(), {"split": "test"}, "split is 'test'"),
        (DataConfig(eval_fraction=0.0), {"split": "eval"}, "data.eval_fraction is 0"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_load_refuses_what_it_cannot_give(config, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_all(config, **arguments)


def test_classes_are_checked_against_the_model():
    unlabelled = ArrayDataset(np.zeros((2, 2, 2, 1), np.uint8), np.full(2, -1, np.int32))
    digits = load_all(DataConfig())
    for dataset, num_classes in ((unlabelled, 0), (digits, 0), (digits, 10), (digits, 12)):
        check_classes(dataset, num_classes)
    with pytest.raises(ValueError, match=r"model\.num_classes is 9, but the data have 10"):
        check_classes(digits, 9)
    with pytest.raises(ValueError, match="have no labels"):
        check_classes(unlabelled, 10)


# Folders.


def test_classes_are_first_level_folders_in_order(photos):
    dataset = load_all(DataConfig("folder", path=str(photos)))
    assert dataset.class_names == ("cat", "dog")
    np.testing.assert_array_equal(everything(dataset).context, [0] * 6 + [1] * 6)


def test_flat_folder_has_no_labels(photos):
    dataset = load_all(DataConfig("folder", path=str(photos / "cat" / "deep")))
    assert (len(dataset), dataset.class_names) == (3, ())
    np.testing.assert_array_equal(everything(dataset).context, [-1] * 3)


def test_memory_and_disk_give_the_same_images(photos):
    memory = load_all(DataConfig("folder", path=str(photos)), channels=1)
    disk = load_all(DataConfig("folder", path=str(photos), in_memory_bytes=0), channels=1)
    assert isinstance(memory, ArrayDataset)
    assert isinstance(disk, FileDataset)
    np.testing.assert_array_equal(everything(memory).x, everything(disk).x)


@pytest.mark.parametrize(
    ("modes", "channels", "sentence"),
    [
        (("RGB", "L"), 1, "The colour images of data.path '{}' are converted to grey, because the model"),
        (("L", "LA"), 3, "The grey images of data.path '{}' get 3 equal channels, because the model"),
        (("RGB", "L"), 3, None),  # A folder of colour images often has a few grey ones.
        (("L",), 1, None),
        ((), 3, "The grey images of data.name 'digits' get 3 equal channels"),
    ],
)
def test_converted_images_are_told_once(tmp_path, caplog, modes, channels, sentence):
    for index, mode in enumerate(modes):
        Image.new(mode, (8, 8)).save(tmp_path / f"{index}.png")
    config = DataConfig("folder", path=str(tmp_path)) if modes else DataConfig()
    with told_once():
        for _ in range(2):
            load_all(config, channels=channels)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (sentence is not None)
    assert not told or told[0].startswith(sentence.format(tmp_path))


@pytest.mark.parametrize("limit", [0, 2**20])
def test_unreadable_files_are_refused_by_name(photos, limit):
    names = spoil(photos)
    config = DataConfig("folder", path=str(photos), in_memory_bytes=limit)
    with pytest.raises(ValueError, match=r"cannot be read.*data.on_corrupt to 'skip'") as error:
        everything(load_all(config))
    assert all(name in str(error.value) for name in (names if limit else names[:1]))
    assert "\n" not in str(error.value)


def test_at_most_five_unreadable_files_are_named(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.png").write_text("no image")
    with pytest.raises(
        ValueError, match=r"8 images that cannot be read: .*4.png' \(not in a supported image format\) and 3 more;"
    ):
        load_all(DataConfig("folder", path=str(tmp_path)))
    with pytest.raises(ValueError, match="8 images that cannot be read"):
        load_all(DataConfig("folder", path=str(tmp_path), on_corrupt="skip"))


def test_skipped_files_are_named_and_left_out_of_memory(photos, caplog):
    whole = load_all(DataConfig("folder", path=str(photos)))
    names = spoil(photos)
    dataset = load_all(DataConfig("folder", path=str(photos), on_corrupt="skip"))
    np.testing.assert_array_equal(dataset.x, np.delete(whole.x, [0, 8], axis=0))
    np.testing.assert_array_equal(dataset.labels, np.delete(whole.labels, [0, 8]))
    # One line a time of what is not taken for an image, one of what cannot be read.
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    assert all(name in caplog.records[2].getMessage() for name in names)


def test_skipped_files_are_named_once_and_replaced_by_the_next_on_disk(photos, caplog):
    spoil(photos)
    config = DataConfig("folder", path=str(photos), on_corrupt="skip", in_memory_bytes=0)
    caplog.set_level(logging.WARNING)
    dataset = load_all(config)
    batch = everything(dataset)
    backwards = load_all(config)[np.arange(len(dataset))[::-1]]
    np.testing.assert_array_equal(batch.x, backwards.x[::-1])
    np.testing.assert_array_equal(batch.x[[0, 8, 12]], batch.x[[1, 9, 1]])
    np.testing.assert_array_equal(batch.context[[0, 8, 12]], [0, 1, 0])
    named = [record for record in caplog.records if "unreadable" in record.getMessage()]
    seen = len(caplog.records)
    everything(dataset)
    assert (len(caplog.records), len(named)) == (seen, 6)


def test_folder_errors(photos, tmp_path):
    (photos / "0.png").write_bytes((photos / "cat" / "deep" / "1.png").read_bytes())
    (tmp_path / "file").write_text("")
    for path, error, sentence in (
        (tmp_path / "missing", FileNotFoundError, "does not exist"),
        (tmp_path / "file", NotADirectoryError, "is a file; give the folder"),
        (photos / "empty", ValueError, "has no images; put .png"),
        (photos, ValueError, r"both at the top level \(such as '0.png'\) and in sub-folders \(such as 'cat'\)"),
    ):
        with pytest.raises(error, match=sentence):
            load_all(DataConfig("folder", path=str(path)))
