"""Video files as telephones, old programs and full disks make them: the right frames, or a refusal by name."""

import socket
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from video_files import FINE, FORTY, SIZE, blocks, encode, is_close

from flowgen.data import ClipsConfig, load_clips
from flowgen.data.media import pillow
from flowgen.data.video import UnreadableVideo, av, frame_times, read_clip, video_length, video_size, write_video

ONE = blocks(1)
# Name: how it is written, its frames, and the seconds that it lasts.
ODD = {
    "b frames.avi": (lambda p: encode(p, FORTY, **FINE), FORTY, 4.0),
    "b frames of mpeg4.avi": (lambda p: encode(p, FORTY, "mpeg4", bf="2", qmax="2"), FORTY, 4.0),
    "transport stream.ts": (lambda p: encode(p, FORTY, **FINE), FORTY, 4.0),
    "programme stream.mpg": (lambda p: encode(p, FORTY, "mpeg2video", rate=25, qmax="2"), FORTY, 1.6),
    "flash.flv": (lambda p: encode(p, FORTY, **FINE), FORTY, 4.0),
    "fragments.mp4": (
        lambda p: encode(p, FORTY, container={"movflags": "frag_keyframe+empty_moov"}, **FINE),
        FORTY,
        4.0,
    ),
    "vp9.webm": (lambda p: encode(p, FORTY, "libvpx-vp9", crf="4", b="0"), FORTY, 4.0),
    "ten bits.mkv": (lambda p: encode(p, FORTY, "libx264", "yuv420p10le", **FINE), FORTY, 4.0),
    "without loss.mkv": (lambda p: encode(p, FORTY, "ffv1", "bgr0"), FORTY, 4.0),
    "one frame.mp4": (lambda p: encode(p, ONE, **FINE), ONE, 0.1),
    "uneven.mkv": (lambda p: encode(p, FORTY[:5], at=[0, 40, 500, 1500, 1540], rate=30, **FINE), FORTY[:5], 1.573),
    "odd sides.mkv": (lambda p: encode(p, FORTY[:, :31, :47], "ffv1", "bgr0"), FORTY[:, :31, :47], 4.0),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_videos_have_their_frames_and_last_as_long_as_they_should(tmp_path, name):
    write, frames, seconds = ODD[name]
    path, size = tmp_path / name, frames.shape[1:3]
    write(path)
    assert video_size(path) == size
    assert video_length(path)[0] == pytest.approx(seconds, abs=0.03)
    times = frame_times(path)
    assert len(times) == len(frames)
    assert is_close(read_clip(path, len(frames), size, 3), frames)
    middle = len(frames) // 2
    assert is_close(read_clip(path, len(frames) - middle, size, 3, start=times[middle]), frames[middle:])
    assert is_close(read_clip(path, 1, size, 3, fps=10, start=times[-1]), frames[-1:])


@pytest.mark.parametrize("count", [22, 23, 24, 40])
@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_a_transport_stream_lasts_until_the_end_of_the_frame_that_is_shown_last(tmp_path, codec, count):
    # The last frame is predicted from, so that its packet comes before those of the frames that are shown before it.
    options = {"x264-params": "b-adapt=0:bframes=3:scenecut=0"} if codec == "libx264" else {"g": "12", "bf": "2"}
    path = encode(tmp_path / "a.ts", FORTY[:count], codec, rate=25, **options)
    assert len(frame_times(path)) == len(frame_times(path, fps=25)) == count
    assert video_length(path)[0] == pytest.approx(count / 25)
    assert len(read_clip(path, count, (8, 8), 3, fps=25)) == count


def test_a_mov_may_say_that_it_begins_later_than_its_first_packet(tmp_path):
    """What an edit list cuts off is not shown."""
    path = encode(tmp_path / "a.mp4", FORTY, **FINE)
    content = bytearray(path.read_bytes())
    entry = content.index(b"elst") + 12
    duration, begin = struct.unpack_from(">Ii", content, entry)
    scale = struct.unpack_from(">I", content, content.index(b"mdhd") + 16)[0]
    struct.pack_into(">Ii", content, entry, duration // 2, begin + scale)  # From second 1 to 3.
    path.write_bytes(content)
    assert len(frame_times(path)) == 20
    assert is_close(read_clip(path, 20, SIZE, 3), FORTY[10:30])


CONTAINERS = {
    "a.avi": {"codec": "mpeg4", "qmax": "2"},
    "b.avi": FINE,
    "a.mkv": FINE,
    "a.ts": FINE,
    "fragments.mp4": {"container": {"movflags": "frag_keyframe+empty_moov"}, **FINE},
    "index in front.mp4": {"container": {"movflags": "faststart"}, **FINE},
}


@pytest.mark.parametrize("fps", [0, 5.0])
@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("kept", [0.65, 0.8])
def test_a_video_that_was_cut_off_ends_with_its_last_whole_frame(tmp_path, name, kept, fps):
    path = encode(tmp_path / name, FORTY, **CONTAINERS[name])
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    times = frame_times(path, fps=fps or None)
    assert 0 < len(times) < 52 * kept * (fps or 10) / 10
    clip = read_clip(path, len(times), SIZE, 3, fps=fps or None)
    # Where a frame is missing before the end, for it was to come later in the file, the one before is shown on.
    whole = frame_times(path)
    shown = whole[np.searchsorted(whole, times + 0.01) - 1]
    assert is_close(clip, FORTY[np.rint(10 * shown).astype(int)])
    assert np.diff(shown).max() < 0.25
    dataset = load_clips(
        ClipsConfig("folder", path=str(tmp_path), fps=fps, eval_fraction=0.0),
        frames=2,
        image_size=SIZE,
        channels=3,
        split="train",
    )
    assert len(dataset) == len(times) // 2


def test_a_programme_stream_that_was_cut_off_is_read_up_to_its_last_frame(tmp_path):
    """Its packets have no length, so that only their decoder notices."""
    path = encode(tmp_path / "a.mpg", FORTY, "mpeg2video", rate=25, qmax="2")
    path.write_bytes(path.read_bytes()[: int(0.65 * path.stat().st_size)])
    times = frame_times(path)
    assert 10 < len(times) < 30
    assert is_close(read_clip(path, len(times) - 2, SIZE, 3), FORTY[: len(times) - 2])


def damaged(path):
    """Breaks some frames in the middle of a video of 40 that has a key frame every 10."""
    encode(path, FORTY, **FINE)
    with av().open(str(path)) as container:
        broken = [
            packet
            for packet in container.demux(video=0)
            if packet.size and 1.2 <= float(packet.pts * packet.time_base) < 1.4
        ]
        places = [(packet.pos, packet.size) for packet in broken]
    content = bytearray(path.read_bytes())
    for at, size in places:
        content[at + 5 : at + size] = bytes(size - 5)
    path.write_bytes(content)


@pytest.mark.parametrize("in_memory", [True, False])
def test_videos_that_cannot_be_read_are_named_together_or_left_out(tmp_path, caplog, in_memory):
    for name in "ad":
        encode(tmp_path / f"{name}.mp4", FORTY, **FINE)
    damaged(tmp_path / "b.mp4")
    (tmp_path / "c.mp4").write_bytes(b"nothing")
    (tmp_path / "e.mp4").write_bytes(b"")
    for name in "abcde":
        (tmp_path / f"{name}.txt").write_text(f"video {name}", encoding="utf-8-sig")
    config = {"name": "folder", "path": str(tmp_path), "fps": 10, "eval_fraction": 0.0}
    shape = {"frames": 10, "image_size": SIZE, "channels": 3, "split": "train"}
    with pytest.raises(ValueError, match=r"data\.path has 2 videos .*c\.mp4.*e\.mp4.*data\.on_corrupt to 'skip'"):
        load_clips(ClipsConfig(**config), **shape)
    config |= {"on_corrupt": "skip", "in_memory_bytes": 2 << 30 if in_memory else 0}
    dataset = load_clips(ClipsConfig(**config), **shape)
    assert "c.mp4" in caplog.text
    assert "e.mp4" in caplog.text
    if in_memory:
        assert "b.mp4" in caplog.text
        # Of the damaged one, the second with the damage is left out alone.
        assert dataset.captions == ("video a",) * 4 + ("video b",) * 3 + ("video d",) * 4
        assert is_close(dataset[np.arange(len(dataset))].x[4], FORTY[:10])
        return
    assert len(dataset) == 12
    with pytest.raises(ValueError, match=r"data\.path has 1 video .*b\.mp4' is damaged at second 1\."):
        dataset[np.arange(12)]  # with captions, none may stand in for it
    for text in tmp_path.glob("*.txt"):
        text.unlink()
    dataset = load_clips(ClipsConfig(**config), **shape)
    caplog.clear()
    batch = dataset[np.array([4, 5, 6])].x
    assert is_close(batch[1], FORTY[20:30])
    np.testing.assert_array_equal(batch[1], batch[2])
    assert caplog.text.count("b.mp4") == 1
    dataset[np.array([5])]
    assert caplog.text.count("b.mp4") == 1


def test_all_videos_unreadable_are_refused_even_if_they_may_be_left_out(tmp_path):
    for name in "abcdefg":
        (tmp_path / f"{name}.mp4").write_bytes(b"nothing")
    config = ClipsConfig("folder", path=str(tmp_path), on_corrupt="skip", eval_fraction=0.0)
    with pytest.raises(ValueError, match=r"data\.path has 7 videos that cannot be read: .*e\.mp4.* and 2 more"):
        load_clips(config, frames=2, image_size=SIZE, channels=3, split="train")


def claiming(path, **changes):
    """Writes a Matroska file that claims another length."""
    encode(path, FORTY[:4], **FINE)
    content = bytearray(path.read_bytes())
    at = content.index(b"\x44\x89\x88") + 3  # The duration, a float of 8 bytes, in milliseconds.
    struct.pack_into(">d", content, at, 8 * 365.25 * 86_400e3)
    path.write_bytes(content)


def test_a_claim_of_years_is_not_believed(tmp_path):
    claiming(tmp_path / "a.mkv")
    assert video_length(tmp_path / "a.mkv")[0] == pytest.approx(0.4, abs=0.01)
    assert len(frame_times(tmp_path / "a.mkv", fps=10)) == 4


def test_frames_that_are_years_apart_are_refused(tmp_path):
    path = encode(tmp_path / "a.mkv", FORTY[:3], at=[0, 100, 250_000_000_000], **FINE)
    with pytest.raises(UnreadableVideo, match=r"a\.mkv' claims to last 2\.5e\+08 seconds"):
        frame_times(path, fps=8)
    assert len(frame_times(path)) == 3


DASH = (
    "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011' type='static' "
    "mediaPresentationDuration='PT9S'><Period><AdaptationSet mimeType='video/mp4'><Representation id='1' "
    "bandwidth='1' codecs='avc1.42c01e' width='8' height='8'><BaseURL>{url}</BaseURL><SegmentList>"
    "<SegmentURL media='{url}'/></SegmentList></Representation></AdaptationSet></Period></MPD>"
)
SESSION = (
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)


def lists_of(url):
    """Files that name others, in formats that FFmpeg would follow."""
    return {
        "list.mp4": f"ffconcat version 1.0\nfile '{url}'\n",
        "playlist.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n",
        "session.avi": SESSION,
        "dash.mkv": DASH.format(url=url),
        "title.mp4": f"[DEFAULT]\n[InternetShortcut]\nURL={url}\n",
        "script.mov": "[Script Info]\nScriptType: v4.00+\n",
        "raw.gif": "YUV4MPEG2 W8 H8 F8:1 C420\nFRAME\n" + "x" * 96,
        "nothing.mp4": "",
    }


def test_no_other_file_and_no_address_is_opened(tmp_path):
    secret = encode(tmp_path / "secret.mp4", FORTY, **FINE)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        for url in (f"http://127.0.0.1:{server.getsockname()[1]}/a.mp4", str(secret), "secret.mp4"):
            for name, text in lists_of(url).items():
                (tmp_path / name).write_text(text)
                for call in (video_length, video_size, frame_times, lambda p: read_clip(p, 1, SIZE, 3)):
                    with pytest.raises(UnreadableVideo, match=name.split(".")[0]):
                        call(tmp_path / name)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("name", ["12:30.mp4", "concat:a.mp4", "frame%03d.gif", "http:x.mp4", "-.mp4"])
def test_names_mean_nothing_to_the_decoder(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(name, FORTY[:3], fps=10)
    assert read_clip(name, 3, SIZE, 3).shape == (3, *SIZE, 3)


@pytest.mark.parametrize("cover", [False, True])
def test_sound_is_no_video_even_with_a_image_on_its_cover(tmp_path, cover):
    with av().open(tmp_path / "a.mp4", "w") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        silence = av().AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        if cover:
            stream = container.add_stream("png")
            stream.height, stream.width, stream.pix_fmt = *SIZE, "rgb24"
            stream.disposition = av().stream.Disposition.attached_pic.value
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
        if cover:
            container.mux(stream.encode(av().VideoFrame.from_ndarray(ONE[0], format="rgb24")))
            container.mux(stream.encode())
    with pytest.raises(UnreadableVideo, match=r"a\.mp4' has no frames"):
        frame_times(tmp_path / "a.mp4")


HUGE = """
import re, sys, time
from pathlib import Path
from flowgen.data.video import *
for path in sys.argv[1:]:
    for call in (video_length, video_size, frame_times, lambda p: frame_times(p, fps=1000),
                 lambda p: read_clip(p, 17, (64, 64), 3, fps=8), lambda p: read_clip(p, 2, (64, 64), 3)):
        begin = time.time()
        try:
            call(path)
        except UnreadableVideo:
            pass
        assert time.time() - begin < 20, path
        # The most memory this process has held, in kB.
        assert int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) < 1 << 20, path
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux tells it")
def test_small_files_take_little_memory_and_time(tmp_path):
    claiming(tmp_path / "years.mkv")
    encode(tmp_path / "gap.mkv", FORTY[:3], at=[0, 100, 250_000_000_000], **FINE)
    pillow().new("P", (8, 8)).save(tmp_path / "wide.gif", save_all=True, append_images=[pillow().new("P", (8, 8), 1)])
    content = bytearray((tmp_path / "wide.gif").read_bytes())
    for name, side in (("wide", 65_535), ("large", 16_000), ("fits", 5_000)):
        struct.pack_into("<HH", content, 6, side, side)
        (tmp_path / f"{name}.gif").write_bytes(content)
    content = encode(tmp_path / "header.avi", FORTY[:3], "mjpeg", "yuvj420p").read_bytes()
    at = content.index(b"strf") + 12
    (tmp_path / "header.avi").write_bytes(content[:at] + struct.pack("<ii", 60_000, 60_000) + content[at + 8 :])
    at = content.index(b"\xff\xc0") + 5
    (tmp_path / "frame.avi").write_bytes(content[:at] + b"\xff\0\xff\0" + content[at + 4 :])
    encode(tmp_path / "cut.mp4", FORTY, **FINE)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "cut.mp4").read_bytes()[:-2000])
    files = sorted(str(path) for path in tmp_path.iterdir())
    subprocess.run([sys.executable, "-c", HUGE, *files], check=True, timeout=120)


@pytest.mark.slow
def test_a_large_video_takes_memory_for_some_frames_alone(tmp_path):
    still = np.broadcast_to(np.uint8(80), (18, 4096, 8192, 3))  # 50 MB each when it is decoded
    encode(tmp_path / "still.mp4", still, preset="ultrafast", g="100")
    subprocess.run([sys.executable, "-c", HUGE, str(tmp_path / "still.mp4")], check=True, timeout=120)
