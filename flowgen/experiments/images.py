"""Opens an experiment's images or clips, and prepares their batches and class names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax

from flowgen.data import (
    Batch,
    ClipsConfig,
    DataConfig,
    Dataset,
    LatentsConfig,
    Loader,
    check_classes,
    found_classes,
    load,
    prefetch,
)
from flowgen.data.dataset import OF_FILES, OWN, BucketedDataset, Split, buckets_of, of_one_shape
from flowgen.data.inventory import name_list, tell
from flowgen.data.latents import LatentDataset
from flowgen.experiments.experiment import Experiment
from flowgen.training import TrainConfig

E = TypeVar("E", bound=Experiment)


class TrainingImages(NamedTuple):
    """The images that a model was trained on, or images that replace them. name: plural noun for these images."""

    dataset: Dataset
    name: str


def training_images(
    experiment: Experiment, trained_on: Any, split: Split, read: Callable[[Any, Split], Dataset]
) -> TrainingImages:
    """Returns the images that a model was trained on or, if they cannot be opened, images of the evaluated data.

    experiment: the experiment with the evaluated data. trained_on: the config of the data that the model was trained
    on; None for the data of the experiment. split: the evaluated split. read: opens a split of an experiment's data.

    Example:
        training_images(experiment, None, "eval", lambda one, split: one.dataset(split)).name  # "training images"
    """
    try:
        own = experiment if trained_on is None else dataclasses.replace(experiment, data=trained_on)
        return TrainingImages(read(own, "train"), "training images")
    except (OSError, ValueError) as error:
        if trained_on is None:
            raise
        reason = error
    other, name = compared_split(split)
    tell(f"The run's training images cannot be opened, so the {name} take their place: {reason}")
    return TrainingImages(read(experiment, other), name)


def compared_split(split: Split) -> tuple[Split, str]:
    """Returns the split that replaces the training images if `split` is evaluated, and a name for its images.

    Example:
        compared_split("eval")  # ("train", "images of the train split")
    """
    return ("train", "images of the train split") if split == "eval" else (split, "evaluated images")


def image_dataset(data: DataConfig, model: Any, split: Split, *, labelled: bool = True) -> Dataset:
    """Returns the images in a split, at the size the model expects. Raises ValueError if they do not fit the model.

    labelled: whether the images must have labels if the model is class-conditional.

    Example:
        dataset = image_dataset(experiment.data, experiment.model, "train")
    """
    height, width, channels = model.event_shape
    dataset = of_one_shape(load(data, image_size=(height, width), channels=channels, split=split), "this model")
    if model.num_classes and labelled:
        check_classes(dataset, model.num_classes)
    return dataset


def with_class_names(experiment: E) -> E:
    """Returns the experiment with `data.classes` set to the class names that are found in the data.

    Returns the experiment unchanged if it already has class names, if its model does not use classes, or if its data
    are `own`, or files without a path.

    Example:
        with_class_names(experiment).data.classes  # ("cat", "dog", "fox")
    """
    data = experiment.data
    if not getattr(experiment.model, "num_classes", 0) or not hasattr(data, "classes") or data.classes:
        return experiment
    of_files = isinstance(data, LatentsConfig) or data.name in (*OF_FILES, "npz", OWN)
    if of_files and not data.path:  # This is the case in experiments for published weights.
        return experiment
    return dataclasses.replace(experiment, data=dataclasses.replace(data, classes=found_classes(data)))


def tell_unused_classes(
    dataset: Dataset | BucketedDataset, data: DataConfig | ClipsConfig | LatentsConfig, num_classes: int
) -> None:
    """Warns if the user's own data have classes but the model is not conditioned on classes.

    Example:
        tell_unused_classes(dataset, experiment.data, experiment.model.num_classes)
    """
    if data.path and dataset.class_names and not num_classes:
        count = len(dataset.class_names)
        tell(
            f"The data have {count} classes ({name_list(dataset.class_names)}), but they are not used, because "
            f"model.num_classes is 0; set it to {count} to train with them."
        )


def tell_repeats(dataset: Dataset | BucketedDataset, train: TrainConfig) -> None:
    """Warns if batches contain some samples more than once.

    Example:
        tell_repeats(dataset, experiment.train)
    """
    if len(dataset) < train.batch_size:
        tell(
            f"train.batch_size is {train.batch_size}, but there are only {len(dataset)} training samples, so each "
            "batch repeats some; lower it."
        )


def image_batches(
    dataset: Dataset | BucketedDataset, data: DataConfig | ClipsConfig | LatentsConfig, train: TrainConfig
) -> Callable[[int, int], Iterator[Batch]]:
    """Returns a function for `Job`: (start, stop) -> an iterator over this process's batches for steps start..stop-1.

    Latents are not flipped; with `data.flip`, flipped copies of the images are encoded instead.

    Example:
        batches = image_batches(dataset, experiment.data, experiment.train)(0, 1000)
    """
    tell_repeats(dataset, train)
    loader = Loader(
        dataset,
        batch_size=train.batch_size,
        seed=train.seed,
        flip=not isinstance(data, LatentsConfig) and data.flip and not holds_latents(dataset),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return lambda start, stop: prefetch(loader, start, stop)


def holds_latents(dataset: Dataset | BucketedDataset) -> bool:
    """Returns whether a dataset contains latents instead of images.

    Example:
        holds_latents(LatentDataset((shard,)))  # True
    """
    return isinstance(buckets_of(dataset)[0], LatentDataset)
