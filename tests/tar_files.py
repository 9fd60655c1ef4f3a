"""Folders of images, and tar files that hold them or samples in the WebDataset layout."""

import functools
import io
import subprocess
import tarfile

import numpy as np
from PIL import Image

from flowgen.data import buckets_of
from flowgen.data.dataset import captions_in

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


def all_of(dataset):
    batches = [bucket[np.arange(len(bucket))] for bucket in buckets_of(dataset)]
    return [batch.x for batch in batches], [batch.context for batch in batches]


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


def three(path):
    samples(path, ["cat", "dog", "cat"], texts=False)
    return path.read_bytes()
