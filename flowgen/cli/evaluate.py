"""The command `evaluate`."""

from __future__ import annotations

import argparse
from typing import Any

from flowgen.cli.options import MAX_SEED, check_options, say, step_or_best, whole_number


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--checkpoint", required=True, help="directory of a run")
    parser.add_argument("--step", type=step_or_best, help="checkpoint to take: a number, or best (default: the latest)")
    parser.add_argument("--split", choices=("train", "eval", "all"), default="eval")
    parser.add_argument(
        "--noise",
        choices=("model", "uniform"),
        help="flows: noise on the images, what the model was trained under (default), or uniform dequantisation",
    )
    parser.add_argument("--samples", type=whole_number(2), help="samples to draw and compare with the data")
    parser.add_argument("--unconditional", action="store_true", help="do not give labels to a class model")
    parser.add_argument("--autoencoder", metavar="DIR", help="where the autoencoder is, if not where the run says")
    parser.add_argument("--text-encoder", metavar="DIR", help="where the text encoder is, if not where the run says")
    parser.epilog = "Other data than the run's: --data.source folder --data.path DIR."
    parser.add_argument("--batch", type=whole_number(1), default=256)
    parser.add_argument("--seed", type=whole_number(0, MAX_SEED), default=0)


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Returns the exit code."""
    from flowgen import checkpoint, config
    from flowgen.data import told_once
    from flowgen.tasks import task_of
    from flowgen.tasks.frozen import with_codec

    other = [word for word in rest if word.startswith("--") and not word.startswith("--data.")]
    if other:
        raise ValueError(f"{other[0]} is not an option of evaluate; of the config, only --data.* can be set.")
    flow, params, experiment = checkpoint.load(options.checkpoint, options.step)
    check_options(options, experiment.model, "evaluate")
    experiment = _on_other_data(experiment, config.override(experiment, rest))
    experiment = with_codec(experiment, autoencoder=options.autoencoder, text_encoder=options.text_encoder)
    with told_once():
        lines = task_of(experiment.model).evaluate(experiment, flow, params, options)
    for line in lines:
        say(line)
    return 0


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
