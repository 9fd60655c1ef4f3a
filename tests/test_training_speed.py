"""What a run reports about its speed: samples, tokens, FLOP, the wait for data and memory; and traces for profilers."""

import dataclasses
import time

import jax
import pytest
from commands import refused
from scripts import toy
from scripts.toy import BATCH, QUIET, TEN, WIDTH, arrays_of, assert_bitwise, rows_of

from flowgen import backend
from flowgen.training import TrainConfig, train
from flowgen.training.pace import Pace, Work

# The toy network's products: both layers forward, their kernels' gradients, and the second layer's input's.
FLOP = 2.0 * BATCH * (2 * 3 * WIDTH + 3 * WIDTH)


def test_rows_tell_the_speed(tmp_path):
    job = toy.make_job(tokens=lambda batch: 5 * len(batch["x"]))
    toy.run(job, tmp_path / "run", steps=20, log=TEN)
    for row in rows_of(tmp_path / "run"):
        assert row["flop_per_step"] == FLOP
        speed = row["steps_per_second"]
        assert row["samples_per_second"] == pytest.approx(BATCH * speed)
        assert row["tokens_per_second"] == pytest.approx(5 * BATCH * speed)
        assert row["flop_per_second"] == pytest.approx(FLOP * speed)
        assert 0 <= row["data_wait"] < 1
        assert "mfu" not in row  # The peak of a CPU is not known,
        assert "peak_memory_bytes" not in row  # and it does not tell its memory.


def test_micro_batches_have_the_flop_of_the_batch(tmp_path):
    options = {"optim": toy.OPTIM, "log": QUIET, "config": {}, "check_config": lambda saved: None}
    train(toy.make_job(), tmp_path / "run", train=TrainConfig(steps=5, batch_size=BATCH, accumulation=2), **options)
    assert [row["flop_per_step"] for row in rows_of(tmp_path / "run")[1:]] == [FLOP] * 4


def test_the_products_of_an_optimizer_are_no_work_of_the_model(tmp_path):
    options = {"log": QUIET, "config": {}, "check_config": lambda saved: None}
    optim = dataclasses.replace(toy.OPTIM, name="muon")
    train(toy.make_job(), tmp_path / "run", train=TrainConfig(steps=5, batch_size=BATCH), optim=optim, **options)
    assert rows_of(tmp_path / "run")[-1]["flop_per_step"] == FLOP


def test_the_wait_for_data_is_told(tmp_path):
    def slow(start, stop):
        for batch in toy.batches(start, stop):
            time.sleep(0.05)
            yield batch

    toy.run(toy.make_job(batches=slow), tmp_path / "run", steps=6, log=TEN)
    assert rows_of(tmp_path / "run")[-1]["data_wait"] > 0.5


def test_known_devices_have_a_share_of_their_peak(tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "seconds_at_peak", lambda flop, kind: 1e-6 * (flop == {"float32": FLOP / 4}))
    monkeypatch.setattr(backend, "peak_memory", lambda devices: 3_000_000_000)
    toy.run(toy.make_job(), tmp_path / "run", steps=10, log=TEN)
    (row,) = rows_of(tmp_path / "run")
    assert row["mfu"] == pytest.approx(1e-6 * row["steps_per_second"])
    assert row["peak_memory_bytes"] == 3e9


def test_a_share_of_the_peak_needs_every_step():
    pace = Pace()
    pace.begin(1)
    pace.add(Work(8, flop=1.0, seconds_at_peak=1.0))
    pace.add(Work(8, flop=1.0))
    assert "mfu" not in pace.measure(3)


def test_lines_show_the_speed(tmp_path, capsys):
    job = toy.make_job(tokens=lambda batch: 5 * len(batch["x"]))
    toy.run(job, tmp_path / "run", steps=10, log=TEN)
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("step 10/10"))
    for word in ("steps/s", " samples/s", "tokens/s", "FLOP/s", " waiting for data", " left"):
        assert word in line


@pytest.mark.slow  # two runs
def test_a_profile_is_written_and_changes_nothing(tmp_path, capsys):
    toy.run(toy.make_job(), tmp_path / "plain", steps=6)
    toy.run(toy.make_job(profile=2), tmp_path / "run", steps=6)
    told = capsys.readouterr().err
    folder = tmp_path / "run" / "profile"
    assert f"Traced 2 steps into {folder}" in told
    assert list(folder.rglob("*.xplane.pb"))
    assert_bitwise(arrays_of(tmp_path / "plain"), arrays_of(tmp_path / "run"))
    # A run that ends earlier traces fewer steps.
    toy.run(toy.make_job(profile=9), tmp_path / "run", steps=8)
    assert f"Traced 1 steps into {folder}" in capsys.readouterr().err


def test_no_profile_without_steps():
    for steps in ("0", "-1", "few"):
        assert "--profile" in refused("train --config tarflow_digits --workdir new --profile", steps)


def test_a_step_is_still_traced_once(tmp_path):
    traces = []

    def objective(variables, batch, key):
        traces.append(jax.tree.map(lambda x: x.shape, batch["x"]))
        return toy.make_objective()(variables, batch, key)

    toy.run(toy.make_job(objective=objective), tmp_path / "run", steps=4, log=dataclasses.replace(QUIET, log_every=2))
    assert len(traces) == 1
