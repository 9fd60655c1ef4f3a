"""The command `report`, which writes an HTML page about a run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from flowgen.cli.options import CHECKPOINT, num_parameters, open_run, placed, say, step_or_best, whole_number
from flowgen.places import Destination, is_remote

NAME = "report.html"


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.add_argument("run", metavar="RUN", help=f"{CHECKPOINT}; a run may still be training")
    parser.add_argument(
        "--out",
        help=f"HTML file or URL to write (default: {NAME} in the run; for other models MODEL.{NAME}, here)",
    )
    parser.add_argument("--step", type=step_or_best, help="checkpoint to use: a number, or best (default: the latest)")
    parser.add_argument(
        "--samples", type=whole_number(1, 1024), default=8, help="number of samples to draw and decode (default: 8)"
    )
    parser.add_argument(
        "--no-model", action="store_true", help="write only what the run has saved; open neither checkpoints nor data"
    )
    parser.epilog = (
        "If the run's data or autoencoder have moved, give their new places, such as --data.path DIR or --codec.path "
        "DIR. What cannot be opened is left out of the page, which then says so."
    )


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Runs the command and returns its exit code."""
    from flowgen.cli.grammar import apply_words
    from flowgen.data import atomic_file
    from flowgen.experiments import from_json
    from flowgen.experiments.attention import on_any_device
    from flowgen.report import check_report_path, report_page
    from flowgen.runs import RunReader, is_exported, located, read_contents

    named, options.run = options.run, str(located(options.run))
    run_dir = options.run
    elsewhere = is_remote(run_dir) or is_exported(run_dir)  # an exported folder is shared as it is
    out = options.out or (_page_here(named) if elsewhere else str(Path(run_dir) / NAME))
    reader = RunReader(run_dir)
    contents = read_contents(reader)  # before the page is checked, because its default place is in the run
    destination = Destination(out)
    check_report_path(destination.path)
    with reader.named():
        saved = from_json(contents.config)
    groups = ("data", "sampling", "codec.path", "text.encoder")
    experiment, _, _ = apply_words(rest, saved, groups=groups)
    model, missing = None, ""
    if not options.no_model:
        model, missing = _model(options, reader, experiment, contents.steps)
    page = report_page(
        experiment,
        contents,
        parameters=num_parameters(on_any_device(experiment).build()),
        model=model,
        samples=options.samples,
        missing=missing,
    )
    with atomic_file(destination.path) as file:
        file.write(page.encode())
    destination.send()
    say(f"Wrote {out}")
    return 0


def _page_here(named: str) -> str:
    """Returns the name of a model's page in the current folder. named: the model's name on the command line."""
    from flowgen.runs.located import HUB

    place = named.partition("@")[0] if named.startswith(HUB) else named
    return f"{os.path.basename(os.path.abspath(place))}.{NAME}"


def _model(
    options: argparse.Namespace, reader: Any, experiment: Any, steps: tuple[int, ...]
) -> tuple[tuple[Any, Any] | None, str]:
    """Returns a run's model and variables, or None and the reason."""
    if not steps:
        return None, "The run has no checkpoint yet, so nothing was measured."
    model, variables = open_run(reader, options.step).load()
    return (model, placed(variables, experiment, options)), ""
