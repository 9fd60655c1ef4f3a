"""Measures how well examples/many_well.py fits the many-well energy in 32 dimensions, for several seeds.

python benchmarks/many_well.py --out benchmarks/results/many_well.json

The exact log Z is known by quadrature. The effective sample sizes are shares of the samples; `forward_ess` belongs to
exact samples, and is low if the flow has missed a mode.
"""

import argparse
import runpy
from pathlib import Path

import measure

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "many_well.py"
COLUMNS = ("ess", "forward_ess", "log_z_error", "standard_error", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--dim", type=int, default=32, help="number of coordinates")
    parser.add_argument("--steps", type=int, default=800, help="training steps")
    parser.add_argument("--samples", type=int, default=10_000, help="samples of the flow, and exact samples")
    parser.add_argument("--seeds", type=int, default=3, help="number of trainings, with seeds from 0")
    parser.add_argument("--threads", type=int, default=1, help="number of cores")
    arguments = parser.parse_args()
    measure.check_cores(parser, "--threads", arguments.threads)
    measure.confine(arguments.threads)
    train, rows = runpy.run_path(str(EXAMPLE))["main"], []
    about = {name: getattr(arguments, name) for name in ("dim", "steps", "samples")}
    for seed in range(arguments.seeds):
        result = train([f"--{name}={value}" for name, value in {**about, "seed": seed}.items()])._asdict()
        measured = {name: round(result[name], 4) for name in COLUMNS}
        rows.append(about | {"seed": seed} | measured | measure.environment(arguments.threads, None))
        measure.save(arguments.out, rows)


if __name__ == "__main__":
    main()
