"""The command `export`, which exports the model of a run to a folder."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from flowgen.cli.options import CHECKPOINT, say, step_or_best


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.add_argument("run", metavar="RUN", help=f"{CHECKPOINT}; or RUN/checkpoints/STEP")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to create")
    parser.add_argument("--step", type=step_or_best, help="checkpoint to use: a number, or best (default: the latest)")
    parser.add_argument("--no-ema", action="store_true", help="export the trained parameters, not their average")
    parser.add_argument(
        "--dtype",
        choices=("float16",),
        help="store float32 parameters as float16, which halves the file (default: keep them bit for bit)",
    )
    parser.add_argument("--license", default="", help="licence of the weights for the model card, such as apache-2.0")
    parser.epilog = (
        "The folder contains config.json, model.safetensors and a model card, README.md. Every --checkpoint, "
        "--init-from and --codec.path accepts it, and so does flowgen.load."
    )


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Runs the command and returns its exit code."""
    from flowgen.exports import export

    place, step = _run_and_step(options.run, options.step)
    out = options.out if Path(options.out).parent.exists() else os.path.realpath(options.out)
    export(place, out, step=step, ema=not options.no_ema, dtype=options.dtype, licence=options.license)
    size = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())
    say(f"Wrote {out} ({size / 1e6:.2f} MB); sample with --checkpoint {out}")
    return 0


def _run_and_step(place: str, step: int | str | None) -> tuple[str, int | str | None]:
    """Returns the run and the step for the path of a run or of one of its checkpoints."""
    from flowgen.runs import CHECKPOINTS

    path = Path(place)
    if path.parent.name != CHECKPOINTS or not path.name.isdecimal() or not path.is_dir():
        return place, step
    if step is not None:
        raise ValueError(f"{place} already names a checkpoint; leave out --step.")
    return str(path.parent.parent), int(path.name)
