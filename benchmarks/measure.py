"""How the benchmarks measure: the same two shapes, one thread budget, alternating runs, one JSON row each."""

import argparse
import dataclasses
import json
import os
import platform
import statistics
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
PAUSE_SECONDS = 0.005  # lets the threads of the run before go to sleep


class Cost(NamedTuple):
    """What one call took: seconds on the clock, and processor seconds of all threads of its process."""

    seconds: float
    processor: float


Run = Callable[[], Cost]  # does the work once and waits for it


@dataclasses.dataclass
class Timing:
    """What `alternate` found for one run. first: the first call, compilation included."""

    first: Cost
    calls: list[Cost]

    @property
    def median(self) -> float:
        return statistics.median(call.seconds for call in self.calls)

    @property
    def fastest(self) -> float:
        return min(call.seconds for call in self.calls)

    @property
    def processor(self) -> float:
        return statistics.median(call.processor for call in self.calls)


def parse_arguments(description: str) -> argparse.Namespace:
    """Returns the arguments that every benchmark takes, and applies the thread budget. Call it before jax runs."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--reference", type=Path, help="checkout of apple/ml-tarflow; without it only ours is run")
    parser.add_argument("--torch-python", type=Path, help="interpreter with torch, where this one has none")
    parser.add_argument("--threads", type=int, default=2, help="processor cores that both sides may use")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments = parser.parse_args()
    if arguments.torch_python and not arguments.reference:
        parser.error("--torch-python is given without --reference; give the checkout to run with it.")
    if not arguments.out.parent.is_dir():
        parser.error(f"--out is {arguments.out}, whose directory does not exist; create it first.")
    cores = os.sched_getaffinity(0)
    if not 1 <= arguments.threads <= len(cores):
        parser.error(f"--threads is {arguments.threads}; this process may use 1 to {len(cores)} cores.")
    # XLA sizes its thread pool by the cores it may run on.
    os.sched_setaffinity(0, sorted(cores)[: arguments.threads])
    return arguments


def ours(function: Callable[..., Any], *inputs: Any) -> Run:
    """Returns a run of a jax function that waits for every output."""
    import jax

    return lambda: cost(lambda: jax.block_until_ready(function(*inputs)))


def cost(work: Callable[[], Any]) -> Cost:
    """Returns what calling `work` took."""
    seconds, processor = time.perf_counter(), time.process_time()
    work()
    return Cost(time.perf_counter() - seconds, time.process_time() - processor)


def alternate(runs: dict[str, Run]) -> dict[str, Timing]:
    """Returns timings of runs taken in turn, so that whatever else the machine does falls on all of them.

    Ten repeats each after two calls that are not counted, three for a run slower than five seconds.
    """
    timings = {name: Timing(run(), []) for name, run in runs.items()}
    repeats = {}
    for name, run in runs.items():
        repeats[name] = SLOW_REPEATS if run().seconds > SLOW_SECONDS else REPEATS
    for _ in range(REPEATS):
        for name, run in runs.items():
            if len(timings[name].calls) < repeats[name]:
                time.sleep(PAUSE_SECONDS)
                timings[name].calls.append(run())
    return timings


def row(name: str, shape: str, timing: Timing, *, baseline: str, against: Timing, compiled: bool, **more: Any) -> dict:
    """Returns one measurement; `ratio` is its median over the baseline's, so below 1 is faster."""
    model = SHAPES[shape]
    result = {
        "name": name,
        "shape": shape,
        "model": dataclasses.asdict(model) | {"tokens": model.num_tokens, "batch": BATCH},
        "dtype": "float32",
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
        result["compile_seconds"] = round(max(timing.first.seconds - timing.median, 0.0), 2)
    return result


def environment(threads: int, torch_version: str | None) -> dict[str, Any]:
    """Returns where the rows were measured: device, thread budget, load, versions."""
    import jax

    device = jax.devices()[0]
    packages = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {
        "device": f"{device.device_kind} ({_processor()})" if device.platform == "cpu" else device.device_kind,
        "threads": threads,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version(), **packages, "torch": torch_version},
    }


def write(path: Path, rows: list[dict], where: dict[str, Any]) -> None:
    """Writes a JSON array with one row per line and prints a table."""
    lines = ",\n".join(json.dumps(result | where) for result in rows)
    path.write_text(f"[\n{lines}\n]\n")
    for result in rows:
        error = f"  error {result['error']:.1e}" if "error" in result else ""
        print(
            f"{result['shape']} {result['name']:34s} {result['milliseconds']:10.1f} ms"
            f"  {result['ratio']:7.3f} (processor {result['ratio_processor']:7.3f}) x {result['baseline']}{error}"
        )


def _milliseconds(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
