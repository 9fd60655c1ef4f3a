"""Two processes with two devices each train what one process with four does, and stop together."""

import json
import shutil
import signal
import socket

import jax
import pytest
from scripts import toy
from scripts.toy import PATIENCE, rows_of, wait_for
from tolerances import NETWORK, assert_close

from flowgen.training import CheckpointReader
from flowgen.training.loop import AGREE_EVERY

pytestmark = pytest.mark.slow  # Four processes start.


def free_address():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


def start_two(workdir, *options):
    group = ["--address", free_address(), "--processes", "2"]
    return [toy.start(workdir, *group, "--process", str(i), *options, devices=2) for i in range(2)]


def finish(processes):
    """The reports of both processes; neither may warn or fail."""
    reports = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, err[-4000:]
            assert "Traceback" not in err
            assert "Warning" not in err
            reports.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    return reports


def stop_two(workdir, place):
    """The reports of two processes that a signal to the second stops after step 10, which train at a place."""
    processes = start_two(place, "--pause-at", "10", "--evaluated")
    try:
        wait_for(lambda: any(row["step"] >= 10 for row in rows_of(workdir)), processes[0])
        processes[1].send_signal(signal.SIGTERM)
        workdir.with_suffix(".go").touch()
    except BaseException:
        for process in processes:
            process.kill()
        raise
    return finish(processes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run stopped and resumed: (workdir, files when it stopped, reports of the stopped and the resumed processes)."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    stopped = stop_two(workdir, workdir)
    files = {path.relative_to(workdir).as_posix() for path in workdir.rglob("*") if path.is_file()}
    return workdir, files, stopped, finish(start_two(workdir, "--evaluated"))


def test_a_signal_to_one_process_stops_both_at_the_same_step(runs):
    _, files, reports, _ = runs
    assert [report["signal"] for report in reports] == [signal.SIGTERM] * 2
    step = -(-11 // AGREE_EVERY) * AGREE_EVERY  # The next at which they ask each other.
    assert [report["step"] for report in reports] == [step] * 2
    assert f"checkpoints/{step}/meta.json" in files


def test_two_processes_train_what_one_does(runs, tmp_path):
    workdir, _, _, reports = runs
    assert [(report["step"], report["signal"]) for report in reports] == [(toy.STEPS, 0)] * 2
    assert len(jax.devices()) == 4
    toy.run(toy.make_job(), tmp_path / "run")
    two, one = (CheckpointReader(path / "checkpoints").arrays(toy.STEPS) for path in (workdir, tmp_path / "run"))
    assert two.keys() == one.keys()
    for name in two:
        assert_close(two[name], one[name], NETWORK, err_msg=name)


def test_only_the_first_process_decides_and_writes(runs):
    workdir, _, stopped, resumed = runs
    for reports in (stopped, resumed):
        # Each process's own evaluation gives its number.
        assert [report["metrics"] for report in reports] == [{"bits_per_dim": 0.0}] * 2
        assert reports[0]["written"]
        assert reports[1]["written"] == []
    assert not list(workdir.rglob("ocdbt.process_1"))
    rows = rows_of(workdir)
    for kind in ("loss", "eval/bits_per_dim"):
        steps = [row["step"] for row in rows if kind in row]
        assert steps == sorted(set(steps))
    assert {row["eval/bits_per_dim"] for row in rows if "eval/bits_per_dim" in row} == {0.0}
    names = ["checkpoints", "config.json", "history.jsonl", "lock", "metrics.jsonl", "samples"]
    assert sorted(path.name for path in workdir.iterdir()) == names


def test_two_processes_train_in_a_bucket(tmp_path):
    """Each machine fetches what it needs to resume; nothing else is shared."""
    workdir, url = tmp_path / "run", f"file://{tmp_path}/run"
    stopped = stop_two(workdir, url)
    resumed = finish(start_two(url, "--evaluated"))
    assert [report["signal"] for report in stopped] == [signal.SIGTERM] * 2
    assert [(report["step"], report["metrics"]) for report in resumed] == [(toy.STEPS, {"bits_per_dim": 0.0})] * 2
    toy.run(toy.make_job(), tmp_path / "one")
    two, one = toy.arrays_of(url), toy.arrays_of(tmp_path / "one")
    assert two.keys() == one.keys()
    for name in two:
        assert_close(two[name], one[name], NETWORK, err_msg=name)
    names = ["checkpoints", "config.json", "history.jsonl", "metrics.jsonl", "samples"]
    assert sorted(path.name for path in workdir.iterdir()) == names


@pytest.mark.parametrize("mesh", [("4", "1"), ("2", "2")])
def test_two_processes_share_the_parameters(mesh, tmp_path):
    reports = finish(start_two(tmp_path / "two", "--evaluated", "--mesh", *mesh))
    assert [report["step"] for report in reports] == [toy.STEPS] * 2
    assert reports[1]["written"] == []
    toy.run(toy.make_job(), tmp_path / "one")
    two, one = (CheckpointReader(tmp_path / name / "checkpoints").arrays(toy.STEPS) for name in ("two", "one"))
    assert two.keys() == one.keys()
    for name in two:
        assert_close(two[name], one[name], NETWORK, err_msg=name)


@pytest.mark.parametrize("mesh", [(), ("4", "1"), ("2", "2")])
def test_two_killed_processes_continue_bit_for_bit(mesh, tmp_path):
    options = ["--mesh", *mesh] if mesh else []
    processes = start_two(tmp_path / "killed", *options, "--pause-at", "23")
    try:
        wait_for(lambda: any(row["step"] >= 23 for row in rows_of(tmp_path / "killed")), processes[0])
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    steps = CheckpointReader(tmp_path / "killed" / "checkpoints").steps()
    assert steps
    assert max(steps) < toy.STEPS
    for name in ("killed", "whole"):
        finish(start_two(tmp_path / name, *options))
    toy.assert_bitwise(*(toy.arrays_of(tmp_path / name) for name in ("killed", "whole")))


@pytest.mark.parametrize("mesh", [(), ("4", "1"), ("2", "2")])
@pytest.mark.parametrize("saved", [None, (4, 1), (1, 4)])
def test_two_processes_resume_a_run_of_one(saved, mesh, whole, tmp_path):
    toy.run(toy.make_job(), tmp_path / "run", log=toy.TEN, mesh=saved)
    for step in (30, 40):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    finish(start_two(tmp_path / "run", *(["--mesh", *mesh] if mesh else [])))
    found, expected = (toy.arrays_of(path) for path in (tmp_path / "run", whole))
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], NETWORK, err_msg=name)
