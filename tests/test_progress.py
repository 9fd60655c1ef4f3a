"""What a run shows while it trains: a line or a bar, safe names, and nothing whose failure could end it."""

import dataclasses
import errno
import shutil
import sys
import time

import pytest
from scripts import toy
from scripts.toy import TEN, arrays_of, assert_bitwise, rows_of

from flowgen.runs import CHECKPOINTS


@pytest.mark.slow  # a run of its own
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
