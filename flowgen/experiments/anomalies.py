"""Evaluates how well a flow distinguishes anomalous images from the images that it models."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from flowgen.data import ArrayDataset, DataConfig, Dataset, load
from flowgen.data.dataset import NO_LABEL, BucketedDataset, file_names_in, image_set, of_one_shape
from flowgen.data.inventory import tell
from flowgen.evaluation import CORRUPTIONS, SCORES, AnomalyScores, Estimate, Evaluation, anomaly_scores, auroc, mean_of
from flowgen.experiments.images import TrainingImages
from flowgen.experiments.latents import as_taken
from flowgen.experiments.likelihoods import check_computed
from flowgen.places import is_same_place
from flowgen.printable import printable
from flowgen.runs.evaluations import ANOMALY

CORRUPTED = "corrupted"
MOST_ANOMALIES = 4096
MOST_TYPICAL = 1024
SIGNIFICANCE = 0.05
# If one side has fewer images, the standard error of an AUROC, which assumes many, is rough.
FEW = 30
MOST_NAMED, NAMED_BY = 5, "typicality"


class AnomalySets(NamedTuple):
    """The images that `evaluate_anomalies` scores in addition to the data.

    typical: training images; their mean nats are the centre of the typicality score. typical_name: what to call these
    images in messages. anomalies: the sets of anomalies by name. origins: the position in the data of the image that
    each anomaly of a set was made from; None if these positions are unknown.
    """

    typical: ArrayDataset
    typical_name: str
    anomalies: dict[str, ArrayDataset]
    origins: np.ndarray | None


def open_anomalies(experiment: Any, options: Any, train: Callable[[], TrainingImages]) -> AnomalySets:
    """Returns the images that `evaluate_anomalies` compares with the data.

    experiment: a `FlowExperiment`. options: options for evaluation with `anomaly` set. train: a function that returns
    the training images.

    Raises ValueError if the flow needs texts, if `anomaly` is invalid, or if the data or a set of anomalies has fewer
    than two images.

    Example:
        train = TrainingImages(experiment.dataset("train"), "training images")
        sets = open_anomalies(experiment, ImageEvaluateOptions(anomaly="corrupted"), lambda: train)
    """
    check_anomaly(experiment, options.anomaly)
    data = of_one_shape(experiment.dataset(options.split), "--anomaly")
    # Mirror images among the latents change the positions.
    mirrored = experiment.is_latent and experiment.data.flip and options.split == "train"
    copied = options.anomaly == CORRUPTED and not mirrored
    origins = _positions(data, MOST_ANOMALIES) if copied else None
    anomalies = _anomalies(experiment, options, data)
    images, name = train()
    sets = AnomalySets(_some(images, MOST_TYPICAL), name, anomalies, origins)
    for name, count in {"data": len(data), **{name: len(one) for name, one in sets.anomalies.items()}}.items():
        if count < 2:
            raise ValueError(f"--anomaly is {options.anomaly}, but {name} has only {count} image; give at least 2.")
        if count < FEW:
            more = "; add --split all to compare all of the data" if (name, options.split) == ("data", "eval") else ""
            tell(f"--anomaly compares only {count} images of {name}, so each AUROC and its error are rough{more}.")
    return sets


def evaluate_anomalies(
    experiment: Any, flow: Any, variables: Any, options: Any, data: Dataset, sets: AnomalySets
) -> Evaluation:
    """Returns each score's AUROC for each set of anomalies, and how often tests reject z ~ N(0, 1) for the data.

    If the flow models latents, the images are encoded, and the scores measure the density of their latents. The
    evaluation's `files` contain the scores, the log p(x) terms of the tokens, the p-values and the file name of each
    image. If the anomalies were read from files, the evaluation's `lines` list the most anomalous files.

    experiment, options, sets: see `open_anomalies`. data: the images or latents that are not anomalous.

    Example:
        evaluation = evaluate_anomalies(experiment, flow, variables, options, experiment.flow_dataset("eval"), sets)
    """
    by_class = flow.config.num_classes > 0 and not options.unconditional

    def scored(dataset: Dataset) -> AnomalyScores:
        return anomaly_scores(
            flow,
            variables,
            dataset,
            jax.random.key(options.seed),
            noise_std=options.noise_std(flow),
            batch_size=options.batch,
            by_class=by_class,
        )

    def of_images(images: ArrayDataset) -> AnomalyScores:
        taken = as_taken(images, experiment.data, experiment.encoding, flip=False)
        return scored(of_one_shape(taken, "--anomaly"))

    centre, normal = of_images(sets.typical).nats, scored(data)
    check_computed(centre, sets.typical_name)
    check_computed(normal.nats, "images")
    typical = float(centre.mean())
    others = {name: of_images(images) for name, images in sets.anomalies.items()}
    scores = {"normal": normal, **{f"anomaly_{name}": other for name, other in others.items()}}
    what = f"{options.split}, density of latents" if experiment.is_latent else options.split
    evaluation = _fit_of_z(normal) + _areas(normal, others, typical, what, sets.origins)
    names = {"normal": file_names_in(data)}
    for name, images in sets.anomalies.items():
        names[f"anomaly_{name}"] = images.file_names
        if images.file_names and options.anomaly != CORRUPTED:
            evaluation += _most_anomalous(name, images.file_names, others[name], normal, typical)
    about = {
        "scores_higher_if_anomalous": dict(SCORES),
        "density_of": "latents" if experiment.is_latent else "pixels",
        "likelihood": "equal mixture of all classes" if by_class else "unconditional",
        "scale_parameterisation": str(flow.config.scale_parameterisation),
        "typicality": {"mean_nats": typical, "of": sets.typical_name},
    }
    return evaluation + Evaluation(about={"anomaly": about}, files={ANOMALY: _arrays(scores, names, typical)})


def check_anomaly(experiment: Any, anomaly: str) -> None:
    """Raises ValueError if the flow needs texts, or if `anomaly` is not "corrupted", a dataset or an existing path.

    Example:
        check_anomaly(experiment, "corrupted")
    """
    if experiment.model.text_dim:
        raise ValueError(f"--anomaly is {anomaly}, but this flow needs texts, which anomalies lack; leave it out.")
    if anomaly != CORRUPTED and image_set(anomaly) is None and not os.path.exists(anomaly):
        raise ValueError(
            f"--anomaly is '{anomaly}', which is neither '{CORRUPTED}', a dataset such as mnist, nor a path; "
            "correct it."
        )


def _anomalies(experiment: Any, options: Any, data: Dataset) -> dict[str, ArrayDataset]:
    if options.anomaly == CORRUPTED:
        whole, random = _some(data, MOST_ANOMALIES), np.random.default_rng(options.seed)
        return {name: dataclasses.replace(whole, x=corrupt(whole.x, random)) for name, corrupt in CORRUPTIONS.items()}
    path, name = options.anomaly, options.anomaly
    if image_set(name) is None:
        kind = "npz" if path.endswith(".npz") else "tar" if path.endswith(".tar") else "folder"
        config = DataConfig(kind, path=path)
        # The name becomes part of the names of metrics and arrays, which must be encodable.
        name = printable(os.path.basename(os.path.abspath(path)).removesuffix(".npz"))
    else:
        config = DataConfig(name)
    if _has_the_data(config, experiment.data):
        tell(f"--anomaly is {path}, which is where the data come from, so an AUROC near 0.5 is expected.")
    config = dataclasses.replace(config, eval_fraction=0.0)
    height, width, channels = data.event_shape
    found = load(config, image_size=(height, width), channels=channels, split="all")
    return {name: _some(found, MOST_ANOMALIES)}


def _has_the_data(config: DataConfig, data: DataConfig) -> bool:
    """Returns whether two configs select the same dataset."""
    both = config.path and data.path
    return is_same_place(config.path, data.path) if both else config.name == data.name


def _some(dataset: Dataset | BucketedDataset, most: int) -> ArrayDataset:
    """Returns up to `most` evenly spaced images of a dataset, without labels."""
    dataset = of_one_shape(dataset, "--anomaly")
    positions = _positions(dataset, most)
    images, names = np.asarray(dataset[positions].pixels), file_names_in(dataset)
    unlabelled = np.full(len(images), NO_LABEL, np.int32)
    return ArrayDataset(images, unlabelled, file_names=tuple(names[i] for i in positions) if names else ())


def _positions(dataset: Dataset, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, len(dataset) - 1, min(most, len(dataset))).astype(np.int64))


def _fit_of_z(normal: AnomalyScores) -> Evaluation:
    square = mean_of(normal.squares / normal.dims)
    rejected = {
        # A p-value is NaN if z is, which is not from the prior either.
        "chi_square_rejected": mean_of(1.0 - (normal.chi_square_p() >= SIGNIFICANCE)),
        "ks_rejected": mean_of(1.0 - (normal.ks_p() >= SIGNIFICANCE)),
    }
    chi_square, ks = rejected.values()
    line = (
        f"|z|² per dimension {square}; N(0, 1) is rejected at {SIGNIFICANCE:.0%} for {chi_square.value:.1%} of images "
        f"by chi-square and {ks.value:.1%} by Kolmogorov-Smirnov tests"
    )
    return Evaluation((line,), {"z_square": square, **rejected})


def _areas(
    normal: AnomalyScores,
    others: dict[str, AnomalyScores],
    typical: float,
    what: str,
    origins: np.ndarray | None,
) -> Evaluation:
    lines, metrics, ours = [], {}, normal.scores(typical)
    for name, other in others.items():
        areas = {score: _area(ours[score], values, origins) for score, values in other.scores(typical).items()}
        metrics |= {f"auroc_{name}_{score}": area for score, area in areas.items()}
        values = ", ".join(f"{score} {area:.3f}" for score, area in areas.items())
        lines.append(f"AUROC of {len(other.nats)} {name} against {len(normal.nats)} images ({what}): {values}")
    return Evaluation(tuple(lines), metrics)


def _area(normal: np.ndarray, anomalous: np.ndarray, origins: np.ndarray | None) -> Estimate:
    """Returns the AUROC, or NaN if the flow overflows for an image, so that its score is NaN."""
    if np.isnan(normal).any() or np.isnan(anomalous).any():
        return Estimate(math.nan, None, len(normal) + len(anomalous))
    return auroc(normal, anomalous, origins=origins)


def _most_anomalous(
    name: str, files: Sequence[str], found: AnomalyScores, normal: AnomalyScores, typical: float
) -> Evaluation:
    # A score is NaN if the flow's numbers overflow, which no image of the data should cause.
    scores = np.where(np.isnan(values := found.scores(typical)[NAMED_BY]), np.inf, values)
    order = np.argsort(-scores, kind="stable")[:MOST_NAMED]
    named = ", ".join(f"{printable(files[i])} {scores[i]:.3f}" for i in order)
    largest = normal.scores(typical)[NAMED_BY].max()
    return Evaluation((f"Most anomalous of {name} by {NAMED_BY}: {named}; the data have at most {largest:.3f}",))


def _arrays(sets: dict[str, AnomalyScores], files: dict[str, tuple[str, ...]], typical: float) -> dict[str, np.ndarray]:
    arrays = {f"{name}_files": np.array(names) for name, names in files.items() if names}
    for name, scores in sets.items():
        every = {"tokens": scores.tokens, "chi_square_p": scores.chi_square_p(), "ks_p": scores.ks_p()}
        arrays |= {f"{name}_{what}": values for what, values in {**scores.scores(typical), **every}.items()}
    return arrays
