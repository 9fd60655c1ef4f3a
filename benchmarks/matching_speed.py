"""The speed part of benchmarks/matching.py: our training steps and torchcfm's, and the overhead of the weights."""

import concurrent.futures
import contextlib
import functools
import math
import multiprocessing
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matching_published as published
import measure
from matching_quality import BATCH, PAIRS, training

from flowgen import matching as fm
from flowgen.matching.couplings import Coupling

PAIR = "8gaussians-moons"
LEARNING_RATE = 1e-3
SCAN, SHORT_SCAN, JITTED, EAGER = "scan", "scan of 16", "jitted step", "eager"
STEPS, SLOW_STEPS = 160, 48  # Per call; SLOW_STEPS if a step takes milliseconds. Multiples of 16.
ROUNDS, OVERHEAD_STEPS, OVERHEAD_ROUNDS = 20, 100, 200


class Method(NamedTuple):
    """A coupling to time, the forms of its training step, and the torchcfm method to compare with."""

    coupling: Coupling
    counterpart: str
    forms: tuple[str, ...] = (SCAN, JITTED)
    steps: int = STEPS


ICFM, EXACT = "I-CFM", "OT-CFM exact"
METHODS = {
    ICFM: Method(fm.Independent(), published.ICFM, (SCAN, SHORT_SCAN, JITTED)),
    "W-CFM": Method(fm.GibbsWeights(epsilon=2.0), published.ICFM, (SCAN, SHORT_SCAN, JITTED)),
    "W-CFM un-normalised": Method(fm.GibbsWeights(epsilon=2.0, normalize="none"), published.ICFM),
    "corrected W-CFM, 5 sweeps": Method(
        fm.GibbsWeights(epsilon=2.0, sinkhorn_sweeps=5), published.OTCFM, steps=SLOW_STEPS
    ),
    "corrected W-CFM, 20 sweeps": Method(
        fm.GibbsWeights(epsilon=0.5, sinkhorn_sweeps=20), published.OTCFM, steps=SLOW_STEPS
    ),
    EXACT: Method(fm.MinibatchOT(method="exact"), published.OTCFM, steps=SLOW_STEPS),
}
# Compared with I-CFM step by step; the second I-CFM shows how precise this comparison is.
OVERHEAD_OF = (f"{ICFM} again", "W-CFM", "W-CFM un-normalised")


def measure_speed(thread_counts: list[int], torch_python: Path | None) -> list[dict]:
    """Returns the rows of the speed part. flowgen and torchcfm each use one process per thread count."""
    rows: list[dict] = []
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        runs, pools, theirs, steps = {}, {}, {}, {}
        for threads in thread_counts:
            pools[threads] = stack.enter_context(
                concurrent.futures.ProcessPoolExecutor(1, context, measure.confine, (threads,))
            )
            for name, method in METHODS.items():
                for form in method.forms:
                    runs[threads, name, form] = partial(_in_pool, pools[threads], name, form, method.steps)
                    steps[threads, name, form] = method.steps
            if torch_python is not None:
                theirs[threads] = published.Published(torch_python, threads, BATCH, LEARNING_RATE)
                stack.callback(theirs[threads].close)
                for name, count in published.STEPS.items():
                    runs[threads, name, EAGER] = partial(theirs[threads].time, name)
                    steps[threads, name, EAGER] = count
        timings = measure.alternate(runs, ROUNDS)
        for key, timing in timings.items():
            timing.steps = steps[key]
        versions = {}
        for key in timings:
            threads, name, form = key
            if form == EAGER:
                loss, versions = theirs[threads].loss(name), theirs[threads].versions
            else:
                loss = pools[threads].submit(last_loss, name, form, steps[key]).result()
            rows.append(_row(key, timings, loss))
        for threads in thread_counts:
            rows += measure_overhead(threads, pools[threads])
    where = measure.environment(0, None)
    where["versions"] |= versions
    return [where | row for row in rows]


def _in_pool(pool: concurrent.futures.Executor, name: str, form: str, steps: int) -> measure.Cost:
    return pool.submit(time_program, name, form, steps).result()


def time_program(name: str, form: str, steps: int) -> measure.Cost:
    """Returns the cost of `steps` training steps; the process keeps the training state for the next call."""
    return measure.cost(program(name, form, steps))


def last_loss(name: str, form: str, steps: int) -> float:
    """Returns the loss after `steps` more steps."""
    return float(program(name, form, steps)())


@functools.cache
def program(name: str, form: str, steps: int) -> Callable[[], jax.Array]:
    """Returns a function that trains for `steps` more steps and returns the last loss."""
    method = METHODS[name.removesuffix(" again")]
    start, update = training(PAIRS[PAIR], method.coupling, LEARNING_RATE)
    length = {SCAN: steps, SHORT_SCAN: 16, JITTED: 1}[form]

    @partial(jax.jit, donate_argnums=1)
    def advance(key, state):
        if form == JITTED:
            return update(key, state)
        state, losses = jax.lax.scan(lambda state, _: update(key, state), state, length=length)
        return state, losses[-1]

    key = jax.random.key(0)
    carried = [start(key)]

    def call():
        loss = None
        for _ in range(steps // length):
            carried[0], loss = advance(key, carried[0])
        return jax.block_until_ready(loss)

    return call


def _row(key: tuple[int, str, str], timings: dict[Any, measure.Timing], loss: float) -> dict:
    """Returns the row of one program. Its baseline is the other side's best time with at most as many threads."""
    threads, name, form = key
    timing = timings[key]
    if form == EAGER:
        other = (ICFM if name.startswith(published.ICFM) else EXACT, SCAN)
    else:
        other = (METHODS[name].counterpart, EAGER)
        other = other if (threads, *other) in timings else (ICFM, SCAN)
    rivals = [rival for rival in timings if rival[1:] == other and rival[0] <= threads]
    best = min(rivals, key=lambda rival: timings[rival].median)
    against, baseline = timings[best], f"{', '.join(other)}, threads {best[0]}"
    row = {"part": "speed", "pair": PAIR, "name": name, "form": form, "threads": threads, "batch": BATCH}
    row |= measure.figures(timing, baseline=baseline, against=against, compiled=form != EAGER)
    row |= {"steps_per_second": round(1 / timing.median, 1), "steps_per_call": timing.steps, "loss": round(loss, 4)}
    if form != EAGER:
        row["ratio_to_icfm"] = round(timing.median / timings[threads, ICFM, form].median, 4)
    return row


def measure_overhead(threads: int, pool: concurrent.futures.Executor) -> list[dict]:
    """Returns the overhead of other methods over I-CFM in percent, from short calls in alternating order."""
    names = [ICFM, *OVERHEAD_OF]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names * 2:
        _in_pool(pool, name, SCAN, OVERHEAD_STEPS)
    for turn in range(OVERHEAD_ROUNDS):
        for name in names if turn % 2 else names[::-1]:
            seconds[name].append(_in_pool(pool, name, SCAN, OVERHEAD_STEPS).seconds)
    rows = []
    for name in OVERHEAD_OF:
        percent = [100 * (a / b - 1) for a, b in zip(seconds[name], seconds[ICFM], strict=True)]
        low, median, high = median_interval(percent)
        micro = {key: round(1e6 * statistics.median(seconds[key]) / OVERHEAD_STEPS, 1) for key in (name, ICFM)}
        rows.append(
            {
                "part": "overhead",
                "pair": PAIR,
                "name": name,
                "form": SCAN,
                "threads": threads,
                "batch": BATCH,
                "overhead_percent": round(median, 2),
                "overhead_percent_95": [round(low, 2), round(high, 2)],
                "microseconds": micro[name],
                "baseline": ICFM,
                "baseline_microseconds": micro[ICFM],
                "rounds": OVERHEAD_ROUNDS,
                "steps_per_call": OVERHEAD_STEPS,
            }
        )
    return rows


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Returns (low, median, high) with the 95 % interval from order statistics (normal approximation)."""
    ordered = sorted(values)
    reach = 0.98 * math.sqrt(len(ordered))
    low = ordered[max(0, math.floor(len(ordered) / 2 - reach))]
    high = ordered[min(len(ordered) - 1, math.ceil(len(ordered) / 2 + reach))]
    return low, statistics.median(ordered), high


def line(row: dict) -> str:
    """Returns a speed or overhead row as a line of the printed table."""
    head = f"threads {row['threads']}  {row['name'] + ', ' + row['form']:44}"
    if row["part"] == "overhead":
        low, high = row["overhead_percent_95"]
        return f"{head} {row['overhead_percent']:+6.2f} % of {row['baseline']} (95 %: {low:+.2f} to {high:+.2f})"
    return (
        f"{head} {row['milliseconds']:8.3f} ms {row['steps_per_second']:8.1f} steps/s"
        f"  {row['ratio']:7.3f} (processor {row['ratio_processor']:7.3f}) x {row['baseline']}"
    )
