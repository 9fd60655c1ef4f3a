"""Measures attention, training steps and decoding on one accelerator, in order of importance.

python benchmarks/accelerator.py --out accelerator.jsonl [--minutes 8] [--reference PATH_TO_ml-tarflow]

Each row is appended as soon as it is measured, and the program ends after --minutes. `--toy` measures tiny shapes on a
CPU, to check that everything runs.
"""

import argparse
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import measure
import published
from accelerator_rows import TOY, Reference, Row, Sizes, attention, decoding, deep_block, training_step


class Measurement(NamedTuple):
    """A row to measure. baseline: the name of the earlier row to compare with."""

    name: str
    run: Callable[[], Row]
    baseline: str | None = None


def all_rows(sizes: Sizes, reference: Reference | None) -> Iterator[Measurement]:
    """Returns the rows to measure, in order of importance."""
    first, *others = sizes.lengths
    yield softmax("auto", first, sizes)
    yield softmax("xla", first, sizes)
    for config in ("tarflow_afhq256", "tarflow_imagenet64"):
        yield Measurement(name := f"training step, {config}", partial(training_step, config, sizes))
        if reference is not None:
            yield Measurement(f"published {name}", partial(reference.row, config, "adamw", sizes), name)
    for config, plans in {"tarflow_afhq256": ("jacobi", "auto"), "tarflow_imagenet64": ()}.items():
        exact = f"decoding, {config}, sequential"
        yield Measurement(exact, partial(decoding, config, "sequential", sizes))
        if reference is not None:
            yield Measurement(f"published {exact}", partial(reference.row, config, "reverse_guided", sizes), exact)
        for plan in plans:
            yield Measurement(f"decoding, {config}, {plan}", partial(decoding, config, plan, sizes), exact)
    yield Measurement("training step, starflow_imagenet256", partial(training_step, "starflow_imagenet256", sizes))
    yield Measurement("deep block of starflow_v_480p, per layer", partial(deep_block, sizes))
    for n in sizes.lengths:
        if n != first:
            yield softmax("auto", n, sizes)
        yield Measurement(
            f"linear attention, {n} tokens", partial(attention, "nala", n, sizes), softmax_name("auto", n)
        )
    for n in others:
        yield softmax("xla", n, sizes)


def softmax(implementation: str, n: int, sizes: Sizes) -> Measurement:
    """Returns the measurement of softmax attention; the baseline is the implementation that "auto" chooses."""
    baseline = None if implementation == "auto" else softmax_name("auto", n)
    return Measurement(softmax_name(implementation, n), partial(attention, implementation, n, sizes), baseline)


def softmax_name(implementation: str, n: int) -> str:
    return f"softmax attention, {implementation}, {n} tokens"


def compared(row: Row, name: str, base: Row) -> Row:
    """Returns a row with the ratio of its time to the time of the baseline; a ratio below 1 is faster."""
    ratio = row["milliseconds"] / base["milliseconds"]
    against = {"baseline": name, "baseline_milliseconds": base["milliseconds"], "ratio": round(ratio, 4)}
    if "torch" in row and base["share_of_peak"] is not None:  # The published code does the same work.
        against["share_of_peak"] = round(base["share_of_peak"] / ratio, 4)
    return row | against


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file to append JSON rows to, one per line")
    parser.add_argument("--minutes", type=float, default=8.0, help="time after which the program ends")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, for a CPU")
    measure.add_reference(parser)
    arguments = parser.parse_args()
    measure.check_reference(parser, arguments)
    if not 0 < arguments.minutes < 1000:
        parser.error(f"--minutes is {arguments.minutes}; give a positive number below 1000.")
    try:
        arguments.out.open("a").close()
    except OSError as error:
        parser.error(f"--out {arguments.out} cannot be written ({error.strerror}).")
    reference = None
    if arguments.reference is not None:
        published.check(arguments.reference, arguments.torch_python)
        reference = Reference(arguments.reference, arguments.torch_python)
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory for the other process
    began, limit = time.perf_counter(), 60 * arguments.minutes
    # Compilation cannot be interrupted, so the process ends when the time is over. Earlier rows are already written.
    watch = threading.Timer(limit, end, (reference,))
    watch.daemon = True
    watch.start()
    import jax

    sizes = TOY if arguments.toy else Sizes()
    if not arguments.toy and jax.default_backend() == "cpu":
        parser.error("there is no accelerator; give --toy to check that everything runs.")
    where, rows = measure.environment(len(os.sched_getaffinity(0)), None), {}
    for name, run, baseline in all_rows(sizes, reference):
        try:
            result = run()
            rows[name] = result = result if baseline not in rows else compared(result, baseline, rows[baseline])
        except (ValueError, RuntimeError, OSError, MemoryError) as error:  # out of memory, or the row cannot run here
            result = {"error": " ".join(str(error).split())[:300]}
        line = {"name": name, "dtype": sizes.dtype, "seconds_so_far": round(time.perf_counter() - began, 1)}
        with arguments.out.open("a") as file:
            file.write(json.dumps(line | result | where) + "\n")
        print(name, result.get("milliseconds", result.get("error")), result.get("ratio", ""), flush=True)
        jax.clear_caches()


def end(reference: Reference | None) -> None:
    """Ends this process and the process of the published code at once."""
    if reference is not None:
        reference.stop()
    os._exit(0)


if __name__ == "__main__":
    main()
