"""Evaluates how well a flow tells anomalies from its data."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import numpy as np

from flowgen.data import ArrayDataset, DataConfig, Dataset, load
from flowgen.data.dataset import image_set, of_one_shape
from flowgen.evaluation import CORRUPTIONS, SCORES, AnomalyScores, Evaluation, anomaly_scores, auroc, mean_of
from flowgen.runs.evaluations import ANOMALY

CORRUPTED = "corrupted"
MOST_ANOMALIES = 4096
MOST_TYPICAL = 1024
SIGNIFICANCE = 0.05


def evaluate_anomalies(experiment: Any, flow: Any, variables: Any, options: Any) -> Evaluation:
    """Returns the AUROC of each score against each set of anomalies, and tests of z for the data.

    The maps of the tokens, all scores and all p-values are among the files.

    experiment: a `FlowExperiment` on pixels. options: its options for evaluation, with `anomaly` set.

    Raises ValueError if the flow does not model pixels, or if there is no such set of anomalies.

    Example:
        evaluation = evaluate_anomalies(experiment, flow, variables, ImageEvaluateOptions(anomaly="corrupted"))
    """
    check_anomaly(experiment, options.anomaly)
    data = of_one_shape(experiment.flow_dataset(options.split, labelled=False), "--anomaly")
    train = experiment.flow_dataset("train" if options.split == "eval" else options.split, labelled=False)
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

    typical = float(scored(_some(train, MOST_TYPICAL)).nats.mean())
    normal = scored(data)
    others = {name: scored(dataset) for name, dataset in _anomalies(experiment, options, data).items()}
    sets = {"normal": normal, **{f"anomaly_{name}": other for name, other in others.items()}}
    areas = _areas(normal, others, typical, options.split)
    return _fit_of_z(normal) + areas + _record(flow, by_class, typical, sets)


def check_anomaly(experiment: Any, anomaly: str) -> None:
    """Raises ValueError unless the flow models pixels without texts and `anomaly` names a set of images.

    Example:
        check_anomaly(experiment, "corrupted")
    """
    if experiment.is_latent:
        raise ValueError(f"--anomaly is {anomaly}, but this flow models latents, not pixels; leave it out.")
    if experiment.model.text_dim:
        raise ValueError(f"--anomaly is {anomaly}, but this flow needs texts, which anomalies lack; leave it out.")
    if anomaly != CORRUPTED and image_set(anomaly) is None and not os.path.exists(anomaly):
        raise ValueError(
            f"--anomaly is '{anomaly}', which is neither '{CORRUPTED}', a dataset such as mnist, nor a path; "
            "correct it."
        )


def _anomalies(experiment: Any, options: Any, data: Dataset) -> dict[str, Dataset]:
    if options.anomaly == CORRUPTED:
        images, random = _some(data, MOST_ANOMALIES).x, np.random.default_rng(options.seed)
        return {name: _unlabelled(corrupt(images, random)) for name, corrupt in CORRUPTIONS.items()}
    path, name = options.anomaly, options.anomaly
    if image_set(name) is None:
        kind = "npz" if path.endswith(".npz") else "tar" if path.endswith(".tar") else "folder"
        config = DataConfig(kind, path=path)
        name = os.path.basename(os.path.normpath(path)).removesuffix(".npz")
    else:
        config = DataConfig(name)
    config = dataclasses.replace(config, eval_fraction=0.0)
    height, width, channels = experiment.model.event_shape
    found = load(config, image_size=(height, width), channels=channels, split="all")
    return {name: _some(of_one_shape(found, "--anomaly"), MOST_ANOMALIES)}


def _some(dataset: Any, most: int) -> ArrayDataset:
    """Returns up to `most` evenly spaced images of a dataset, without labels."""
    dataset = of_one_shape(dataset, "--anomaly")
    positions = np.unique(np.linspace(0, len(dataset) - 1, min(most, len(dataset))).astype(np.int64))
    return _unlabelled(np.asarray(dataset[positions].pixels))


def _unlabelled(images: np.ndarray) -> ArrayDataset:
    return ArrayDataset(images, np.full(len(images), -1, np.int32))


def _fit_of_z(normal: AnomalyScores) -> Evaluation:
    square = mean_of(normal.squares / normal.dims)
    rejected = {
        "chi_square_rejected": mean_of((normal.chi_square_p() < SIGNIFICANCE).astype(np.float64)),
        "ks_rejected": mean_of((normal.ks_p() < SIGNIFICANCE).astype(np.float64)),
    }
    chi_square, ks = rejected.values()
    line = (
        f"|z|² per dimension {square}; N(0, 1) is rejected at {SIGNIFICANCE:.0%} for {chi_square.value:.1%} of images "
        f"by chi-square and {ks.value:.1%} by Kolmogorov-Smirnov tests"
    )
    return Evaluation((line,), {"z_square": square, **rejected})


def _areas(normal: AnomalyScores, others: dict[str, AnomalyScores], typical: float, split: str) -> Evaluation:
    lines, metrics, ours = [], {}, normal.scores(typical)
    for name, other in others.items():
        areas = {score: auroc(ours[score], values) for score, values in other.scores(typical).items()}
        metrics |= {f"auroc_{name}_{score}": area for score, area in areas.items()}
        values = ", ".join(f"{score} {area.value:.3f} ± {area.standard_error:.3f}" for score, area in areas.items())
        lines.append(f"AUROC of {len(other.nats)} {name} against {len(normal.nats)} images ({split}): {values}")
    return Evaluation(tuple(lines), metrics)


def _record(flow: Any, by_class: bool, typical: float, sets: dict[str, AnomalyScores]) -> Evaluation:
    arrays = {}
    for name, scores in sets.items():
        every = {"tokens": scores.tokens, "chi_square_p": scores.chi_square_p(), "ks_p": scores.ks_p()}
        arrays |= {f"{name}_{what}": values for what, values in {**scores.scores(typical), **every}.items()}
    about = {
        "scores_higher_if_anomalous": dict(SCORES),
        "likelihood": "equal mixture of all classes" if by_class else "unconditional",
        "scale_parameterisation": str(flow.config.scale_parameterisation),
        "mean_nats_of_training_images": typical,
    }
    return Evaluation(about={"anomaly": about}, files={ANOMALY: arrays})
