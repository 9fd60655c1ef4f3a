"""Runs in buckets: what is uploaded is a run at every moment, and one process at a time writes it."""

import dataclasses
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bucket_runs import REST, Watched, age, contents, copy, put, rows_of, saved
from commands import one_sentence
from fsspec.implementations.memory import MemoryFileSystem
from scripts import toy
from scripts.toy import TEN, arrays_of, assert_bitwise, without_speed

from flowgen.places import RemoteFolder
from flowgen.runs import CheckpointReader, RunReader, mirror, remote_lock, uploads
from flowgen.runs.metrics import MetricsLog
from flowgen.runs.mirror import Mirror
from flowgen.runs.remote_lock import RemoteLock

pytestmark = pytest.mark.usefixtures("staging")


def test_a_machine_that_dies_after_a_save_changes_nothing(whole, bucket, staging, capsys):
    url, left = f"{bucket}/run", f"{bucket}/left"

    def batches(start, stop):
        for step in range(start, stop):
            if step == 25:
                saved(url, 20)
                copy(url, left)
            yield from toy.batches(step, step + 1)

    toy.run(toy.make_job(batches=batches), url, log=TEN)
    assert_bitwise(arrays_of(url), arrays_of(whole))
    assert "lock" in RemoteFolder(left).sizes()
    with pytest.raises(BlockingIOError, match=f"in use by process .* on '{socket.gethostname()}'.* until .* UTC"):
        toy.run(toy.make_job(), left, log=TEN)
    age(RemoteFolder(left))
    capsys.readouterr()
    toy.run(toy.make_job(), left, log=TEN)
    told = capsys.readouterr().err
    assert f"Resuming {left} from step 20." in told
    assert f"Took over {left} from process " in told
    assert_bitwise(arrays_of(left), arrays_of(whole))
    assert RunReader(left).checkpoints.steps() == CheckpointReader(whole / "checkpoints").steps()
    plain = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [without_speed(row) for row in rows_of(left)] == [without_speed(row) for row in plain]
    assert "lock" not in RemoteFolder(left).sizes()
    assert not list(staging.iterdir())


def test_every_moment_of_an_upload_leaves_complete_checkpoints(watch):
    url, snapshots, found = "watched://bucket/run", [], set()
    watch(lambda what, path: snapshots.append(dict(Watched.store)))
    toy.run(toy.make_job(), url, log=dataclasses.replace(TEN, checkpoint_every=20, keep=1))
    assert len(snapshots) > 80
    for snapshot in snapshots:
        Watched.store = snapshot
        found.add(tuple(RunReader(url).checkpoints.steps()))
    assert found == {(), (20,), (20, 40), (40,)}


def test_an_interrupted_upload_is_removed_and_told(whole, bucket, capsys):
    url = f"{bucket}/run"
    folder = put(whole, url)
    folder.delete("checkpoints/40/meta.json")
    toy.run(toy.make_job(), url, log=TEN)
    told = capsys.readouterr().err
    assert f"Resuming {url} from step 30." in told
    assert f"the rest of checkpoint 40 in {url}" in told
    assert_bitwise(arrays_of(url), arrays_of(whole))


@pytest.mark.parametrize("change", ["missing", "truncated"])
def test_a_checkpoint_that_was_changed_in_the_bucket(whole, bucket, capsys, change):
    url = f"{bucket}/run"
    folder = put(whole, url)
    name = "checkpoints/40/params/_METADATA"
    if change == "missing":
        folder.delete(name)
        toy.run(toy.make_job(), url, log=TEN)
        told = capsys.readouterr().err
        assert f"{url}/checkpoints that are not checkpoints: '40' (it lacks params/_METADATA)" in told
        assert_bitwise(arrays_of(url), arrays_of(whole))
    else:
        folder.write(name, folder.read(name)[:-1])
        with pytest.raises(ValueError, match=rf"Checkpoint 40 in '{url}/checkpoints' is damaged .*resume from step 30"):
            toy.run(toy.make_job(), url, log=TEN)
        assert "lock" not in folder.sizes()


def test_a_failed_upload_is_told_and_keeps_the_local_copy(whole, watch, staging, capsys):
    def fails(what, path):
        if what == "put" and "/30/opt_state" in path:
            raise ConnectionError("the network is gone")

    watch(fails)
    with pytest.raises(OSError, match=r"Checkpoint 30 could not be saved in 'watched://.*the network is gone") as error:
        toy.run(toy.make_job(), "watched://bucket/run", log=TEN)
    one_sentence(error)
    kept = Path(capsys.readouterr().err.split("is kept in ")[1].split(" on this")[0])
    assert kept.parent == staging
    step = CheckpointReader(kept / "checkpoints").latest_step()
    assert step >= 30
    assert int(arrays_of(kept, step)["step"]) == step
    watch(lambda what, path: None)
    toy.run(toy.make_job(), "watched://bucket/run", log=TEN)
    assert_bitwise(arrays_of("watched://bucket/run"), arrays_of(whole))


def test_training_goes_on_while_a_checkpoint_and_its_evaluation_are_uploaded(whole, watch):
    url, steps, sent = "watched://bucket/run", [], []

    def slow(what, path):
        if what == "put" and path.endswith(".json"):
            deadline = time.monotonic() + 20
            while "/20/" in path and steps[-1] < 27 and time.monotonic() < deadline:
                time.sleep(0.01)
            sent.append((path.partition("checkpoints/")[2], steps[-1] >= 27))

    def batches(start, stop):
        for step in range(start, stop):
            steps.append(step)
            yield from toy.batches(step, step + 1)

    watch(slow)
    log = dataclasses.replace(TEN, eval_every=20, checkpoint_every=20)
    toy.run(toy.make_job(batches=batches, evaluate=lambda variables: {"bits_per_dim": 1.0}), url, log=log)
    assert sent == [(f"{step}/{name}.json", True) for step in (20, 40) for name in ("meta", "evaluation")]
    reader = RunReader(url).checkpoints
    assert [reader.evaluation(step) for step in reader.steps()] == [{"bits_per_dim": 1.0}] * 2
    assert_bitwise(arrays_of(url), arrays_of(whole))


def test_uploaded_checkpoints_leave_the_local_disk(watch, staging):
    sizes = {}

    def measure(what, path):
        if path.endswith("/40/meta.json"):
            for file in staging.rglob("checkpoints/*/*/_METADATA"):
                sizes.setdefault(file.parent.parent.name, set()).add(file.stat().st_size > 0)

    watch(measure)
    toy.run(toy.make_job(), "watched://bucket/run", log=TEN)
    assert sizes == {"10": {False}, "20": {False}, "30": {False}, "40": {True}}


def test_two_that_start_at_once(tmp_path):
    """Exactly one of many gets a lock that is free, and one that has expired."""
    folder = RemoteFolder(f"file://{tmp_path}/run")
    for _ in range(5):
        (holder,) = taken_at_once(folder, 6)
        holder.refresh()
        age(folder)


def taken_at_once(folder, count):
    """The locks that so many threads get which ask at once."""
    barrier = threading.Barrier(count)

    def take(number):
        barrier.wait()
        try:
            return RemoteLock(folder)
        except BlockingIOError:
            return None

    with ThreadPoolExecutor(count) as pool:
        return [lock for lock in pool.map(take, range(count)) if lock is not None]


def test_the_lock_of_a_living_process_stays_its_own(bucket):
    folder = RemoteFolder(f"{bucket}/run")
    lock = RemoteLock(folder)
    age(folder, remote_lock.EXPIRES - 5)
    with pytest.raises(BlockingIOError):
        RemoteLock(folder)
    lock.refresh()
    assert json.loads(folder.read("lock"))["time"] > time.time() - 5
    age(folder)
    other = RemoteLock(folder)
    with pytest.raises(BlockingIOError, match="no longer holds"):
        lock.refresh()
    lock.release()
    assert "lock" in folder.sizes()
    other.release()
    assert not folder.sizes()


def test_a_takeover_that_was_interrupted_expires(bucket):
    folder = RemoteFolder(f"{bucket}/run")
    RemoteLock(folder)
    age(folder)
    folder.write("lock.takeover", json.dumps({"pid": 1, "host": "b", "time": time.time(), "token": "x"}).encode())
    with pytest.raises(BlockingIOError, match="another process is taking over") as error:
        RemoteLock(folder)
    one_sentence(error)
    age(folder, name="lock.takeover")
    lock = RemoteLock(folder)
    assert list(folder.sizes()) == ["lock"]
    lock.refresh()


def test_a_lock_that_is_no_lock_is_refused(bucket, monkeypatch):
    folder = RemoteFolder(f"{bucket}/run")
    folder.write("lock", b"[]")
    with pytest.raises(BlockingIOError, match=r"cannot be read.* delete lock there\.$"):
        toy.run(toy.make_job(), folder.url, log=TEN)


def test_a_run_that_has_lost_its_lock_stops(watch, monkeypatch, staging):
    def lose(what, path):
        if what == "put" and "/20/" in path:
            MemoryFileSystem.pipe_file(
                Watched(), "/bucket/run/lock", b'{"pid": 1, "host": "b", "time": 9e9, "token": "x"}'
            )

    watch(lose)
    with pytest.raises(OSError, match="process 1 on 'b' has taken over its lock"):
        toy.run(toy.make_job(), "watched://bucket/run", log=TEN)
    assert json.loads(RemoteFolder("watched://bucket/run").read("lock"))["host"] == "b"


@pytest.mark.parametrize("at", ["/20/ema/d/", *(pytest.param(f"/20/{at}", marks=pytest.mark.slow) for at in REST)])
def test_a_process_that_was_suspended_changes_nothing_of_the_next_holder(watch, monkeypatch, at):
    """The upload of one file is suspended, after the last look at the lock, until another process has trained on."""
    monkeypatch.setattr(mirror, "AT_ONCE", 1)  # nothing else of the process runs either
    url, suspended, after = "watched://bucket/run", [], []

    def suspend(what, path):
        if what == "put" and at in path and not suspended:
            suspended.append(path)
            watch(lambda what, path: None)
            age(RemoteFolder(url))
            toy.run(toy.make_job(noise=0.2), url, log=TEN)  # other numbers, as another device gives
            after.append(contents(url))
            monkeypatch.setattr(remote_lock, "EXPIRES", 0)  # as if the last refresh were too long ago

    watch(suspend)
    with pytest.raises(OSError, match="no longer holds workdir"):
        toy.run(toy.make_job(), url, log=TEN)
    assert contents(url).items() >= after[0].items()
    assert [int(arrays_of(url, step)["step"]) for step in RunReader(url).checkpoints.steps()] == [20, 30, 40]


def test_deletions_stop_when_the_lock_is_lost(whole, bucket, monkeypatch):
    url = f"{bucket}/run"
    folder = put(whole, url)
    ours = uploads.Uploads(Mirror(url), say=lambda line: None)
    monkeypatch.setattr(remote_lock, "EXPIRES", 0.01)
    time.sleep(0.02)
    RemoteLock(folder)
    before = folder.sizes()
    ours.delete(40)
    assert folder.sizes() == before
    with pytest.raises(BlockingIOError, match="has taken over its lock"):
        ours.close()


def test_the_lock_and_the_metrics_are_refreshed_while_nothing_is_saved(watch, monkeypatch):
    monkeypatch.setattr(uploads, "BEAT", 0.05)
    url, seen = "watched://bucket/run", []

    def batches(start, stop):
        for step in range(start, stop):
            if step == 5:
                first = json.loads(RemoteFolder(url).read("lock"))["time"]
                while json.loads(RemoteFolder(url).read("lock"))["time"] == first or not rows_of(url):
                    time.sleep(0.01)
                seen.append(len(rows_of(url)))
            yield from toy.batches(step, step + 1)

    watch(lambda what, path: None)
    toy.run(toy.make_job(batches=batches), url, log=dataclasses.replace(toy.QUIET, checkpoint_every=100))
    assert seen


def test_the_lock_is_refreshed_during_a_slow_upload(watch, monkeypatch):
    monkeypatch.setattr(uploads, "BEAT", 0.05)
    url, times = "watched://bucket/run", []

    def slow(what, path):
        if what == "write" and path.endswith("metrics.jsonl") and not times:
            times.append(first := json.loads(RemoteFolder(url).read("lock"))["time"])
            deadline = time.monotonic() + 20
            while times[-1] == first and time.monotonic() < deadline:
                time.sleep(0.01)
                times.append(json.loads(RemoteFolder(url).read("lock"))["time"])

    def batches(start, stop):
        for step in range(start, stop):
            while step == 5 and not times:
                time.sleep(0.01)
            yield from toy.batches(step, step + 1)

    watch(slow)
    toy.run(toy.make_job(batches=batches), url, log=dataclasses.replace(toy.QUIET, checkpoint_every=100))
    assert times[-1] > times[0]


def test_the_lock_is_released_whatever_cannot_be_closed(bucket, monkeypatch):
    url = f"{bucket}/run"

    def fail(log):
        raise RuntimeError("cannot be closed")

    monkeypatch.setattr(MetricsLog, "close", fail)
    with pytest.raises(RuntimeError, match="cannot be closed"):
        toy.run(toy.make_job(), url, log=dataclasses.replace(TEN, checkpoint_every=40))
    assert "lock" not in RemoteFolder(url).sizes()
    assert RunReader(url).checkpoints.steps() == [40]


@pytest.mark.parametrize("mistake", [TypeError, AttributeError])
def test_mistakes_of_a_program_are_not_told_as_errors_of_the_bucket(watch, mistake):
    def fail(what, path):
        raise mistake("ours")

    watch(fail)
    folder = RemoteFolder("watched://bucket/run")
    for call in (folder.write, folder.create, lambda name, content: folder.upload_new(__file__, name)):
        with pytest.raises(mistake, match="ours"):
            call("a", b"")


def test_another_run_that_started_in_between_is_noticed(whole, bucket):
    url = f"{bucket}/run"
    folder = put(whole, url)

    def init(key):
        folder.delete("checkpoints/40/meta.json")
        return toy.init(key)

    with pytest.raises(BlockingIOError, match="another process has since trained"):
        toy.run(toy.make_job(init=init), url, log=TEN)
    assert "lock" not in folder.sizes()


def test_a_folder_with_other_files_is_refused(bucket):
    folder = RemoteFolder(f"{bucket}/photos")
    folder.write("cat.png", b"")
    with pytest.raises(FileExistsError, match="contains files but no flowgen run"):
        toy.run(toy.make_job(), folder.url, log=TEN)
    assert list(folder.sizes()) == ["cat.png"]


def test_names_that_lead_out_of_the_folder_are_left_out(watch, tmp_path):
    Watched.store["/bucket/run/checkpoints/../../x/meta.json"] = Watched.store["/bucket/run/a"] = None
    MemoryFileSystem.pipe_file(Watched(), "/bucket/run/checkpoints/../../x/meta.json", b"{}")
    MemoryFileSystem.pipe_file(Watched(), "/bucket/run/a", b"{}")
    assert list(RemoteFolder("watched://bucket/run").sizes()) == ["a"]
