"""Times attention kernels and softmax attention at growing sequence lengths, with and without gradients.

python benchmarks/attention.py --out benchmarks/results/attention.json

A kernel, full or causal, is compared with the faster of `jax.nn.dot_product_attention` and flowgen's own
`softmax_attention` with the same mask. A call that would exceed --max-seconds or --max-bytes is skipped; its row states
the reason.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import measure
import numpy as np

from flowgen.attention import gated_delta_rule, kernel, soft_attention, softmax_attention

BATCH, HEADS, WIDTH = 1, 8, 64
FORWARD, BACKWARD = "forward", "forward backward"
# Calls under 0.2 s are repeated at least 10 times, the slowest ones 3 times.
SECONDS_PER_RUN, MIN_REPEATS, MAX_REPEATS = 2.0, 3, 30
SLOPE_FROM, SLOPE_GOAL = 4096, 1.05


class Method(NamedTuple):
    """A form of attention. num_inputs: how many of q, k, v, β and log-decay it takes; gradients are taken for all."""

    attend: Callable[..., jax.Array]
    mask: str
    num_inputs: int = 3


class Program(NamedTuple):
    """A compiled method."""

    run: measure.Run
    compile_seconds: float
    temporary_bytes: int


def main() -> None:
    arguments = parse_arguments()
    baselines = softmax_methods(jnp.dtype(arguments.dtype))
    methods = baselines | {name: kernel_methods()[name] for name in arguments.kernels}
    rows, tokens = [], 64
    print(f"{'tokens':>6} {'direction':16} {'attention':36} {'median':>13} {'temporary':>12} {'of softmax':>10}")
    while tokens <= arguments.max_tokens:
        for direction in (FORWARD, BACKWARD):
            found = measure_methods(methods, baselines, tokens, direction, rows, arguments)
            where = measure.environment(len(os.sched_getaffinity(0)), None)
            rows += [row | where for row in found]
            for row in found:
                print(line(row), flush=True)
            write(arguments.out, rows)
        jax.clear_caches()
        tokens *= 2
    summaries = [summary(name, direction, rows) for direction in (FORWARD, BACKWARD) for name in methods]
    write(arguments.out, rows + summaries)
    print(f"\n{'direction':16} {'attention':36} {'slope (of processor)':>22}  faster than softmax")
    for row in summaries:
        print(summary_line(row, is_baseline=row["name"] in baselines))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--max-tokens", type=int, default=65536, help="tokens double from 64 up to this")
    names = list(kernel_methods())
    parser.add_argument("--kernels", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--max-seconds", type=float, default=10.0, help="skip calls that are expected to take longer")
    parser.add_argument("--max-bytes", type=float, default=8e9, help="skip calls that need more temporary memory")
    arguments = parser.parse_args()
    if not arguments.out.parent.is_dir():
        parser.error(f"--out is {arguments.out}, but its directory does not exist; create it first.")
    return arguments


def softmax_methods(dtype: jnp.dtype) -> dict[str, Method]:
    """Returns the baselines, including cuDNN's fused attention if the device and dtype support it."""
    fused = jax.default_backend() == "gpu" and dtype.itemsize == 2
    library = "cudnn" if fused else "xla"
    methods = {}
    for mask in ("full", "causal"):
        options = {"is_causal": mask == "causal"}
        theirs = partial(jax.nn.dot_product_attention, implementation=library, **options)
        methods[f"softmax jax.nn {library} {mask}"] = Method(theirs, mask)
        methods[f"softmax flowgen {mask}"] = Method(partial(softmax_attention, **options), mask)
    return methods


def kernel_methods() -> dict[str, Method]:
    """Returns the methods to compare with softmax."""
    causal = {name: partial(kernel(name).attend, is_causal=True) for name in ("elu_plus_one", "nala", "focused")}
    return {
        "elu_plus_one full": Method(kernel("elu_plus_one").attend, "full"),
        "nala full": Method(kernel("nala").attend, "full"),
        "soft 64 landmarks full": Method(partial(soft_attention, num_landmarks=64), "full"),
        **{f"{name} causal": Method(attend, "causal") for name, attend in causal.items()},
        "retention causal": Method(partial(kernel("retention").attend, is_causal=True), "causal"),
        "gated delta rule causal": Method(lambda *inputs: gated_delta_rule(*inputs)[0], "causal", num_inputs=5),
    }


def measure_methods(
    methods: dict[str, Method],
    baselines: Iterable[str],
    tokens: int,
    direction: str,
    before: list[dict],
    arguments: argparse.Namespace,
) -> list[dict]:
    """Returns one row per method at this length; the methods take turns. before: the rows for shorter lengths."""
    dtype = jnp.dtype(arguments.dtype)
    cotangent, *inputs = draw_inputs(tokens, dtype)
    programs, skipped = {}, {}
    for name, method in methods.items():
        history = [row for row in before if row["name"] == name and row["direction"] == direction]
        expected = extrapolate(history, "milliseconds", tokens) / 1e3
        expected_bytes = extrapolate(history, "temporary_bytes", tokens)
        if expected > arguments.max_seconds:
            skipped[name] = (
                f"a call would take about {expected:.0f} s, more than --max-seconds {arguments.max_seconds:g}"
            )
        elif expected_bytes <= arguments.max_bytes:
            programs[name] = build(method, direction, cotangent, inputs)
            expected_bytes = programs[name].temporary_bytes
        if name not in skipped and expected_bytes > arguments.max_bytes:
            programs.pop(name, None)
            skipped[name] = f"needs about {expected_bytes / 1e9:.1f} GB, more than --max-bytes {arguments.max_bytes:g}"
    timings = alternate({name: program.run for name, program in programs.items()})

    rows = []
    for name, method in methods.items():
        row = {"name": name, "mask": method.mask, "tokens": tokens, "direction": direction}
        row |= {"batch": BATCH, "heads": HEADS, "width": WIDTH, "dtype": dtype.name}
        if name in skipped:
            rows.append(row | {"skipped": skipped[name]})
            continue
        median = timings[name].median
        row |= {"milliseconds": milliseconds(median), "fastest": milliseconds(timings[name].fastest)}
        row["processor_milliseconds"] = milliseconds(timings[name].processor)
        row |= {"repeats": len(timings[name].calls), "temporary_bytes": programs[name].temporary_bytes}
        row["compile_seconds"] = round(programs[name].compile_seconds, 2)
        rivals = [other for other in baselines if other in timings and methods[other].mask == method.mask]
        if rivals:
            baseline = min(rivals, key=lambda other: timings[other].median)
            against = timings[baseline].median
            row |= {"baseline": baseline, "baseline_milliseconds": milliseconds(against)}
            row["ratio"] = round(median / against, 4)
        rows.append(row)
    return rows


def draw_inputs(tokens: int, dtype: jnp.dtype) -> list[jax.Array]:
    """Returns the cotangent of the output, then q, k, v, β between 0 and 1, and log-decay below 0."""
    keys = jax.random.split(jax.random.key(tokens), 6)
    wide = [jax.random.normal(key, (BATCH, tokens, HEADS, WIDTH), dtype) for key in keys[:4]]
    beta, gate = (jax.random.normal(key, (BATCH, tokens, HEADS), dtype) for key in keys[4:])
    return [*wide, jax.nn.sigmoid(beta), jax.nn.log_sigmoid(4 + gate)]


def build(method: Method, direction: str, cotangent: jax.Array, inputs: list[jax.Array]) -> Program:
    """Compiles the method for these inputs, without running it."""

    def forward_backward(cotangent, *inputs):
        out, pull = jax.vjp(method.attend, *inputs)
        return out, pull(cotangent)

    inputs = inputs[: method.num_inputs]
    function, inputs = (method.attend, inputs) if direction == FORWARD else (forward_backward, [cotangent, *inputs])
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*inputs).compile()
    seconds = time.perf_counter() - start
    return Program(measure.ours(compiled, *inputs), seconds, compiled.memory_analysis().temp_size_in_bytes)


def alternate(runs: dict[str, measure.Run]) -> dict[str, measure.Timing]:
    """Returns timings of runs that take turns, like `measure.alternate`, but repeats shorter runs more often."""
    timings = {name: measure.Timing(run(), []) for name, run in runs.items()}
    repeats = {}
    for name, run in runs.items():
        first = min(timings[name].first.seconds, run().seconds) if timings[name].first.seconds < 1 else math.inf
        repeats[name] = int(np.clip(SECONDS_PER_RUN / first, MIN_REPEATS, MAX_REPEATS))
    for turn in range(max(repeats.values(), default=0)):
        for name, run in runs.items():
            if turn < repeats[name]:
                time.sleep(measure.PAUSE_SECONDS)
                timings[name].calls.append(run())
    return timings


def extrapolate(history: list[dict], quantity: str, tokens: int) -> float:
    """Extrapolates a quantity from the last two lengths to a longer one, assuming linear to quadratic growth."""
    points = [(row["tokens"], max(row[quantity], 1e-6)) for row in history if quantity in row][-2:]
    if not points:
        return 0.0
    power = 2.0
    if len(points) == 2:
        (n0, y0), (n1, y1) = points
        power = float(np.clip(math.log(y1 / y0) / math.log(n1 / n0), 1, 2))
    n, y = points[-1]
    return y * (tokens / n) ** power


def summary(name: str, direction: str, rows: list[dict]) -> dict[str, Any]:
    """Returns how the time of one method grows, and the length from which it is faster than softmax.

    crossover_tokens: this length, or None if the method is slower at the largest length compared, compared_up_to.
    slope: slope of log time against log tokens; slope_processor: the same for the processor time of all threads,
    which other load affects less.
    """
    measured = [r for r in rows if r["name"] == name and r["direction"] == direction and "milliseconds" in r]
    compared = [r for r in measured if "ratio" in r]
    crossover = None
    for row in reversed(compared):
        if row["ratio"] >= 1:
            break
        crossover = row["tokens"]
    return {
        "name": name,
        "direction": direction,
        "dtype": measured[0]["dtype"] if measured else None,
        "crossover_tokens": crossover,
        "compared_up_to": compared[-1]["tokens"] if compared else None,
        "measured_up_to": measured[-1]["tokens"] if measured else None,
        "slope": slope(measured, "milliseconds"),
        "slope_processor": slope(measured, "processor_milliseconds"),
        "slope_from": SLOPE_FROM,
        "slope_goal": SLOPE_GOAL,
    }


def slope(measured: list[dict], quantity: str) -> float | None:
    """Returns the exponent with which a quantity grows from SLOPE_FROM tokens on: 1 is linear, 2 quadratic."""
    points = [(row["tokens"], row[quantity]) for row in measured if row["tokens"] >= SLOPE_FROM]
    return round(float(np.polyfit(*np.log(np.array(points)).T, 1)[0]), 3) if len(points) > 1 else None


def line(row: dict) -> str:
    """Returns a measurement as a line of the table, with a note if softmax is faster."""
    start = f"{row['tokens']:6d} {row['direction']:16} {row['name']:36}"
    if "skipped" in row:
        return f"{start} skipped: {row['skipped']}"
    start += f" {row['milliseconds']:10.2f} ms {row['temporary_bytes'] / 1e6:9.1f} MB"
    if "ratio" not in row:
        return f"{start}          - (softmax was skipped)"
    slower = row["ratio"] > 1 and not row["name"].startswith("softmax")
    repeats = f" ({row['repeats']} repeats)" if row["repeats"] < 10 else ""
    return f"{start} {row['ratio']:10.3f}{'  softmax is faster' if slower else ''}{repeats}"


def summary_line(row: dict, is_baseline: bool) -> str:
    """Returns a summary as a line of the second table."""
    slopes = "" if row["slope"] is None else f"{row['slope']:.2f} ({row['slope_processor']:.2f})"
    verdict = "never" if row["crossover_tokens"] is None else f"from {row['crossover_tokens']} tokens on"
    verdict = "baseline" if is_baseline else f"{verdict} (compared up to {row['compared_up_to']})"
    above = "  slope above the goal" if not is_baseline and (row["slope"] or 0) > SLOPE_GOAL else ""
    return f"{row['direction']:16} {row['name']:36} {slopes:>22}  {verdict}{above}"


def write(path: Path, rows: list[dict]) -> None:
    """Writes a JSON array with one row per line."""
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def milliseconds(seconds: float) -> float:
    return round(1e3 * seconds, 3)


if __name__ == "__main__":
    main()
