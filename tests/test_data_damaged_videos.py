"""Videos that begin anywhere, or from which something is lost: their own frames at their own times, or a refusal."""

import numpy as np
import pytest
from video_files import FINE, FORTY, SIZE, encode, is_close

from flowgen.data import ClipsConfig, load_clips
from flowgen.data.video import UnreadableVideo, av, frame_times, read_clip, video_length, video_size

SMALL_GROUPS = {"g": "10"}
# Where Matroska is damaged, it goes on with the next cluster, here of one second.
CLUSTERS = {"cluster_time_limit": "1000"}
WRITERS = {
    "h264.ts": lambda p: encode(p, FORTY, **FINE),
    "mpeg2.ts": lambda p: encode(p, FORTY, "mpeg2video", rate=25, qmax="2", bf="2", **SMALL_GROUPS),
    "mpeg2.mpg": lambda p: encode(p, FORTY, "mpeg2video", rate=25, qmax="2", bf="0", **SMALL_GROUPS),
    "mpeg4.ts": lambda p: encode(p, FORTY, "mpeg4", qmax="2", **SMALL_GROUPS),
    "h264.mkv": lambda p: encode(p, FORTY, container=CLUSTERS, **FINE),
    "vp9.webm": lambda p: encode(p, FORTY, "libvpx-vp9", crf="4", b="0", container=CLUSTERS, **SMALL_GROUPS),
    "vp8.webm": lambda p: encode(p, FORTY, "libvpx", crf="4", b="4M", container=CLUSTERS, **SMALL_GROUPS),
    "mpeg4.avi": lambda p: encode(p, FORTY, "mpeg4", qmax="2", **SMALL_GROUPS),
    "h264.flv": lambda p: encode(p, FORTY, **FINE),
}


def packets(path):
    with av().open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def from_packet(path, first):
    """Writes a video again without its first packets."""
    later = path.with_stem("later")
    with av().open(str(path)) as container, av().open(str(later), "w") as copy:
        stream = copy.add_stream_from_template(container.streams.video[0])
        for packet in [packet for packet in container.demux(video=0) if packet.size][first:]:
            packet.stream = stream
            copy.mux(packet)
    path.unlink()
    return later


def clips_of(path, fps=0.0, frames=5, **changes):
    config = ClipsConfig("folder", path=str(path.parent), fps=fps, eval_fraction=0.0, **changes)
    return load_clips(config, frames=frames, image_size=SIZE, channels=3, split="train")


@pytest.mark.parametrize("fps", [None, 5])
@pytest.mark.parametrize("name", ["h264.ts", "mpeg2.ts", "mpeg4.ts", "h264.mkv", "vp9.webm", "vp8.webm", "mpeg4.avi"])
def test_a_video_that_begins_between_key_frames_begins_with_the_next(tmp_path, name, fps):
    path = from_packet(WRITERS[name](tmp_path / name), 4)
    rate = 25 if "mpeg2" in name else 10
    key = next(number for number, packet in enumerate(packets(tmp_path / f"later{path.suffix}")) if packet.is_keyframe)
    assert key > 0
    times = frame_times(path, fps=fps)
    whole = frame_times(path)
    assert times[0] == 0
    clip = read_clip(path, len(times), SIZE, 3, fps=fps)
    first = 40 - len(whole)
    assert 4 < first <= 13
    assert is_close(clip, FORTY[first + np.rint(times * rate - 0.1).astype(int)])
    assert video_length(path)[0] == pytest.approx(len(whole) / rate, abs=0.01)
    assert video_size(path) == SIZE
    held = clips_of(path, fps=float(fps or 0))
    assert is_close(held.x.reshape(-1, *SIZE, 3), clip[: len(held) * 5].astype(int))


def test_a_video_without_a_key_frame_is_refused(tmp_path):
    path = from_packet(encode(tmp_path / "a.ts", FORTY[:15], crf="4", g="100", **{"x264-params": "scenecut=0"}), 4)
    for call in (frame_times, video_length, video_size, lambda p: read_clip(p, 1, SIZE, 3)):
        with pytest.raises(UnreadableVideo, match="has no frames that can be decoded"):
            call(path)


def test_a_key_frame_that_is_damaged_is_not_replaced_by_the_next(tmp_path):
    path = WRITERS["vp8.webm"](tmp_path / "a.webm")
    first, content = packets(path)[0], bytearray(path.read_bytes())
    content[first.pos + 8 : first.pos + first.size] = bytes(first.size - 8)
    path.write_bytes(content)
    with pytest.raises(UnreadableVideo, match=r"a\.webm' has no decodable frame at second 0"):
        read_clip(path, 2, SIZE, 3, fps=10)
    assert is_close(clips_of(path, on_corrupt="skip").x[0], FORTY[10:15])


def zeroed(content, at):
    """From one packet into the next but one."""
    content[at[13] - 8 : at[15] + 4] = bytes(at[15] - at[13] + 12)


def removed(content, at):
    del content[at[13] : at[15]]


def unmarked(content, at):
    """The mark of a packet of a transport stream."""
    content[at[13] - 5 : at[13] + 5] = bytes(10)


LOSSES = {
    **{f"removed {name}": (name, removed) for name in ("h264.ts", "mpeg2.ts")},
    **{f"unmarked {name}": (name, unmarked) for name in ("h264.ts", "mpeg2.ts")},
    **{f"zeroed {name}": (name, zeroed) for name in ("h264.mkv", "vp9.webm", "vp8.webm", "h264.flv", "h264.ts")},
}


@pytest.mark.parametrize("fps", [0.0, 5.0])
@pytest.mark.parametrize("case", LOSSES)
def test_a_loss_in_the_middle_is_refused_by_name_or_left_out(tmp_path, case, fps):
    name, lose = LOSSES[case]
    path = WRITERS[name](tmp_path / name)
    rate = 25 if "mpeg2" in name else 10
    content = bytearray(path.read_bytes())
    lose(content, [packet.pos for packet in packets(path)])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}' is damaged at second"):
        clips_of(path, fps)
    kept = clips_of(path, fps, frames=2, on_corrupt="skip").x
    assert 0 < len(kept) < 20 * (fps or rate) / rate
    # What is left are frames of the video as they follow each other, none of them twice.
    step = 1 if not fps else rate / fps
    starts = [[n for n in range(40) if is_close(clip[0], FORTY[n])] for clip in kept]
    assert all(len(found) == 1 for found in starts)
    assert len({found[0] for found in starts}) == len(kept)
    for clip, (start,) in zip(kept, starts, strict=True):
        assert is_close(clip[1], FORTY[min(39, round(start + step))])


def test_a_lost_end_is_no_cut_end(tmp_path):
    """One that is cut off has no bytes behind its last packet."""
    path = encode(tmp_path / "a.webm", FORTY, "libvpx", crf="4", b="4M", **SMALL_GROUPS)
    content, at = bytearray(path.read_bytes()), [packet.pos for packet in packets(path)]
    path.write_bytes(content[: at[20] + 3])
    assert len(frame_times(path)) == len(frame_times(path, fps=10)) == 20
    content[at[20] - 8 : at[21] + 20] = bytes(at[21] - at[20] + 28)
    path.write_bytes(content)
    for fps in (None, 10):
        with pytest.raises(UnreadableVideo, match="is damaged at second 2"):
            frame_times(path, fps=fps)


@pytest.mark.parametrize("name", ["a.mkv", "a.flv", "a.ts", "a.mp4"])
def test_frames_that_are_shown_long_are_no_loss(tmp_path, name):
    at = np.cumsum(np.random.default_rng(0).choice([40, 40, 40, 80, 400, 33, 1500], 40))
    path = encode(tmp_path / name, FORTY, at=(at - at[0]).tolist(), rate=25, **FINE)
    assert np.abs(frame_times(path) - (at - at[0]) / 1000).max() < 0.002
    assert is_close(read_clip(path, 40, SIZE, 3), FORTY)
    shown = clips_of(path, fps=10.0)
    assert len(shown) > 10
