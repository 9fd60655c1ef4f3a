"""Odd folders of images and videos, written here, are read as a person would: each file once, by class, or told."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowgen.data import ClipsConfig, DataConfig, load, load_clips
from flowgen.data.listing import list_files
from flowgen.data.media import IMAGE_FORMATS
from flowgen.data.video import READABLE
from flowgen.runs import RunWriter

COLOURS = {"cat": (250, 10, 10), "dog": (10, 250, 10), "fox": (10, 10, 250)}


def paint(path, colour=(90, 90, 90), size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, colour)
    # PBM has two levels, PGM is grey.
    image = image.convert({".pbm": "1", ".pgm": "L"}.get(path.suffix.lower(), "RGB"))
    image.save(path, IMAGE_FORMATS[path.suffix.lower()])


def classes(root, **counts):
    """Images 0.png, 1.png, ... in a folder per class, in the class's colour."""
    for name, count in counts.items():
        for number in range(count):
            paint(root / name / f"{number}.png", COLOURS.get(name, (90, 90, 90)))


def nested(root):
    classes(root, cat=2, dog=1)
    paint(root / "cat" / "2019" / "summer" / "0.png", COLOURS["cat"])
    paint(root / "dog" / "old" / "0.png", COLOURS["dog"])


def loops(root):
    classes(root, a=2, b=1)
    for name in "ab":
        (root / name / "all").symlink_to("..")
    (root / "a" / "self").symlink_to("self")


def links_between_classes(root):
    classes(root, cat=2, dog=3)
    (root / "cat" / "more").symlink_to(root / "dog")  # Dogs stay dogs.
    (root / "dog" / "first.png").symlink_to(root / "cat" / "0.png")


def links_to_elsewhere(root):
    pool = root.parent / "pool"
    classes(pool, cat=2, dog=2)
    (root / "cat").mkdir(parents=True)
    for number in range(2):
        (root / "cat" / f"a{number}.png").symlink_to(pool / "cat" / f"{number}.png")
    (root / "dog").symlink_to(pool / "dog")
    (root / "dog2").symlink_to(pool / "dog")
    (root / "cat" / "gone.png").symlink_to(pool / "gone.png")


def hard_links(root):
    classes(root, cat=2, dog=1)
    os.link(root / "cat" / "0.png", root / "dog" / "same.png")


def every_suffix(root):
    for number, suffix in enumerate(IMAGE_FORMATS):
        paint(root / f"{number:02d}{suffix if number % 2 else suffix.upper()}", (240, 30, 60))


def foreign(root):
    classes(root, cat=1, dog=1)
    for name in ("a.xcf", "b.XCF", "c.heic", "notes.txt", "README"):
        (root / "dog" / name).write_text("no image")
    os.mkfifo(root / "dog" / "pipe.png")


def empty_classes(root):
    classes(root, cat=1, fox=1)
    (root / "dog").mkdir()
    (root / "eel").mkdir()
    (root / "eel" / "a.xcf").write_text("no image")


def hidden(root):
    classes(root, cat=1, dog=1)
    (root / ".git").mkdir()
    paint(root / ".cache" / "0.png")
    (root / "cat" / "._0.png").write_text("no image")
    (root / "cat" / ".DS_Store").write_text("no image")


def foreign_names(root):
    classes(root, **{"Äpfel": 1, "日本": 2, "cats, big": 1, "a b": 1})
    paint(root / "日本" / "büro\n\x1b[31m.png")


def captions(root):
    for name, text in {"1.png": "1.TXT", "2.png": "2.png.txt", "3.JPG": "3.txt", "Four.png": "four.txt"}.items():
        paint(root / name)
        (root / text).write_bytes(b"\xef\xbb\xbf" * (name == "1.png") + f"text of {name}\n".encode())
    (root / "2.txt").write_text("another text, of nothing")


def one_class(root):
    classes(root, cat=3)


# What each holds: images by class ("" for none), and what is told of the rest.
ODD_SETS = {
    nested: ({"cat": 3, "dog": 2}, ""),
    loops: (
        {"a": 2, "b": 1},
        "2 links to a folder already listed ('a/all', ...); 1 link to nothing ('a/self')",
    ),
    links_between_classes: (
        {"cat": 2, "dog": 3},
        "1 file already listed under another name ('dog/first.png'); 1 link to a folder already listed ('cat/more')",
    ),
    links_to_elsewhere: (
        {"cat": 2, "dog": 2},
        "1 link to a folder already listed ('dog2'); 1 link to nothing ('cat/gone.png'); "
        "1 class folder without images (dog2)",
    ),
    hard_links: ({"cat": 2, "dog": 1}, "1 file already listed under another name ('dog/same.png')"),
    every_suffix: ({"": len(IMAGE_FORMATS)}, ""),
    foreign: (
        {"cat": 1, "dog": 1},
        "2 .xcf, 1 without suffix, 1 .heic, 1 .txt; 1 entry other than a file or a folder ('dog/pipe.png')",
    ),
    empty_classes: ({"cat": 1, "fox": 1}, "1 .xcf; 2 class folders without images (dog, eel)"),
    hidden: ({"cat": 1, "dog": 1}, "4 hidden"),
    foreign_names: ({"a b": 1, "cats, big": 1, "Äpfel": 1, "日本": 3}, ""),
    captions: ({"": 4}, "1 .txt"),
    one_class: ({"cat": 3}, ""),
}


@pytest.fixture(params=ODD_SETS, ids=lambda build: build.__name__)
def odd(request, tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    request.param(root)
    return root, *ODD_SETS[request.param]


@pytest.mark.parametrize("limit", [0, 1 << 20], ids=["from disk", "in memory"])
def test_odd_sets_are_read_right(odd, limit, caplog):
    root, expected, told = odd
    config = DataConfig("folder", path=str(root), eval_fraction=0.0, in_memory_bytes=limit)
    dataset = load(config, image_size=(8, 8), channels=3, split="all")
    batch = dataset[np.arange(len(dataset))]
    assert dataset.class_names == tuple(name for name in expected if name)
    found = {dataset.class_names[label] if label >= 0 else "": 0 for label in batch.context.tolist()}
    for image, label in zip(batch.x, batch.context.tolist(), strict=True):
        name = dataset.class_names[label] if label >= 0 else ""
        found[name] += 1
        if name in COLOURS:
            np.testing.assert_array_equal(image[4, 4], COLOURS[name])
    assert found == expected
    sentences = [record.getMessage() for record in caplog.records]
    assert sentences == ([f"Left out of data.path '{root}': {told}."] if told else [])


def test_captions_are_found_in_capitals_and_behind_the_suffix(tmp_path):
    captions(tmp_path)
    config = DataConfig("folder", path=str(tmp_path), eval_fraction=0.0)
    dataset = load(config, image_size=(8, 8), channels=3, split="all")
    assert dataset.captions == ("text of 1.png", "text of 2.png", "text of 3.JPG", "text of Four.png")


def test_every_listed_suffix_is_read_in_its_own_colours(tmp_path):
    every_suffix(tmp_path)
    config = DataConfig("folder", path=str(tmp_path), eval_fraction=0.0)
    images = load(config, image_size=(8, 8), channels=3, split="all")[np.arange(len(IMAGE_FORMATS))].x
    for suffix, image in zip(IMAGE_FORMATS, images, strict=True):
        if suffix not in (".pbm", ".pgm"):
            # Lossy formats keep an even colour to a level or two.
            np.testing.assert_allclose(image[4, 4].astype(int), (240, 30, 60), atol=3, err_msg=suffix)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    classes(tmp_path, cat=1, dog=1)
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=r"data\.path: cannot read .*dog'"):
        load(DataConfig("folder", path=str(tmp_path)), image_size=(8, 8), channels=3, split="all")


def test_files_of_one_number_are_told_apart_by_their_device(tmp_path, monkeypatch):
    """Some file systems say the same inode of every file, which must not make one of them all."""
    classes(tmp_path, cat=3, dog=3)
    real = os.stat

    def same(path, **options):
        about = real(path, **options)
        return about if not str(path).endswith(".png") else os.stat_result((about[0], 1, *about[2:10]))

    monkeypatch.setattr(os, "stat", same)
    assert len(list_files(tmp_path, (".png",), "images")) == 6


def test_names_that_are_written_alike_are_one_class_name(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    classes(tmp_path / "one", **{apart: 1})
    assert list_files(tmp_path / "one", (".png",), "images").class_names == (composed,)
    classes(tmp_path / "two", **{apart: 1, composed: 1})
    if len(list((tmp_path / "two").iterdir())) == 2:  # Some file systems make them one folder.
        with pytest.raises(ValueError, match="two folders named 'café'"):
            list_files(tmp_path / "two", (".png",), "images")


def test_all_images_of_a_class_held_out_are_told(tmp_path, caplog):
    classes(tmp_path, cat=1, dog=1, fox=1)
    config = DataConfig("folder", path=str(tmp_path), eval_fraction=0.3)
    held_out = load(config, image_size=(8, 8), channels=3, split="eval")
    assert not caplog.records
    load(config, image_size=(8, 8), channels=3, split="train")
    [lost] = {held_out.class_names[label] for label in held_out.labels.tolist()}
    assert f"All images of {lost} are held out" in caplog.text


@pytest.mark.parametrize("lost", [None, "config.json", "checkpoints"])
@pytest.mark.parametrize("place", ["run", "cat/run", "cat/deep/run"])
def test_a_run_inside_the_data_is_none_of_them(tmp_path, place, lost):
    classes(tmp_path, cat=2, dog=1)
    with RunWriter(tmp_path / place, keep=1, best_metric="loss") as record:
        record.begin({"seed": 1}, first_step=None, last_step=3, tensorboard=False, bar=False, tracker="none")
        record.save_last(3, {"w": np.zeros(2, np.float32)})
        record.draw(3, np.zeros((8, 8, 3), np.uint8))
    if lost:
        (tmp_path / place / lost).rename(tmp_path.with_name(f"{tmp_path.name}-{lost}"))
    listing = list_files(tmp_path, (".png",), "images")
    assert listing.class_names == ("cat", "dog")
    assert len(listing) == 3
    assert listing.left_out == (f"1 folder written by a flowgen run ('{place}')",)


def video(path, level):
    """A grey video of one or two seconds in a container that the suffix names, noisy so that its length can be told."""
    av = pytest.importorskip("av")
    kinds = {".ts": "mpegts", ".mts": "mpegts", ".m2ts": "mpegts", ".wmv": "asf", ".mkv": "matroska", ".ogv": "ogg"}
    codecs = {".webm": "libvpx", ".ogv": "libvpx", ".wmv": "wmv2", ".asf": "wmv2", ".flv": "flv", ".avi": "mpeg4"}
    if path.suffix == ".gif":
        frames = [Image.new("L", (32, 32), level)] * 8
        frames[-1] = Image.new("L", (32, 32), level + 9)  # Pillow joins equal frames.
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=125)
        return
    codec = codecs.get(path.suffix, "mpeg1video" if path.suffix in (".mpg", ".mpeg") else "libx264")
    kind = kinds.get(path.suffix)
    rate = 25 if codec == "mpeg1video" else 8  # which has few rates
    with av.open(str(path), "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        noise = np.random.default_rng(0)
        for _ in range(rate * 2):
            array = (level + noise.integers(-30, 31, (32, 32, 1))).astype(np.uint8).repeat(3, axis=2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())


def test_every_listed_video_is_read(tmp_path, caplog):
    for number, suffix in enumerate(READABLE):
        video(tmp_path / f"{number:02d}{suffix}", 40 + 10 * number)
    (tmp_path / "a.srt").write_text("no video")
    config = ClipsConfig("folder", path=str(tmp_path), fps=8.0, eval_fraction=0.0)
    dataset = load_clips(config, frames=4, image_size=(16, 16), channels=1, split="all")
    batch = dataset[np.arange(len(dataset))]
    seen = {round(float(level), -1) for level in batch.x.mean(axis=(1, 2, 3, 4))}
    assert seen == {40 + 10 * number for number in range(len(READABLE))}
    assert set(batch.context.tolist()) == {-1}
    assert f"Left out of data.path '{tmp_path}': 1 .srt." in caplog.text


def test_odd_sets_of_videos_are_read_right(tmp_path, caplog):
    for name in ("cat/0.mp4", "cat/deep/1.MP4", "dog/0.avi"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        video((tmp_path / name).with_suffix(".mp4"), 200 if name.startswith("dog") else 80)
        (tmp_path / name).with_suffix(".mp4").rename(tmp_path / name)
    (tmp_path / "cat" / "all").symlink_to("..")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dog" / "cover.png").write_text("no video")
    config = ClipsConfig("folder", path=str(tmp_path), fps=8.0, eval_fraction=0.0)
    dataset = load_clips(config, frames=4, image_size=(16, 16), channels=1, split="train")
    batch = dataset[np.arange(len(dataset))]
    assert dataset.class_names == ("cat", "dog")
    dogs = batch.x.mean(axis=(1, 2, 3, 4)) > 140
    np.testing.assert_array_equal(batch.context, dogs.astype(int))
    assert (len(dogs), int(dogs.sum())) == (12, 4)
    told = "1 .png; 1 link to a folder already listed ('cat/all'); 1 class folder without videos (empty)"
    assert f"Left out of data.path '{tmp_path}': {told}." in caplog.text
