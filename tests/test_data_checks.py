"""What datasets ask of sides, labels and names before they open anything, and what they tell of what they found."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from flowgen.data import ClipsConfig, DataConfig, Inventory, found_classes, load, load_clips, take_inventory
from flowgen.text import aspect_size

COMPOSED, APART = "caf\xe9", "cafe\u0301"
SIDES = {"image_size": 8, "channels": 3, "split": "train"}


def paint(path, level=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (level,) * 3).save(path)


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        for number in range(4):
            paint(tmp_path / "photos" / name / f"{number}.png", 20 * number)
    return DataConfig("folder", path=str(tmp_path / "photos"), eval_fraction=0.2)


def npz(tmp_path, **arrays):
    path = tmp_path / "a.npz"
    np.savez(path, images=np.zeros((4, 8, 8, 3), np.uint8), **arrays)
    return DataConfig("npz", path=str(path), eval_fraction=0.25)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("size", [0, -8, (0, 8), (8, -1), [8, 0], (8, 8, 8), (), 8.0, True, (8, True), "8", None])
def test_sides_that_cannot_be_are_refused_before_files_are_opened(folder, size):
    with pytest.raises(ValueError, match=r"^image_size is "):
        load(folder, **SIDES | {"image_size": size})
    with pytest.raises(ValueError, match=r"^image_size is "):
        load_clips(ClipsConfig(), **SIDES | {"image_size": size}, frames=2)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("size", [8, np.int64(8), [8, 8], (np.int32(8), np.uint8(8))])
def test_sides_are_whole_numbers_of_any_kind(folder, size):
    assert load(folder, **SIDES | {"image_size": size}).event_shape == (8, 8, 3)
    assert load(folder, **SIDES | {"image_size": size}, multiple=np.int64(2)).event_shape == (8, 8, 3)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("multiple", [0, -4, 2.5, None])
def test_multiples_that_cannot_be_are_refused(folder, multiple):
    aspects = DataConfig("folder", path=folder.path, aspects=True)
    with pytest.raises(ValueError, match=r"^multiple is "):
        load(aspects, **SIDES, multiple=multiple)
    with pytest.raises(ValueError, match=r"^multiple is "):
        aspect_size("1:1", 64, multiple)
    with pytest.raises(ValueError, match=r"^side is "):
        aspect_size("1:1", 0)


@pytest.mark.parametrize("kind", ["timedelta64[s]", "datetime64[s]", "bool", "float32", "complex64", "U1"])
def test_labels_of_an_npz_are_integers(tmp_path, kind):
    labels = np.array([0, 1, 0, 1]).astype(kind)
    with pytest.raises(ValueError, match=rf"'labels' in data\.path '.*' is {re.escape(str(labels.dtype))} of shape"):
        load(npz(tmp_path, labels=labels), **SIDES)


@pytest.mark.parametrize("kind", ["int8", "int64", "uint8", "uint64"])
def test_labels_of_an_npz_may_be_integers_of_any_size(tmp_path, kind):
    dataset = load(npz(tmp_path, labels=np.array([0, 1, 0, 1], kind)), **SIDES | {"split": "all"})
    assert dataset.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("names", [["cat", "cat"], [COMPOSED, APART], ["", "cat"]])
def test_names_of_classes_are_refused_by_the_name_of_their_array(tmp_path, names):
    config = npz(tmp_path, labels=[0, 1, 0, 1], class_names=names)
    for read in (found_classes, lambda config: load(config, **SIDES)):
        with pytest.raises(ValueError, match=r"^'class_names' in data\.path") as caught:
            read(config)
        assert "data.classes" not in str(caught.value)


def test_names_are_the_same_in_every_form_of_unicode(tmp_path, folder):
    with pytest.raises(ValueError, match=r"classes contains 'café' twice"):
        DataConfig(classes=(COMPOSED, APART))
    for config in (DataConfig, ClipsConfig):
        assert config(classes=(APART,)).classes == (COMPOSED,)
    for form in (COMPOSED, APART):
        arrays = npz(tmp_path, labels=[0, 1, 0, 1], class_names=["dog", form])
        assert found_classes(arrays) == ("dog", COMPOSED)
        known = DataConfig("npz", path=arrays.path, classes=(APART, "dog"))
        assert load(known, **SIDES | {"split": "all"}).labels.tolist() == [1, 0, 1, 0]
        paint(tmp_path / form / form / "1.png")
        photos = DataConfig("folder", path=str(tmp_path / form), classes=("dog", APART))
        assert load(photos, **SIDES | {"split": "all"}).labels.tolist() == [1]


@pytest.mark.parametrize("caption", [f"{COMPOSED}/{APART}.txt", f"{COMPOSED}/{APART.upper()}.PNG.TXT"])
def test_captions_are_found_in_every_form_of_unicode(tmp_path, caption):
    paint(tmp_path / COMPOSED / f"{COMPOSED}.png")
    (tmp_path / caption).write_text("a cup of coffee")
    config = DataConfig("folder", path=str(tmp_path))
    assert load(config, **SIDES | {"split": "all"}).captions == ("a cup of coffee",)


def test_a_caption_of_the_same_form_goes_first(tmp_path):
    for form in (COMPOSED, APART):
        paint(tmp_path / f"{form}.png")
        (tmp_path / f"{form}.txt").write_text(f"{len(form)} letters")
    if len(list(tmp_path.glob("*.png"))) < 2:
        pytest.skip("the file system makes them one file")
    captions = load(DataConfig("folder", path=str(tmp_path)), **SIDES | {"split": "all"}).captions
    assert sorted(captions) == ["4 letters", "5 letters"]


def test_a_file_whose_name_took_another_form_is_no_other_file():
    then = Inventory("images", 1, 1, train_files={APART: 5}, held_out_files={"b": 6})
    now = Inventory("images", 1, 1, train_files={COMPOSED: 5}, held_out_files={"b": 6})
    assert now.changes(json.loads(json.dumps(then.record()))) == ""
    both = Inventory("images", 2, 1, train_files={COMPOSED: 5, APART: 5}, held_out_files={"b": 6})
    assert "1 added" in both.changes(then.record())


@pytest.mark.parametrize("kind", ["images", "clips", "arrays"])
def test_classes_that_are_held_out_whole_are_told(tmp_path, caplog, kind):
    if kind == "arrays":
        config, open_split = npz(tmp_path, labels=[0, 1, 2, 3], class_names=["cat", "dog", "fox", "owl"]), load
        sides = SIDES
    elif kind == "images":
        for name in ("cat", "dog", "fox", "owl"):
            paint(tmp_path / name / "1.png")
        config, open_split, sides = DataConfig("folder", path=str(tmp_path), eval_fraction=0.25), load, SIDES
    else:
        for name in ("cat", "dog", "fox", "owl"):
            (tmp_path / name).mkdir()
            frames = [Image.new("RGB", (12, 10), (20 * i,) * 3) for i in range(4)]
            frames[0].save(tmp_path / name / "1.gif", save_all=True, append_images=frames[1:], duration=100)
        config, open_split = ClipsConfig("folder", path=str(tmp_path), fps=0, eval_fraction=0.25), load_clips
        sides = SIDES | {"frames": 2}
    held_out = open_split(config, **sides | {"split": "eval"})
    assert not caplog.records
    open_split(config, **sides)
    [lost] = {held_out.class_names[label] for label in held_out.labels.tolist()}
    assert f"of {lost} are held out" in caplog.text


@pytest.mark.parametrize("aspects", [False, True])
def test_counts_and_files_of_a_record_agree(folder, tmp_path, aspects):
    (tmp_path / "photos" / "cat" / "0.png").write_bytes(b"no image")
    config = DataConfig("folder", path=folder.path, on_corrupt="skip", aspects=aspects)
    train, held_out = (load(config, **SIDES | {"split": split}) for split in ("train", "eval"))
    record = take_inventory(config, train, held_out).record()
    listed, counted = (sum(map(len, record["files"].values())), record["train"] + record["held_out"])
    assert (listed, counted) == (8, 7)
    assert [words for words in record["left_out"] if words.startswith("1 unreadable")]
