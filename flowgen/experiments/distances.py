"""Compares samples with data by their features: draws samples, computes statistics, and returns metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from flowgen.arrays import digest_of
from flowgen.data import Dataset, fixed_batches, from_uint8
from flowgen.evaluation import Estimate, FeatureStatistics, feature_statistics, mean_of, train_classifier
from flowgen.evaluation.features import has_labels
from flowgen.experiments.drawing import Conditions, DrawBatch, check_samples

SAMPLES_AT_ONCE = 256
# Digests of extractors begin with what they compute.
CLASSIFIER, PIXELS = "classifier", "pixels"

Images = Float[np.ndarray, "n height width c"]


@dataclass(frozen=True)
class FeatureExtractor:
    """Computes features of images in [-1, 1]. Also predicts classes, unless `classes` is None.

    name: what to call the features in the output, such as "pixels". digest: identifies the extractor; only statistics
    of the same extractor are compared.
    """

    name: str
    features: Callable[[Images], Float[np.ndarray, "n f"]]
    classes: Callable[[Images], Int[np.ndarray, " n"]] | None = None
    digest: str = ""


def train_features(dataset: Dataset, name: str = "training images") -> FeatureExtractor:
    """Trains a classifier and returns an extractor of its features. Without labels, the features are the pixels.

    name: plural noun for the images in the dataset.

    Example:
        extractor = train_features(experiment.dataset("train"))
    """
    if not has_labels(dataset):
        return pixel_features()
    classifier = train_classifier(dataset, jax.random.key(0))
    digest = digest_of(jax.tree.leaves(classifier.variables))
    return FeatureExtractor(
        f"a classifier of the {name}", classifier.features, classifier.classes, f"{CLASSIFIER} {digest}"
    )


def pixel_features() -> FeatureExtractor:
    """Returns an extractor whose features are the pixels.

    Example:
        extractor = pixel_features()
    """
    return FeatureExtractor("pixels", lambda images: images.reshape(len(images), -1), digest=PIXELS)


class DrawnFeatures(NamedTuple):
    """Features of samples.

    statistics: statistics of the features. shown: the first samples, whose nearest training images will be shown.
    class_accuracy: the fraction of samples whose class is correct; None if samples have no classes or the extractor
    predicts none.
    """

    statistics: FeatureStatistics
    shown: Images
    class_accuracy: Estimate | None


def draw_features(
    draw_batch: DrawBatch,
    extractor: FeatureExtractor,
    data: Dataset,
    num: int,
    *,
    seed: int = 0,
    conditions: Conditions | None = None,
    shown: int = 0,
) -> DrawnFeatures:
    """Draws `num` samples in batches, and returns statistics of their features.

    A sample's class is correct if the extractor predicts the label that the sample is conditioned on.

    conditions: a function from positions in the data to labels, texts or contexts; None for unconditional samples. The
    positions cover the data evenly, so samples have the class proportions of the data. shown: number of samples to
    return.

    Raises the errors of `check_samples`.

    Example:
        drawn = draw_features(partial(experiment.draw_batch, network, variables), extractor, held_out, 1000)
    """
    # The data may be sorted by class, so if there are more data than samples, positions are evenly spaced.
    positions = np.arange(num) * len(data) // num if num < len(data) else np.arange(num) % len(data)
    size, kept, correct = min(SAMPLES_AT_ONCE, num), [], []

    def batches() -> Iterator[np.ndarray]:
        for first in range(0, num, size):
            asked = np.resize(positions[first:], size)
            cond = None if conditions is None else conditions(asked)
            drawn, _ = draw_batch(jax.random.key(seed), np.arange(first, first + size), cond)
            check_samples(drawn[: num - first], first)
            samples = np.clip(drawn[: num - first], -1, 1)
            if first < shown:
                kept.append(samples[: shown - first])
            if extractor.classes is not None and conditions is not None:
                labels = data[asked[: len(samples)]].labels
                correct.append((extractor.classes(samples) == labels)[labels >= 0])
            yield extractor.features(samples)

    statistics = feature_statistics(batches(), num)
    accuracy = mean_of(np.concatenate(correct).astype(np.float64)) if correct and any(map(len, correct)) else None
    return DrawnFeatures(statistics, np.concatenate(kept) if kept else np.empty((0, *data.event_shape)), accuracy)


def data_features(extractor: FeatureExtractor, data: Dataset) -> Iterator[Float[np.ndarray, "b f"]]:
    """Yields the features of a dataset's images in batches.

    Example:
        statistics = feature_statistics(data_features(extractor, held_out), len(held_out))
    """
    for batch, mask in fixed_batches(data, min(SAMPLES_AT_ONCE, len(data))):
        yield extractor.features(np.asarray(from_uint8(batch.pixels)))[mask]


def sample_metrics(
    draw_batch: DrawBatch,
    extractor: FeatureExtractor,
    data: Dataset,
    num: int,
    *,
    seed: int = 0,
    conditions: Conditions | None = None,
) -> dict[str, float]:
    """Returns the Fréchet distance between samples and the data, and the fraction of samples with the correct class.

    The fraction is omitted if it is unknown. The arguments are those of `draw_features`.

    Example:
        metrics = sample_metrics(partial(experiment.draw_batch, network, variables), extractor, held_out, 1000)
    """
    drawn = draw_features(draw_batch, extractor, data, num, seed=seed, conditions=conditions)
    reference = feature_statistics(data_features(extractor, data), len(data))
    accuracy = {} if drawn.class_accuracy is None else {"class_accuracy": drawn.class_accuracy.value}
    return {"frechet": drawn.statistics.frechet(reference), **accuracy}
