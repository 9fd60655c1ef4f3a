"""The command `evaluate`, which prints the metrics of a model on data."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from flowgen.cli.options import CHECKPOINT, SHARING, load_run, placed, say, step_or_best, warn_of_guidance


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT)
    parser.add_argument("--step", type=step_or_best, help="checkpoint to use: a number, or best (default: the latest)")
    parser.epilog = (
        "To use other data, add --data.name folder --data.path DIR. To change how samples are drawn, add fields such "
        f"as --guidance 2 --plan jacobi; info --checkpoint lists them. {SHARING}"
    )


def fields_help() -> str:
    """Returns the help on the fields that each kind of model accepts."""
    from flowgen.cli.grammar import options_help
    from flowgen.experiments.autoregressive import FlowEvaluateOptions
    from flowgen.experiments.drawing import EvaluateOptions
    from flowgen.experiments.solving import VelocityEvaluateOptions

    every = EvaluateOptions()
    parts = [
        options_help("all models", every),
        options_help("flows", FlowEvaluateOptions(), without=(every,)),
        options_help("velocity networks", VelocityEvaluateOptions(), without=(every,)),
    ]
    return "\n\n".join(parts)


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Runs the command and returns its exit code."""
    from flowgen.cli.grammar import apply_words
    from flowgen.data import told_once
    from flowgen.experiments.autoregressive import AutoregressiveExperiment
    from flowgen.experiments.distances import SAMPLES_AT_ONCE
    from flowgen.experiments.tuning import TUNED, with_tuned_plan
    from flowgen.runs import located

    options.checkpoint = str(located(options.checkpoint))
    model, params, trained = load_run(options.checkpoint, options.step)
    groups = ("data", "sampling", "codec.path", "text.encoder", "train.parallel")
    _check_data(rest)
    experiment, asked, given = apply_words(rest, trained, trained.evaluate_options(), groups=groups)
    if "split" not in given and given & {"data", "data.path", "data.name"}:
        asked = dataclasses.replace(asked, split="all")
    _check_sampling(given, experiment, asked)
    if getattr(asked, "samples", 0):
        warn_of_guidance(experiment, options.checkpoint)
    experiment = _on_other_data(trained, experiment)
    params = placed(params, experiment, options)
    if isinstance(experiment, AutoregressiveExperiment) and experiment.sampling.plan == TUNED:
        experiment = with_tuned_plan(experiment, options.checkpoint, params, min(asked.samples, SAMPLES_AT_ONCE))
    with told_once():
        lines = experiment.evaluate(model, params, asked)
    for line in lines:
        say(line)
    return 0


def _check_data(words: list[str]) -> None:
    """Raises ValueError if fields are set that only change which data a flow is trained on."""
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name.startswith(("data.drop_first", "data.images")):
            raise ValueError(f"--{name} has no effect in evaluate, which uses only whole clips; leave it out.")


def _check_sampling(given: set[str], experiment: Any, asked: Any) -> None:
    """Raises ValueError if a sampling field is set that this evaluation does not use."""
    from flowgen.data import PointsConfig
    from flowgen.experiments import MatchingExperiment

    for name in sorted(name for name in given if name.startswith("sampling.")):
        if name.removeprefix("sampling.") in ("num", "prompts", "frechet_samples"):
            raise ValueError(f"--{name} has no effect in evaluate; set the number of samples with --samples.")
        if isinstance(experiment.data, PointsConfig):
            raise ValueError(
                f"--{name} has no effect on points, where evaluate always compares the same solvers; leave it out."
            )
        if not asked.samples and not isinstance(experiment, MatchingExperiment):
            raise ValueError(f"--{name} has no effect without samples; add --samples 100, or leave it out.")


def _on_other_data(trained: Any, changed: Any) -> Any:
    """Returns the experiment on the requested data, with classes matched to the run's by name."""
    from flowgen.data.inventory import name_list, tell
    from flowgen.experiments.images import with_class_names

    known, asked = (getattr(one.data, "classes", ()) for one in (trained, changed))
    if known and not asked:  # another type of data has no classes yet
        return dataclasses.replace(changed, data=dataclasses.replace(changed.data, classes=known))
    if known and asked != known:
        raise ValueError(f"--data.classes is {asked}, but the run's classes are {name_list(known)}; leave it out.")
    if not known and changed.data != trained.data and (found := getattr(with_class_names(changed).data, "classes", ())):
        tell(
            f"The run has no class names, so its labels 0, 1, ... are assumed to mean {name_list(found)}; "
            "check their order."
        )
    return changed
