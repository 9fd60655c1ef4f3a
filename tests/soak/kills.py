"""Kills training runs at random, goes on by the same command, and compares with runs that nobody killed.

python tests/soak/kills.py --kills 100 --seed 0 [--jobs 2] [--kinds flow matching clips]

Each run is a program of its own, killed by SIGKILL, SIGTERM, SIGINT or two SIGINT: half of the times at any moment,
half at one of interest, which is while a checkpoint is saved, while one is deleted, or in the last evaluation. After
every kill the directory must say the truth (exit code, checkpoints). When the run at last ends, its state must be
bitwise that of a run that was never killed, its metrics the same, and nothing left over. Prints one line a run, and
exits 1 where one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flowgen.runs import CHECKPOINTS, SPEED, CheckpointReader

ROOT = Path(__file__).parent.parent.parent
STEPS = 40
KINDS = {
    "flow": "configs/tarflow_digits.py",
    "matching": "configs/wcfm_digits.py",
    "clips": "configs/starflow_v_bouncing.py",
}
OPTIONS = {
    "train.steps": STEPS,
    "log.log_every": 1,
    "log.eval_every": 10,
    "log.sample_every": 0,
    "log.checkpoint_every": 2,
    "log.keep": 2,
    "log.tensorboard": "false",
    "optim.warmup_steps": 3,
}
ENDINGS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "SIGINT twice": signal.SIGINT}
AIMS = ("save", "deletion", "last evaluation")
PATIENCE = 300  # seconds after which a run that shows nothing is a failure
# Python's own start, before any code of flowgen runs, answers Ctrl-C with a traceback; nobody is killed there.
START = 1.0


@dataclass
class Tally:
    """What has happened so far, and how many kills are still wanted."""

    wanted: int
    kills: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def done(self) -> bool:
        with self.lock:
            return bool(self.failures) or self.kills.total() >= self.wanted

    def count(self, what: str) -> None:
        with self.lock:
            self.kills[what] += 1


def command(kind: str, workdir: Path) -> list[str]:
    options = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "train.py", "--debug", "--config", KINDS[kind], "--workdir", str(workdir), *options]


def start(kind: str, workdir: Path, errors: Path) -> subprocess.Popen:
    with errors.open("w") as file:
        return subprocess.Popen(
            command(kind, workdir),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=file,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )


def names_of(workdir: Path) -> set[str]:
    try:
        return set(os.listdir(workdir / CHECKPOINTS))
    except FileNotFoundError:
        return set()


def reached(aim: str, workdir: Path) -> bool:
    """Whether a run is at the moment that is aimed at."""
    names = names_of(workdir)
    if aim == "save":
        return any(".saving" in name for name in names)
    if aim == "deletion":
        return any(".deleted" in name for name in names)
    last = workdir / CHECKPOINTS / str(STEPS)
    return str(STEPS) in names and not (last / "evaluation.json").exists()


def wait_until(moment: float | str, skip: int, workdir: Path, process: subprocess.Popen) -> bool:
    """Returns True at the moment, of which some are skipped, or False where the run ends before."""
    begun = time.monotonic()
    was = False
    while process.poll() is None:
        now = time.monotonic() - begun
        if now > PATIENCE:
            raise TimeoutError(f"no end after {PATIENCE} s")
        if isinstance(moment, float):
            if now >= moment:
                return True
        else:
            at = reached(moment, workdir)
            if at and not was:
                if skip == 0:
                    return now > START
                skip -= 1
            was = at
        time.sleep(0.001)
    return False


def kill(process: subprocess.Popen, ending: str, pause: float) -> None:
    process.send_signal(ENDINGS[ending])
    if ending == "SIGINT twice":
        time.sleep(pause)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    process.wait(timeout=PATIENCE)


def check_end(process: subprocess.Popen, workdir: Path, errors: str, before: int) -> int:
    """Returns the latest step, after checking that exit code and words are true of the directory."""
    latest = CheckpointReader(workdir / CHECKPOINTS).latest_step() or 0
    assert "Traceback" not in errors, errors[-2000:]
    assert latest >= before, f"went back from step {before} to {latest}"
    code = process.returncode
    known = {0, -9, 128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM}
    assert code in known, f"exit code {code}: {errors[-500:]}"
    if code == 0:
        assert latest == STEPS, f"exit code 0 at step {latest}"
        assert CheckpointReader(workdir / CHECKPOINTS).evaluation(STEPS) is not None, "exit code 0 without evaluation"
    return latest


def rows_of(workdir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in SPEED} for row in rows]


def check_same(workdir: Path, reference: Path) -> None:
    a, b = (CheckpointReader(path / CHECKPOINTS) for path in (workdir, reference))
    kept, expected = a.steps(), b.steps()
    # A run that was stopped between two saves has a checkpoint of that step, which may be one of those kept.
    assert len(kept) == len(expected), f"steps {kept} instead of {expected}"
    assert kept[-1] == expected[-1], f"steps {kept} instead of {expected}"
    left = {name for name in names_of(workdir) if not name.isdecimal()}
    assert not left, f"left over: {left}"
    for step in {*kept} & {*expected}:
        one, other = a.arrays(step), b.arrays(step)
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=f"step {step}: {name}")
        assert a.evaluation(step) == b.evaluation(step)
    assert rows_of(workdir) == rows_of(reference), "other metrics"


def one_run(kind: str, index: int, seed: int, seconds: float, folder: Path, reference: Path, tally: Tally) -> str:
    """Trains one run through several kills to its end, and returns a line about it."""
    rng = random.Random(f"{seed}/{kind}/{index}")
    workdir, errors = folder / f"{kind}-{index}", folder / f"{kind}-{index}.err"
    latest, kills = 0, []
    for life in range(50):
        aimed = rng.random() < 0.5
        moment = rng.choice(AIMS) if aimed else rng.uniform(START, 1.1 * seconds)
        ending, skip, pause = rng.choice(list(ENDINGS)), rng.randrange(6), rng.uniform(0.0, 0.5)
        process = start(kind, workdir, errors)
        try:
            if life < 8 and not tally.done() and wait_until(moment, 0 if moment == AIMS[2] else skip, workdir, process):
                if aimed:
                    time.sleep(rng.uniform(0, 0.03))
                kill(process, ending, pause)
                what = f"{ending} at {moment if aimed else 'any time'}"
                kills.append(what)
                tally.count(what)
            process.wait(timeout=PATIENCE)
            latest = check_end(process, workdir, errors.read_text(), latest)
        finally:
            if process.poll() is None:
                process.kill()
        if process.returncode == 0:
            check_same(workdir, reference)
            return f"{kind} {index}: {len(kills)} kills, {life + 1} starts, bitwise the same"
    raise AssertionError("never ended")


def soak(kills: int, seed: int, jobs: int, kinds: list[str]) -> Tally:
    """Returns what happened in so many kills over runs of these kinds."""
    tally = Tally(kills)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="flowgen-soak-"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    with tempfile.TemporaryDirectory(prefix="flowgen-soak-") as name, ThreadPoolExecutor(jobs) as pool:
        folder = Path(name)

        def reference(kind: str) -> float:
            for attempt in range(2):  # The second finds everything compiled, and is timed.
                begun = time.monotonic()
                process = start(kind, folder / f"{kind}-whole-{attempt}", folder / f"{kind}.err")
                assert process.wait(timeout=2 * PATIENCE) == 0, (folder / f"{kind}.err").read_text()[-2000:]
            check_same(folder / f"{kind}-whole-0", folder / f"{kind}-whole-1")
            return time.monotonic() - begun

        seconds = dict(zip(kinds, pool.map(reference, kinds), strict=True))

        def worker(offset: int) -> None:
            index = offset
            while not tally.done():
                kind = kinds[index % len(kinds)]
                try:
                    line = one_run(kind, index, seed, seconds[kind], folder, folder / f"{kind}-whole-1", tally)
                except (AssertionError, TimeoutError, ValueError, OSError, subprocess.TimeoutExpired) as error:
                    line = f"{kind} {index}: FAILED: {error}"
                    with tally.lock:
                        tally.failures.append(line)
                sys.stdout.write(f"{line} ({tally.kills.total()}/{kills})\n")
                sys.stdout.flush()
                index += jobs

        list(pool.map(worker, range(jobs)))
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    options = parser.parse_args()
    begun = time.monotonic()
    tally = soak(options.kills, options.seed, options.jobs, options.kinds)
    for what, count in sorted(tally.kills.items()):
        sys.stdout.write(f"{count:4} {what}\n")
    ends = f"{len(tally.failures)} failed" if tally.failures else "all ended bitwise as runs that nobody killed"
    sys.stdout.write(f"{tally.kills.total()} kills in {time.monotonic() - begun:.0f} s: {ends}\n")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
