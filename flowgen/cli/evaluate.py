"""The command `evaluate`."""

from __future__ import annotations

import argparse

from flowgen.cli.options import MAX_SEED, say, step_or_best, whole_number


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--checkpoint", required=True, help="directory of a run")
    parser.add_argument("--step", type=step_or_best, help="checkpoint to take: a number, or best (default: the latest)")
    parser.add_argument("--split", choices=("train", "eval", "all"), default="eval")
    parser.add_argument(
        "--noise",
        choices=("model", "uniform"),
        default="model",
        help="noise on the images: what the model was trained under, or uniform dequantisation",
    )
    parser.add_argument("--unconditional", action="store_true", help="do not give labels to a class model")
    parser.epilog = "Other data than the run's: --data.source folder --data.path DIR."
    parser.add_argument("--batch", type=whole_number(1), default=256)
    parser.add_argument("--seed", type=whole_number(0, MAX_SEED), default=0)


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Returns the exit code."""
    import jax

    from flowgen import checkpoint, config
    from flowgen.evaluation import flow_bits_per_dim, gaussian_bits_per_dim

    other = [word for word in rest if word.startswith("--") and not word.startswith("--data.")]
    if other:
        raise ValueError(f"{other[0]} is not an option of evaluate; of the config, only --data.* can be set.")
    flow, params, experiment = checkpoint.load(options.checkpoint, options.step)
    experiment = config.override(experiment, rest)
    source = experiment.source(options.split)
    sigma = flow.config.noise_std if options.noise == "model" else 0.0
    bits = flow_bits_per_dim(
        flow,
        params,
        source,
        jax.random.key(options.seed),
        noise_std=sigma,
        batch_size=options.batch,
        conditional=not options.unconditional,
    )
    fitted = experiment.source("train" if options.split == "eval" else options.split)
    baseline = gaussian_bits_per_dim(fitted, source, noise_std=sigma)
    noise = f"Gaussian noise of std {sigma:g}" if sigma else "uniform dequantisation"
    say(f"{len(source)} images ({options.split}), {noise}")
    say(f"bits/dim {bits:.4f}")
    say(f"bits/dim of a Gaussian fit {baseline:.4f}")
    return 0
