"""Data in a bucket are what the same data on this machine are."""

import dataclasses
import io
import tarfile

import numpy as np
import pytest
from commands import one_sentence
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from flowgen.data import ClipsConfig, DataConfig, LatentsConfig, load
from flowgen.data.found import found_classes, take_inventory
from flowgen.places import RemoteFolder

SHAPE = {"image_size": (8, 8), "channels": 3}


def png(seed, size=(10, 8)):
    levels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(levels).save(content, "PNG")
    return content.getvalue()


def shards(files):
    """Two tar files, each with half of the files."""
    names = sorted(files)
    for half in (names[::2], names[1::2]):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            for name in half:
                about = tarfile.TarInfo(name)
                about.size = len(files[name])
                tar.addfile(about, io.BytesIO(files[name]))
        yield content.getvalue()


def npz():
    content = io.BytesIO()
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    np.savez(content, images=images, labels=np.arange(12) % 2, class_names=["cat", "dog"])
    return content.getvalue()


CLASSES = {f"{kind}/{i}.png": png(i) for kind in ("dog", "cat", "Ärger") for i in range(4)}
MORE = {"cat/.hidden/1.png": b"", ".hidden": b"", "dog/a.xcf": b"", "dog/b.xcf": b"", "notes/list.md": b""}
RUN = {"out/config.json": b'{"sha256": "0"}', "out/samples/1.png": png(99)}
CAPTIONED = {f"{i}.{suffix}": png(i) if suffix == "png" else b"A cat." for i in range(6) for suffix in ("png", "txt")}
# The name in a config, the path below the root, and the files.
DATA = {
    "classes": ("folder", "photos", {**CLASSES, **MORE, **RUN}),
    "captions": ("folder", "photos", CAPTIONED),
    "tar": ("tar", "photos", {f"{i}.tar": content for i, content in enumerate(shards(CLASSES))}),
    "one tar": ("tar", "photos/0.tar", {f"{i}.tar": content for i, content in enumerate(shards(CLASSES))}),
    "npz": ("npz", "photos/shapes.npz", {"shapes.npz": npz()}),
}


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])


@pytest.mark.parametrize("in_memory", [1 << 30, 0], ids=["at once", "on demand"])
@pytest.mark.parametrize("kind", DATA)
def test_data_in_a_bucket_equal_those_on_this_machine(kind, in_memory, tmp_path, caplog):
    name, path, files = DATA[kind]
    told = []
    for root in (f"file://{tmp_path}", "memory://bucket", str(tmp_path)):
        if "://" in root:
            folder = RemoteFolder(f"{root}/photos")
            for file, content in files.items():
                folder.write(file, content)
        config = DataConfig(name, path=f"{root}/{path}", eval_fraction=0.25, in_memory_bytes=in_memory)
        caplog.clear()
        train, held_out = (load(config, **SHAPE, split=split) for split in ("train", "eval"))
        inventory = take_inventory(config, train, held_out)
        pixels = [part[np.arange(len(part))].x for part in (train, held_out)]
        lines = [record.getMessage().replace(root, "") for record in caplog.records]
        told.append((lines, inventory, found_classes(config), getattr(train, "captions", None), pixels))
    for other in told[:-1]:
        assert other[:-1] == told[-1][:-1]
        for here, there in zip(told[-1][-1], other[-1], strict=True):
            np.testing.assert_array_equal(here, there)


def test_files_that_cannot_be_reached_are_not_skipped():
    folder = RemoteFolder("memory://bucket/photos")
    for name, content in {**CLASSES, "cat/damaged.png": b"x"}.items():
        folder.write(name, content)
    config = DataConfig("folder", path=folder.url, eval_fraction=0.0, in_memory_bytes=0, on_corrupt="skip")
    dataset = load(config, **SHAPE, split="train")
    assert dataset[np.arange(len(dataset))].x.shape == (13, 8, 8, 3)
    for change in (lambda: folder.write("dog/1.png", b"x"), lambda: folder.delete("dog/1.png")):
        change()
        with pytest.raises(ValueError, match=r"photos/dog/1\.png.* run the command again\.|does not exist") as error:
            dataset[np.arange(len(dataset))]
        one_sentence(error)


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [
        ("folder", "memory://nowhere", "does not exist or is empty"),
        ("tar", "memory://nowhere", "has no .tar files of images"),
        ("tar", "memory://nowhere/a.tar", "has no .tar files of images"),
        ("npz", "memory://nowhere/a.npz", "is not a file"),
        ("folder", "gs:/bucket", "lost a slash"),
        ("npz", "gs:/bucket/a.npz", "lost a slash"),
    ],
)
def test_data_that_are_not_there(name, path, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load(DataConfig(name, path=path), **SHAPE, split="train")


def test_latents_in_a_bucket_are_refused():
    with pytest.raises(ValueError, match=r"data.path is 'memory://latents', but it must be on this machine; copy"):
        found_classes(LatentsConfig(path="memory://latents"))


def test_videos_in_a_bucket(tmp_path):
    pytest.importorskip("av")
    from flowgen.data import load_clips
    from flowgen.data.video import write_video

    frames = np.random.default_rng(0).integers(0, 256, (2, 6, 16, 16, 3), np.uint8)
    for i, video in enumerate(frames):
        write_video(tmp_path / f"{i}.mp4", video, fps=8)
    config = ClipsConfig(name="folder", path=str(tmp_path), eval_fraction=0.0)
    shape = {"frames": 4, "image_size": (16, 16), "channels": 3, "split": "train"}
    here, there = (
        load_clips(dataclasses.replace(config, path=f"{start}{tmp_path}"), **shape) for start in ("", "file://")
    )
    np.testing.assert_array_equal(here[np.arange(len(here))].x, there[np.arange(len(there))].x)
