"""A job small enough to train in a blink, and a program that trains it: python toy.py WORKDIR [--option value ...]

A two-layer regression with everything a resumed run must remember: step keys, carried state, moments, average.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flowgen.backend import shards
from flowgen.rows import batch_rows
from flowgen.runs import SPEED, RunReader
from flowgen.training import Interrupted, Job, LogConfig, OptimConfig, Result, TrainConfig, train

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 120  # seconds a program may take to show progress on a loaded machine
WIDTH, BATCH, STEPS = 8, 16, 40
OPTIM = OptimConfig(lr=0.05, min_lr=0.01, warmup_steps=3, ema_decay=0.9)
QUIET = LogConfig(log_every=1, checkpoint_every=5, progress=False, tensorboard=False)
TEN = dataclasses.replace(QUIET, log_every=10, checkpoint_every=10)


def init(key: jax.Array) -> dict:
    first, second = jax.random.split(key)
    params = {
        "first": {"kernel": jax.random.normal(first, (3, WIDTH)) / 2},
        "second": {"kernel": jax.random.normal(second, (WIDTH, 1)) / 2, "bias": jnp.zeros(1)},
    }
    return {"params": params, "stats": {"mean": jnp.zeros(3)}}


def make_objective(noise: float = 0.0):
    """Squared error of the regression; `noise` perturbs the inputs, each row by its own key."""

    def objective(variables, batch, key):
        rows = batch_rows(batch, key, len(batch["x"]))
        x = batch["x"] + noise * rows.draw(lambda key, x: jax.random.normal(key, x.shape), batch["x"])
        params = variables["params"]
        hidden = jnp.tanh(x @ params["first"]["kernel"])
        error = hidden @ params["second"]["kernel"] + params["second"]["bias"][None] - batch["y"]
        mean = 0.9 * variables["stats"]["mean"] + 0.1 * batch["x"].mean(axis=0)
        return jnp.mean(error**2), {"error": jnp.abs(error).mean()}, {"stats": {"mean": mean}}

    return objective


def batch_of(step: int, batch_size: int = BATCH) -> dict[str, np.ndarray]:
    """The batch of a step over all processes."""
    x = np.random.default_rng([17, step]).normal(size=(batch_size, 3)).astype(np.float32)
    return {"x": x, "y": np.sin(x.sum(axis=1, keepdims=True))}


def batches(start: int, stop: int, pause_at: int | None = None, gate: Path | None = None) -> Iterator[dict]:
    """This process's share of each batch; after step `pause_at` it waits for the file `gate`."""
    index, count = jax.process_index(), jax.process_count()
    for step in range(start, stop):
        while step == pause_at and not gate.exists():
            time.sleep(0.01)
        yield {name: np.split(array, count)[index] for name, array in batch_of(step).items()}


def make_job(*, noise: float = 0.1, pause_at: int | None = None, gate: Path | None = None, **changes) -> Job:
    return Job(
        **{
            "init": init,
            "objective": make_objective(noise),
            "batches": lambda start, stop: batches(start, stop, pause_at, gate),
            **changes,
        }
    )


def run(
    job: Job,
    workdir: str | Path,
    *,
    steps: int = STEPS,
    log: LogConfig = QUIET,
    mesh: tuple[int, int] | None = None,
    **changes,
) -> Result:
    """Trains a toy job, with sharded parameters on a mesh if its shape is given; any config may be resumed."""
    options = {"optim": OPTIM, "config": {"toy": True}, "check_config": lambda saved: None, **changes}
    length = TrainConfig(steps=steps, batch_size=BATCH, parallel="fsdp" if mesh else "data", mesh=mesh)
    return train(job, workdir, train=length, log=log, **options)


def rows_of(workdir: Path) -> list[dict]:
    """The rows of metrics.jsonl, none where it does not exist yet."""
    path = workdir / "metrics.jsonl"
    # A program may be writing the last row right now.
    return [json.loads(line) for line in path.read_text().splitlines(True) if line[-1] == "\n"] if path.exists() else []


def without_speed(row: dict) -> dict:
    """A row of metrics without those that a repeated step measures anew; the first step of a process has none."""
    return {name: value for name, value in row.items() if name not in SPEED}


def arrays_of(workdir: str | Path, step: int | None = None) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, the latest if no step is given, by path."""
    reader = RunReader(workdir).checkpoints
    return reader.arrays(reader.latest_step() if step is None else step)


def assert_bitwise(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Fails unless both checkpoints hold the same arrays, bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def start(workdir: Path, *options: str, devices: int = 4) -> subprocess.Popen:
    """This file as a program with so many virtual devices, every warning an error."""
    # Compiled as in the tests, of which one asks for the same bits.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-W", "error", __file__, str(workdir), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "NPROC": "16", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Returns when the condition holds; fails where the program ends before."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.01)


def note_written_files(directory: Path) -> list[str]:
    """A list that collects the files below `directory` which this process writes, moves or removes from now on."""
    names = []

    def note(event, arguments):
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.rename", "os.remove")) and str(arguments[0]).startswith(str(directory)):
            names.append(str(arguments[0]))

    sys.addaudithook(note)
    return names


def slowly(function: Callable, workdir: str):
    """The function, which first makes the file WORKDIR.slow and waits for the file WORKDIR.go."""

    def slow(*arguments):
        Path(f"{workdir}.slow").touch()
        while not Path(f"{workdir}.go").exists():
            time.sleep(0.01)
        return function(*arguments)

    return slow


def limiting(batches: Callable, step: int):
    """The batches, of which one forbids this process to write files of more than some kilobytes."""
    import resource

    def limited(start, stop):
        for at, batch in zip(range(start, stop), batches(start, stop), strict=True):
            if at == step:
                time.sleep(1)  # A save may be under way.
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            yield batch

    return limited


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("--pause-at", type=int, help="step after which to wait for the file WORKDIR.go")
    parser.add_argument("--evaluated", action="store_true", help="evaluate and draw, too")
    parser.add_argument("--slow", choices=["init", "objective", "evaluate", "sample"], help="what waits for WORKDIR.go")
    parser.add_argument("--limit-at", type=int, help="step from which no larger files can be written")
    parser.add_argument("--log-every", type=int, default=1)
    parser.add_argument("--address", help="coordinator of several processes")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--mesh", type=int, nargs=2, help="train with sharded parameters on a mesh of this shape")
    options = parser.parse_args()
    if options.processes > 1:
        jax.distributed.initialize(options.address, options.processes, options.process)
    if options.mesh:
        shards.MIN_SIZE = 1
    written = note_written_files(Path(options.workdir))
    parts, log = {}, dataclasses.replace(QUIET, log_every=options.log_every)
    if options.evaluated:
        parts = {
            # Each process sees another number, as numerics may; only one of them may decide.
            "evaluate": lambda variables: {"bits_per_dim": float(jax.process_index())},
            "sample": lambda variables: np.zeros((4, 4, 3), np.uint8),
        }
        log = LogConfig(
            log_every=2, eval_every=4, sample_every=4, checkpoint_every=5, progress=False, tensorboard=False
        )
    gate = Path(f"{options.workdir.removeprefix('file://')}.go")
    job = make_job(pause_at=options.pause_at, gate=gate, **parts)
    if options.slow:
        job = dataclasses.replace(job, **{options.slow: slowly(getattr(job, options.slow), options.workdir)})
    if options.limit_at is not None:
        job = dataclasses.replace(job, batches=limiting(job.batches, options.limit_at))
    try:
        result = run(job, options.workdir, log=log, mesh=tuple(options.mesh) if options.mesh else None)
    except Interrupted as stop:
        sys.exit(128 + stop.number)
    except OSError as error:
        sys.exit(f"toy: {error}")
    report = {"step": int(result.state.step), "signal": result.signal, "metrics": result.metrics, "written": written}
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
