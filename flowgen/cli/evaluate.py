"""The command `evaluate`."""

from __future__ import annotations

import argparse
from typing import Any

from flowgen.cli.options import MAX_SEED, check_options, fields_of, say, step_or_best, whole_number


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--checkpoint", required=True, help="directory of a run")
    parser.add_argument("--step", type=step_or_best, help="checkpoint to take: a number, or best (default: the latest)")
    parser.add_argument(
        "--split",
        choices=("train", "eval", "all"),
        help="of the data (default: eval; of other data than the run's, all)",
    )
    parser.add_argument(
        "--noise",
        choices=("model", "uniform"),
        help="flows: noise on the images, what the model was trained under (default), or uniform dequantisation",
    )
    parser.add_argument("--samples", type=whole_number(2), help="samples to draw and compare with the data")
    parser.add_argument("--unconditional", action="store_true", help="do not give labels to a class model")
    parser.add_argument("--autoencoder", metavar="DIR", help="where the autoencoder is, if not where the run says")
    parser.add_argument("--text-encoder", metavar="DIR", help="where the text encoder is, if not where the run says")
    parser.epilog = (
        "Other data than the run's: --data.source folder --data.path DIR. Samples may be drawn otherwise than the run "
        "says: --sampling.guidance 2 --sampling.plan jacobi; info --checkpoint lists the fields."
    )
    parser.add_argument("--batch", type=whole_number(1), default=256, help="samples per compiled call (default: 256)")
    parser.add_argument("--seed", type=whole_number(0, MAX_SEED), default=0, help="of noise and samples (default: 0)")


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Returns the exit code."""
    from flowgen import checkpoint, config
    from flowgen.data import told_once
    from flowgen.tasks import task_of
    from flowgen.tasks.frozen import with_codec

    names = fields_of(rest, groups=("data", "sampling"), command="evaluate")
    if options.split is None:
        options.split = "all" if {"data.path", "data.source"} & {*names} else "eval"
    flow, params, experiment = checkpoint.load(options.checkpoint, options.step)
    check_options(options, experiment.model, "evaluate")
    _check_sampling([name for name in names if name.startswith("sampling.")], experiment, options)
    experiment = _on_other_data(experiment, config.override(experiment, rest))
    experiment = with_codec(experiment, autoencoder=options.autoencoder, text_encoder=options.text_encoder)
    with told_once():
        lines = task_of(experiment.model).evaluate(experiment, flow, params, options)
    for line in lines:
        say(line)
    return 0


def _check_sampling(names: list[str], experiment: Any, options: argparse.Namespace) -> None:
    """Raises ValueError where fields of sampling are set that this evaluation does not ask."""
    from flowgen.data import PointsConfig
    from flowgen.tasks import matching, task_of

    for name in names:
        if name.removeprefix("sampling.") in ("num", "prompts", "frechet_samples"):
            raise ValueError(f"--{name} is not asked by evaluate, which draws as many samples as --samples says.")
        if isinstance(experiment.data, PointsConfig):
            raise ValueError(f"--{name} is not asked by evaluate, which compares solvers of its own on points.")
        if not options.samples and task_of(experiment.model) is not matching:
            raise ValueError(f"--{name} is given, and no samples are drawn; add --samples 100, or leave it out.")


def _on_other_data(experiment: Any, changed: Any) -> Any:
    """The experiment with the data that are asked for, whose classes are those of the run by name."""
    from flowgen.data.inventory import name_list, tell
    from flowgen.tasks.images import named

    known, asked = (getattr(one.data, "classes", ()) for one in (experiment, changed))
    if known and asked != known:
        raise ValueError(
            f"--data.classes is {asked}, and the numbers of the run are those of {name_list(known)}; leave it out."
        )
    if not known and changed.data != experiment.data and (found := getattr(named(changed).data, "classes", ())):
        tell(
            f"The run kept no names of classes, so its numbers 0, 1, ... are taken for {name_list(found)}; check "
            "their order."
        )
    return changed
