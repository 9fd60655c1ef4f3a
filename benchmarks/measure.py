"""Measures runs for the benchmarks: two shapes, one thread budget, runs that take turns, and one JSON row per run."""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "fixtures")]
import reference_weights as rw  # noqa: E402

SHAPES = {
    "A": rw.Shape(image_size=32, patch_size=4, num_blocks=4, num_classes=10),  # 64 tokens of 48 numbers
    "B": rw.Shape(image_size=32, patch_size=2, num_blocks=4, num_classes=10),  # 256 tokens of 12 numbers
}
BATCH = 16
REPEATS = 10
SLOW_REPEATS, SLOW_SECONDS = 3, 5.0
PAUSE_SECONDS = 0.005  # lets the previous run's threads go to sleep


class Cost(NamedTuple):
    """The cost of one call: wall-clock seconds, and the processor seconds of all threads in its process."""

    seconds: float
    processor: float


Run = Callable[[], Cost]  # does the work once and waits until it is done


@dataclasses.dataclass
class Timing:
    """The timings of one run. first: the first call, including compilation. steps: how often a call repeats the work.
    The properties are per step."""

    first: Cost
    calls: list[Cost]
    steps: int = 1

    @property
    def median(self) -> float:
        return statistics.median(call.seconds for call in self.calls) / self.steps

    @property
    def fastest(self) -> float:
        return min(call.seconds for call in self.calls) / self.steps

    @property
    def processor(self) -> float:
        return statistics.median(call.processor for call in self.calls) / self.steps


def parse_arguments(description: str) -> argparse.Namespace:
    """Returns the arguments that all benchmarks share, and applies the thread budget. Call it before using jax."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    add_reference(parser)
    parser.add_argument("--threads", type=int, default=2, help="number of processor cores for each side")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments = parser.parse_args()
    check_reference(parser, arguments)
    if not arguments.out.parent.is_dir():
        parser.error(f"--out is {arguments.out}, but its directory does not exist; create it first.")
    check_cores(parser, "--threads", arguments.threads)
    confine(arguments.threads)
    return arguments


def add_reference(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the published code."""
    parser.add_argument("--reference", type=Path, help="checkout of apple/ml-tarflow; without it, only our side runs")
    parser.add_argument("--torch-python", type=Path, help="interpreter with torch, if this one has none")


def check_reference(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends the program with an error message if the interpreter with torch is given without the published code."""
    if arguments.torch_python and not arguments.reference:
        parser.error("--torch-python needs --reference; give the checkout to run.")


def check_cores(parser: argparse.ArgumentParser, option: str, count: int) -> None:
    """Ends the program with an error message unless this process may use `count` cores."""
    cores = len(os.sched_getaffinity(0))
    if not 1 <= count <= cores:
        parser.error(f"{option} is {count}; it must be from 1 to {cores}, the cores available to this process.")


def confine(threads: int) -> None:
    """Restricts this process to its first `threads` cores. XLA sizes its thread pool to match when jax first runs."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def ours(function: Callable[..., Any], *inputs: Any) -> Run:
    """Returns a run that calls a jax function and waits for every output."""
    import jax

    return lambda: cost(lambda: jax.block_until_ready(function(*inputs)))


def cost(work: Callable[[], Any]) -> Cost:
    """Returns the cost of calling `work`."""
    seconds, processor = time.perf_counter(), time.process_time()
    work()
    return Cost(time.perf_counter() - seconds, time.process_time() - processor)


def alternate(runs: dict[str, Run], rounds: int = REPEATS, *, slow_rounds: int = SLOW_REPEATS) -> dict[str, Timing]:
    """Returns timings of runs that take turns, so that other load on the machine affects all of them.

    Each run is repeated `rounds` times, or `slow_rounds` times if it takes more than five seconds, after two calls that
    are not counted.
    """
    timings = {name: Timing(run(), []) for name, run in runs.items()}
    repeats = {}
    for name, run in runs.items():
        repeats[name] = slow_rounds if run().seconds > SLOW_SECONDS else rounds
    for _ in range(rounds):
        for name, run in runs.items():
            if len(timings[name].calls) < repeats[name]:
                time.sleep(PAUSE_SECONDS)
                timings[name].calls.append(run())
    return timings


def row(name: str, shape: str, timing: Timing, *, baseline: str, against: Timing, compiled: bool, **more: Any) -> dict:
    """Returns the row of one measurement for a shape."""
    model = SHAPES[shape]
    what = {
        "name": name,
        "shape": shape,
        "model": dataclasses.asdict(model) | {"tokens": model.num_tokens, "batch": BATCH},
        "dtype": "float32",
    }
    return what | figures(timing, baseline=baseline, against=against, compiled=compiled, **more)


def figures(timing: Timing, *, baseline: str, against: Timing, compiled: bool, **more: Any) -> dict:
    """Returns the measurements of one step; `ratio` is its median divided by the baseline's, so values below 1 are
    faster.
    """
    result = {
        "milliseconds": _milliseconds(timing.median),
        "fastest": _milliseconds(timing.fastest),
        "processor_milliseconds": _milliseconds(timing.processor),
        "repeats": len(timing.calls),
        "baseline": baseline,
        "baseline_milliseconds": _milliseconds(against.median),
        "ratio": round(timing.median / against.median, 4),
        "ratio_fastest": round(timing.fastest / against.fastest, 4),
        "ratio_processor": round(timing.processor / against.processor, 4),
        **more,
    }
    if compiled:
        result["compile_seconds"] = round(max(timing.first.seconds - timing.median * timing.steps, 0.0), 2)
    return result


def environment(threads: int, torch_version: str | None) -> dict[str, Any]:
    """Returns the conditions of the measurement: device, thread budget, memory pages, load and versions."""
    import jax

    from flowgen import huge_pages

    device = jax.devices()[0]
    packages = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {
        "device": f"{device.device_kind} ({_processor()})" if device.platform == "cpu" else device.device_kind,
        "threads": threads,
        "cores": os.cpu_count(),
        "huge_pages": not huge_pages.why_absent(),
        "load_average": round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version(), **packages, "torch": torch_version},
    }


def write(path: Path, rows: list[dict], where: dict[str, Any]) -> None:
    """Writes the rows and prints a table."""
    save(path, [result | where for result in rows])
    for result in rows:
        error = f"  error {result['error']:.1e}" if "error" in result else ""
        print(
            f"{result['shape']} {result['name']:34s} {result['milliseconds']:10.1f} ms"
            f"  {result['ratio']:7.3f} (processor {result['ratio_processor']:7.3f}) x {result['baseline']}{error}"
        )


def save(path: Path, rows: list[dict]) -> None:
    """Writes a JSON array with one row per line."""
    lines = ",\n".join(json.dumps(result) for result in rows)
    path.write_text(f"[\n{lines}\n]\n")


class Process:
    """A script in another interpreter; requests and answers are JSON objects, one per line."""

    def __init__(self, python: Path, script: Path):
        self._process = subprocess.Popen(
            [str(python), str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, request: dict[str, Any]) -> Any:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("The process of --torch-python ended early; its message is above.")
        return json.loads(answer)

    def close(self) -> None:
        self._process.communicate()


def _milliseconds(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
