"""What tasks on pictures share: the data of a split, its batches, and the debug shrink."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from flowgen.data import (
    Batch,
    DataConfig,
    Loader,
    PointsConfig,
    Source,
    check_classes,
    found_classes,
    load,
    prefetch,
)
from flowgen.data.buckets import BucketedSource, BucketLoader
from flowgen.data.latents import LatentSource
from flowgen.data.sources import Split


def check_foreign(experiment: Any, kind: str, how: str, groups: tuple[str, ...]) -> None:
    """Raises ValueError where a group of the config is given that a model of this kind has no use for.

    Example:
        check_foreign(experiment, "DiT", "flow matching", ("likelihood", "codec"))
    """
    given = [name for name in groups if getattr(experiment, name) is not None]
    if given:
        told = f"{given[0]} is" if len(given) == 1 else f"{' and '.join(given)} are"
        it = "it" if len(given) == 1 else "them"
        raise ValueError(f"{told} given, but a {kind} is trained by {how} and has no use for {it}; leave {it} out.")


def image_source(experiment: Any, split: Split) -> Source:
    """Returns the data of a split at the model's size. Raises ValueError where they do not fit each other.

    Example:
        source = image_source(experiment, "train")
    """
    model = experiment.model
    source = load(experiment.data, image_size=model.image_hw, channels=model.channels, split=split)
    if not isinstance(source, Source):
        raise ValueError("data.aspects is set, but this model has one size; leave it out.")
    if model.num_classes:
        check_classes(source, model.num_classes)
    return source


def named(experiment: Any) -> Any:
    """Returns the experiment with the names of the classes of its data, as it is kept with a run; itself where it has
    names already, or its model has no use for them.

    Example:
        named(experiment).data.classes  # ("cat", "dog", "fox")
    """
    data = experiment.data
    if not getattr(experiment.model, "num_classes", 0) or isinstance(data, PointsConfig) or data.classes:
        return experiment
    if data.source in ("folder", "npz", "encoded") and not data.path:  # as of published weights
        return experiment
    return dataclasses.replace(experiment, data=dataclasses.replace(data, classes=found_classes(data)))


def drawn_classes(experiment: Any) -> int:
    """Returns of how many classes a run draws samples in turn: those with a name where it knows names, else all.

    Example:
        labels = grid_labels(20, drawn_classes(experiment))
    """
    count, names = experiment.model.num_classes, getattr(experiment.data, "classes", ())
    return min(count, len(names)) if names else count


def image_batches(experiment: Any, source: Source | BucketedSource) -> Callable[[int, int], Iterator[Batch]]:
    """Returns this process's batches of steps start..stop-1, a function for `Job`; latents were mirrored before.

    Example:
        batches = image_batches(experiment, source)(0, 1000)
    """
    options: dict[str, Any] = {
        "batch_size": experiment.train.batch_size,
        "seed": experiment.train.seed,
        "flip": experiment.data.flip and not holds_latents(source),
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    loader = BucketLoader(source, **options) if isinstance(source, BucketedSource) else Loader(source, **options)
    return lambda start, stop: prefetch(loader, start, stop)


def holds_latents(source: Source | BucketedSource) -> bool:
    """Returns whether a source gives latents instead of pictures.

    Example:
        holds_latents(LatentSource((shard,)))  # True
    """
    return isinstance(source.buckets[0] if isinstance(source, BucketedSource) else source, LatentSource)


def shrink_images(experiment: Any, model: Any, **changes: Any) -> Any:
    """Returns the experiment with another model and other changes, on the built-in digits, and a few steps of all.

    Example:
        small = shrink_images(experiment, dataclasses.replace(experiment.model, image_size=8))
    """
    data = DataConfig(flip=experiment.data.flip, eval_fraction=experiment.data.eval_fraction)
    return shrink_run(dataclasses.replace(experiment, **{"model": model, "data": data, **changes}))


def shrink_run(experiment: Any) -> Any:
    """Returns the experiment with a few steps, small batches and few samples.

    Example:
        small = shrink_run(experiment)
    """
    return dataclasses.replace(
        experiment,
        optim=dataclasses.replace(experiment.optim, warmup_steps=min(experiment.optim.warmup_steps, 2)),
        train=dataclasses.replace(experiment.train, steps=8, batch_size=16, accumulation=1),
        log=dataclasses.replace(experiment.log, log_every=2, eval_every=4, sample_every=4, checkpoint_every=4),
        sampling=dataclasses.replace(experiment.sampling, num=4),
    )
