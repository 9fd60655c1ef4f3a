"""The command `encode`, which computes and stores the latents and text features of a dataset."""

from __future__ import annotations

import argparse
import time
from typing import Any

from flowgen.cli.options import say


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.add_argument("--config", required=True, help="Python file with a config() that returns a flow on latents")
    parser.add_argument("--out", required=True, help="new directory for the latents and caption features")
    parser.add_argument("--debug", action="store_true", help="encode data for the experiment that train --debug runs")
    parser.epilog = "Any field of the config can be set, such as --codec.path DIR --data.name folder --data.path DIR."


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Runs the command and returns its exit code."""
    from flowgen import checkpoint
    from flowgen.cli.grammar import load_experiment
    from flowgen.data import LatentsConfig, told_once
    from flowgen.data.latent_files import LatentWriter
    from flowgen.experiments.autoregressive import AutoregressiveExperiment
    from flowgen.experiments.latents import provenance
    from flowgen.runs.new_folder import new_folder

    checkpoint.check_new(options.out)
    experiment = load_experiment(options, rest)
    if not isinstance(experiment, AutoregressiveExperiment) or not experiment.is_latent:
        raise ValueError(f"{experiment.name} has no codec and no text encoder, so nothing needs encoding; set --codec.")
    if isinstance(experiment.data, LatentsConfig):
        raise ValueError("data are cached latents, which are already encoded; give images or clips instead.")
    # The provenance makes training with other networks raise an error.
    data, experiment = experiment.data, experiment.with_provenance()
    splits = ("train", "eval") if data.eval_fraction > 0 else ("train",)
    with new_folder(options.out) as unfinished:
        writer, names = LatentWriter(unfinished), ()
        with told_once():
            for split in splits:
                names = _encode(writer, experiment, split)
        writer.finish(class_names=names, provenance=provenance(data, experiment.encoding))
    say(f"Wrote {options.out}; train on it with --data Latents --data.path {options.out}")
    return 0


def _encode(writer: Any, experiment: Any, split: Any) -> tuple[str, ...]:
    """Writes the latents of a split and returns its class names."""
    from flowgen.data.dataset import buckets_of
    from flowgen.data.latents import kind_of
    from flowgen.experiments.drawing import per_second
    from flowgen.experiments.latents import encoded_shards, null_features, pixel_dataset

    dataset = pixel_dataset(experiment.data, experiment.encoding, split)
    for bucket in buckets_of(dataset):
        null = null_features(experiment.encoding, bucket)
        began = time.perf_counter()
        count = _write(
            writer,
            split,
            encoded_shards(experiment.encoding, bucket, flip=experiment.data.flip and split == "train"),
            kind=kind_of(bucket),
            null=null,
        )
        height, width, _ = bucket.event_shape[-3:]
        say(f"{split}: {count} of {height} x {width} pixels, {per_second(count / (time.perf_counter() - began))}")
    return dataset.class_names


def _write(writer: Any, split: Any, shards: Any, **about: Any) -> int:
    from flowgen.data.latents import merged

    count = 0
    for shard in merged(shards):
        writer.add(split, shard, **about)
        count += shard.size
    return count
