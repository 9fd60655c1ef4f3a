"""Tar files of images and videos give what the folder gives that unpacking them would make."""

import dataclasses
import functools
import os
import pickle
import shutil
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from commands import outcome_of, succeed
from tar_files import (
    FOLDERS,
    PACKERS,
    SHAPE,
    add,
    all_of,
    by_class,
    levels_of,
    packed,
    png,
    samples,
)

import flowgen
from flowgen.data import ClipsConfig, DataConfig, Loader, buckets_of, found_classes, load, load_clips, take_inventory
from flowgen.data.dataset import captions_in
from flowgen.data.tar import Shards, list_shards, list_tar, local_shards
from flowgen.data.tar_headers import members
from flowgen.data.video import write_video
from flowgen.experiments import FlowExperiment
from flowgen.flows import TARFlowConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def configs(photos, shards, **changes):
    return [DataConfig(name, path=str(path), **changes) for name, path in (("folder", photos), ("tar", shards))]


def without(path, messages):
    return [message.replace(str(path), "") for message in messages]


def packed_folders():
    for pack in PACKERS:
        for build in FOLDERS:
            if "ustar" not in pack or build not in ("by_class", "beside_other_things"):  # their names are too long
                yield pack, build


@pytest.mark.parametrize(("pack", "build"), list(packed_folders()))
def test_shards_are_read_as_the_folder_that_they_unpack_to(tmp_path, pack, build, caplog):
    photos, shards = packed(tmp_path, FOLDERS[build], PACKERS[pack])
    for changes in ({}, {"in_memory_bytes": 0}, {"aspects": True}):
        told = []
        inventories = []
        for config in configs(photos, shards, eval_fraction=0.25, **changes):
            caplog.clear()
            splits = [load(config, **SHAPE, split=split) for split in ("train", "eval")]
            told.append(without(config.path, caplog.messages))
            inventories.append((splits, take_inventory(config, *splits).record(), found_classes(config)))
        (of_folder, *about_folder), (of_shards, *about_shards) = inventories
        assert about_folder == about_shards
        assert told[0] == told[1]
        for one, other in zip(of_folder, of_shards, strict=True):
            jax.tree.map(np.testing.assert_array_equal, all_of(one), all_of(other))
            assert [captions_in(bucket) for bucket in buckets_of(one)] == [captions_in(b) for b in buckets_of(other)]


@pytest.mark.parametrize("name", ["tar", "folder"])
def test_one_shard_may_be_given_without_a_folder(tmp_path, name):
    _, shards = packed(tmp_path, by_class)
    config = DataConfig("tar", path=str(shards / "a.tar" if name == "tar" else shards))
    assert len(load(config, **SHAPE, split="all")) == 16


def test_videos_in_shards_are_read_as_in_a_folder(tmp_path):
    def build(root):
        frames = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
        for number, name in enumerate(("cat/a.gif", "cat/b.mp4", "dog/c.mp4", "dog/d.gif")):
            (root / name).parent.mkdir(exist_ok=True)
            write_video(root / name, np.roll(frames, number, axis=0), fps=10)

    photos, shards = packed(tmp_path, build, PACKERS["three of pax"])
    for fps, limit in ((0, 0), (5, 1 << 20)):
        found = []
        for name, path in (("folder", photos), ("tar", shards)):
            config = ClipsConfig(name, path=str(path), fps=fps, eval_fraction=0.25, in_memory_bytes=limit)
            dataset = load_clips(config, frames=3, **SHAPE, split="train")
            found.append((all_of(dataset), take_inventory(config, dataset).record(), found_classes(config)))
        (one, *about_one), (other, *about_other) = found
        jax.tree.map(np.testing.assert_array_equal, one, other)
        assert about_one == about_other


def test_large_files_are_read_in_parts(tmp_path):
    content = np.random.default_rng(0).bytes(5 << 20)
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        add(shard, "0.png", b"first")
        add(shard, "1.png", content)
    file = list_tar(tmp_path, (".png",), "images").files[1]
    with file.open("rb") as opened:
        assert opened.seek(-7, os.SEEK_END) == len(content) - 7
        assert opened.read() == content[-7:]
        opened.seek(1000)
        assert opened.read(3 << 20) == content[1000 : 1000 + (3 << 20)]
        assert opened.read() == content[1000 + (3 << 20) :]
        opened.seek(len(content) + 5)
        assert opened.read(1) == b""
    assert file.read_bytes() == content


# -- the order of batches ----------------------------------------------------------------------------------


def test_batches_are_those_of_the_folder_in_every_process_and_after_every_step(tmp_path):
    photos, shards = packed(tmp_path, by_class, PACKERS["three of GNU"])
    folder, tar = (load(config, **SHAPE, split="train") for config in configs(photos, shards, in_memory_bytes=0))
    of = functools.partial(Loader, batch_size=6, seed=3, flip=True)
    going_on = of(tar)
    for step in range(7):
        expected = of(folder).batch(step)
        shares = [of(tar, process_index=index, process_count=2).batch(step) for index in range(2)]
        for batch in (going_on.batch(step), of(load_again(shards)).batch(step)):
            jax.tree.map(np.testing.assert_array_equal, batch, expected)
        jax.tree.map(
            lambda *parts: np.testing.assert_array_equal(np.concatenate(parts[:2]), parts[2]), *shares, expected
        )


def load_again(shards):
    return load(DataConfig("tar", path=str(shards), in_memory_bytes=0), **SHAPE, split="train")


def test_shards_are_read_from_threads_and_in_other_processes(tmp_path):
    photos, shards = packed(tmp_path, by_class, PACKERS["three of pax"])
    listing = list_tar(shards, (".png", ".jpg"), "images")
    content = {name: (photos / name).read_bytes() for name in listing.names}
    files = pickle.loads(pickle.dumps(listing)).files
    with ThreadPoolExecutor(8) as pool:
        for name, found in zip(
            listing.names * 50, pool.map(lambda file: file.read_bytes(), [*files] * 50), strict=True
        ):
            assert found == content[name]


def test_many_shards_need_few_open_files(tmp_path):
    resource = pytest.importorskip("resource")
    for number in range(300):
        with tarfile.open(tmp_path / f"{number:03}.tar", "w") as shard:
            add(shard, f"{number}.png", str(number).encode())
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    listing = list_tar(tmp_path, (".png",), "images")
    open_now = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 160, most))
    try:
        assert [file.read_bytes().decode() for file in listing.files] == [name.split(".")[0] for name in listing.names]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))


def test_shards_beyond_those_kept_open_are_read_by_many_threads(tmp_path):
    shards = 400
    for number in range(shards):
        with tarfile.open(tmp_path / f"{number:03}.tar", "w") as shard:
            add(shard, f"{number:03}.png", f"{number:03}".encode())
    files = list_tar(tmp_path, (".png",), "images").files
    order = np.random.default_rng(0).integers(0, shards, 8_000).tolist()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(16) as pool:
            contents = list(pool.map(lambda number: int(files[number].read_bytes()), order))
    finally:
        sys.setswitchinterval(interval)
    assert contents == order


QUIET = LogConfig(log_every=2, checkpoint_every=3, progress=False, tensorboard=False)
FLOW = TARFlowConfig(image_size=8, channels=3, patch_size=4, width=16, head_dim=8, num_blocks=2, layers_per_block=1)


@pytest.mark.slow  # trains three times; the test of the loader is quick
def test_a_run_goes_on_in_the_middle_of_a_shard(tmp_path):
    photos, shards = packed(tmp_path, by_class, PACKERS["three of GNU"])
    of_folder, of_shards = configs(photos, shards, in_memory_bytes=0, eval_fraction=0.2)
    experiment = FlowExperiment(
        name="tar",
        model=dataclasses.replace(FLOW, num_classes=3),
        data=of_shards,
        optim=OptimConfig(schedule="constant", warmup_steps=0),  # so that the steps do not depend on their number
        train=TrainConfig(steps=7, batch_size=4),
        log=QUIET,
    )
    whole = flowgen.fit(experiment, tmp_path / "whole")
    half = dataclasses.replace(experiment, train=TrainConfig(steps=3, batch_size=4))
    flowgen.fit(half, tmp_path / "halves")
    halves = flowgen.fit(experiment, tmp_path / "halves")
    folder = flowgen.fit(dataclasses.replace(experiment, data=of_folder), tmp_path / "folder")
    for other in (halves, folder):
        jax.tree.map(np.testing.assert_array_equal, other.state.params, whole.state.params)


class Elsewhere:
    """A shard that is not a local file, and counts its requests."""

    ahead = 1 << 16

    def __init__(self, content):
        self.content, self.size, self.requests = content, len(content), 0

    def __str__(self):
        return "elsewhere/a.tar"

    def read_range(self, offset, size):
        self.requests += 1
        return self.content[offset : offset + size]


def test_shards_of_other_places_are_listed_in_few_requests(tmp_path):
    samples(tmp_path / "a.tar", range(200), texts=False)
    shard = Elsewhere((tmp_path / "a.tar").read_bytes())
    assert [*members(shard)] == [*members(*local_shards(tmp_path, "images").files)]
    assert shard.requests <= 1 + shard.size // (shard.ahead - 1024)
    files = list_shards(Shards("elsewhere", (shard,), ("a.tar",)), (".png",), "images").files
    assert str(files[7]) == "elsewhere/a.tar/007.png"
    assert files[7].read_bytes() == png(7)


# -- the WebDataset layout ---------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["{:03}", "train/n01/{:03}"])
def test_class_files_give_numbers_and_repeated_keys_stay_apart(tmp_path, key, caplog):
    for number in range(3):
        samples(tmp_path / f"{number}.tar", [number, 2, 0], level=10 * number, key=key)
    config = DataConfig("tar", path=str(tmp_path), eval_fraction=0.0)
    dataset = load(config, **SHAPE, split="all")
    assert dataset.class_names == ("0", "1", "2")
    expected = {
        10 * shard + number: [str(label), f"level {10 * shard + number}"]
        for shard in range(3)
        for number, label in enumerate((shard, 2, 0))
    }
    assert levels_of(dataset) == expected
    assert caplog.messages == [f"Left out of data.path '{tmp_path}': 9 .json."]
    caplog.clear()
    named = load(dataclasses.replace(config, classes=("cat", "dog", "fox")), **SHAPE, split="all")
    assert {level: name for level, (name, _) in levels_of(named).items()} == {
        level: ("cat", "dog", "fox")[int(label)] for level, (label, _) in expected.items()
    }
    assert "read as positions in data.classes (0 is cat)" in caplog.text
    with pytest.raises(ValueError, match=r"contains 2, but data\.classes lists only 2 names"):
        load(dataclasses.replace(config, classes=("cat", "dog")), **SHAPE, split="all")


def test_more_shards_do_not_rename_the_files_of_earlier_ones(tmp_path):
    for number in range(3):
        samples(tmp_path / f"{number}.tar", ["cat", "dog"], level=10 * number)
        names = list_tar(tmp_path, (".png",), "images").names
        assert names[: 2 * number] if number else True
        expected = {f"{prefix}{key}.png" for prefix in ("", "1.tar/", "2.tar/")[: number + 1] for key in ("000", "001")}
        assert {*names} == expected


def test_a_copy_of_a_shard_is_told(tmp_path, caplog):
    samples(tmp_path / "a.tar", ["cat", "dog"], level=0)
    samples(tmp_path / "b.tar", ["cat", "dog"], level=1)  # the same names and sizes, but other pixels
    list_tar(tmp_path, (".png",), "images")
    assert caplog.messages == []
    shutil.copy(tmp_path / "a.tar", tmp_path / "c.tar")
    list_tar(tmp_path, (".png",), "images")
    (message,) = caplog.messages
    assert message.startswith(f"'c.tar' in data.path '{tmp_path}' seems to be a copy of 'a.tar'; remove it, because")


def test_class_files_may_hold_names(tmp_path):
    samples(tmp_path / "a.tar", ["dog\n", " cafe\u0301", "a7", "dog"], texts=False)
    dataset = load(DataConfig("tar", path=str(tmp_path), eval_fraction=0.0), **SHAPE, split="all")
    assert dataset.class_names == ("a7", "caf\u00e9", "dog")
    assert levels_of(dataset) == {0: ["dog", ""], 1: ["caf\u00e9", ""], 2: ["a7", ""], 3: ["dog", ""]}


def test_a_class_of_minus_one_is_none(tmp_path):
    samples(tmp_path / "a.tar", [1, -1], texts=False)
    dataset = load(DataConfig("tar", path=str(tmp_path), eval_fraction=0.0), **SHAPE, split="all")
    assert levels_of(dataset) == {0: ["1", ""], 1: ["", ""]}


@pytest.mark.slow  # runs four commands
def test_the_commands_take_shards(tmp_path):
    _, shards = packed(tmp_path, by_class, PACKERS["three of pax"])
    train = f"train --config tarflow_digits --debug --data.name tar --data.path {shards} --model.num_classes 3"
    train += f" --model.channels 3 --data.eval_fraction 0.2 --optim.warmup_steps 0 --workdir {tmp_path / 'run'}"
    succeed(f"{train} --steps 2")
    succeed(f"evaluate --checkpoint {tmp_path / 'run'}")
    shutil.copy(shards / "0.tar", shards / "3.tar")
    outcome = outcome_of(f"{train} --steps 4")
    assert outcome.code == 0, outcome
    assert "images: " in outcome.out + outcome.err
    assert "added ('3.tar/" in outcome.out + outcome.err
