"""Velocity networks as a task: flow matching on pictures or points, sampling by solvers, distances to the data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flowgen.conditioning import UNCONDITIONAL
from flowgen.data import PointsConfig, Source, blank_batches, fixed_batches, from_uint8, take_inventory
from flowgen.data.sources import Split
from flowgen.evaluation import point_metrics, point_samples, velocity_bits_per_dim
from flowgen.fields import type_name
from flowgen.matching import (
    MatchingConfig,
    MeanFlow,
    MLPConfig,
    edm_times,
    guided,
    integrate,
    integrate_mean,
    log_prob,
    matching_objective,
    trajectory,
    velocity_field,
)
from flowgen.matching.objective import REPORT_PAIRS
from flowgen.models import init
from flowgen.ranges import Samples, Within, check_ranges
from flowgen.rows import batch_rows
from flowgen.tasks.images import check_foreign, drawn_classes, image_batches, image_source, shrink_images, shrink_run
from flowgen.tasks.pictures import DRAWABLE_CHANNELS, DRAWN_PATHS, grid_labels, path_plot, picture
from flowgen.tasks.samples import sample_lines, sample_metrics, train_judge
from flowgen.training import Job
from flowgen.typed import typed

Solver = Literal["euler", "midpoint", "heun", "rk4", "dopri5", "mean_flow"]
# Options of `sample` and `evaluate` that mean something here, by their names in the command.
SAMPLE_OPTIONS = ("method", "num_steps")
EVALUATE_OPTIONS = ("samples",)
PLOT_STEPS = 60


@dataclass(frozen=True)
@typed
class SolverConfig:
    """How samples are drawn, in training and by default in `sample.py`.

    num: samples of a picture; at least 1.
    method: a solver of `flowgen.matching.integrate`, or "mean_flow" for networks of average velocities.
    num_steps: of all methods but "dopri5"; at least 1.
    times: "uniform", or "edm", steps that grow finer towards the data.
    rtol: relative error that "dopri5" allows; positive.
    atol: absolute error that "dopri5" allows; positive.
    guidance: weight w of (1 + w) v_c - w v_u; 0 for none.
    guidance_interval: times in [0, 1] between which guidance acts.
    frechet_samples: pictures that each evaluation draws and compares with held-out ones; 0 for none.
    """

    num: Samples = 64
    method: Solver = "heun"
    num_steps: Annotated[int, Within(1, 1 << 20)] = 25
    times: Literal["uniform", "edm"] = "uniform"
    rtol: float = 1e-5
    atol: float = 1e-5
    guidance: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    frechet_samples: Annotated[int, Within(0, 1 << 24)] = 0

    def __post_init__(self):
        for name, least in (("num", 1), ("num_steps", 1), ("frechet_samples", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"sampling.{name} is {value}; it must be a whole number of at least {least}.")
        check_ranges(self, "sampling")
        if self.method not in get_args(Solver):
            raise ValueError(f"sampling.method is {self.method!r}; choose one of {', '.join(get_args(Solver))}.")
        for name in ("rtol", "atol"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"sampling.{name} is {getattr(self, name)}; it must be positive and finite.")
        if not 0 <= self.guidance < float("inf"):
            raise ValueError(f"sampling.guidance is {self.guidance}; it must be 0 (none) or positive.")
        low, high = self.guidance_interval
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"sampling.guidance_interval is {self.guidance_interval}; give increasing times in [0, 1]."
            )
        if self.frechet_samples == 1:
            raise ValueError("sampling.frechet_samples is 1; a distance needs at least 2, or 0 for none.")
        if self.times == "edm" and self.num_steps < 2:
            raise ValueError(f"sampling.num_steps is {self.num_steps}; the grid 'edm' needs at least 2.")
        if self.times == "edm" and self.method in ("dopri5", "mean_flow"):
            raise ValueError(f"sampling.times is 'edm', but {self.method} takes no grid; set it to 'uniform'.")


def check(experiment: Any) -> None:
    """Raises ValueError where the parts of an experiment do not belong to a velocity network."""
    model, kind = experiment.model, type_name(experiment.model)
    points = isinstance(experiment.data, PointsConfig)
    check_foreign(experiment, kind, "flow matching", ("likelihood", "autoencoding", "codec", "text"))
    if experiment.matching is None:
        raise ValueError(f"matching is missing; a {kind} is trained by flow matching, so give a MatchingConfig.")
    if not isinstance(experiment.sampling, SolverConfig):
        raise ValueError(f"sampling is {experiment.sampling}; a {kind} is sampled by a solver, so give a SolverConfig.")
    if points != isinstance(model, MLPConfig):
        wanted = "points in the plane, so give a PointsConfig" if not points else "pictures, so give a DataConfig"
        raise ValueError(f"data is {experiment.data}; a {kind} is trained on {wanted}.")
    if points and (model.dim != 2 or model.num_classes):
        raise ValueError(
            f"model has dim {model.dim} and num_classes {model.num_classes}; these points have 2 and none."
        )
    mean = isinstance(experiment.matching.loss, MeanFlow)
    if mean and not getattr(model, "intervals", False):
        raise ValueError(f"matching.loss is MeanFlow, which needs model.intervals true; this {kind} has no intervals.")
    if experiment.sampling.method == "mean_flow" and not mean:
        raise ValueError("sampling.method is 'mean_flow', which needs matching.loss MeanFlow; choose another method.")
    if experiment.train.label_dropout >= 1:
        raise ValueError("train.label_dropout is 1.0; some labels must be left to learn from, so set it below 1.")
    if getattr(experiment.matching.coupling, "class_aware", False) and not model.num_classes:
        raise ValueError("matching.coupling.class_aware is true, but the model has no classes; set it to false.")
    if experiment.sampling.guidance and experiment.sampling.method == "mean_flow":
        raise ValueError(
            f"sampling.guidance is {experiment.sampling.guidance}, but mean_flow draws with the guidance that was "
            "learned; set matching.loss.guidance_weight, and sampling.guidance to 0."
        )
    _check_guidance(experiment, "sampling.guidance", experiment.sampling.guidance)
    if mean:
        _check_guidance(experiment, "matching.loss.guidance_weight", experiment.matching.loss.guidance_weight)


def _check_guidance(experiment: Any, name: str, weight: float) -> None:
    """Raises ValueError where there is no class to guide to, or no field to guide away from is learned."""
    if weight and not experiment.model.num_classes:
        raise ValueError(f"{name} is {weight}, but the model has no classes to guide to (num_classes 0); set it to 0.")
    if weight and not experiment.train.label_dropout:
        raise ValueError(
            f"{name} is {weight}, but with train.label_dropout 0 the field without class, which it needs, is not "
            f"learned; train with 0.1, or set {name} to 0."
        )


def best_metric(experiment: Any) -> str:
    """Returns the evaluated metric by which checkpoints are compared; lower is better."""
    if isinstance(experiment.data, PointsConfig):
        return "w2"
    return "frechet" if experiment.sampling.frechet_samples else "loss"


def shrink(experiment: Any) -> Any:
    """Returns the experiment with a tiny network of the same kind, on points or the built-in digits."""
    few = min(experiment.sampling.num_steps, 2)
    sampling = dataclasses.replace(experiment.sampling, num_steps=few, frechet_samples=0)
    experiment = dataclasses.replace(experiment, sampling=sampling)
    if isinstance(experiment.data, PointsConfig):
        model = dataclasses.replace(experiment.model, width=16, num_layers=1)
        return shrink_run(dataclasses.replace(experiment, model=model))
    return shrink_images(experiment, experiment.model.shrunk())


def job(experiment: Any) -> Job:
    """Returns what the training loop needs, with the data opened and an epsilon that was left open chosen."""
    return _points_job(experiment) if isinstance(experiment.data, PointsConfig) else _images_job(experiment)


def _points_job(experiment: Any) -> Job:
    data, network = experiment.data, experiment.flow()
    matching = experiment.matching.fitted(*data.draw(jax.random.key(experiment.train.seed), REPORT_PAIRS))

    def pairs(key, batch):
        rows = batch_rows(batch, key, len(batch["blank"]))
        x0, x1 = rows.draw_whole(data.draw)
        return {"x0": x0, "x1": x1}

    @jax.jit
    def samples(variables, key):
        return point_samples(velocity_field(network, variables, matching), data.draw, key)

    def evaluated(variables: Any) -> dict[str, float]:
        return point_metrics(samples(_weights(variables), jax.random.key(1)))

    def plot(variables: Any) -> np.ndarray:
        key = jax.random.key(experiment.train.seed)
        points, _ = draw(experiment, network, variables, key, experiment.sampling.num, None)
        return plot_points(experiment, network, variables, points, key)

    share = experiment.train.batch_size // jax.process_count()
    return Job(
        init=lambda key: {**init(network, key), **matching.state()},
        objective=matching_objective(network, matching.loss_fn(), pairs),
        batches=partial(blank_batches, share),
        evaluate=evaluated,
        sample=plot,
        best_metric=best_metric(experiment),
    )


def _images_job(experiment: Any) -> Job:
    network, source = experiment.flow(), image_source(experiment, "train")
    order = np.random.default_rng(experiment.train.seed).permutation(len(source))
    x1 = from_uint8(source[np.sort(order[:REPORT_PAIRS])]["image"])
    x0 = jax.random.normal(jax.random.key(experiment.train.seed), x1.shape)
    matching = experiment.matching.fitted(x0, jnp.asarray(x1))
    held_out = image_source(experiment, "eval") if experiment.data.eval_fraction > 0 else None
    pairs = partial(_image_pairs, conditional=experiment.model.num_classes > 0)
    classes = drawn_classes(experiment)

    def picture_of(variables: Any) -> np.ndarray:
        labels = grid_labels(experiment.sampling.num, classes)
        key = jax.random.key(experiment.train.seed)
        images, _ = draw(experiment, network, variables, key, experiment.sampling.num, labels)
        return picture(images, classes)

    return Job(
        init=lambda key: {**init(network, key), **matching.state()},
        objective=matching_objective(network, matching.loss_fn(label_dropout=experiment.train.label_dropout), pairs),
        batches=image_batches(experiment, source),
        evaluate=None if held_out is None else _image_evaluator(experiment, matching, network, source, held_out),
        sample=picture_of if experiment.model.channels in DRAWABLE_CHANNELS else None,
        best_metric=best_metric(experiment),
        inventory=take_inventory(experiment.data, source, held_out),
    )


def _image_pairs(key: Array, batch: dict[str, Any], *, conditional: bool) -> dict[str, Any]:
    return {"x1": from_uint8(batch["image"]), "cond": batch["label"] if conditional else None}


def _image_evaluator(
    experiment: Any, matching: MatchingConfig, network: Any, source: Source, held_out: Source
) -> Callable[[Any], dict[str, float]]:
    """Held-out loss and, where samples are asked for, their Fréchet distance to held-out pictures."""
    pairs = partial(_image_pairs, conditional=experiment.model.num_classes > 0)
    loss = jax.jit(matching_objective(network, matching.loss_fn(), pairs, train=False))
    judge = functools.cache(lambda: train_judge(source))

    def evaluated(variables: Any) -> dict[str, float]:
        size = min(experiment.train.batch_size, len(held_out))
        rows = [
            loss(variables, {name: batch[name] for name in ("image", "label")}, jax.random.key(index))[1]
            for index, batch in enumerate(fixed_batches(held_out, size))
            if batch["mask"].all()
        ]
        metrics = {name: float(np.mean([row[name] for row in rows])) for name in ("loss", "unweighted_loss")}
        num = experiment.sampling.frechet_samples
        if num:
            of_samples = partial(draw, experiment, network, variables)
            conditions = _labels_of(held_out) if experiment.model.num_classes else None
            metrics = {**sample_metrics(of_samples, judge(), held_out, num, conditions=conditions), **metrics}
        return metrics

    return evaluated


def draw(
    experiment: Any,
    network: Any,
    variables: Any,
    key: jax.Array,
    num: int,
    labels: np.ndarray | None,
    *,
    first: int = 0,
) -> tuple[np.ndarray, str]:
    """Returns samples `num *event` and a line on how they were drawn.

    Sample i depends on (key, i) alone; drawn by dopri5, whose steps suit the batch, it does to its tolerance.
    """
    sampling = experiment.sampling
    if sampling.guidance and labels is None:
        raise ValueError(f"guidance is {sampling.guidance}, but no classes are given to guide to; set it to 0.")
    source = experiment.data.source if isinstance(experiment.data, PointsConfig) else None
    x, evaluations = _draw(
        network,
        _weights(variables),
        key,
        first + jnp.arange(num),
        None if labels is None else jnp.asarray(labels),
        source=source,
        matching=dataclasses.replace(experiment.matching, coupling=MatchingConfig().coupling),
        sampling=sampling,
    )
    return np.asarray(x), f"{sampling.method}, {int(evaluations)} evaluations"


@partial(jax.jit, static_argnames=("network", "source", "matching", "sampling"))
def _draw(network, variables, key, indices, labels, *, source, matching, sampling):
    keys = jax.vmap(partial(jax.random.fold_in, key))(indices)
    if source is None:
        x0 = jax.vmap(lambda key: jax.random.normal(key, network.config.event_shape))(keys)
    else:
        x0 = jax.vmap(lambda key: PointsConfig(source=source).draw(key, 1)[0][0])(keys)
    if sampling.method == "mean_flow":

        def average(t, x, cond, interval):
            return network.apply(variables, t, x, cond, interval)

        return integrate_mean(average, x0, labels, num_steps=sampling.num_steps)
    velocity = velocity_field(network, variables, matching)
    if sampling.guidance:
        velocity = guided(velocity, UNCONDITIONAL, weight=sampling.guidance, interval=sampling.guidance_interval)
    return integrate(
        velocity,
        x0,
        labels,
        method=sampling.method,
        num_steps=sampling.num_steps,
        times=edm_times(sampling.num_steps) if sampling.times == "edm" else None,
        rtol=sampling.rtol,
        atol=sampling.atol,
    )


def plot_points(experiment: Any, network: Any, variables: Any, points: np.ndarray, key: jax.Array) -> np.ndarray:
    """Returns a picture of the paths of the field (rk4) and of samples over data.

    Example:
        save_image("points.png", plot_points(experiment, network, variables, points, jax.random.key(0)))
    """
    x0, data = experiment.data.draw(key, max(DRAWN_PATHS, len(points)))
    velocity = velocity_field(network, _weights(variables), experiment.matching)
    paths, _ = trajectory(velocity, x0[:DRAWN_PATHS], method="rk4", num_steps=PLOT_STEPS)
    return path_plot(np.asarray(paths), points, np.asarray(data))


def evaluate(experiment: Any, network: Any, variables: Any, options: Any) -> list[str]:
    """Returns lines with the distances of fresh samples to data, and bits/dim of pictures, as the options ask."""
    if isinstance(experiment.data, PointsConfig):
        field = velocity_field(network, _weights(variables), experiment.matching)
        num = options.samples or 1000
        samples = jax.jit(partial(point_samples, field, experiment.data.draw, num=num))(jax.random.key(options.seed))
        return [f"{num} points"] + [f"{name} {value:.4f}" for name, value in point_metrics(samples).items()]
    source = image_source(experiment, options.split)
    field = velocity_field(network, _weights(variables), experiment.matching)
    conditional = experiment.model.num_classes > 0 and not options.unconditional

    def log_density(x, labels, key):
        return log_prob(field, x, labels if conditional else None, key=key)

    bits = velocity_bits_per_dim(log_density, source, jax.random.key(options.seed), batch_size=options.batch)
    num = options.samples or len(source)
    judge = train_judge(image_source(experiment, "train" if options.split == "eval" else options.split))
    conditions = _labels_of(source) if conditional else None
    sampling = experiment.sampling if conditional else dataclasses.replace(experiment.sampling, guidance=0.0)
    of_samples = partial(draw, dataclasses.replace(experiment, sampling=sampling), network, variables)
    metrics = sample_metrics(of_samples, judge, source, num, seed=options.seed, conditions=conditions)
    return [
        f"{len(source)} images ({options.split})",
        f"bits/dim {bits:.4f} (uniform dequantisation, Hutchinson's estimate, rk4 with 50 steps)",
        *sample_lines(metrics, judge, num, experiment.sampling.method),
    ]


def pictures(experiment: Any, split: Split) -> Source:
    """Returns the pictures of a split at the model's size."""
    return image_source(experiment, split)


def drawn_channels(experiment: Any) -> int:
    """Returns the channels of the pictures that samples are."""
    return experiment.model.channels


def _labels_of(source: Source) -> Callable[[np.ndarray], np.ndarray]:
    labels = source[np.arange(len(source))]["label"]
    return lambda positions: labels[positions]


def _weights(variables: Any) -> Any:
    return {"params": variables["params"]}
