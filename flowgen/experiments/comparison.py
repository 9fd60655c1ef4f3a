"""Compares samples with data by feature distances, precision and recall, and finds the nearest training images."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowgen.arrays import digest_of
from flowgen.convert import efficientnet_file, efficientnet_lite0, inception, read_state_dict
from flowgen.data import Dataset, fixed_batches, from_uint8
from flowgen.data.media import check_writable, pillow
from flowgen.evaluation import (
    Estimate,
    Evaluation,
    FeatureStatistics,
    feature_statistics,
    kernel_distance,
    manifold_metrics,
    nearest_in,
    perfect_coverage,
    read_statistics,
    save_statistics,
)
from flowgen.evaluation.features import FEATURES as CLASSIFIER_FEATURES
from flowgen.evaluation.features import has_labels
from flowgen.evaluation.manifolds import DENSITY_NEIGHBOURS, PRECISION_NEIGHBOURS
from flowgen.evaluation.networks import NetworkFeatures, check_channels
from flowgen.experiments.distances import (
    CLASSIFIER,
    PIXELS,
    SAMPLES_AT_ONCE,
    DrawnFeatures,
    FeatureExtractor,
    data_features,
    draw_features,
    pixel_features,
    train_features,
)
from flowgen.experiments.drawing import CompareOptions, Conditions, DrawBatch
from flowgen.experiments.images import TrainingImages
from flowgen.experiments.plots import sample_grid
from flowgen.printable import printable
from flowgen.runs.evaluations import NEIGHBOURS as NEIGHBOURS_FILE
from flowgen.runs.files import digest_of_file

WEIGHTS = (".pth", ".pt", ".bin", ".safetensors")
SAMPLES_OF_FID = 50_000  # the number with which most papers measure it
NEIGHBOURS = 7  # training images shown beside each sample
EXTRACTOR = "extractor"  # the name under which statistics keep the digest of their extractor


@dataclass(frozen=True)
class Comparison:
    """The data or statistics that samples are compared with.

    data: the images to compare with. train: a function that returns the training images. extractor: computes the
    features. reference: feature statistics to compare with instead of the data; None to use the data.
    """

    data: Dataset
    train: Callable[[], TrainingImages]
    extractor: FeatureExtractor
    reference: FeatureStatistics | None


def check_features(options: CompareOptions) -> None:
    """Raises ValueError or an OSError if `features`, `reference` or `cache` is not usable. The weights are not read.

    Raises ModuleNotFoundError if a package that `features` or `neighbours` needs is missing.

    Example:
        check_features(options)
    """
    name = options.features
    if name == "efficientnet":
        efficientnet_file()
    elif name not in ("auto", "classifier", "pixels"):
        if not name.endswith(WEIGHTS):
            raise ValueError(
                f"--features is '{name}'; it must be auto, classifier, pixels, efficientnet, or a file of Inception v3 "
                f"weights that ends in one of {', '.join(WEIGHTS)}."
            )
        if not os.path.isfile(name):
            raise FileNotFoundError(f"There is no file '{name}' of Inception v3 weights; check --features.")
    if options.reference and not os.path.isfile(options.reference):
        raise FileNotFoundError(f"There is no file '{options.reference}' of reference statistics; check --reference.")
    if options.cache:
        check_writable(Path(options.cache) / "reference.npz")
    if options.neighbours:
        pillow()


def check_sampled(options: CompareOptions, samples: int) -> None:
    """Raises ValueError if an option needs samples, but none are drawn.

    samples: the number of samples to draw.

    Example:
        check_sampled(options, options.samples)
    """
    changed = {name: getattr(options, name) for name in ("features", "reference", "neighbours")}
    for name, value in changed.items():
        if samples or value == getattr(type(options), name):
            continue
        lacks, fix = "no samples", "add --samples 1000"
        if name == "features" and value.endswith(WEIGHTS):
            fix = f"add --samples {SAMPLES_OF_FID}, as for published FIDs"
            if not os.path.isfile(value):
                lacks, fix = "no samples and no such file", f"give the path of the weights, and {fix}"
        raise ValueError(f"{name} is {value}, but there are {lacks}; {fix}, or leave it out.")


def open_comparison(options: CompareOptions, data: Dataset, train: Callable[[], TrainingImages]) -> Comparison:
    """Opens the feature extractor and the reference of a comparison. Trains a classifier if its features are needed.

    data: the data to compare with. train: a function that opens the training images; it is called only if they are
    needed.

    Raises ValueError if the data, the features and the reference statistics do not fit together.

    Example:
        images = TrainingImages(experiment.dataset("train"), "training images")
        comparison = open_comparison(options, held_out, lambda: images)
    """
    train = functools.cache(train)
    reference = read_statistics(options.reference) if options.reference else None
    if reference is None and len(data) < 2:
        raise ValueError(f"--split {options.split} has {len(data)} image, but a distance needs at least 2; give more.")

    def check(digest: str, length: int) -> None:
        if reference is not None:
            _check_reference(options, reference, digest, length)

    extractor = _open_features(options, data, train, check)
    if options.neighbours:
        train()
    return Comparison(data, train, extractor, reference)


def _check_reference(options: CompareOptions, reference: FeatureStatistics, digest: str, length: int) -> None:
    """Raises ValueError if the reference has features of another length, or of an extractor with another digest."""
    if len(reference.mean) != length:
        raise ValueError(
            f"--reference '{options.reference}' has features of length {len(reference.mean)}, but those of "
            f"--features {options.features} have length {length}; give statistics of the same features."
        )
    theirs = reference.about.get(EXTRACTOR, digest)
    if not f"{theirs} ".startswith(f"{digest} "):
        raise ValueError(
            f"--reference '{options.reference}' has features of the extractor '{printable(theirs):.80}', but that of "
            f"--features {options.features} is '{digest}'; give statistics of the same features."
        )


def _open_features(
    options: CompareOptions, data: Dataset, train: Callable[[], TrainingImages], check: Callable[[str, int], None]
) -> FeatureExtractor:
    """Returns the extractor for `options.features`.

    train: called only for "auto" and "classifier". check: called with the digest and the number of features. Before a
    classifier is trained, only the first word of its digest is known.
    """
    name = options.features
    if name == "classifier" and not has_labels(train().dataset):
        raise ValueError(f"--features is classifier, but the {train().name} have no labels to learn; use pixels.")
    if name == "pixels" or (name == "auto" and not has_labels(train().dataset)):
        check(PIXELS, math.prod(data.event_shape))
        return pixel_features()
    if name in ("auto", "classifier"):
        check(CLASSIFIER, CLASSIFIER_FEATURES)
        learned = train_features(*train())
        check(learned.digest, CLASSIFIER_FEATURES)
        return learned
    check_channels(data.event_shape[-1])
    path = efficientnet_file() if name == "efficientnet" else name
    digest = digest_of_file(path)
    if name == "efficientnet":
        network, variables = efficientnet_lite0(read_state_dict(path))
        whose, kind = "EfficientNet-Lite0, not comparable with FID", "efficientnet"
    else:
        network, variables = inception(read_state_dict(path))
        fid, kind = network.variant == "fid", f"inception {network.variant}"
        whose = "the FID's Inception v3" if fid else "torchvision's Inception v3, not comparable with FID"
    check(f"{kind} {digest}", network.num_features)
    features = NetworkFeatures(network, variables)
    return FeatureExtractor(f"{whose}, weights {digest[:8]}", features, digest=f"{kind} {digest}")


def compare_samples(
    draw_batch: DrawBatch,
    comparison: Comparison,
    num: int,
    options: CompareOptions,
    *,
    conditions: Conditions | None,
    how: str,
) -> Evaluation:
    """Draws samples, and returns their distances to the data, precision and recall, and class accuracy.

    num: number of samples. conditions: see `draw_features`. how: a description of how samples are drawn, for the
    output.

    Example:
        evaluation = compare_samples(draw, comparison, 1000, options, conditions=None, how="heun")
    """
    extractor, data = comparison.extractor, comparison.data
    drawn = draw_features(
        draw_batch, extractor, data, num, seed=options.seed, conditions=conditions, shown=options.neighbours
    )
    if comparison.reference is not None:
        reference, whose = comparison.reference, os.path.basename(options.reference)
    else:
        reference = _reference(extractor, data, options)
        whose = f"{len(data)} images ({options.split})"
    about = {EXTRACTOR: "unknown", **reference.about, "of": whose}
    evaluation = _distances(drawn, reference, extractor, num, how, options.seed) + Evaluation(
        about={"samples": num, "extractor": _named(extractor), "reference": about}
    )
    if EXTRACTOR not in reference.about:
        evaluation += Evaluation((f"the extractor of the features of {whose} is unknown, and assumed to be the same",))
    if options.neighbours:
        evaluation += _neighbours(drawn.shown, extractor, comparison.train())
    return evaluation


def _named(extractor: FeatureExtractor) -> dict[str, str]:
    return {"name": extractor.name, "digest": extractor.digest}


def _distances(
    drawn: DrawnFeatures, reference: FeatureStatistics, extractor: FeatureExtractor, num: int, how: str, seed: int
) -> Evaluation:
    statistics, data = drawn.statistics, reference.features
    frechet = statistics.frechet(reference)
    metrics: dict[str, Estimate] = {"frechet": Estimate(frechet, count=num)}
    lines = [f"Fréchet distance of {num} samples {frechet:.3f} (features of {extractor.name}; {how})"]
    about: dict[str, Any] = {"singular_covariances": _singular(statistics, reference)}
    if about["singular_covariances"]:
        lines.append(
            f"too few {' and '.join(about['singular_covariances'])} for {len(statistics.mean)} features, so the "
            "distance is too large"
        )
    samples = statistics.features
    assert samples is not None  # The statistics were just computed.
    if data is None:
        lines.append("no kernel distance, precision and recall, because the reference has no features")
    elif min(len(samples), len(data)) > DENSITY_NEIGHBOURS:
        kernel = kernel_distance(samples, data, seed=seed)
        metrics["kernel"] = Estimate(kernel.mean, count=kernel.size)
        metrics["kernel_std"] = Estimate(kernel.std, count=kernel.subsets)
        lines.append(
            f"kernel distance {kernel.mean:.5f}, std {kernel.std:.5f} over {kernel.subsets} subsets of {kernel.size} "
            "(same features)"
        )
        manifold = manifold_metrics(samples, data)
        counts = {"precision": len(samples), "recall": len(data), "density": len(samples), "coverage": len(data)}
        metrics |= {name: Estimate(value, count=counts[name]) for name, value in manifold._asdict().items()}
        values = ", ".join(f"{name} {value:.3f}" for name, value in manifold._asdict().items())
        perfect = about["coverage_if_perfect"] = perfect_coverage(len(samples), len(data))
        lines.append(
            f"{values} (k = {PRECISION_NEIGHBOURS} and {DENSITY_NEIGHBOURS}; same features; a perfect model has "
            f"density 1 and coverage {perfect:.3f})"
        )
    if drawn.class_accuracy is not None:
        metrics["class_accuracy"] = drawn.class_accuracy
        lines.append(f"samples that show their class {drawn.class_accuracy:.3f} (by the same classifier)")
    return Evaluation(tuple(lines), metrics, about)


def _singular(samples: FeatureStatistics, data: FeatureStatistics) -> list[str]:
    """Returns which of samples and data have no more vectors than features, and therefore a singular covariance."""
    counts = {"samples": samples.count, "data": data.count or math.inf}
    return [side for side, count in counts.items() if count <= len(samples.mean)]


def _reference(extractor: FeatureExtractor, data: Dataset, options: CompareOptions) -> FeatureStatistics:
    """Returns the statistics of the data. With `cache`, they are read from it or, if missing there, saved to it."""

    def computed() -> FeatureStatistics:
        return feature_statistics(data_features(extractor, data), len(data), about=about)

    about = {"data": dataset_digest(data), "split": options.split, EXTRACTOR: extractor.digest}
    if not options.cache:
        return computed()
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(options.cache) / f"reference-{name}.npz"
    if path.is_file():
        with contextlib.suppress(ValueError):  # a damaged file is replaced
            known = read_statistics(path)
            if known.about == about and known.count == len(data):
                return known
    statistics = computed()
    try:
        save_statistics(path, statistics)
    except OSError as error:
        logging.getLogger(__name__).warning("The statistics of the data are not cached: %s", error)
    return statistics


def dataset_digest(data: Dataset) -> str:
    """Returns a digest of all pixels of a dataset, read in batches.

    Example:
        digest = dataset_digest(held_out)
    """
    content = hashlib.sha256(digest_of([np.array([len(data), *data.event_shape])]).encode())
    for batch, mask in fixed_batches(data, min(SAMPLES_AT_ONCE, len(data))):
        content.update(np.ascontiguousarray(batch.pixels[mask]).data)
    return content.hexdigest()


def _neighbours(samples: np.ndarray, extractor: FeatureExtractor, images: TrainingImages) -> Evaluation:
    """Returns the distances of samples to their nearest training images, and a grid with one sample per row."""
    train, name = images
    count = min(NEIGHBOURS, len(train))
    positions, distances = nearest_in(extractor.features(samples), data_features(extractor, train), count)
    near = from_uint8(train[positions.reshape(-1)].pixels).reshape(*positions.shape, *samples.shape[1:])
    rows = np.concatenate([samples[:, None], near], axis=1)
    grid = sample_grid(rows.reshape(-1, *samples.shape[1:]), 0, columns=count + 1)
    line = f"nearest {name} of {len(samples)} samples, at distances {distances[:, 0].min():.3f} or more"
    found = {"of": name, "positions": positions.tolist(), "distances": distances.tolist()}
    return Evaluation((line,), about={"neighbours": found}, files={NEIGHBOURS_FILE: grid})
