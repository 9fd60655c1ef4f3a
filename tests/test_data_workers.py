"""Files are read on all cores: threads and processes give the same samples, and what goes wrong is one sentence."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowgen.data import ClipsConfig, DataConfig, Loader, load, load_clips, prefetch, workers
from flowgen.data.video import write_video

ROOT = Path(__file__).parent.parent
SHAPE = {"image_size": (6, 8), "channels": 3, "split": "train"}


@pytest.fixture
def photos(tmp_path):
    """Twenty images of two classes, two of which cannot be decoded."""
    random = np.random.default_rng(0)
    for number in range(20):
        path = tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8)).save(path)
        if number in (3, 4):
            path.write_bytes(path.read_bytes()[:60])
    return tmp_path / "photos"


def config_of(photos, **changes):
    return DataConfig("folder", path=str(photos), **{"in_memory_bytes": 0, "on_corrupt": "skip", **changes})


def pass_over(config):
    return list(prefetch(Loader(load(config, **SHAPE), batch_size=5, seed=0, flip=True), 0, 8))


@pytest.mark.parametrize("in_memory_bytes", [0, 1 << 20])
def test_processes_give_what_threads_give(photos, in_memory_bytes, caplog):
    threads, processes = (config_of(photos, in_memory_bytes=in_memory_bytes, workers=count) for count in (0, 2))
    expected = pass_over(threads)
    told = sorted(caplog.messages)
    assert len(told) == (2 if in_memory_bytes == 0 else 1)
    assert "03.png" in "".join(told)
    assert "04.png" in "".join(told)
    caplog.clear()
    for batch, other in zip(expected, pass_over(processes), strict=True):
        np.testing.assert_array_equal(batch.x, other.x)
        np.testing.assert_array_equal(batch.context, other.context)
    assert sorted(caplog.messages) == told


def test_processes_read_videos_and_name_those_that_cannot_be_read(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
    for name in ("a.gif", "b.gif"):
        write_video(tmp_path / name, frames, fps=10)
    config = {"path": str(tmp_path), "fps": 0, "eval_fraction": 0.0, "in_memory_bytes": 0}
    threads, processes = (
        load_clips(ClipsConfig("folder", workers=count, **config), frames=3, **SHAPE) for count in (0, 2)
    )
    np.testing.assert_array_equal(threads[np.arange(6)].x, processes[np.arange(6)].x)
    (tmp_path / "b.gif").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"has 1 video that cannot be read: '.*b\.gif' "):
        load_clips(ClipsConfig("folder", workers=2, **config), frames=3, **SHAPE)


@pytest.mark.parametrize(("cores", "processes"), [(1, 0), (8, 0), (9, 9), (96, 32)])
def test_many_cores_are_those_of_processes(cores, processes, monkeypatch):
    monkeypatch.setattr(workers, "available_cores", lambda: cores)
    assert workers.workers_of("auto", "photos").processes == processes
    assert workers.workers_of("auto", "memory://photos").processes == 0
    monkeypatch.setitem(sys.modules, "loky", None)
    assert workers.workers_of("auto", "photos").processes == 0


def test_a_missing_package_is_told_when_the_data_are_opened(photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "loky", None)
    with pytest.raises(ModuleNotFoundError, match=r"data\.workers needs the package loky; install it with `pip"):
        load(config_of(photos, workers=2), **SHAPE)


# Without `if __name__ == "__main__"`, as most scripts of users are.
SCRIPT = """
import os, sys, time
import numpy as np
from flowgen.data import DataConfig, load
from flowgen.data.workers import Workers
config = DataConfig("folder", path=sys.argv[1], in_memory_bytes=0, on_corrupt="skip", workers=2)
dataset = load(config, image_size=8, channels=3, split="train")
pids = {*Workers(2).read([os.getpid] * 8)} - {os.getpid()}
print(dataset[np.arange(8)].x.shape[0], *pids, flush=True)
"""


def started(photos, script):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(photos)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_process_that_is_killed_is_one_sentence_and_is_replaced(photos):
    script = SCRIPT + (
        "os.kill(pids.pop(), 9)\ntime.sleep(2)\n"
        "try:\n    dataset[np.arange(8)]\n"
        "except RuntimeError as error:\n    print(error)\n"
        "print(dataset[np.arange(8)].x.shape[0])\n"
    )
    out, error = started(photos, script).communicate(timeout=120)
    first, sentence, last = out.splitlines()
    assert (first.split()[0], last) == ("8", "8"), error
    assert sentence.startswith("one of the 2 processes that read files was killed, possibly because memory ran out")


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, None])
def test_processes_end_with_the_program(kill, photos):
    program = started(photos, SCRIPT + ("time.sleep(100)\n" if kill else ""))
    count, *pids = map(int, program.stdout.readline().split())
    assert count == 8
    assert pids
    if kill:
        program.send_signal(kill)
    program.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_alive, pids))
