"""The command `sample`, which draws samples from a trained model."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowgen.cli.options import CHECKPOINT, SHARING, open_run, placed, say, step_or_best, warn_of_guidance
from flowgen.packages import missing


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT)
    parser.add_argument("--step", type=step_or_best, help="checkpoint to use: a number, or best (default: the latest)")
    parser.add_argument("--no-ema", action="store_true", help="use the trained parameters, not their average")
    parser.add_argument(
        "--out",
        default="samples.png",
        help="file or URL to write (default: samples.png): an image, or .npz with floats; for clips also .gif or .mp4",
    )
    parser.add_argument(
        "--single", metavar="DIR", help="also write each sample to a file in this new directory: PNG, or GIF for clips"
    )
    parser.add_argument(
        "--prompt", action="append", help="a prompt; repeat the option to sample several prompts in turn"
    )
    parser.add_argument("--prompts", metavar="FILE", help="text file with one prompt per line")
    parser.epilog = (
        "--autoencoder and --text-encoder override the paths recorded in the run. info --checkpoint lists a "
        f"run's fields and their values. {SHARING}"
    )


def fields_help() -> str:
    """Returns the help on the fields that each kind of model accepts."""
    from flowgen.cli.grammar import options_help
    from flowgen.experiments import SamplingConfig, SolverConfig
    from flowgen.experiments.drawing import DrawOptions
    from flowgen.experiments.flow_options import FlowDrawOptions
    from flowgen.experiments.solving import VelocityDrawOptions
    from flowgen.experiments.token_options import TokenDrawOptions, TokenSamplingConfig
    from flowgen.experiments.video_flow import ClipDrawOptions

    every, flows = DrawOptions(), FlowDrawOptions()
    parts = [
        options_help("all models", every),
        options_help("flows", flows, without=(every,)),
        options_help("video flows", ClipDrawOptions(), without=(flows,)),
        options_help("flows of numbers", TokenDrawOptions(), without=(every,)),
        options_help("velocity networks", VelocityDrawOptions(), without=(every,)),
        options_help("sampling of flows (--num is short for --sampling.num)", SamplingConfig(), omit=("prompts",)),
        options_help("sampling of flows of numbers (--num is short for --sampling.num)", TokenSamplingConfig()),
        options_help("sampling of velocity networks (--num is short for --sampling.num)", SolverConfig()),
    ]
    return "\n\n".join(parts)


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Runs the command and returns its exit code."""
    import numpy as np

    from flowgen.cli.grammar import apply_words
    from flowgen.cli.output import Output
    from flowgen.places import Destination, check_local
    from flowgen.runs import located

    for name in ("single", "prompts"):
        check_local(f"--{name}", getattr(options, name) or "")
    destination = Destination(options.out)
    output = Output(destination.path, None if options.single is None else Path(options.single))
    output.check()
    prompts = _prompts(options)
    options.checkpoint = str(located(options.checkpoint))  # a tuned plan is in the same folder
    opened = open_run(options.checkpoint, options.step)
    make_options = opened.experiment.draw_options
    if make_options is None:
        raise ValueError(
            f"{options.checkpoint} is an autoencoder run, which cannot be sampled; train a flow on its latents."
        )
    groups = ("sampling", "codec.path", "text.encoder", "train.parallel")
    experiment, asked, given = apply_words(rest, opened.experiment, make_options(), groups=groups)
    experiment = _with_prompts(experiment, prompts, given)
    output.check_fits(experiment, asked)
    _check_guidance(experiment, given)
    warn_of_guidance(experiment, opened)
    model, params = opened.load(ema=not options.no_ema)
    params = placed(params, experiment, options)
    experiment = _with_plan(experiment, model, params, options.checkpoint, asked, given)
    more: dict[str, Any] = {"progress": _progress_bar()} if getattr(asked, "progress", False) else {}
    samples = experiment.draw(model, params, asked, say, **more)
    output.write(experiment, model, params, samples, asked)
    destination.send()
    say(f"Wrote {options.out}" + (f" and {len(samples.arrays)} files in {output.single}" if output.single else ""))
    finite = np.isfinite(samples.arrays.reshape(len(samples.arrays), -1)).all(axis=1)
    if not finite.all():
        raise FloatingPointError(f"{(~finite).sum()} of {len(finite)} samples are not finite; lower --guidance.")
    return 0


def _with_plan(experiment: Any, model: Any, params: Any, run_dir: str, asked: Any, given: set[str]) -> Any:
    """Returns the experiment with the run's tuned plan, if requested. With --tune, first measures and saves the
    plan.
    """
    from flowgen.experiments import tuning
    from flowgen.experiments.drawing import AT_ONCE

    sampling, tune = experiment.sampling, getattr(asked, "tune", False)
    if tune and "sampling.plan" in given and sampling.plan != tuning.TUNED:
        raise ValueError("--tune chooses the plan; leave --plan out.")
    if not tune and getattr(sampling, "plan", None) != tuning.TUNED:
        return experiment
    if not tune:
        return tuning.with_tuned_plan(experiment, run_dir, params, min(asked.batch or AT_ONCE, sampling.num))
    why_unsaved = tuning.why_plan_unsaved(run_dir)
    tuned = tuning.tuned_plan(experiment, model, params, asked, say)
    if why_unsaved:
        say(f"The plan is used for these samples but not saved, because {why_unsaved}; to keep a plan, tune a copy.")
    else:
        say(f"Saved {tuning.save_tuned_plan(run_dir, tuned)}")
    return tuning.with_plan(experiment, tuned)


def _check_guidance(experiment: Any, given: set[str]) -> None:
    """Raises ValueError if the command line sets guidance fields that would have no effect."""
    sampling, model = experiment.sampling, experiment.model
    conditional = any(getattr(model, name, 0) for name in ("num_classes", "text_dim", "context"))
    if (
        "sampling.guidance" in given
        and sampling.guidance
        and not conditional
        and getattr(sampling, "temperature", 1) == 1
    ):
        raise ValueError(
            f"sampling.guidance is {sampling.guidance:g}, but the model is conditioned on neither classes nor text; "
            "leave it out, or set --temperature to a value other than 1."
        )


def _with_prompts(experiment: Any, prompts: tuple[str, ...], given: set[str]) -> Any:
    """Returns the experiment with the command line's prompts, each sampled once unless --num is given."""
    sampling = experiment.sampling
    if prompts:
        if not getattr(experiment.model, "text_dim", 0):
            raise ValueError(f"--prompt is {prompts[0]!r}, but this model is not conditioned on text; leave it out.")
        if "sampling.prompts" in given:
            raise ValueError("--sampling.prompts sets the same field as --prompt and --prompts; use only one of them.")
        sampling = dataclasses.replace(sampling, prompts=prompts)
    elif "sampling.prompts" not in given:
        return experiment
    if "sampling.num" not in given:
        sampling = dataclasses.replace(sampling, num=max(1, len(sampling.prompts)))
    return dataclasses.replace(experiment, sampling=sampling)


def _prompts(options: argparse.Namespace) -> tuple[str, ...]:
    """Returns the prompts from the command line. Raises ValueError if the file of prompts contains none."""
    if options.prompt is not None and options.prompts is not None:
        raise ValueError(
            "--prompt and --prompts cannot be combined; put all prompts in the file, or give each one with --prompt."
        )
    if options.prompts is None:
        return tuple(options.prompt or ())
    from flowgen.documents import read_bytes

    try:
        lines = read_bytes(options.prompts).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise FileNotFoundError(
            f"--prompts {options.prompts} cannot be read ({error.strerror or error}); give a text file with one "
            "prompt per line."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {options.prompts} is not UTF-8 text ({error}); convert it to UTF-8.") from error
    if not any(line.strip() for line in lines):
        raise ValueError(f"--prompts {options.prompts} contains no prompts; write one per line.")
    return tuple(line.strip() for line in lines if line.strip())


def _progress_bar() -> Callable[[int, int], None]:
    """Returns a callback that shows a progress bar on standard error for the decoded tokens of each batch."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise missing("--progress", "tqdm", otherwise="leave it out") from error
    bars: list[Any] = []  # the current batch's bar, until the batch is decoded

    def progress(solved: int, total: int) -> None:
        if not bars:
            bars.append(tqdm(total=total, file=sys.stderr, unit="token", dynamic_ncols=True))
        bars[0].update(solved)
        if bars[0].n >= total:
            bars.pop().close()

    return progress
