"""Files that cannot be read and may be left out: what is told of classes and splits that are left without any."""

import numpy as np
import pytest
from PIL import Image

from flowgen.data import ClipsConfig, DataConfig, load, load_clips
from flowgen.data.dataset import file_names_in, hold_out_files
from flowgen.data.file_dataset import FileDataset
from flowgen.data.found import take_inventory
from flowgen.data.video import write_video

SHAPE = {"image_size": (8, 8), "channels": 3}
CLASSES = ("cat", "dog", "fox")


@pytest.fixture
def photos(tmp_path):
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    return tmp_path


def held_out(folder, kind):
    names = tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob(f"*{kind}")))
    return {names[position] for position in hold_out_files(names, 0.1, "eval")}


@pytest.mark.parametrize("aspects", [False, True])
def test_a_class_without_a_image_that_can_be_read_is_told(photos, caplog, aspects):
    for path in (photos / "dog").iterdir():
        path.write_bytes(b"nothing")
    config = DataConfig("folder", path=str(photos), on_corrupt="skip", eval_fraction=0.0, aspects=aspects)
    dataset = load(config, **SHAPE, split="train")
    assert dataset.class_names == CLASSES
    assert "No image of dog is left in the split 'train', because none can be read." in caplog.messages


@pytest.mark.parametrize("in_memory_bytes", [0, 1 << 20])
def test_a_split_without_a_image_that_can_be_read_is_named_when_it_is_opened(photos, in_memory_bytes):
    for name in held_out(photos, ".png"):
        (photos / name).write_bytes(b"nothing")
    config = DataConfig("folder", path=str(photos), on_corrupt="skip", in_memory_bytes=in_memory_bytes)
    assert len(load(config, **SHAPE, split="train")) == 11
    with pytest.raises(ValueError, match=r"no file in the split 'eval' is readable.*1 image that cannot be read"):
        load(config, **SHAPE, split="eval")


def test_the_line_of_what_was_found_says_what_is_not_read_yet(photos):
    (photos / "cat" / "0.png").write_bytes(b"nothing")
    known = DataConfig("folder", path=str(photos), on_corrupt="skip", eval_fraction=0.0)
    later = DataConfig("folder", path=str(photos), on_corrupt="skip", eval_fraction=0.0, in_memory_bytes=0)
    datasets = [load(config, **SHAPE, split="train") for config in (known, later)]
    assert isinstance(datasets[1], FileDataset)
    assert take_inventory(known, datasets[0]).line().startswith("images: 11 train, 0 held out")
    assert take_inventory(later, datasets[1]).line().startswith("images: up to 12 train, 0 held out")


def test_images_are_named_unless_others_may_take_their_places(photos):
    every = tuple(f"{name}/{number}.png" for name in CLASSES for number in range(4))
    config = {"name": "folder", "path": str(photos), "eval_fraction": 0.0}
    for options in ({}, {"in_memory_bytes": 0}):
        assert file_names_in(load(DataConfig(**config, **options), **SHAPE, split="train")) == every
    (photos / "cat" / "0.png").write_bytes(b"nothing")
    for options, names in (({}, every[1:]), ({"in_memory_bytes": 0}, ())):
        dataset = load(DataConfig(**config, **options, on_corrupt="skip"), **SHAPE, split="train")
        assert file_names_in(dataset) == names


@pytest.fixture
def videos(tmp_path):
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for number in range(3):
            write_video(tmp_path / name / f"{number}.mp4", np.full((6, 8, 8, 3), 20 * number, np.uint8), fps=8)
    return tmp_path


def test_a_class_without_a_video_that_can_be_read_is_told_apart_from_short_ones(videos, caplog):
    for path in (videos / "dog").iterdir():
        path.write_bytes(b"nothing")
    for path in (videos / "fox").iterdir():
        write_video(path, np.zeros((2, 8, 8, 3), np.uint8), fps=8)
    (videos / "elk").mkdir()
    (videos / "elk" / "0.mp4").write_bytes(b"nothing")
    (videos / "elk" / "1.mp4").write_bytes((videos / "fox" / "0.mp4").read_bytes())
    config = ClipsConfig("folder", path=str(videos), on_corrupt="skip", eval_fraction=0.0)
    load_clips(config, frames=4, **SHAPE, split="train")
    assert "No clips of dog are left, because the videos cannot be read." in caplog.messages
    assert "No clips of fox are left, because the videos are too short." in caplog.messages
    assert "No clips of elk are left, because the videos are too short or cannot be read." in caplog.messages


@pytest.mark.parametrize("in_memory_bytes", [0, 1 << 20])
def test_a_split_without_a_clip_that_can_be_read_is_named_when_it_is_opened(videos, in_memory_bytes):
    for name in held_out(videos, ".mp4"):
        (videos / name).write_bytes(b"nothing")
    config = ClipsConfig("folder", path=str(videos), on_corrupt="skip", in_memory_bytes=in_memory_bytes)
    train = load_clips(config, frames=4, **SHAPE, split="train")
    assert len(train) == 8
    assert isinstance(train, FileDataset) == (in_memory_bytes == 0)
    with pytest.raises(ValueError, match=r"no file in the split 'eval' is readable.*1 video that cannot be read"):
        load_clips(config, frames=4, **SHAPE, split="eval")
