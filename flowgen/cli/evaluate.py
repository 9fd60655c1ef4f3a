"""The command `evaluate`, which prints the metrics of a model on data and saves them as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import time
from importlib.metadata import version
from typing import Any

from flowgen.cli.options import CHECKPOINT, SHARING, open_run, placed, say, step_or_best, warn_of_guidance


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT)
    parser.add_argument("--step", type=step_or_best, help="checkpoint to use: a number, or best (default: the latest)")
    parser.add_argument(
        "--out", metavar="FILE.json", help="new file or URL for the metrics (default: RUN/evaluations/STEP-TIME.json)"
    )
    parser.epilog = (
        "To use other data, add --data.name folder --data.path DIR. To change how samples are drawn, add fields such "
        f"as --guidance 2 --plan jacobi; info --checkpoint lists them. {SHARING}"
    )


def fields_help() -> str:
    """Returns the help on the fields that each kind of model accepts."""
    from flowgen.cli.grammar import options_help
    from flowgen.experiments.drawing import CompareOptions, EvaluateOptions
    from flowgen.experiments.flow import ImageEvaluateOptions
    from flowgen.experiments.flow_options import FlowEvaluateOptions
    from flowgen.experiments.solving import VelocityEvaluateOptions
    from flowgen.experiments.token_options import TokenEvaluateOptions

    every, flows, compared = EvaluateOptions(), FlowEvaluateOptions(), CompareOptions()
    parts = [
        options_help("all models", every),
        options_help("flows", flows, without=(every,)),
        options_help("flows of numbers", TokenEvaluateOptions(), without=(every,)),
        options_help("velocity networks", VelocityEvaluateOptions(), without=(compared,)),
        options_help("samples of image flows and velocity networks", compared, without=(every,)),
        options_help("image flows", ImageEvaluateOptions(), without=(flows, compared)),
    ]
    return "\n\n".join(parts)


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Runs the command and returns its exit code."""
    from flowgen.cli.grammar import apply_words
    from flowgen.data import told_once
    from flowgen.experiments.autoregressive import AutoregressiveExperiment
    from flowgen.experiments.distances import SAMPLES_AT_ONCE
    from flowgen.experiments.drawing import CompareOptions
    from flowgen.experiments.tuning import TUNED, with_tuned_plan
    from flowgen.runs import check_new_evaluation, evaluation_path, located, save_evaluation
    from flowgen.runs.evaluations import ANOMALY, NEIGHBOURS

    began = time.time()
    named, options.checkpoint = options.checkpoint, str(located(options.checkpoint))
    opened = open_run(options.checkpoint, options.step)
    trained = opened.experiment
    groups = ("data", "sampling", "codec.path", "text.encoder", "train.parallel")
    _check_data(rest)
    experiment, asked, given = apply_words(rest, trained, trained.evaluate_options(), groups=groups)
    if options.out:
        made = {NEIGHBOURS: getattr(asked, "neighbours", 0), ANOMALY: getattr(asked, "anomaly", "")}
        check_new_evaluation(options.out, [suffix for suffix, asked_for in made.items() if asked_for])
    if "split" not in given and given & {"data", "data.path", "data.name"}:
        asked = dataclasses.replace(asked, split="all")
    _check_sampling(given, experiment, asked)
    if getattr(asked, "samples", 0):
        warn_of_guidance(experiment, opened)
    experiment = _on_other_data(trained, experiment)
    model, params = opened.load()
    params = placed(params, experiment, options)
    if isinstance(experiment, AutoregressiveExperiment) and experiment.sampling.plan == TUNED:
        experiment = with_tuned_plan(experiment, options.checkpoint, params, min(asked.samples, SAMPLES_AT_ONCE))
    saves = bool(options.out) or _can_save(options.checkpoint, named)
    with told_once():
        compares = isinstance(asked, CompareOptions) and experiment.data != trained.data
        others = {"trained_on": trained.data} if compares else {}
        evaluation = experiment.evaluate(model, params, _with_cache(asked, options.checkpoint), **others)
    for line in evaluation.lines:
        say(line)
    if saves:
        path = options.out or evaluation_path(options.checkpoint, opened.step)
        about = _about(named, opened.step, experiment, asked, began)
        written = save_evaluation(path, {**about, **evaluation.record()}, evaluation.files)
        say(f"Wrote {' and '.join(written)}")
    return 0


def _can_save(run_dir: str, named: str) -> bool:
    """Returns whether evaluations can be saved in a run; if not, prints why. named: the run's name on the command
    line.
    """
    if not (problem := _why_unsaved(run_dir)):
        return True
    say(f"The metrics are not saved, because {named} is {problem}; add --out FILE.json to save them.")
    return False


def _why_unsaved(run_dir: str) -> str:
    """Returns why no evaluations can be saved in a run, or "" if they can."""
    from flowgen.places import is_remote
    from flowgen.runs import is_exported

    if is_exported(run_dir):
        return "an exported model"
    return "" if is_remote(run_dir) or os.access(run_dir, os.W_OK | os.X_OK) else "not writable"


def _with_cache(asked: Any, run_dir: str) -> Any:
    """Returns the options with the run's folder as the cache of data statistics, unless a cache is given."""
    from flowgen.places import is_remote
    from flowgen.runs import EVALUATIONS

    if getattr(asked, "cache", None) != "" or is_remote(run_dir) or _why_unsaved(run_dir):
        return asked
    return dataclasses.replace(asked, cache=os.path.join(run_dir, EVALUATIONS))


def _about(run_dir: str, step: int, experiment: Any, asked: Any, began: float) -> dict[str, Any]:
    """Returns the settings and versions that an evaluation's JSON file records."""
    import jax

    import flowgen
    from flowgen.settings import to_plain

    sampling = getattr(experiment, "sampling", None)
    return {
        "name": experiment.name,
        "run": str(run_dir),
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "seconds": round(time.time() - began, 1),
        "options": to_plain(asked),
        "data": to_plain(experiment.data),
        "sampling": None if sampling is None else to_plain(sampling),
        "versions": {
            "flowgen": flowgen.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "jaxlib", "flax", "numpy", "scipy")},
        },
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


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
    """Returns the experiment with the requested data, whose classes are matched to the run's by name."""
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
