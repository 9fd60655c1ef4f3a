"""Sample metrics: the distance to the data, and the fraction of samples that show the requested class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, Int

from flowgen.data import Dataset, from_uint8
from flowgen.evaluation import frechet_distance, train_classifier
from flowgen.experiments.drawing import Conditions, DrawBatch

SAMPLES_AT_ONCE = 256

Images = Float[np.ndarray, "n height width c"]


@dataclass(frozen=True)
class FeatureExtractor:
    """Computes features of images in [-1, 1] for Fréchet distances. Also predicts classes, unless `classes` is None."""

    name: str
    features: Callable[[Images], Float[np.ndarray, "n f"]]
    classes: Callable[[Images], Int[np.ndarray, " n"]] | None = None


def train_features(dataset: Dataset) -> FeatureExtractor:
    """Trains a classifier and returns an extractor of its features. Without labels, the pixels serve as features.

    Example:
        extractor = train_features(experiment.dataset("train"))
    """
    if not dataset.class_names:
        return FeatureExtractor("pixels", lambda images: images.reshape(len(images), -1))
    classifier = train_classifier(dataset, jax.random.key(0))
    return FeatureExtractor("a classifier of the training data", classifier.features, classifier.classes)


def sample_metrics(
    draw_batch: DrawBatch,
    extractor: FeatureExtractor,
    data: Dataset,
    num: int,
    *,
    seed: int = 0,
    conditions: Conditions | None = None,
) -> dict[str, float]:
    """Returns the Fréchet distance between `num` samples and the data, and the fraction of correct classes.

    A sample's class is correct if the extractor predicts the label that the sample is conditioned on. The fraction is
    omitted if there are no conditions, or if the extractor does not predict classes.

    conditions: a function from positions in the data to the labels or texts to condition on, which gives the samples
    the class proportions of the data; None for unconditional samples.

    Example:
        metrics = sample_metrics(partial(experiment.draw_batch, network, variables), extractor, held_out, 1000)
    """
    # The data may be sorted by class, so if there are more data than samples, positions are evenly spaced.
    positions = np.arange(num) * len(data) // num if num < len(data) else np.arange(num) % len(data)
    size = min(SAMPLES_AT_ONCE, num)
    parts = []
    for first in range(0, num, size):
        cond = None if conditions is None else conditions(np.resize(positions[first:], size))
        parts.append(draw_batch(jax.random.key(seed), np.arange(first, first + size), cond)[0])
    samples = np.clip(np.concatenate(parts)[:num], -1, 1)
    everything = data[np.arange(len(data))]
    real = np.asarray(from_uint8(everything.pixels))
    metrics = {"frechet": frechet_distance(extractor.features(samples), extractor.features(real))}
    if extractor.classes is not None and conditions is not None:
        asked = everything.labels[positions]
        metrics["class_accuracy"] = float((extractor.classes(samples) == asked)[asked >= 0].mean())
    return metrics


def sample_lines(metrics: dict[str, float], extractor: FeatureExtractor, num: int, how: str) -> list[str]:
    """Returns the lines that `evaluate` prints for sample metrics.

    Example:
        lines = sample_lines(metrics, extractor, 1000, "heun")
    """
    lines = [f"Fréchet distance of {num} samples {metrics['frechet']:.3f} (features of {extractor.name}; {how})"]
    if "class_accuracy" in metrics:
        lines.append(f"samples that show their class {metrics['class_accuracy']:.3f} (by the same classifier)")
    return lines
