"""Tar files of images and videos give what the folder gives that unpacking them would make, or are refused by name."""

import dataclasses
import functools
import gzip
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from commands import one_sentence, outcome_of, succeed
from PIL import Image

import flowgen
from flowgen.data import ClipsConfig, DataConfig, Loader, buckets_of, found_classes, load, load_clips, take_inventory
from flowgen.data.dataset import captions_in
from flowgen.data.tar import Shards, list_shards, list_tar, local_shards
from flowgen.data.tar_headers import members
from flowgen.data.video import write_video
from flowgen.experiments import FlowExperiment
from flowgen.flows import TARFlowConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig

SHAPE = {"image_size": (8, 8), "channels": 3}
LONG = "a folder with a long name/" * 6


def paint(path, number, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def flat(root):
    for number in range(12):
        paint(root / f"{number}.png", number)


def by_class(root):
    for number in range(7):
        paint(root / "cat" / f"{number}.png", number)
        paint(root / "dog" / "deep" / f"{number}.jpg", 10 + number, (40, 12))
    paint(root / "Äpfel 日本" / f"{LONG}büro.png", 30)
    paint(root / "Äpfel 日本" / "2.PNG", 31)


def captioned(root):
    for number, text in enumerate(("1.TXT", "2.png.txt", "3.txt", "Four.txt", "5.txt")):
        name = text.split(".")[0]
        paint(root / f"{name.lower()}.png", number)
        (root / text).write_bytes(b"\xef\xbb\xbf" * (number == 1) + f"text of\n{name} ü ".encode())
    (root / "2.txt").write_text("of nothing")


def beside_other_things(root):
    by_class(root)
    (root / "empty").mkdir()
    (root / "eel").mkdir()
    for name in (
        "eel/a.xcf",
        "dog/README",
        "cat/1.json",
        ".git/config",
        ".git/objects/1.png",
        "cat/._0.png",
        "dog/.x/y",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("no image")


FOLDERS = {build.__name__: build for build in (flat, by_class, captioned, beside_other_things)}


def by_the_command(photos, shards):
    subprocess.run(["tar", "cf", shards / "a.tar", "-C", photos, "."], check=True)


def in_three(photos, shards, form):
    """Every third entry in one of three shards, so that captions and classes are spread over them."""
    entries = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*"))
    for number in range(3):
        with tarfile.open(shards / f"{number}.tar", "w", format=form) as shard:
            for name in entries[number::3]:
                shard.add(photos / name, name, recursive=False)


PACKERS = {
    "the command": by_the_command,
    "three of ustar": functools.partial(in_three, form=tarfile.USTAR_FORMAT),
    "three of pax": functools.partial(in_three, form=tarfile.PAX_FORMAT),
    "three of GNU": functools.partial(in_three, form=tarfile.GNU_FORMAT),
}


def packed(tmp_path, build, pack=by_the_command):
    """A folder, and the shards that hold it."""
    photos, shards = tmp_path / "photos", tmp_path / "shards"
    for folder in (photos, shards):
        folder.mkdir()
    build(photos)
    pack(photos, shards)
    return photos, shards


def configs(photos, shards, **changes):
    return [DataConfig(name, path=str(path), **changes) for name, path in (("folder", photos), ("tar", shards))]


def all_of(dataset):
    batches = [bucket[np.arange(len(bucket))] for bucket in buckets_of(dataset)]
    return [batch.x for batch in batches], [batch.context for batch in batches]


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


def add(shard, name, content=b"", **fields):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    for field, value in fields.items():
        setattr(entry, field, value)
    shard.addfile(entry, io.BytesIO(content))


def png(level):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def samples(path, classes, *, key="{:03}", texts=True, level=0):
    """A shard of keys from 0 on, with red levels from `level` on."""
    with tarfile.open(path, "w") as shard:
        for number, label in enumerate(classes):
            name = key.format(number)
            add(shard, f"{name}.png", png(level + number))
            if label is not None:
                add(shard, f"{name}.cls", str(label).encode())
            if texts:
                add(shard, f"{name}.txt", f"level {level + number}".encode())
            add(shard, f"{name}.json", b"{}")


def levels_of(dataset):
    """The label and caption of each red level."""
    batch = dataset[np.arange(len(dataset))]
    captions = captions_in(dataset) or [""] * len(dataset)
    names = [dataset.class_names[label] if label >= 0 else "" for label in batch.context.tolist()]
    return {int(x[0, 0, 0]): found for x, *found in zip(batch.x, names, captions, strict=True)}


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


WRONG_CLASSES = {
    "one is missing": ([0, None, 1], r"has classes for only 2 of 3 files; add '.*/001\.cls', or remove"),
    "empty": ([0, " ", 1], r"'.*a\.tar/001\.cls' in data\.path is ''; write one class number"),
    "two lines": ([0, "a\nb", 1], "write one class number or one class name"),
    "a name among numbers": (
        [0, 1, "dog"],
        r"002\.cls' in data\.path contains 'dog', but classes must be either all n",
    ),
    "a number among names": (["cat", "3", "dog"], r"001\.cls' in data\.path contains '3', but classes must be either"),
    "below none": ([0, -2, 1], r"001\.cls' in data\.path contains '-2', but classes must be either all numbers"),
    "fractions": ([0, "1.0", 2], r"001\.cls' in data\.path contains '1\.0', but classes must be either all numbers"),
    "ten digits": ([0, 1_234_567_890, 1], r"001\.cls' in data\.path contains '1234567890', but classes must"),
    "far too large": ([0, 99_999_999, 1], "contains 99999999, which is too large for 3 samples"),
}


@pytest.mark.parametrize("case", WRONG_CLASSES)
def test_class_files_without_a_class_are_named(tmp_path, case):
    classes, sentence = WRONG_CLASSES[case]
    samples(tmp_path / "a.tar", classes, texts=False)
    with pytest.raises(ValueError, match=sentence) as error:
        load(DataConfig("tar", path=str(tmp_path)), **SHAPE, split="all")
    one_sentence(error)


# -- what is left out, and what is refused -----------------------------------------------------------------


def test_only_plain_files_inside_are_read(tmp_path, caplog):
    secret = tmp_path / "secret.png"
    paint(secret, 0)
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "a.tar", "w") as shard:
        add(shard, "cat/0.png", png(1))
        add(shard, "./cat//./1.png", png(2))
        add(shard, "cat/1.png", png(3))  # An appended version replaces the first, as when unpacking.
        add(shard, f"{secret}", png(4))
        add(shard, "../secret.png", png(5))
        add(shard, "cat/../../secret.png", png(6))
        add(shard, "cat/2.png", type=tarfile.SYMTYPE, linkname=str(secret))
        add(shard, "cat/3.png", type=tarfile.LNKTYPE, linkname="cat/0.png")
        add(shard, "cat/4.png", type=tarfile.FIFOTYPE)
        add(shard, "cat/5.png", type=tarfile.CHRTYPE)
        add(shard, "cat/6.png", png(7), pax_headers={"GNU.sparse.map": "0,1"})
        add(shard, "cat/7.png", png(8), type=b"Q")
    (tmp_path / "shards" / "sizes.json").write_text("{}")
    (tmp_path / "shards" / "old").mkdir()
    (tmp_path / "shards" / "same.tar").symlink_to("a.tar")
    dataset = load(DataConfig("tar", path=str(tmp_path / "shards"), eval_fraction=0.0), **SHAPE, split="all")
    assert sorted(levels_of(dataset)) == [1, 3]
    assert caplog.messages == [
        f"Left out of data.path '{tmp_path / 'shards'}': 1 .json; "
        "1 file already listed under another name ('same.tar'); "
        "3 entries other than a file or a folder ('cat/4.png', ...); 1 folder next to the .tar files ('old'); "
        "1 file replaced by a later one of the same name ('cat/1.png'); "
        "3 entries with an absolute name, or with '..' in its name ('../secret.png', ...); "
        "2 links not followed in a tar file ('cat/2.png', ...); 1 sparse file not readable in a tar file ('cat/6.png')."
    ]


def three(path):
    samples(path, ["cat", "dog", "cat"], texts=False)
    return path.read_bytes()


def header_at(content, name):
    return content.index(name.encode() + b"\0")


def changed(content, at, value):
    return content[:at] + value + content[at + len(value) :]


def with_checksum(content, at):
    block = content[at : at + 512]
    return changed(content, at + 148, b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256))


def with_size(content, field):
    at = header_at(content, "001.png")
    return with_checksum(changed(content, at + 124, field), at)


def pax_of(records):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as shard:
        add(shard, "0.png", png(1))
        add(shard, "extra", records, type=tarfile.XHDTYPE)
        add(shard, "1.png", png(1))
    return file.getvalue()


DAMAGE = {
    "two joined by cat": (lambda c: c + c, "goes on after its end mark"),
    "an empty block inside": (
        lambda c: c[: header_at(c, "002.png")] + bytes(512) + c[header_at(c, "002.png") :],
        "goes on after its end mark",
    ),
    "empty": (lambda c: b"", "is not a tar file; pack it again"),
    "no tar": (lambda c: png(1) * 20, "is not a tar file; pack it again"),
    "gzip": (gzip.compress, "is compressed with gzip.*decompress it with `gunzip`"),
    "zstd": (lambda c: b"\x28\xb5\x2f\xfd" + c, "is compressed with zstd.*`unzstd`"),
    "cut in a file": (lambda c: c[: header_at(c, "002.png") + 600], "ends in the middle of '002.png' .*truncated"),
    "cut in a header": (lambda c: c[: header_at(c, "002.png") + 100], "no end mark after '001.json' .*truncated"),
    "cut between files": (lambda c: c[: header_at(c, "002.png")], "no end mark after '001.json' .*truncated"),
    "a changed name": (lambda c: changed(c, header_at(c, "001.png"), b"9"), "damaged after '000.json' .a checksum"),
    "noise": (lambda c: changed(c, header_at(c, "001.png"), bytes(range(256)) * 2), "damaged after '000.json'"),
    "no header": (lambda c: changed(c, 0, b"9"), "is not a tar file"),
    "a size beyond the file": (lambda c: with_size(c, b"77777777777\0"), "ends in the middle of '001.png'"),
    "a huge size": (lambda c: with_size(c, b"\x80" + b"\xff" * 11), "ends in the middle of '001.png'"),
    "a negative size": (lambda c: with_size(c, b"\xff" * 12), "damaged after '000.json' .*no valid size"),
    "a size of letters": (lambda c: with_size(c, b"abcdefghijk\0"), "damaged after '000.json' .*no valid size"),
    "pax without an end": (lambda c: pax_of(b"99 path=a"), "damaged after '0.png' .*pax header at byte"),
    "pax of length 0": (lambda c: pax_of(b"0 path=a\n"), "damaged after '0.png' .*pax header at byte"),
    "pax without numbers": (lambda c: pax_of(b"path=a\n" * 9), "damaged after '0.png' .*no valid size"),
    "pax with a size beyond the file": (lambda c: pax_of(b"18 size=999999999\n"), "ends in the middle of '1.png'"),
    "pax of megabytes": (lambda c: pax_of(b"1" * (2 << 20)), "damaged after '0.png' .*2,097,152 bytes"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_shards_are_named_with_a_remedy(tmp_path, case):
    damage, sentence = DAMAGE[case]
    path = tmp_path / "a.tar"
    path.write_bytes(damage(three(path)))
    with pytest.raises(ValueError, match=f"'{re.escape(str(path))}' .*{sentence}") as error:
        load(DataConfig("tar", path=str(tmp_path)), **SHAPE, split="all")
    one_sentence(error)


def test_cuts_and_changes_anywhere_never_change_what_is_read_in_silence(tmp_path):
    """Images are read as they were, or one sentence names the shard. Content has no checksum of its own in a tar."""
    path = tmp_path / "a.tar"
    content = three(path)
    random = np.random.default_rng(0)
    cuts = [content[:at] for at in random.integers(0, len(content) - 1025, 40)]
    headers = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
    flips = [
        changed(content, at, bytes([content[at] ^ 1 << random.integers(8)]))
        for at in (random.choice(headers, 60) + random.integers(0, 512, 60)).tolist()
    ]
    for damaged in (*cuts, *flips):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(str(path))) as error:
            list_tar(path, (".png",), "images")
        one_sentence(error)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_headers_are_read_as_by_tarfile(tmp_path, form):
    path = tmp_path / "a.tar"
    names = ["a", "b/" * 60 + "c", "plain/", "x" * 100, "y" * 90 + "/" + "z" * 90]
    if form != tarfile.USTAR_FORMAT:
        names += ["日本" * 200, "é" * 99, "line\nbreak", "n" * 5000]
    with tarfile.open(path, "w", format=form) as shard:
        for number, name in enumerate(names):
            is_folder = name.endswith("/")
            content = b"" if is_folder else b"." * (number * 511)
            add(shard, name, content, type=tarfile.DIRTYPE if is_folder else tarfile.REGTYPE)
        add(shard, "link" * 24, type=tarfile.SYMTYPE, linkname="elsewhere/" * 9)
        add(shard, "last", b"content", mtime=1e9 + 0.5, uname="ü")
    with tarfile.open(path) as shard:
        expected = [(entry.name, entry.offset_data, entry.size) for entry in shard]
    found = [
        (name.rstrip("/"), offset, size) for name, _, offset, size in members(local_shards(path, "images").files[0])
    ]
    assert found == expected


def test_the_command_writes_sparse_files_that_are_left_out(tmp_path):
    with (tmp_path / "hole.png").open("wb") as file:
        for place in range(40):  # more holes than fit into one header
            file.seek(place << 20)
            file.write(b"content")
    paint(tmp_path / "whole.png", 1)
    for form in ("gnu", "pax"):
        shard = tmp_path / f"{form}.tar"
        command = ["tar", "cf", shard, "--sparse", f"--format={form}", "-C", tmp_path, "hole.png", "whole.png"]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("this tar writes no sparse files")
        listing = list_tar(shard, (".png",), "images")
        assert listing.names == ("whole.png",)
        assert listing.files[0].read_bytes() == (tmp_path / "whole.png").read_bytes()
        if shard.stat().st_size < 10 << 20:  # some file systems have no holes
            assert "1 sparse file" in listing.left_out[0]


@pytest.mark.parametrize("in_memory_bytes", [0, 1 << 20])
def test_an_unreadable_image_is_refused_or_skipped_as_in_a_folder(tmp_path, in_memory_bytes, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for number in range(4):
            add(shard, f"{number}.png", png(number) if number != 2 else png(number)[:-30])
    config = DataConfig("tar", path=str(tmp_path), eval_fraction=0.0, in_memory_bytes=in_memory_bytes)
    with pytest.raises(ValueError, match=r"1 image that cannot be read: '.*a\.tar/2\.png' \(") as error:
        all_of(load(config, **SHAPE, split="all"))
    one_sentence(error)
    dataset = load(dataclasses.replace(config, on_corrupt="skip"), **SHAPE, split="all")
    assert sorted(levels_of(dataset)) == [0, 1, 3]
    assert "Left out" in caplog.text
    assert "a.tar/2.png' (" in caplog.text


@pytest.mark.parametrize("on_corrupt", ["refuse", "skip"])
@pytest.mark.parametrize("change", ["longer", "touched", "shorter"])
def test_a_shard_that_changes_while_it_is_read_ends_the_run(tmp_path, on_corrupt, change):
    path = tmp_path / "a.tar"
    three(path)
    config = DataConfig("tar", path=str(path), eval_fraction=0.0, in_memory_bytes=0, on_corrupt=on_corrupt)
    dataset = load(config, **SHAPE, split="all")
    dataset[np.arange(3)]
    if change == "touched":
        os.utime(path, (1, 1))
    else:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size + (512 if change == "longer" else -2048))
    with pytest.raises(ValueError, match=r"a\.tar' has changed since it was opened") as error:
        dataset[np.arange(3)]
    one_sentence(error)


def test_shards_and_folders_are_told_apart(tmp_path):
    photos, shards = packed(tmp_path, by_class)
    for config, sentence in (
        (DataConfig("folder", path=str(shards)), r"has no images, but \.tar files; set data\.name to 'tar'"),
        (DataConfig("folder", path=str(shards / "a.tar")), r"is a file; .*or set data\.name to 'tar'"),
        (DataConfig("tar", path=str(photos)), r"has no \.tar files; .*set data\.name to 'folder'"),
        (DataConfig("tar", path=str(tmp_path / "none")), r"does not exist; give a \.tar file"),
        (DataConfig("tar", path=str(photos / "cat" / "0.png")), "is not a tar file"),
        (DataConfig("tar"), r"data\.path is empty"),
    ):
        with pytest.raises((ValueError, OSError), match=sentence) as error:
            load(config, **SHAPE, split="train")
        one_sentence(error)
    (shards / "b.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"compressed tar files \(such as 'b\.tar\.gz'\).*decompress"):
        load(DataConfig("tar", path=str(shards)), **SHAPE, split="train")


def test_shards_without_images_say_what_they_have(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        add(shard, "a.xcf", b"no image")
    with pytest.raises(ValueError, match=r"has no images; put .*\(it contains 1 \.xcf\)"):
        load(DataConfig("tar", path=str(tmp_path)), **SHAPE, split="train")


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
