"""Measures flow matching in the plane: the quality of each coupling, and the cost of our training steps and torchcfm's.

python benchmarks/matching.py --out benchmarks/results/matching.json --torch-python PATH_TO_python_WITH_torchcfm
"""

import argparse
import os
from pathlib import Path

import matching_quality as quality
import matching_speed as speed
import measure


def main() -> None:
    arguments = parse_arguments()
    rows: list[dict] = []
    if "speed" in arguments.parts:
        rows += speed.measure_speed(arguments.threads, arguments.torch_python)
        measure.save(arguments.out, rows)
        for row in rows:
            print(speed.line(row))
    if "quality" in arguments.parts:
        finished = []
        for finished in quality.measure_quality(arguments):
            measure.save(arguments.out, rows + finished)
        quality.print_tables(finished)


def parse_arguments() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--parts", nargs="+", choices=("speed", "quality"), default=["speed", "quality"])
    parser.add_argument("--pairs", nargs="+", choices=quality.PAIRS, default=list(quality.PAIRS))
    parser.add_argument(
        "--methods", nargs="+", choices=quality.KINDS, default=list(quality.KINDS), help="methods of the quality part"
    )
    parser.add_argument("--steps", type=int, default=20_000, help="training steps in the quality part")
    parser.add_argument("--seeds", type=int, default=3, help="number of trainings per method, with seeds from 0")
    parser.add_argument("--jobs", type=int, default=cores, help="number of trainings at a time, one core each")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=sorted({1, min(2, cores)}), help="numbers of cores for the speed part"
    )
    parser.add_argument(
        "--torch-python", type=Path, help="interpreter with torchcfm; without it, only our side is timed"
    )
    arguments = parser.parse_args()
    measure.check_cores(parser, "--jobs", arguments.jobs)
    for threads in arguments.threads:
        measure.check_cores(parser, "--threads", threads)
    if arguments.steps < 1 or arguments.seeds < 1:
        parser.error(f"--steps is {arguments.steps} and --seeds {arguments.seeds}; both must be at least 1.")
    if not arguments.out.parent.is_dir():
        parser.error(f"--out is {arguments.out}, but its directory does not exist; create it first.")
    return arguments


if __name__ == "__main__":
    main()
