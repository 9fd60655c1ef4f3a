"""Signals end a run soon, with what was trained saved; what other processes and callbacks do harms nothing."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scripts import toy
from scripts.toy import PATIENCE, TEN, arrays_of, assert_bitwise, start, wait_for

from flowgen.runs import CHECKPOINTS, CheckpointReader
from flowgen.training import Interrupted, Signals

# Where a signal may come: nothing trained yet, compiling, evaluating, drawing.
PLACES = ("init", "objective", "evaluate", "sample")
SHOWN = (("objective", signal.SIGTERM),)


@pytest.mark.parametrize(
    ("place", "number"),
    [
        pytest.param(*row, id=f"{row[0]}-{row[1].name}", marks=[] if row in SHOWN else [pytest.mark.slow])
        for row in itertools.product(PLACES, (signal.SIGINT, signal.SIGTERM))
    ],
)
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


@pytest.mark.slow  # processes start
def test_signals_to_processes_that_load_data_are_not_ours():
    command = [sys.executable, "-W", "ignore", "-c", FORKING]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=toy.ROOT, timeout=PATIENCE, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


class Callback:
    """A signal comes while Python calls its `__del__`, in which exceptions are lost."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)


def test_a_signal_whose_exception_a_callback_loses_interrupts_once_it_has_ended(capfd):
    answers = []
    with Signals(on_second=answers.append) as signals:
        with pytest.raises(Interrupted), signals.raising():
            [Callback(), time.sleep(0)].clear(), time.sleep(1)
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
