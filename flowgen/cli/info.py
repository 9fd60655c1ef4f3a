"""The command `info`."""

from __future__ import annotations

import argparse
from pathlib import Path

from flowgen.cli.options import described, num_parameters, say


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--config", help="Python file with config(), or the name of one, such as tarflow_digits")
    group.add_argument("--checkpoint", help="directory of a run")
    parser.add_argument(
        "--debug", action="store_true", help="with --config: show the experiment that train.py --debug runs"
    )


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Runs the command and returns its exit code."""
    from flowgen.cli.grammar import load_experiment
    from flowgen.experiments import from_json
    from flowgen.experiments.attention import attention_lines, on_any_device
    from flowgen.runs import CHECKPOINTS, CheckpointReader, read_config
    from flowgen.settings import settings

    if options.checkpoint:
        given = ["--debug"] * options.debug + rest
        if given:
            raise ValueError(f"{given[0]} is not an option of info --checkpoint; see --help.")
        experiment = from_json(read_config(options.checkpoint))
        steps = CheckpointReader(Path(options.checkpoint) / CHECKPOINTS).steps()
        say(f"checkpoints: {', '.join(map(str, steps)) or 'none'}")
    else:
        experiment = load_experiment(options, rest)
    say(f"parameters: {num_parameters(on_any_device(experiment).build()):,}")
    for line in attention_lines(experiment.model):
        say(line)
    if options.checkpoint and (classes := getattr(experiment.data, "classes", ())):
        say("classes: " + ", ".join(f"{number} {name}" for number, name in enumerate(classes)))
    for setting in settings(experiment):
        say(described(setting))
    return 0
