"""A run directory neither blocks nor lies: whatever happens to it while a run trains is noticed and said."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scripts import toy
from scripts.toy import PATIENCE, rows_of, start, wait_for

from flowgen.runs import CheckpointReader, RunLock, check_workdir, read_config
from flowgen.training import Interrupted, Signals

TEN = dataclasses.replace(toy.QUIET, checkpoint_every=10, log_every=10)
CHECKPOINTS = "checkpoints"


def arrays_of(workdir, step=toy.STEPS):
    return CheckpointReader(workdir / CHECKPOINTS).arrays(step)


def assert_bitwise(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The arrays of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    toy.run(toy.make_job(), workdir, log=TEN)
    return workdir


def with_event(step, event):
    """A toy job whose batches do something before they give that of a step."""

    def batches(start, stop):
        for at in range(start, stop):
            if at == step:
                event()
            yield from toy.batches(at, at + 1)

    return toy.make_job(batches=batches)


def test_a_half_deleted_checkpoint_is_told_and_passed_over(whole, tmp_path, capsys):
    workdir = shutil.copytree(whole, tmp_path / "run")
    (workdir / CHECKPOINTS / "40" / "meta.json").unlink()
    (workdir / CHECKPOINTS / "150").mkdir()
    toy.run(toy.make_job(), workdir, log=TEN)
    told = capsys.readouterr().err
    assert f"Resuming {workdir} from step 30." in told
    assert "'150': it is empty" in told
    assert "'40': it has no meta.json" in told
    assert_bitwise(arrays_of(workdir), arrays_of(whole))


def test_a_damaged_checkpoint_is_refused_and_not_passed_over(whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    path = workdir / CHECKPOINTS / "40" / "params" / "_METADATA"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"Checkpoint 40 .* damaged .*; remove that folder to resume from step 30"):
        toy.run(toy.make_job(), workdir, log=TEN)


def test_a_copied_checkpoint_is_refused(whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(workdir / CHECKPOINTS / "30", workdir / CHECKPOINTS / "50")
    with pytest.raises(ValueError, match=r"Checkpoint 50 .* holds step 30"):
        toy.run(toy.make_job(), workdir, log=TEN, steps=60)


def test_a_run_without_a_whole_checkpoint_is_refused(whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    for folder in (workdir / CHECKPOINTS).iterdir():
        shutil.rmtree(folder / "params")
    before = sorted(workdir.rglob("*"))
    with pytest.raises(ValueError, match=r"No checkpoint in .* is complete .40: it lacks params/") as error:
        toy.run(toy.make_job(), workdir, log=TEN)
    assert "\n" not in str(error.value)
    assert sorted(workdir.rglob("*")) == before


@pytest.mark.parametrize("lost", ["all", "none yet"])
def test_a_run_that_has_lost_its_checkpoints_says_so(whole, tmp_path, capsys, lost):
    workdir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(workdir / CHECKPOINTS)
    if lost == "none yet":
        (workdir / CHECKPOINTS).mkdir()
    toy.run(toy.make_job(), workdir, log=TEN, steps=3, optim=dataclasses.replace(toy.OPTIM, warmup_steps=0))
    told = capsys.readouterr().err
    assert "starts over at step 0" in told
    assert "metrics reach step 40" in told
    assert ("has lost its folder" in told) == (lost == "all")


def test_a_second_training_is_refused_by_name_and_reading_is_not(whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    lock = RunLock(workdir)
    before = sorted(workdir.rglob("*"))
    for attempt in (
        lambda: toy.run(toy.make_job(), workdir, log=TEN, steps=60),
        lambda: check_workdir(workdir, lambda config: None),
        lambda: RunLock(workdir),
    ):
        with pytest.raises(BlockingIOError) as error:
            attempt()
        for word in (str(workdir), str(os.getpid()), socket.gethostname()):
            assert word in str(error.value)
    assert sorted(workdir.rglob("*")) == before
    assert read_config(workdir) == {"toy": True}
    assert arrays_of(workdir)
    lock.release()
    assert int(toy.run(toy.make_job(), workdir, log=TEN, steps=41).state.step) == 41


def test_the_lock_goes_with_its_process(tmp_path):
    code = (
        "import os, sys, time; from flowgen.runs import RunLock\n"
        "lock = RunLock(sys.argv[1]); child = os.fork()\n"
        "if not child: print(1, flush=True)\n"  # The child lives longer; it has let go of the lock by now.
        "time.sleep(99 if child else 5)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=toy.ROOT)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"1\n"
    with pytest.raises(BlockingIOError, match=f"process {holder.pid} "):
        RunLock(tmp_path)
    holder.kill()
    holder.wait()
    RunLock(tmp_path).release()
    holder.stdout.close()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("elsewhere")], ids=["pipe", "link"])
def test_a_lock_that_is_no_file_is_refused(tmp_path, make):
    make(tmp_path / "lock")
    with pytest.raises(OSError, match=r"lock|cannot be written"):
        toy.run(toy.make_job(), tmp_path, log=TEN)


def saved(workdir, step):
    """Waits for the checkpoint of a step, whose save could make a directory again that was taken away."""
    while not (workdir / CHECKPOINTS / str(step)).exists():
        time.sleep(0.01)


def delete(path):
    """Removes a folder, into which a save may be writing."""
    path.rename(path.with_name("moved"))
    shutil.rmtree(path.with_name("moved"), ignore_errors=True)


# What may be taken away from a run, and what is then made again.
LOSSES = {
    "deleted": lambda run: delete(run),
    "renamed": lambda run: run.rename(run.with_name("moved")),
    "checkpoints": lambda run: delete(run / CHECKPOINTS),
    "config": lambda run: (run / "config.json").unlink(),
    "metrics": lambda run: (run / "metrics.jsonl").unlink(),
    "lock": lambda run: (run / "lock").unlink(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_taken_away_while_training_is_made_again_and_told(whole, tmp_path, capsys, loss):
    workdir = tmp_path / "run"

    def lose():
        saved(workdir, 20)
        LOSSES[loss](workdir)

    toy.run(with_event(25, lose), workdir, log=dataclasses.replace(TEN, log_every=1))
    told = capsys.readouterr().err
    assert ("deleted or renamed" in told) == (loss in ("deleted", "renamed", "checkpoints"))
    assert read_config(workdir) == {"toy": True}
    assert [row["step"] for row in rows_of(workdir)] == list(range(1, toy.STEPS + 1))
    kept = [10, 20, 30, 40][-3:] if loss in ("config", "metrics", "lock") else [30, 40]
    assert CheckpointReader(workdir / CHECKPOINTS).steps() == kept
    assert_bitwise(arrays_of(workdir), arrays_of(whole))
    # The same command finds the run whole.
    assert int(toy.run(toy.make_job(), workdir, log=TEN).state.step) == toy.STEPS


def test_a_directory_deleted_in_the_last_evaluation_holds_the_result(whole, tmp_path, capsys):
    workdir = tmp_path / "run"

    def evaluate(variables):
        shutil.rmtree(workdir)
        return {"bits_per_dim": 2.0}

    toy.run(toy.make_job(evaluate=evaluate), workdir, log=TEN)
    assert "deleted or renamed" in capsys.readouterr().err
    assert_bitwise(arrays_of(workdir), arrays_of(whole))
    assert CheckpointReader(workdir / CHECKPOINTS).evaluation(toy.STEPS) == {"bits_per_dim": 2.0}


def test_a_directory_that_was_replaced_is_not_written_into(tmp_path):
    workdir = tmp_path / "run"

    def replace():
        saved(workdir, 20)
        workdir.rename(tmp_path / "moved")
        workdir.mkdir()
        (workdir / "letter.txt").write_text("mine")

    with pytest.raises(FileExistsError, match="was replaced during training") as error:
        toy.run(with_event(25, replace), workdir, log=TEN)
    assert "\n" not in str(error.value)
    assert [path.name for path in workdir.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("error", [ValueError("clip 'a.mp4' is damaged."), OSError("gone."), RuntimeError("odd.")])
def test_what_was_trained_is_saved_when_the_data_fail(whole, tmp_path, error):
    def fail():
        raise error

    workdir = tmp_path / "run"
    with pytest.raises(type(error), match=str(error)):
        toy.run(with_event(25, fail), workdir, log=TEN)
    assert CheckpointReader(workdir / CHECKPOINTS).latest_step() == 25
    toy.run(toy.make_job(), workdir, log=TEN)
    assert_bitwise(arrays_of(workdir), arrays_of(whole))


def test_the_last_checkpoint_is_saved_before_the_last_evaluation(whole, tmp_path):
    workdir = tmp_path / "run"
    seen = []

    def evaluate(variables):
        seen.append(CheckpointReader(workdir / CHECKPOINTS).steps())
        return {"bits_per_dim": 3.0 - len(seen)}

    log = dataclasses.replace(TEN, keep=1, eval_every=20, checkpoint_every=0)
    toy.run(toy.make_job(evaluate=evaluate), workdir, log=log)
    assert seen[-1] == [20, 40]  # 20 is the best so far, and 40 may become it.
    reader = CheckpointReader(workdir / CHECKPOINTS)
    assert reader.steps() == [40]
    assert reader.meta(40)["metrics"] == {"bits_per_dim": 1.0}
    assert_bitwise(arrays_of(workdir), arrays_of(whole))


@pytest.mark.parametrize("step", [20, 40])
def test_an_evaluation_that_was_cut_off_is_made_up_for(whole, tmp_path, capsys, step):
    workdir = tmp_path / "run"

    evaluations = iter([20, 40])

    def broken(variables):
        if next(evaluations) == step:
            # As if the process had been killed between the row and the file.
            with (workdir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "eval/bits_per_dim": 1.0}) + "\n")
            raise RuntimeError("killed here")
        return {"bits_per_dim": 1.0}

    log = dataclasses.replace(TEN, eval_every=20, keep=5)
    with pytest.raises(RuntimeError, match="killed here"):
        toy.run(toy.make_job(evaluate=broken), workdir, log=log)
    assert CheckpointReader(workdir / CHECKPOINTS).latest_step() == step
    toy.run(toy.make_job(evaluate=lambda variables: {"bits_per_dim": 1.0}), workdir, log=log)
    reader = CheckpointReader(workdir / CHECKPOINTS)
    assert [reader.evaluation(at) for at in (20, 40)] == [{"bits_per_dim": 1.0}] * 2
    assert [row["step"] for row in rows_of(workdir) if "eval/bits_per_dim" in row] == [20, 40]
    assert_bitwise(arrays_of(workdir), arrays_of(whole))


def test_a_disk_that_takes_no_more_is_told_in_one_sentence(whole, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, "--limit-at", "12")
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (1, "")
    said = [line for line in err.splitlines() if not line.startswith(("step ", "Compiling "))]
    assert said == [line for line in said if line.startswith(("toy: ", "Step "))], err
    assert "could not be saved" in said[-1]
    assert "File too large" in said[-1]
    reader = CheckpointReader(workdir / CHECKPOINTS)
    assert reader.steps() == [5, 10]
    toy.run(toy.make_job(), workdir, log=TEN)
    assert sorted(path.name for path in (workdir / CHECKPOINTS).iterdir()) == ["20", "30", "40"]
    assert_bitwise(arrays_of(workdir), arrays_of(whole))


@pytest.mark.parametrize(
    "row", ["5", "[]", "null", '{"step": "x"}', '{"step": null}', "[" * 100_000, '{"a": ' * 9999, "\udcff", '{"loss"']
)
def test_rows_of_metrics_that_are_none_are_dropped(whole, tmp_path, row):
    workdir = shutil.copytree(whole, tmp_path / "run")
    with (workdir / "metrics.jsonl").open("ab") as file:
        file.write(row.encode(errors="surrogateescape") + b"\n")
    toy.run(toy.make_job(), workdir, log=TEN, steps=41)
    assert [row["step"] for row in rows_of(workdir)] == [10, 20, 30, 40, 41]


def test_metrics_that_are_a_pipe_are_refused_without_waiting(whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    (workdir / "metrics.jsonl").unlink()
    os.mkfifo(workdir / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics\.jsonl.* not a regular file"):
        toy.run(toy.make_job(), workdir, log=TEN, steps=41)


# Where a signal may come: nothing trained yet, compiling, evaluating, drawing.
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("place", ["init", "objective", "evaluate", "sample"])
def test_a_signal_is_answered_at_once_and_nothing_is_lost(whole, tmp_path, place, number):
    workdir = tmp_path / "run"
    process = start(workdir, "--evaluated", "--slow", place)
    try:
        wait_for(Path(f"{workdir}.slow").exists, process)
        process.send_signal(number)
        asked = time.monotonic()
        assert process.stderr is not None
        line = next(line for line in process.stderr if line.startswith("Stopping"))
        assert time.monotonic() - asked < 5
        assert "a second signal ends the program without saving" in line
        if place == "objective":  # What compiles cannot be left; the step is taken and saved.
            Path(f"{workdir}.go").touch()
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert "Traceback" not in err
    if place == "init":
        assert process.returncode == 128 + number
        assert not (workdir / "config.json").exists()
    else:
        report = json.loads(out)
        assert report["signal"] == number
        # The first evaluation and the first image are of step 4.
        step = 1 if place == "objective" else 4
        assert report["step"] == step == CheckpointReader(workdir / CHECKPOINTS).latest_step()
    toy.run(toy.make_job(), workdir, log=TEN)
    assert_bitwise(arrays_of(workdir), arrays_of(whole))


def test_a_second_signal_ends_what_the_first_did_not():
    answers = []

    def signalled():
        with Signals(on_second=answers.append) as signals:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # Together: one wish.
            time.sleep(0.4)
            assert signals.number == signal.SIGINT
            assert answers == []
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        signalled()
    assert answers == [signal.SIGINT]


FORKING = """
import os, signal, time
from flowgen.training import Interrupted, Signals
with Signals(on_second=lambda number: os._exit(9)) as signals:
    for _ in range(2):
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.3)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    time.sleep(0.3)
    assert signals.number == 0
"""


def test_signals_to_processes_that_load_data_are_not_ours():
    command = [sys.executable, "-W", "ignore", "-c", FORKING]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=toy.ROOT, timeout=PATIENCE, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_progress_without_a_terminal_is_a_line_for_each_report(tmp_path, capsys):
    def compiling(variables, batch, key):
        time.sleep(1.0)  # Once, when it is traced.
        return toy.make_objective()(variables, batch, key)

    log = dataclasses.replace(toy.QUIET, log_every=5, checkpoint_every=4, progress=True)
    toy.run(toy.make_job(objective=compiling), tmp_path / "run", steps=20, log=log)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 5/20", "step 10/20", "step 15/20", "step 20/20"]
    for line in lines:
        for word in ("loss ", "lr ", "steps/s", " left"):
            assert word in line
    first = rows_of(tmp_path / "run")[0]
    assert first["steps_per_second"] > 5, "compilation counts as no step"
    assert " 0:00 left" in lines[-1]
    assert int(lines[0].rsplit(" ", 2)[-2].split(":")[-1]) <= 2


def test_the_bar_of_a_terminal_shows_what_is_trained(tmp_path, monkeypatch):
    class Terminal:
        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text

        def flush(self): ...

        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    def objective(variables, batch, key):
        loss, metrics, state = toy.make_objective()(variables, batch, key)
        return loss, {**metrics, "nats_per_dim": loss, "bits_per_dim": loss}, state

    log = dataclasses.replace(toy.QUIET, log_every=5, progress=True)
    toy.run(toy.make_job(objective=objective), tmp_path / "run", steps=20, log=log)
    last = terminal.text.rstrip("\n").rsplit("\r", 1)[-1]
    for word in ("20/20", "loss ", "bits_per_dim ", "nats_per_dim ", "lr ", "steps/s", "left"):
        assert word in last


def test_a_result_is_shown_in_a_line(tmp_path):
    result = toy.run(toy.make_job(), tmp_path / "run", steps=4)
    assert len(repr(result)) < 300
    assert "step 4" in repr(result)


def test_a_lost_config_is_written_again(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    toy.run(toy.make_job(), tmp_path / "run", log=TEN)
    assert (tmp_path / "run" / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    assert "lost its config.json" in capsys.readouterr().err


ODD_FILES = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(b'{"step": 4'),
    "folder": lambda path: (path / "notes").mkdir(parents=True),
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize("kind", ODD_FILES)
def test_a_damaged_config_is_refused_and_written_again_once_it_is_deleted(whole, tmp_path, kind):
    workdir = shutil.copytree(whole, tmp_path / "run")
    config = workdir / "config.json"
    config.unlink()
    ODD_FILES[kind](config)
    for read in (read_config, lambda path: check_workdir(path, lambda saved: None)):
        with pytest.raises(ValueError, match=r"config\.json .* delete it, and the command that trained .* writes it"):
            read(workdir)
    with pytest.raises(ValueError, match="delete it"):
        toy.run(toy.make_job(), workdir, log=TEN)
    config.rename(tmp_path / "elsewhere")
    toy.run(toy.make_job(), workdir, log=TEN)
    assert config.read_bytes() == (whole / "config.json").read_bytes()


@pytest.mark.parametrize("kind", ODD_FILES)
def test_a_damaged_evaluation_counts_as_none_and_is_made_again(whole, tmp_path, capsys, kind):
    workdir = tmp_path / "run"
    job = toy.make_job(evaluate=lambda variables: {"bits_per_dim": 1.0})
    log = dataclasses.replace(TEN, eval_every=20, keep=5)
    toy.run(job, workdir, log=log)
    for step in (20, 40):
        path = workdir / CHECKPOINTS / str(step) / "evaluation.json"
        path.unlink()
        ODD_FILES[kind](path)
    toy.run(job, workdir, log=log)
    told = capsys.readouterr().err
    assert all(f"step {step} counts as not evaluated" in told for step in (20, 40))
    reader = CheckpointReader(workdir / CHECKPOINTS)
    assert [reader.evaluation(at) for at in (20, 40)] == [None, {"bits_per_dim": 1.0}]
    assert_bitwise(arrays_of(workdir), arrays_of(whole))
    toy.run(job, workdir, log=log, steps=41)
    assert "counts as" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["samples", "checkpoints", "lock", "data.json", "metrics.jsonl"])
def test_entries_of_the_wrong_kind_are_refused_by_name_before_training(whole, tmp_path, name):
    workdir = shutil.copytree(whole, tmp_path / "run")
    path = workdir / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.write_text("") if name in ("samples", "checkpoints") else path.mkdir()
    untrained = toy.make_job(batches=lambda start, stop: iter(()))
    with pytest.raises((OSError, ValueError), match=rf"{name} is not a (folder|regular file); remove it"):
        toy.run(untrained, workdir, log=TEN, steps=41)


def test_lines_show_names_without_what_controls_a_terminal(whole, tmp_path, capsys):
    workdir = shutil.copytree(whole, tmp_path / "run\x1b[31m")
    (workdir / CHECKPOINTS / "\x1b[2J").mkdir()
    toy.run(toy.make_job(), workdir, log=TEN, steps=41)
    told = capsys.readouterr().err
    assert "\x1b" not in told
    assert "Resuming" in told
    assert "run\\x1b[31m" in told


class Full:
    """A standard error that takes nothing."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    def isatty(self):
        return False


@pytest.mark.parametrize("stream", [None, Full()], ids=["closed", "full"])
def test_messages_that_cannot_be_shown_end_no_training(whole, tmp_path, monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    toy.run(toy.make_job(), tmp_path / "run", log=TEN)
    assert_bitwise(arrays_of(tmp_path / "run"), arrays_of(whole))


def test_batches_that_end_early_are_refused_and_what_was_trained_is_saved(tmp_path):
    job = toy.make_job(batches=lambda start, stop: toy.batches(start, 5))
    with pytest.raises(ValueError, match=r"the batches end after step 5, but train\.steps"):
        toy.run(job, tmp_path / "run", log=TEN)
    assert CheckpointReader(tmp_path / "run" / "checkpoints").latest_step() == 5


class Callback:
    """A signal comes while Python calls its `__del__`, in which exceptions are lost."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)


def test_a_signal_whose_exception_a_callback_loses_interrupts_once_it_has_ended(capfd):
    answers = []
    with Signals(on_second=answers.append) as signals:
        with pytest.raises(Interrupted), signals.raising():
            [Callback(), time.sleep(0)].clear(), time.sleep(10)
        assert signals.number == signal.SIGINT
        time.sleep(0.3)
    assert not answers
    told = capfd.readouterr().err
    assert "ignored" not in told
    assert told.count("a second signal ends") == 1


def test_a_signal_whose_exception_is_lost_stops_all_the_same():
    def lose():
        with signals.raising(), contextlib.suppress(Interrupted):  # as a callback of another package loses it
            signal.raise_signal(signal.SIGINT)
            time.sleep(1)

    with Signals() as signals, pytest.raises(Interrupted):
        lose()


def test_a_closed_terminal_ends_a_run_as_other_signals_do():
    with Signals() as signals:
        signal.raise_signal(signal.SIGHUP)
        assert signals.number == signal.SIGHUP


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.number == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_batch_of_other_rows_than_the_config_says_is_refused(tmp_path):
    half = {"x": np.zeros((toy.BATCH // 2, 3), np.float32), "y": np.zeros((toy.BATCH // 2, 1), np.float32)}
    with pytest.raises(ValueError, match=rf"{toy.BATCH // 2} .*{toy.BATCH}|{toy.BATCH}.* {toy.BATCH // 2}"):
        toy.run(toy.make_job(batches=lambda start, stop: iter([half])), tmp_path / "run", log=TEN)
