"""A run directory neither blocks nor lies: whatever happens to it while a run trains is noticed and said."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import one_sentence
from conftest import rows
from scripts import toy
from scripts.toy import PATIENCE, TEN, arrays_of, assert_bitwise, rows_of, start

from flowgen.runs import CHECKPOINTS, CheckpointReader, RunLock, check_workdir, read_config


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
    assert "'150' (it is empty)" in told
    assert "'40' (it has no meta.json)" in told
    assert_bitwise(arrays_of(workdir), arrays_of(whole))


def test_a_damaged_checkpoint_is_refused_and_not_passed_over(whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    path = workdir / CHECKPOINTS / "40" / "params" / "_METADATA"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"Checkpoint 40 .* damaged .*; remove that folder to resume from step 30"):
        toy.run(toy.make_job(), workdir, log=TEN)


def test_a_run_without_a_whole_checkpoint_is_refused(whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    for folder in (workdir / CHECKPOINTS).iterdir():
        shutil.rmtree(folder / "params")
    before = sorted(workdir.rglob("*"))
    with pytest.raises(ValueError, match=r"No checkpoint in .* is complete .40: it lacks params/") as error:
        toy.run(toy.make_job(), workdir, log=TEN)
    one_sentence(error)
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


@pytest.mark.parametrize("loss", rows(LOSSES, ("renamed", "metrics", "lock", "deleted", "config")))
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
    one_sentence(error)
    assert [path.name for path in workdir.iterdir()] == ["letter.txt"]


def test_what_was_trained_is_saved_when_the_data_fail(whole, tmp_path):
    def fail():
        raise RuntimeError("odd.")

    workdir = tmp_path / "run"
    with pytest.raises(RuntimeError, match="odd"):
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


@pytest.mark.parametrize("step", rows([20, 40], (40,)))
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


# What no longer fits: a checkpoint, or the metrics, of which a row for each step is longer.
@pytest.mark.slow  # beside the sentences of tests/test_runs_checkpoints.py
@pytest.mark.parametrize(("log_every", "failed"), [("5", "could not be saved"), ("1", "cannot be")])
def test_a_disk_that_takes_no_more_is_told_in_one_sentence(log_every, failed, whole, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, "--limit-at", "12", "--log-every", log_every)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (1, "")
    said = [line for line in err.splitlines() if not line.startswith(("step ", "Compiling "))]
    assert said == [line for line in said if line.startswith(("toy: ", "Step "))], err
    assert failed in said[-1]
    assert "File too large" in said[-1]
    reader = CheckpointReader(workdir / CHECKPOINTS)
    assert reader.steps() == [5, 10]
    toy.run(toy.make_job(), workdir, log=TEN)
    assert sorted(path.name for path in (workdir / CHECKPOINTS).iterdir()) == ["20", "30", "40"]
    assert_bitwise(arrays_of(workdir), arrays_of(whole))


LIKE_THEM = ("[]", "null", '{"step": null}', '{"a": ' * 9999, "\udcff")


@pytest.mark.parametrize(
    "row",
    [
        *("5", '{"step": "x"}', "[" * 100_000, '{"loss"'),
        *rows(LIKE_THEM, LIKE_THEM),
    ],
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
        with pytest.raises(ValueError, match=r"config\.json .* delete it and run the training command again"):
            read(workdir)
    with pytest.raises(ValueError, match="delete it"):
        toy.run(toy.make_job(), workdir, log=TEN)
    config.rename(tmp_path / "elsewhere")
    toy.run(toy.make_job(), workdir, log=TEN)
    assert config.read_bytes() == (whole / "config.json").read_bytes()


@pytest.mark.parametrize("kind", rows(ODD_FILES, ("empty", "folder", "pipe")))
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


@pytest.mark.parametrize("name", ["samples", "checkpoints", "lock", "data.json", "plan.json", "metrics.jsonl"])
def test_entries_of_the_wrong_kind_are_refused_by_name_before_training(whole, tmp_path, name):
    workdir = shutil.copytree(whole, tmp_path / "run")
    path = workdir / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.write_text("") if name in ("samples", "checkpoints") else path.mkdir()
    untrained = toy.make_job(batches=lambda start, stop: iter(()))
    with pytest.raises((OSError, ValueError), match=rf"{name} is not a (folder|regular file); remove it"):
        toy.run(untrained, workdir, log=TEN, steps=41)


def test_batches_that_end_early_are_refused_and_what_was_trained_is_saved(tmp_path):
    job = toy.make_job(batches=lambda start, stop: toy.batches(start, 5))
    with pytest.raises(ValueError, match=r"the batches end after step 5, but train\.steps"):
        toy.run(job, tmp_path / "run", log=TEN)
    assert CheckpointReader(tmp_path / "run" / "checkpoints").latest_step() == 5


def test_a_batch_of_other_rows_than_the_config_says_is_refused(tmp_path):
    half = {"x": np.zeros((toy.BATCH // 2, 3), np.float32), "y": np.zeros((toy.BATCH // 2, 1), np.float32)}
    with pytest.raises(ValueError, match=rf"{toy.BATCH // 2} .*{toy.BATCH}|{toy.BATCH}.* {toy.BATCH // 2}"):
        toy.run(toy.make_job(batches=lambda start, stop: iter([half])), tmp_path / "run", log=TEN)
