"""The loop: stopped runs end bitwise like others, numbers that are not finite stop it, devices change nothing."""

import dataclasses
import json
import re
import shutil
import signal
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import one_sentence
from conftest import rows
from scripts import toy
from scripts.toy import PATIENCE, arrays_of, assert_bitwise, rows_of, start, wait_for
from tolerances import FORMULA, LAYER, assert_close

from flowgen.runs import read_config
from flowgen.training import CheckpointReader, LogConfig, make_schedule


def assert_complete_metrics(workdir, steps):
    """Every step has its row once, in order."""
    assert [row["step"] for row in rows_of(workdir)] == list(range(1, steps + 1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    result = toy.run(toy.make_job(), workdir)
    return workdir, result


# Each waits after this step to be signalled; the last checkpoint before a kill at step 13 is that of step 10.
STOPS = {"SIGINT": (signal.SIGINT, 3), "SIGTERM": (signal.SIGTERM, 10), "SIGKILL": (signal.SIGKILL, 13)}


@pytest.fixture
def stopped(name, tmp_path):
    """A run of the toy program that a signal stops: its directory, return code and report."""
    (number, step), workdir = STOPS[name], tmp_path / "run"
    process = start(workdir, "--pause-at", str(step))
    try:
        wait_for(lambda: any(row["step"] >= step for row in rows_of(workdir)), process)
        if name == "SIGKILL":
            wait_for(lambda: (workdir / "checkpoints" / "10").exists(), process)
        process.send_signal(number)
        Path(f"{workdir}.go").touch()
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    said = "Stopping after the current step and saving it; a second signal ends the program without saving."
    rest = [line for line in err.splitlines() if not line.startswith(("step ", "Compiling "))]
    assert rest == ([] if name == "SIGKILL" else [said])
    return workdir, process.returncode, json.loads(out) if out else None


@pytest.mark.parametrize("name", rows(STOPS, ("SIGTERM",)))
def test_a_stopped_and_resumed_run_ends_bitwise_like_another(stopped, whole, name, capsys):
    workdir, code, report = stopped
    number, step = STOPS[name]
    latest = CheckpointReader(workdir / "checkpoints").latest_step()
    if number == signal.SIGKILL:
        assert (code, report, latest) == (-signal.SIGKILL, None, 10)
        assert rows_of(workdir)[-1]["step"] == step
    else:
        assert code == 0
        assert report["signal"] == number
        # The step under way is finished and saved; the pause after a step holds the next batch back.
        assert report["step"] == latest == step + 1
    assert read_config(workdir) == {"toy": True}
    result = toy.run(toy.make_job(), workdir)
    assert f"Resuming {workdir} from step {latest}." in capsys.readouterr().err
    assert (result.signal, int(result.state.step)) == (0, toy.STEPS)
    a, b = arrays_of(workdir), arrays_of(whole[0])
    assert {name.split("/")[0] for name in a} == {"step", "params", "collections", "opt_state", "ema"}
    assert_bitwise(a, b)
    assert_complete_metrics(workdir, toy.STEPS)
    for row, other in zip(rows_of(workdir), rows_of(whole[0]), strict=True):
        assert toy.without_speed(row) == toy.without_speed(other)


def test_a_run_with_other_initial_variables_starts_there_once(tmp_path, capsys):
    def start(variables):
        calls.append(variables)
        return jax.tree.map(lambda x: np.asarray(2 * x), variables), ["Twice as large."]

    calls = []
    job = toy.make_job(start=start)
    optim = dataclasses.replace(toy.OPTIM, lr=1e-9, min_lr=0.0, warmup_steps=0)
    for steps in (1, 2):
        result = toy.run(job, tmp_path / "run", steps=steps, optim=optim)
    [initial] = calls  # A resumed run goes on from its checkpoint.
    expected = 2 * np.asarray(initial["params"]["first"]["kernel"])
    assert_close(result.state.params["first"]["kernel"], expected, FORMULA)
    assert_close(result.state.ema["first"]["kernel"], expected, FORMULA)
    assert (tmp_path / "run" / "start.txt").read_text() == "Twice as large.\n"
    assert capsys.readouterr().err.count("Twice as large.") == 1


@pytest.mark.parametrize("number", rows([signal.SIGINT, signal.SIGTERM], (signal.SIGTERM,)))
def test_a_signal_during_the_last_evaluation_ends_it_and_the_run_is_saved(number, whole, tmp_path, capsys):
    def told_to_stop(state):
        signal.raise_signal(number)
        return {"value": 1.0}

    before = signal.getsignal(number)
    result = toy.run(toy.make_job(evaluate=told_to_stop), tmp_path / "run")
    assert (result.signal, result.metrics) == (number, {})
    told = capsys.readouterr().err
    assert f"step {toy.STEPS}: evaluating\nStopping this evaluation; its step is saved" in told
    assert signal.getsignal(number) == before
    assert_bitwise(arrays_of(tmp_path / "run"), arrays_of(whole[0]))
    # The same command then only evaluates.
    result = toy.run(toy.make_job(evaluate=lambda state: {"value": 2.0}), tmp_path / "run")
    assert (result.signal, result.metrics) == (0, {"value": 2.0})


def test_what_was_trained_is_kept_where_the_last_drawing_fails(whole, tmp_path):
    def broken(state):
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        toy.run(toy.make_job(sample=broken), tmp_path / "run")
    assert_bitwise(arrays_of(tmp_path / "run"), arrays_of(whole[0]))


def test_noise_of_the_step_key_matters(whole, tmp_path):
    # Otherwise the bitwise tests would not notice a key that forgets its step.
    toy.run(toy.make_job(noise=0.0), tmp_path / "run")
    assert (arrays_of(tmp_path / "run")["params/first/kernel"] != arrays_of(whole[0])["params/first/kernel"]).any()


def test_result_is_what_was_saved(whole):
    workdir, result = whole
    np.testing.assert_array_equal(result.state.params["first"]["kernel"], arrays_of(workdir)["params/first/kernel"])
    assert result.metrics == {}
    assert result.samples is None
    assert CheckpointReader(workdir / "checkpoints").steps() == [30, 35, 40]
    meta = CheckpointReader(workdir / "checkpoints").meta(40)
    assert meta["config"] == {"toy": True}
    assert int(arrays_of(workdir)["step"]) == 40
    assert_complete_metrics(workdir, toy.STEPS)


def test_a_longer_run_goes_on(whole, tmp_path):
    workdir = shutil.copytree(whole[0], tmp_path / "run")
    result = toy.run(toy.make_job(), workdir, steps=toy.STEPS + 3)
    assert int(result.state.step) == toy.STEPS + 3
    assert_complete_metrics(workdir, toy.STEPS + 3)


def test_a_shorter_run_is_refused_and_changes_nothing(whole, tmp_path):
    workdir = shutil.copytree(whole[0], tmp_path / "run")
    with pytest.raises(ValueError, match=r"already has 40 steps, more than train\.steps 39; raise train\.steps\.$"):
        toy.run(toy.make_job(), workdir, steps=39, config={"other": True})
    assert read_config(workdir) == {"toy": True}
    assert_complete_metrics(workdir, toy.STEPS)


def test_a_finished_run_is_left_as_it_is(tmp_path, capsys):
    calls = []

    def evaluate(variables):
        calls.append(variables)
        return {"bits_per_dim": 1.5}

    for _ in range(2):
        result = toy.run(toy.make_job(evaluate=evaluate), tmp_path / "run", steps=4)
        assert result.metrics == {"bits_per_dim": 1.5}
        names = [(row["step"], "loss" in row) for row in rows_of(tmp_path / "run")]
        assert names == [(1, True), (2, True), (3, True), (4, True), (4, False)]
    assert len(calls) == 1
    assert "already has all of its 4 steps" in capsys.readouterr().err


def test_other_configs_are_asked_for_permission(tmp_path):
    toy.run(toy.make_job(), tmp_path / "run", steps=2, optim=dataclasses.replace(toy.OPTIM, warmup_steps=0))

    def refuse(saved):
        assert saved == {"toy": True}
        raise ValueError("not this one.")

    with pytest.raises(ValueError, match="not this one"):
        toy.run(toy.make_job(), tmp_path / "run", check_config=refuse, config={"toy": False})
    assert read_config(tmp_path / "run") == {"toy": True}


def test_a_foreign_directory_is_refused_untouched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"contains files but no flowgen run; give a new or empty"):
        toy.run(toy.make_job(), tmp_path)
    with pytest.raises(NotADirectoryError, match=r"notes.txt is a file; give a new or empty directory"):
        toy.run(toy.make_job(), tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(OSError, match="cannot be written"):
        toy.run(toy.make_job(), tmp_path / "notes.txt" / "run")


@pytest.mark.parametrize(
    ("bad", "log_every"),
    [
        ("gradient", 1),
        ("loss", 20),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in (("loss", 1), ("gradient", 20))),
    ],
)
def test_numbers_that_are_not_finite_stop_the_run_at_their_step(tmp_path, bad, log_every):
    def objective(variables, batch, key):
        loss, metrics, _ = toy.make_objective()(variables, batch, key)
        zero = 0.0 * variables["params"]["second"]["bias"][0]
        # A constant nan has no gradient; the square root at 0 is finite, its slope is not.
        poison = (lambda x: jnp.nan) if bad == "loss" else jnp.sqrt
        return loss + jax.lax.cond(batch["bad"][0], poison, lambda x: 0.0, zero), metrics

    def batches(start, stop):
        for step in range(start, stop):
            yield {**toy.batch_of(step), "bad": np.full(toy.BATCH, step == 6)}

    job = toy.make_job(objective=objective, batches=batches)
    log = dataclasses.replace(toy.QUIET, log_every=log_every, checkpoint_every=2)
    with pytest.raises(FloatingPointError) as error:
        toy.run(job, tmp_path / "run", steps=20, log=log)
    message = one_sentence(error)
    assert re.match(r"Step 7 has loss .* and gradient norm .*, so the run was stopped", message)
    assert f"{'loss' if bad == 'loss' else 'gradient norm'} nan" in message
    assert "(last good checkpoint: 6)" in message
    assert CheckpointReader(tmp_path / "run" / "checkpoints").latest_step() == 6
    assert all(np.isfinite(array).all() for array in arrays_of(tmp_path / "run").values())
    assert [row["step"] for row in rows_of(tmp_path / "run")][-1] == 6
    assert np.isfinite([row["loss"] for row in rows_of(tmp_path / "run")]).all()


def spiky(bad_steps):
    """The toy objective, whose gradient is a thousandfold at some steps, and batches that say at which."""

    def objective(variables, batch, key):
        loss, *rest = toy.make_objective()(variables, batch, key)
        factor = jnp.where(batch["bad"][0], 1e3, 1.0)
        return loss * factor, *rest

    def batches(start, stop):
        for step in range(start, stop):
            yield {**toy.batch_of(step), "bad": np.full(toy.BATCH, step in bad_steps)}

    return toy.make_job(objective=objective, batches=batches)


SKIPPING = dataclasses.replace(toy.OPTIM, skip_norm=50.0, skip_after=4, max_skips=2)


def test_spikes_are_skipped_counted_and_reported(tmp_path):
    # Step 3 is before skipping begins; steps 7, 8 and 12 leave all but the number of the step as it was.
    job = spiky({2, 6, 7, 11})
    one_by_one = dataclasses.replace(toy.QUIET, checkpoint_every=1, keep=20)
    result = toy.run(job, tmp_path / "run", steps=14, optim=SKIPPING, log=one_by_one)
    assert [row["step"] for row in rows_of(tmp_path / "run") if row["skipped"]] == [7, 8, 12]
    assert int(result.state.opt_state.skipped) == 3
    before, after = arrays_of(tmp_path / "run", 6), arrays_of(tmp_path / "run", 8)
    for name in before:
        if name.startswith(("params/", "collections/", "opt_state/inner/")):
            np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    assert not np.array_equal(
        arrays_of(tmp_path / "run", 2)["params/second/bias"], arrays_of(tmp_path / "run", 3)["params/second/bias"]
    )


def test_a_report_leaves_skipped_steps_out_of_its_means(tmp_path):
    log = dataclasses.replace(toy.QUIET, log_every=10, checkpoint_every=0)
    toy.run(spiky({6, 7}), tmp_path / "some", steps=10, optim=SKIPPING, log=log)
    (row,) = rows_of(tmp_path / "some")
    assert row["skipped"] == pytest.approx(0.2)
    assert row["loss"] < 10
    assert "skipped_in_a_row" not in row


def test_more_skips_in_a_row_than_allowed_stop_the_run(tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"Step 9 .* 3 updates in a row were skipped, more than optim.max_skips"
    ):
        toy.run(spiky(range(6, 20)), tmp_path / "run", steps=20, optim=SKIPPING)
    assert CheckpointReader(tmp_path / "run" / "checkpoints").latest_step() == 5


def test_the_learning_rate_that_is_reported_is_the_one_that_was_applied(tmp_path):
    optim = dataclasses.replace(SKIPPING, skip_after=0, warmup_steps=5, max_skips=10)
    toy.run(spiky({0, 1, 2}), tmp_path / "run", steps=8, optim=optim)
    schedule = make_schedule(optim, 8)
    taken = [row["lr"] for row in rows_of(tmp_path / "run") if not row["skipped"]]
    assert_close(taken, [schedule(count) for count in range(5)], FORMULA)


@pytest.mark.slow
def test_skipping_resumes_where_it_was(tmp_path):
    whole = toy.run(spiky({6, 7, 11}), tmp_path / "whole", steps=14, optim=SKIPPING)
    fixed = dataclasses.replace(SKIPPING, schedule="constant")
    toy.run(spiky({6, 7, 11}), tmp_path / "parts", steps=7, optim=fixed)
    parts = toy.run(spiky({6, 7, 11}), tmp_path / "parts", steps=14, optim=fixed)
    assert int(parts.state.opt_state.skipped) == int(whole.state.opt_state.skipped) == 3


def test_an_evaluation_that_is_not_finite_does_not_stop_the_run(tmp_path):
    job = toy.make_job(evaluate=lambda variables: {"bits_per_dim": float("nan"), "other": 1.0})
    result = toy.run(job, tmp_path / "run", steps=4)
    assert np.isnan(result.metrics["bits_per_dim"])
    assert CheckpointReader(tmp_path / "run" / "checkpoints").meta(4)["metrics"] == {"other": 1.0}


def test_what_is_due_happens_when_it_is_due(tmp_path):
    scores = iter([3.0, 1.0, 2.0, 4.0])
    job = toy.make_job(
        evaluate=lambda variables: {"bits_per_dim": next(scores)},
        sample=lambda variables: np.full((2, 3, 3), 7, np.uint8),
    )
    log = LogConfig(
        log_every=2, eval_every=3, sample_every=4, checkpoint_every=5, keep=1, progress=False, tensorboard=False
    )
    result = toy.run(job, tmp_path / "run", steps=11, log=log)
    assert result.metrics == {"bits_per_dim": 4.0}
    assert result.samples == tmp_path / "run" / "samples" / "0000011.png"
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows if "eval/bits_per_dim" in row] == [3, 6, 9, 11]
    # A report is due before each evaluation and each save, too.
    assert [row["step"] for row in rows if "loss" in row] == [2, 3, 4, 5, 6, 8, 9, 10, 11]
    images = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert images == ["0000004.png", "0000008.png", "0000011.png"]
    assert CheckpointReader(tmp_path / "run" / "checkpoints").steps() == [6, 11]


def test_reports_are_means_over_the_steps_between(whole, tmp_path):
    toy.run(
        toy.make_job(),
        tmp_path / "run",
        steps=toy.STEPS,
        log=dataclasses.replace(toy.QUIET, log_every=5, checkpoint_every=0),
    )
    each = {row["step"]: row for row in rows_of(whole[0])}
    for row in rows_of(tmp_path / "run"):
        steps = range(row["step"] - 4, row["step"] + 1)
        assert_close(row["loss"], np.mean([each[step]["loss"] for step in steps]), LAYER)


def test_a_run_outside_the_main_thread_leaves_signals_alone(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    results = []
    thread = threading.Thread(target=lambda: results.append(toy.run(toy.make_job(), tmp_path / "run", steps=4)))
    thread.start()
    thread.join()
    assert int(results[0].state.step) == 4
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_objective_is_traced_once_whatever_the_number_of_steps(tmp_path):
    traces = []

    def objective(variables, batch, key):
        traces.append(batch["x"].shape)
        return toy.make_objective()(variables, batch, key)

    toy.run(toy.make_job(objective=objective), tmp_path / "run", steps=12)
    assert traces == [(toy.BATCH // 4, 3)]
