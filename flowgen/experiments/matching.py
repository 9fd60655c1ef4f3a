"""Experiments that train velocity networks by flow matching on images or points, and sample with ODE solvers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowgen import backend
from flowgen.counting import flop_of, peak_of
from flowgen.data import (
    Batch,
    DataConfig,
    Dataset,
    PointsConfig,
)
from flowgen.data.dataset import Split
from flowgen.evaluation import Estimate, Evaluation, point_metrics, point_samples
from flowgen.experiments.comparison import Comparison, check_features, compare_samples, open_comparison
from flowgen.experiments.conditions import (
    check_command_needs_no_context,
    check_needs_no_context,
    check_not_flipped,
    conditions_of,
    is_conditional,
    model_context,
)
from flowgen.experiments.debug import SAMPLES, debug_images, debug_run
from flowgen.experiments.distances import SAMPLES_AT_ONCE
from flowgen.experiments.drawing import (
    AT_ONCE,
    asked_labels,
    check_samples,
    draw_in_batches,
    on_devices,
)
from flowgen.experiments.estimates import some_condition
from flowgen.experiments.experiment import Experiment, Rehearsal, Samples, SamplingCost
from flowgen.experiments.images import image_dataset, training_images, with_class_names
from flowgen.experiments.likelihoods import evaluate_velocity
from flowgen.experiments.matching_jobs import images_job, pairs_of, points_job, weights_of
from flowgen.experiments.own_data import own_data
from flowgen.experiments.plots import DRAWN_PATHS, path_plot
from flowgen.experiments.solving import SolverConfig, VelocityDrawOptions, VelocityEvaluateOptions, draw_by_solver
from flowgen.flows.flow import ImageTokens
from flowgen.matching import (
    AnyNetwork,
    MatchingConfig,
    MeanFlow,
    matching_objective,
    trajectory,
    velocity_field,
)
from flowgen.nn import init
from flowgen.settings import config, type_name
from flowgen.training import Job

POINTS = 1000  # default number of samples in an evaluation
PLOT_STEPS = 60


@config(kw_only=True)
class MatchingExperiment(Experiment):
    """An experiment that trains a velocity network by flow matching.

    model: the config of the velocity network.
    data: the images or points to train on.
    matching: the loss, the path from noise to data, the coupling of noise and data, and the distribution of training
    times.
    sampling: how samples are drawn: their number, the solver and the guidance.

    Raises ValueError if the fields do not fit together.

    Example:
        experiment = MatchingExperiment(name="moons", model=MLPConfig(dim=2), data=PointsConfig())
    """

    draw_options = VelocityDrawOptions
    evaluate_options = VelocityEvaluateOptions

    model: AnyNetwork
    data: DataConfig | PointsConfig = DataConfig()
    matching: MatchingConfig = MatchingConfig()
    sampling: SolverConfig = SolverConfig()

    def __post_init__(self):
        self._check_data()
        self._check_loss()
        self.check_warmups()

    def _check_data(self) -> None:
        model, kind, points = self.model, type_name(self.model), isinstance(self.data, PointsConfig)
        context = model_context(model)
        if isinstance(model, ImageTokens):
            raise ValueError(f"model is {model}, which is a flow; use a FlowExperiment.")
        if len(model.event_shape) not in (1, 3):
            raise ValueError(
                f"model has event_shape {model.event_shape}; it must be (2,) or (height, width, channels)."
            )
        if points != (len(model.event_shape) == 1):
            wanted = "images; give a DataConfig" if points else "points in the plane; give a PointsConfig"
            raise ValueError(f"data is {self.data}, but this {kind} trains on {wanted}.")
        if points and (model.event_shape != (2,) or model.num_classes or context is not None):
            raise ValueError(
                f"model has event_shape {model.event_shape}, num_classes {model.num_classes} and context "
                f"{context}; for points, they must be (2,), 0 and None."
            )
        check_not_flipped(model, self.data)
        if getattr(self.matching.coupling, "class_aware", False) and not model.num_classes:
            raise ValueError("matching.coupling.class_aware is true, but the model has no classes; set it to false.")
        if self.train.label_dropout >= 1:
            raise ValueError(
                "train.label_dropout is 1.0, which leaves no labels or contexts to learn from; set it below 1."
            )

    def _check_loss(self) -> None:
        loss, sampling = self.matching.loss, self.sampling
        mean = isinstance(loss, MeanFlow)
        if mean and not getattr(self.model, "intervals", False):
            kind = type_name(self.model)
            raise ValueError(
                f"matching.loss is MeanFlow, but this {kind} accepts no intervals; set model.intervals to true."
            )
        if sampling.method == "mean_flow" and not mean:
            raise ValueError(
                "sampling.method is 'mean_flow', which works only if matching.loss is MeanFlow; choose another method."
            )
        if sampling.guidance and sampling.method == "mean_flow":
            raise ValueError(
                f"sampling.guidance is {sampling.guidance}, but mean_flow uses the guidance learned in training; "
                "set sampling.guidance to 0 and use matching.loss.guidance_weight instead."
            )
        self._check_guidance("sampling.guidance", sampling.guidance)
        if isinstance(loss, MeanFlow):
            self._check_guidance("matching.loss.guidance_weight", loss.guidance_weight)

    def _check_guidance(self, name: str, weight: float) -> None:
        """Raises ValueError if there is nothing to guide towards, or if no unconditional field is learned."""
        if weight and not is_conditional(self.model):
            raise ValueError(
                f"{name} is {weight}, but the model has no classes to guide towards (num_classes is 0) and no "
                "context; set it to 0."
            )
        if weight and not self.train.label_dropout:
            raise ValueError(
                f"{name} is {weight}, but it needs an unconditional field, which is not learned if train.label_dropout "
                f"is 0; set train.label_dropout to 0.1, or {name} to 0."
            )

    @property
    def best_metric(self) -> str:
        """The name of the evaluation metric by which checkpoints are ranked; lower is better.

        It is "w2" for points. For images, it is "frechet" if `sampling.frechet_samples` is above 0, and otherwise
        "loss".
        """
        if isinstance(self.data, PointsConfig):
            return "w2"
        return "frechet" if self.sampling.frechet_samples else "loss"

    @property
    def drawn_channels(self) -> int | None:
        """The number of channels of sampled images; None for points."""
        return None if isinstance(self.data, PointsConfig) else self.model.event_shape[-1]

    def build(self) -> Any:
        """Returns the network that `model` describes, as a Flax module without parameters.

        Raises ValueError if the network's field `config` is missing or is not `model`.
        """
        network = self.model.build()
        if getattr(network, "config", None) != self.model:
            raise ValueError(
                f"model is {self.model}, but its build() returns a network that does not store this config; store it "
                "in the network's field `config`."
            )
        return network

    def with_provenance(self) -> MatchingExperiment:
        """Returns a copy of the experiment that records the names of its classes in `data.classes`.

        The names are those found in the data. If `data.classes` is already set, or if the network is not conditioned on
        classes, the field stays as it is.
        """
        return with_class_names(self)

    def dataset(self, split: Split, *, labelled: bool = True) -> Dataset:
        """Returns the images in a split of `data`, in the size that the network expects.

        labelled: whether images without labels are an error if the network is class-conditional.

        Raises ValueError if `data` is a `PointsConfig`, or if the images do not fit the network.
        """
        if isinstance(self.data, PointsConfig):
            raise ValueError("data are points, which have no dataset; draw them with data.draw(key, num).")
        check_needs_no_context(self.model, self.data)
        return image_dataset(self.data, self.model, split, labelled=labelled)

    def job(self, *, dataset: Dataset | None = None, held_out: Dataset | None = None, model: Any = None) -> Job:
        """Opens the data and returns the training job.

        If the coupling has an `epsilon` that is None, the job uses a value that is chosen from noise and data.

        dataset, held_out, model: see `fit`.
        """
        network = self.build() if model is None else model
        if isinstance(self.data, PointsConfig):
            if dataset is not None:
                raise ValueError(
                    "dataset is given, but data is a PointsConfig, which draws points; set data to a DataConfig."
                )
            return points_job(self, network, self.data)
        if dataset is None:
            dataset = self.dataset("train")
            held_out = self.dataset("eval") if self.data.eval_fraction > 0 else None
        else:
            dataset, held_out = own_data(
                dataset, held_out, self.model.event_shape, self.model.num_classes, model_context(self.model)
            )
        return images_job(self, network, self.data, dataset, held_out)

    def rehearsal(self, model: Any, rows: int) -> Rehearsal:
        """Returns what is needed to trace a training step of the network `model` on `rows` samples.

        The traced step pairs noise and data independently, whatever `matching.coupling` is.
        """
        matching = dataclasses.replace(self.matching, coupling=MatchingConfig().coupling)
        shape = (rows,) if isinstance(self.data, PointsConfig) else (rows, *self.model.event_shape)

        def batch() -> Batch:
            return Batch(jnp.zeros(shape, jnp.uint8), some_condition(self.model, rows))

        objective = matching_objective(model, matching.loss_fn(), partial(pairs_of, self))
        return Rehearsal(lambda key: init(model, key), objective, jax.eval_shape(batch))

    def sampling_cost(self, model: Any, variables: Any, num: int) -> SamplingCost:
        """Returns the FLOP and the memory of drawing `num` samples at a time.

        The FLOP are None if `sampling.method` is "dopri5", whose number of steps depends on the samples.
        """
        run = partial(
            draw_by_solver,
            network=model,
            distribution=self.data.x0 if isinstance(self.data, PointsConfig) else None,
            matching=dataclasses.replace(self.matching, coupling=MatchingConfig().coupling),
            sampling=self.sampling,
        )
        numbers, key = jax.ShapeDtypeStruct((num,), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
        cond = jax.eval_shape(lambda: some_condition(self.model, num))
        traced = jax.make_jaxpr(lambda *args: run(*args)[0])((weights_of(variables), key), numbers, cond).jaxpr
        flop = sum(flop_of(traced).values(), start=0.0) / num
        return SamplingCost(None if self.sampling.method == "dopri5" else flop, 0, peak_of(traced))

    def draw_batch(
        self, network: Any, variables: Any, key: jax.Array, numbers: np.ndarray, cond: Any
    ) -> tuple[np.ndarray, str]:
        """Returns samples `b *event`, and a line of text with the solver and its number of velocity evaluations.

        Each sample depends only on `key`, its entry of `numbers` and its condition. If `sampling.method` is "dopri5",
        it also depends slightly, within the solver's tolerance, on the batch, because the steps are adapted to the
        whole batch.

        cond: labels, or a context with one row per sample; None for unconditional samples.

        Raises ValueError if `cond` is None and `sampling.guidance` is not 0.
        """
        sampling = self.sampling
        if sampling.guidance and cond is None:
            raise ValueError(f"guidance is {sampling.guidance}, but cond is None; give it, or set guidance to 0.")
        x, evaluations = backend.by_rows(
            draw_by_solver,
            (weights_of(variables), key),
            numbers,
            cond,
            network=network,
            distribution=self.data.x0 if isinstance(self.data, PointsConfig) else None,
            matching=dataclasses.replace(self.matching, coupling=MatchingConfig().coupling),
            sampling=sampling,
        )
        return x, f"{sampling.method}, {evaluations.max()} evaluations"

    def draw(
        self, model: Any, variables: Any, options: VelocityDrawOptions, say: Callable[[str], None] = lambda line: None
    ) -> Samples:
        """Returns `sampling.num` samples, and calls `say` with a line about the speed of each batch."""
        check_command_needs_no_context(self.model)
        num = self.sampling.num
        labels = asked_labels(self.model, self.data, num, options.classes)

        def conditions(numbers: np.ndarray) -> np.ndarray | None:
            return None if labels is None else labels[numbers]

        points = isinstance(self.data, PointsConfig)
        at_once = num if points else AT_ONCE
        draw_batch = partial(self.draw_batch, model, on_devices(variables, min(options.batch or at_once, num)))
        samples = draw_in_batches(draw_batch, conditions, num, options, say, batch=at_once)
        return Samples(samples, {} if points else {"labels": np.full(num, -1) if labels is None else labels})

    def plot(self, network: Any, variables: Any, points: np.ndarray, key: jax.Array) -> np.ndarray:
        """Returns an image `height width 3` with two plots of a network that is trained on points.

        The first plot shows the paths of points from noise to data, solved with rk4 in 60 steps. The second plot shows
        the samples `points` on top of points of the data. key: the random key with which noise and data are drawn.
        """
        assert isinstance(self.data, PointsConfig)
        x0, data = self.data.draw(key, max(DRAWN_PATHS, len(points)))
        velocity = velocity_field(network, weights_of(variables), self.matching)
        paths, _ = trajectory(velocity, x0[:DRAWN_PATHS], method="rk4", num_steps=PLOT_STEPS)
        return path_plot(np.asarray(paths), points, np.asarray(data))

    def evaluate(
        self,
        model: Any,
        variables: Any,
        options: VelocityEvaluateOptions,
        *,
        trained_on: DataConfig | PointsConfig | None = None,
    ) -> Evaluation:
        """Draws samples, and returns their distances from the data; for images, also the likelihood in bits/dim.

        Images are compared with the split `options.split`, and points with new points of the data. The likelihood is
        that of the split under the ODE of the network, without guidance.

        trained_on: the config of the data that the network was trained on; None if it was trained on the experiment's
        `data`.
        """
        field = velocity_field(model, weights_of(variables), self.matching)
        if isinstance(self.data, PointsConfig):
            options.check_points()
            num, draw = options.samples or POINTS, self.data.draw
            samples = jax.jit(partial(point_samples, field, draw, num=num))(jax.random.key(options.seed))
            for points in (samples.generated, samples.euler_1, samples.euler_4, samples.euler_10):
                check_samples(np.asarray(points))
            metrics = {name: Estimate(value, count=num) for name, value in point_metrics(samples).items()}
            lines = [f"{name} {metric.value:.4f}" for name, metric in metrics.items()]
            return Evaluation((f"{num} points", *lines), metrics)
        check_features(options)
        dataset = self.dataset(options.split, labelled=not options.unconditional)
        conditional = self.model.num_classes > 0 and not options.unconditional

        def read(one: MatchingExperiment, split: Split) -> Dataset:
            return one.dataset(split, labelled=False)

        train = partial(training_images, self, trained_on, options.split, read)
        comparison = open_comparison(options, dataset, train)
        likelihood = evaluate_velocity(field, dataset, options, conditional=conditional)
        return likelihood + self._compare(model, variables, options, comparison, conditional)

    def _compare(
        self,
        network: Any,
        variables: Any,
        options: VelocityEvaluateOptions,
        comparison: Comparison,
        conditional: bool,
    ) -> Evaluation:
        num = options.samples or len(comparison.data)
        guidance = self.sampling.guidance if conditional else 0.0
        drawn = dataclasses.replace(self, sampling=dataclasses.replace(self.sampling, guidance=guidance))
        return compare_samples(
            partial(drawn.draw_batch, network, on_devices(variables, min(num, SAMPLES_AT_ONCE))),
            comparison,
            num,
            options,
            conditions=conditions_of(self.model, comparison.data) if conditional else None,
            how=self.sampling.method,
        )

    def debug(self) -> MatchingExperiment:
        """Returns a copy of the experiment that trains a tiny network of the same kind for a few steps.

        The copy keeps the data if they are points, and otherwise uses the built-in digits. A network of a class that
        has no method `shrunk` keeps its size.
        """
        few = min(self.sampling.num_steps, 2)
        sampling = dataclasses.replace(self.sampling, num=SAMPLES, num_steps=few, frechet_samples=0)
        shrunk = getattr(self.model, "shrunk", None)  # A user's config may lack this method.
        model = self.model if shrunk is None else shrunk()
        data = self.data if isinstance(self.data, PointsConfig) else debug_images(self.data)
        return debug_run(self, sampling=sampling, model=model, data=data)
