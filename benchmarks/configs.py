"""Records the final metrics and the step times of runs of shipped configs.

python benchmarks/configs.py --runs runs/{digits,cfm,otcfm,wcfm,nfm,autoencoder_digits,starflow} \\
    --out benchmarks/results/configs.json
"""

import argparse
import itertools
import os
from pathlib import Path
from typing import Any

import measure

from flowgen.experiments import from_json
from flowgen.runs import EVAL, RunReader, read_metrics

SPEED = "steps_per_second"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="+", required=True, help="finished runs, each trained on this machine")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores that training could use"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    where = measure.environment(arguments.threads, None)
    about = {name: where[name] for name in ("device", "threads", "cores", "versions")}
    measure.save(arguments.out, [row(run) | about for run in arguments.runs])


def row(run: str) -> dict[str, Any]:
    """Returns a run's config, seed, last metrics, and the seconds of its steps excluding compilation and evaluation."""
    experiment, metrics = from_json(RunReader(run).config()), read_metrics(run)
    trained = [entry for entry in metrics if SPEED in entry]
    pairs = itertools.pairwise([{"step": 0}, *trained])
    evaluated = [entry for entry in metrics if any(name.startswith(EVAL) for name in entry)][-1]
    return {
        "config": experiment.name,
        "seed": experiment.train.seed,
        "steps": trained[-1]["step"],
        "step_seconds": round(sum((now["step"] - last["step"]) / now[SPEED] for last, now in pairs), 1),
        "metrics": {name.removeprefix(EVAL): value for name, value in evaluated.items() if name.startswith(EVAL)},
    }


if __name__ == "__main__":
    main()
