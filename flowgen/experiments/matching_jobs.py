"""The training jobs of velocity networks: on points, and on images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flowgen.data import (
    Batch,
    DataConfig,
    Dataset,
    PointsConfig,
    blank_batches,
    fixed_batches,
    from_uint8,
    take_inventory,
)
from flowgen.evaluation import point_metrics, point_samples
from flowgen.experiments.conditions import conditions_of, model_context, network_condition
from flowgen.experiments.distances import SAMPLES_AT_ONCE, sample_metrics, train_features
from flowgen.experiments.distilled import distilled_objective, fixed_variables, with_flow
from flowgen.experiments.drawing import cycled_labels, drawn_classes, on_devices
from flowgen.experiments.images import image_batches, tell_unused_classes
from flowgen.experiments.plots import DRAWABLE_CHANNELS, sample_grid
from flowgen.matching import MatchingConfig, matching_objective, velocity_field
from flowgen.matching.objective import REPORT_PAIRS
from flowgen.nn import init
from flowgen.rows import batch_rows
from flowgen.training import Job
from flowgen.training.step import Objective


def pairs_of(experiment: Any, key: Array, batch: Batch) -> dict[str, Any]:
    """Returns the noise and data of a batch of points, or the data and conditions of a batch of images.

    experiment: a `MatchingExperiment`.

    Example:
        objective = matching_objective(network, loss, partial(pairs_of, experiment))
    """
    if isinstance(experiment.data, PointsConfig):
        rows = batch_rows(batch, key, batch.size)
        x0, x1 = rows.draw_whole(experiment.data.draw)
        return {"x0": x0, "x1": x1}
    return {"x1": from_uint8(batch.pixels), "cond": network_condition(experiment.model, batch)}


def points_job(experiment: Any, network: Any, data: PointsConfig) -> Job:
    """Returns the job that trains the network of a `MatchingExperiment` on points.

    Example:
        job = points_job(experiment, experiment.build(), PointsConfig())
    """
    matching = with_flow(experiment.matching, experiment.model).fitted(
        *data.draw(jax.random.key(experiment.train.seed), REPORT_PAIRS)
    )

    @jax.jit
    def samples(variables, key):
        return point_samples(velocity_field(network, variables, matching), data.draw, key)

    def plot(variables: Any) -> np.ndarray:
        key = jax.random.key(experiment.train.seed)
        points, _ = experiment.draw_batch(network, variables, key, np.arange(experiment.sampling.num), None)
        return experiment.plot(network, variables, points, key)

    return Job(
        init=lambda key: {**init(network, key), **matching.state()},
        objective=matching_objective(network, matching.loss_fn(), partial(pairs_of, experiment)),
        batches=partial(blank_batches, experiment.train.batch_size // jax.process_count()),
        evaluate=lambda variables: point_metrics(samples(weights_of(variables), jax.random.key(1))),
        sample=plot,
        best_metric=experiment.best_metric,
    )


def images_job(experiment: Any, network: Any, data: DataConfig, dataset: Dataset, held_out: Dataset | None) -> Job:
    """Returns the job that trains the network of a `MatchingExperiment` on images of the size that the network expects.

    Example:
        job = images_job(experiment, experiment.build(), DataConfig(), experiment.dataset("train"), held_out=None)
    """
    tell_unused_classes(dataset, data, experiment.model.num_classes)
    order = np.random.default_rng(experiment.train.seed).permutation(len(dataset))
    x1 = from_uint8(dataset[np.sort(order[:REPORT_PAIRS])].pixels)
    x0 = jax.random.normal(jax.random.key(experiment.train.seed), x1.shape)
    opened = with_flow(experiment.matching, experiment.model, tuple(dataset.class_names))
    matching = opened.fitted(x0, jnp.asarray(x1))
    classes = drawn_classes(experiment.model, experiment.data)

    def draw_image(variables: Any) -> np.ndarray:
        numbers, key = np.arange(experiment.sampling.num), jax.random.key(experiment.train.seed)
        cond = cycled_labels(len(numbers), classes)
        if model_context(experiment.model) is not None:
            shown = dataset if held_out is None else held_out
            cond = shown[numbers % len(shown)].context
        images, _ = experiment.draw_batch(network, variables, key, numbers, cond)
        return sample_grid(images, classes)

    def objective(matching: MatchingConfig) -> Objective:
        loss = matching.loss_fn(label_dropout=experiment.train.label_dropout)
        return matching_objective(network, loss, partial(pairs_of, experiment))

    return Job(
        init=lambda key: {**init(network, key), **matching.state()},
        objective=distilled_objective(matching, objective),
        fixed=fixed_variables(matching),
        batches=image_batches(dataset, data, experiment.train),
        evaluate=None if held_out is None else _evaluator(experiment, matching, network, dataset, held_out),
        sample=draw_image if experiment.drawn_channels in DRAWABLE_CHANNELS else None,
        best_metric=experiment.best_metric,
        inventory=take_inventory(data, dataset, held_out),
    )


def _evaluator(
    experiment: Any, matching: MatchingConfig, network: Any, dataset: Dataset, held_out: Dataset
) -> Callable[[Any], dict[str, float]]:
    """Returns a function that computes the held-out loss and, if requested, the Fréchet distance of samples."""

    def objective(matching: MatchingConfig) -> Objective:
        return matching_objective(network, matching.loss_fn(), partial(pairs_of, experiment), train=False)

    loss, fixed = jax.jit(distilled_objective(matching, objective)), fixed_variables(matching)
    extractor = functools.cache(lambda: train_features(dataset))

    def evaluated(variables: Any) -> dict[str, float]:
        size = min(experiment.train.batch_size, len(held_out))
        rows = [
            loss({**variables, **fixed}, batch, jax.random.key(index))[1]
            for index, (batch, mask) in enumerate(fixed_batches(held_out, size))
            if mask.all()
        ]
        metrics = {name: float(np.mean([row[name] for row in rows])) for name in ("loss", "unweighted_loss")}
        num = experiment.sampling.frechet_samples
        if num:
            of_samples = partial(experiment.draw_batch, network, on_devices(variables, min(num, SAMPLES_AT_ONCE)))
            conditions = conditions_of(experiment.model, held_out)
            metrics = {**sample_metrics(of_samples, extractor(), held_out, num, conditions=conditions), **metrics}
        return metrics

    return evaluated


def weights_of(variables: Any) -> Any:
    """Returns the variables of the network alone, without the state of its loss.

    Example:
        velocity = velocity_field(network, weights_of(variables), experiment.matching)
    """
    return {"params": variables["params"]}
