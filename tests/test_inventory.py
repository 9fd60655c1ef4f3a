"""What a run says of its data, and what it says of files that changed; a hold-out that files do not move in."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from flowgen.data import (
    ArrayDataset,
    ClipsConfig,
    DataConfig,
    Inventory,
    Moments,
    hold_out,
    load,
    load_clips,
    take_inventory,
)
from flowgen.data.clip_views import ContinuedClips, StillClips
from flowgen.data.dataset import BucketedDataset, buckets_of, hold_out_files
from flowgen.data.latent_files import LatentsConfig, LatentWriter, read_latents
from flowgen.data.latents import Shard
from flowgen.runs import RunWriter


def keep(inventory, run_dir, *, resumed=False):
    """What a run that begins or goes on in a directory says of its data besides, and keeps the record."""
    with RunWriter(run_dir, keep=1, best_metric="loss") as record:
        said = []
        record.say = said.append
        record.describe_data(inventory, resumed=resumed)
    first, *rest = said
    assert first == inventory.line()
    return "\n".join(rest)


NAMES = tuple(f"{name}/{number:04d}.png" for name in ("cat", "dog") for number in range(500))
IMAGES = Inventory("images", 1080, 120, ((48, 48),), ((32, 32),), ("cat", "dog", "fox"))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "images: 1,080 train, 120 held out, 48 x 48 -> 32 x 32, classes: cat, dog, fox"),
        ({"before": ((32, 32),)}, "images: 1,080 train, 120 held out, 32 x 32, classes: cat, dog, fox"),
        ({"before": ()}, "images: 1,080 train, 120 held out, 32 x 32, classes: cat, dog, fox"),
        (
            {"before": ((40, 30), (480, 640), (32, 32)), "classes": ()},
            "images: 1,080 train, 120 held out, 32 x 32 to 480 x 640 or so -> 32 x 32, no classes",
        ),
        (
            {"after": ((32, 32), (16, 64)), "held_out": 0},
            "images: 1,080 train, 0 held out, 48 x 48 -> 2 shapes, classes: cat, dog, fox",
        ),
        (
            {"what": "clips", "stills": 1200, "classes": tuple(map(str, range(1000)))},
            "clips: 1,080 train and 1,200 images, 120 held out, 48 x 48 -> 32 x 32, "
            "1,000 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 990 more",
        ),
        ({"classes": ("a\x1b[31m", "b\n")}, "classes: a\\x1b[31m, b\\x0a"),
    ],
)
def test_one_line_says_what_was_found(changes, line):
    assert dataclasses.replace(IMAGES, **changes).line().endswith(line)


def written(path, count=10, size=(24, 20)):
    for name in ("cat", "dog"):
        (path / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", size[::-1]).save(path / name / f"{number}.png")
    return DataConfig("folder", path=str(path))


@pytest.mark.parametrize("aspects", [False, True])
def test_a_folder_is_counted(tmp_path, aspects):
    config = dataclasses.replace(written(tmp_path / "photos"), aspects=aspects)
    (tmp_path / "photos" / "dog" / "a.xcf").write_text("no image")
    train, held_out = (load(config, image_size=(8, 8), channels=1, split=split) for split in ("train", "eval"))
    inventory = take_inventory(config, train, held_out)
    # 24 x 20 is nearest to 5:4 of the nine aspects, of about the area of 8 x 8.
    size = " x ".join(map(str, buckets_of(train)[0].event_shape[:2])) if isinstance(train, BucketedDataset) else "8 x 8"
    assert inventory.line() == f"images: 18 train, 2 held out, 24 x 20 -> {size}, classes: cat, dog"
    assert inventory.left_out == ("1 .xcf",)
    assert (len(inventory.train_files), len(inventory.held_out_files)) == (18, 2)


def test_built_in_sets_npz_and_latents_are_counted(tmp_path):
    digits = load(DataConfig(), image_size=(8, 8), channels=1, split="train")
    assert (
        take_inventory(DataConfig(), digits).line().startswith("images: 1,617 train, 0 held out, 8 x 8, classes: 0, ")
    )
    larger = load(DataConfig(), image_size=(16, 12), channels=1, split="train")
    assert "0 held out, 8 x 8 -> 16 x 12, classes" in take_inventory(DataConfig(), larger).line()
    np.savez(tmp_path / "a.npz", images=np.zeros((9, 8, 8), np.uint8), labels=np.arange(9) % 2)
    config = DataConfig("npz", path=str(tmp_path / "a.npz"))
    inventory = take_inventory(config, load(config, image_size=(8, 8), channels=1, split="all"))
    assert inventory.line() == "images: 9 train, 0 held out, 8 x 8, classes: 0, 1"
    assert set(inventory.train_files) == {"images.npy", "labels.npy"}
    writer = LatentWriter(tmp_path / "set")
    moments = np.ones((5, 4, 6, 2), np.float32)
    writer.add("train", Shard(Moments(moments, moments), np.zeros(5, np.int32)), kind="image")
    writer.finish(class_names=("cat",))
    config = LatentsConfig(str(tmp_path / "set"))
    inventory = take_inventory(config, read_latents(tmp_path / "set", "train"))
    assert inventory.line() == "latents of images: 5 train, 0 held out, 4 x 6 x 2, classes: cat"
    assert set(inventory.train_files) == {
        "dataset.json",
        *(f"train-00000/{part}.npy" for part in ("label", "mean", "std")),
    }


def test_clips_are_counted_apart_from_images_and_from_their_own_parts():
    config = ClipsConfig(num=100)
    shape = {"image_size": (10, 10), "channels": 1, "split": "train"}
    clips = load_clips(config, frames=4, **shape)
    stills = StillClips(ArrayDataset(np.zeros((7, 10, 10, 1), np.uint8), np.zeros(7, np.int32)))
    dataset = BucketedDataset((clips, ContinuedClips(clips), stills))
    line = take_inventory(config, dataset).line()
    assert line.startswith("clips: 90 train and 7 images, 0 held out, 10 x 10, classes: 0, 1, 2")


def test_as_many_files_are_held_out_as_of_any_data_and_the_same_everywhere():
    train, held = (hold_out_files(NAMES, 0.1, split) for split in ("train", "eval"))
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held])), np.arange(1000))
    assert len(held) == len(hold_out(1000, 0.1, "eval"))
    # Recorded: another hold-out would mix what runs were trained on with what they are measured on.
    assert [NAMES[i] for i in hold_out_files(NAMES[:20], 0.1, "eval")] == ["cat/0005.png", "cat/0007.png"]
    turned = NAMES[::-1]
    assert {turned[i] for i in hold_out_files(turned, 0.1, "eval")} == {NAMES[i] for i in held}


@pytest.mark.parametrize("change", ["added", "removed", "renamed"])
def test_other_files_hardly_move_between_the_splits(change):
    kept = {
        "added": ("aaa/new.png", *NAMES),
        "removed": NAMES[1:],
        "renamed": ("aaa/cat.png", *NAMES[1:]),
    }[change]
    before, after = ({names[i] for i in hold_out_files(names, 0.1, "eval")} for names in (NAMES, kept))
    assert len(before ^ after) <= 2


FILES = {"cat/0.png": 100, "cat/1.png": 101, "dog/0.png": 102}
HELD = {"dog/1.png": 103}


@pytest.mark.parametrize(
    ("train", "held", "said"),
    [
        (FILES, HELD, ""),
        ({**FILES, "fox.png": 9}, HELD, "1 added ('fox.png')"),
        ({"cat/0.png": 100}, HELD, "2 removed ('cat/1.png', 'dog/0.png')"),
        ({**FILES, "cat/0.png": 99}, HELD, "1 with changed content ('cat/0.png')"),
        ({**FILES, **HELD}, {}, "1 previously held out, now trained on ('dog/1.png')"),
        (
            {name: FILES[name] for name in ("cat/0.png", "cat/1.png")},
            {**HELD, "dog/0.png": 102},
            "1 previously trained on, now held out ('dog/0.png')",
        ),
        (
            {**{f"new{number}.png": 1 for number in range(5)}, "cat/0.png": 100, "dog/0.png": 102},
            HELD,
            "5 added ('new0.png', 'new1.png', 'new2.png', ...); 1 removed ('cat/1.png')",
        ),
    ],
)
def test_a_resumed_run_says_what_changed(tmp_path, train, held, said):
    before = Inventory("images", 3, 1, train_files=FILES, held_out_files=HELD)
    keep(before, tmp_path)
    now = Inventory("images", len(train), len(held), train_files=train, held_out_files=held)
    assert keep(now, tmp_path, resumed=True) == (
        f"The data have changed since the run was last started: {said}." if said else ""
    )
    # What was told once is known.
    assert keep(now, tmp_path, resumed=True) == ""


@pytest.mark.parametrize(
    "content", [None, "", "[]", "5", '{"digest": 1}', "[" * 100_000, '{"digest": "x", "files": 3}']
)
def test_a_record_that_is_missing_or_damaged_is_said_and_written_anew(tmp_path, content):
    if content is not None:
        (tmp_path / "data.json").write_text(content)
    inventory = Inventory("images", 3, 1, train_files=FILES, held_out_files=HELD)
    assert "cannot be detected" in keep(inventory, tmp_path, resumed=True)
    assert keep(inventory, tmp_path, resumed=True) == ""
    assert keep(Inventory("images", 3, 1), tmp_path, resumed=True) == ""


def test_of_very_many_files_the_digest_alone_is_kept(tmp_path):
    many = Inventory("images", 100_001, 0, train_files={f"{number}.png": 1 for number in range(100_001)})
    keep(many, tmp_path)
    assert (tmp_path / "data.json").stat().st_size < 1000
    assert json.loads((tmp_path / "data.json").read_text())["files"] is None
    assert keep(many, tmp_path, resumed=True) == ""
    told = keep(dataclasses.replace(many, train_files=FILES), tmp_path, resumed=True)
    assert "data files have changed" in told
