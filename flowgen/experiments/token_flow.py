"""Experiments that train flows for vectors, sequences and sets, for example to model the posterior of a simulator.

A flow is trained on standardised numbers; see `flowgen.experiments.units`. All samples and densities that these
experiments return are in the units of the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flowgen import backend
from flowgen.batch import Batch
from flowgen.conditioning import split_padded
from flowgen.contexts import VectorContext
from flowgen.data import Dataset, Inventory, Loader, fixed_batches, prefetch
from flowgen.data.dataset import Split
from flowgen.data.numbers import NumbersConfig, NumbersDataset, SimulatedConfig, load_numbers, numbers_marks
from flowgen.decoding import Jacobi
from flowgen.evaluation import Evaluation, mean_of, ratio_of
from flowgen.experiments.debug import SAMPLES, debug_run
from flowgen.experiments.decoding import decoded_by_all, decoding_line
from flowgen.experiments.drawing import DrawOptions, asked_labels, draw_in_batches, on_devices
from flowgen.experiments.estimates import decoding_cost, tokens_of
from flowgen.experiments.experiment import Experiment, Rehearsal, Samples, SamplingCost
from flowgen.experiments.images import tell_repeats
from flowgen.experiments.likelihoods import check_computed
from flowgen.experiments.number_checks import batch_context, check_finite_samples
from flowgen.experiments.number_contexts import blank_context, named_arrays, with_labels
from flowgen.experiments.number_plots import number_plot, observation_title
from flowgen.experiments.posteriors import check_observations, evaluate_calibration, evaluate_observations
from flowgen.experiments.row_orders import with_rows_shuffled
from flowgen.experiments.token_options import TokenDrawOptions, TokenEvaluateOptions, TokenSamplingConfig
from flowgen.experiments.units import (
    blank_units,
    box_of,
    context_to_flow,
    log_prob_in_data,
    measured_units,
    to_data,
    to_flow,
)
from flowgen.flows.objective import mean_dims, nll_objective
from flowgen.flows.token_flow import TokenFlowConfig
from flowgen.guidance import Guidance
from flowgen.nn import init
from flowgen.settings import config, in_group
from flowgen.training import Job
from flowgen.training.step import Objective
from flowgen.transforms import Box

AT_ONCE = 8192  # samples per compiled call by default
DEBUG_SIMULATIONS = 200


@config(kw_only=True)
class TokenFlowExperiment(Experiment):
    """An experiment that standardises vectors, sequences or sets, and trains a flow on them by maximum likelihood.

    model: the flow.
    data: the simulator or the file that provides the training samples and their contexts.
    sampling: how samples are drawn: their number, the decoding plan, the guidance and the context.

    Raises ValueError if the fields do not fit together.

    Example:
        model = TokenFlowConfig(shape=(2,), context=VectorContext(dim=2))
        experiment = TokenFlowExperiment(name="moons", model=model, data=SimulatedConfig("two_moons"))
    """

    draw_options = TokenDrawOptions
    evaluate_options = TokenEvaluateOptions

    model: TokenFlowConfig
    data: SimulatedConfig | NumbersConfig
    sampling: TokenSamplingConfig = TokenSamplingConfig()

    def __post_init__(self):
        if isinstance(self.data, SimulatedConfig):
            self._check_simulator(self.data)
        elif self.data.shuffle_rows and len(self.model.shape) == 1:
            raise ValueError(
                f"data.shuffle_rows is true, but the model has shape {self.model.shape}, and a vector has no rows; set "
                "it to false."
            )
        with in_group("data"):
            box_of(self.data, self.model)
        self._check_sampling()
        self.check_warmups()

    def _check_simulator(self, data: SimulatedConfig) -> None:
        simulator, model = data.simulator, self.model
        if model.shape != (simulator.parameter_dim,) or model.context != VectorContext(simulator.observation_dim):
            raise ValueError(
                f"model has shape {model.shape} and context {model.context}; for {data.name}, they must be "
                f"({simulator.parameter_dim},) and {VectorContext(simulator.observation_dim)}."
            )
        count = len(simulator.fixed_observations)
        if self.sampling.observation >= count:
            raise ValueError(
                f"sampling.observation is {self.sampling.observation}, but {data.name} has the fixed observations 0 to "
                f"{count - 1}; choose one of them, or give sampling.context."
            )

    def _check_sampling(self) -> None:
        model, sampling = self.model, self.sampling
        dim = model.context.dim if isinstance(model.context, VectorContext) and not model.padded else 0
        if sampling.context and len(sampling.context) != dim:
            needs = f"give {dim} entries" if dim else "use sampling.observation for this model"
            raise ValueError(f"sampling.context is {sampling.context}, which is not the model's context; {needs}.")
        if not sampling.guidance:
            return
        if model.mixture is not None:
            raise ValueError("sampling.guidance is set, but guidance needs the affine map; set model.mixture to null.")
        if not (model.num_classes or model.context) or not self.train.label_dropout:
            raise ValueError(
                f"sampling.guidance is {sampling.guidance}, but it needs a condition that is dropped in training; set "
                "train.label_dropout to 0.1, or sampling.guidance to 0."
            )

    @property
    def best_metric(self) -> str:
        """The name of the evaluation metric by which checkpoints are ranked, "nats_per_dim"; lower is better."""
        return "nats_per_dim"

    @property
    def box(self) -> Box | None:
        """The transform that maps samples within bounds to unbounded numbers; None if the samples have no bounds.

        The bounds are those of the simulator's prior or, for a file, `data.low` and `data.high`.
        """
        return box_of(self.data, self.model)

    def dataset(self, split: Split) -> NumbersDataset:
        """Returns the samples in a split of `data` with their contexts, in the units of the data."""
        return load_numbers(self.data, self.model, split)

    def job(self, *, dataset: Dataset | None = None, held_out: Dataset | None = None, model: Any = None) -> Job:
        """Opens or simulates the data, measures the mean and scale of each channel, and returns the training job.

        dataset, held_out: ignored, because this kind of experiment trains only on `data`. model: see `fit`.
        """
        flow = self.build() if model is None else model
        trained_on, evaluated = self.dataset("train"), self.dataset("eval") if self.data.eval_fraction else None
        units = measured_units(trained_on, self.box)
        tell_repeats(trained_on, self.train)
        loader = Loader(
            trained_on,
            batch_size=self.train.batch_size,
            seed=self.train.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return Job(
            init=lambda key: {**init(flow, key), **jax.tree.map(jnp.asarray, units)},
            objective=self.objective(flow),
            batches=lambda start, stop: prefetch(loader, start, stop),
            evaluate=None if evaluated is None else partial(self._held_out_metrics, flow, evaluated),
            sample=partial(self._sample_image, flow, evaluated or trained_on),
            best_metric=self.best_metric,
            inventory=self._inventory(trained_on, evaluated),
            tokens=partial(tokens_of, self.model),
        )

    def objective(self, flow: Any) -> Objective:
        """Returns the maximum-likelihood objective of `flow` for batches in the units of the data.

        The loss is that of the standardised samples; the metric nats_per_dim is in the units of the data.
        """
        of_flow, box = nll_objective(flow, label_dropout=self.train.label_dropout), self.box
        shuffled = isinstance(self.data, NumbersConfig) and self.data.shuffle_rows

        def objective(variables, batch, key):
            if shuffled:
                batch = with_rows_shuffled(batch, key)
            x, context, logdet = to_flow(variables, batch.x, batch.context, box)
            loss, metrics = of_flow(variables, batch._replace(x=x, context=context), key)
            in_data = metrics["nats_per_dim"] - logdet.mean() / mean_dims(flow.config, context, batch.rows)
            return loss, {**metrics, "nats_per_dim": in_data}

        return objective

    def rehearsal(self, model: Any, rows: int) -> Rehearsal:
        """Returns what is needed to trace a training step of the flow `model` on `rows` samples."""

        def batch() -> Batch:
            return Batch(jnp.full((rows, *self.model.shape), 0.5), blank_context(self.model, rows))

        def initial(key: jax.Array) -> Any:
            return {**init(model, key), **blank_units(self.model)}

        return Rehearsal(initial, self.objective(model), jax.eval_shape(batch))

    def sampling_cost(self, model: Any, variables: Any, num: int) -> SamplingCost:
        """Returns the FLOP and the memory of drawing `num` samples at a time, token by token."""
        guided = range(self.model.num_blocks) if self.sampling.guidance else ()
        return decoding_cost(model, variables, num, guided=guided, by_score=self.model.noise_std > 0)

    def log_prob(
        self, model: Any, variables: Any, x: Float[Array | np.ndarray, "b *event"], context: Any = None
    ) -> Float[np.ndarray, " b"]:
        """Returns log p(x | context) in nats, a density in the units of the data; -inf outside the bounds of x.

        x, context: samples and their contexts in the units of the data, such as `x` and `context` of the result of
        `dataset`. A single context, with or without a batch axis, applies to all samples. A value equal to a bound
        counts as outside; in the result of `dataset`, all values are inside.

        Raises ValueError unless x and the context have the shapes that the model requires, and contain only finite
        numbers outside padding.

        Example:
            experiment.log_prob(flow, params, parameters, observations)
        """
        model.config.check_samples(x)
        context = batch_context(model.config, context, len(x))
        check_finite_samples(x, context)
        return backend.by_rows(log_prob_in_data, variables, x, context, flow=model, data=self.data)

    def draw_batch(
        self, flow: Any, variables: Any, key: jax.Array, numbers: Int[np.ndarray, " b"], context: Any
    ) -> tuple[Float[np.ndarray, "b *event"], str]:
        """Returns samples in the units of the data, and a line of text about how the flow was inverted to draw them.

        Each sample depends only on `key`, its entry of `numbers` and its context, not on the other samples of the
        batch.

        context: the context of each sample, in the units of the data, or a single context for all samples; None for
        unconditional samples. If samples are padded, it is a `Padded`, which also contains the mask.

        Raises ValueError unless the context has the shape that the model requires, and contains only finite numbers.

        Example:
            drawn, _ = experiment.draw_batch(flow, params, jax.random.key(0), np.arange(100), observation)
        """
        sampling, context = self.sampling, batch_context(flow.config, context, len(numbers), unconditional=True)
        cond = jax.tree.map(np.asarray, context_to_flow(variables, context))
        result = decoded_by_all(
            flow,
            variables,
            key,
            numbers,
            cond,
            None,
            lambda variables: 1.0,
            plan=Jacobi() if sampling.plan == "jacobi" else sampling.plan,
            guidance=Guidance(scale=sampling.guidance) if sampling.guidance else None,
        )
        return np.asarray(to_data(variables, result.x, context, self.box)), decoding_line(result)

    def draw(
        self, model: Any, variables: Any, options: TokenDrawOptions, say: Callable[[str], None] = lambda line: None
    ) -> Samples:
        """Returns `sampling.num` samples, and calls `say` with a line about the speed of each batch."""
        num, labels = self.sampling.num, asked_labels(self.model, self.data, self.sampling.num, options.classes)
        one = self._context_of(lambda: self.dataset("eval" if self.data.eval_fraction else "all"))
        context = with_labels(jax.tree.map(lambda array: np.repeat(array[None], num, axis=0), one), labels)
        variables = on_devices(variables, min(options.batch or AT_ONCE, num))
        drawn = draw_in_batches(
            partial(self.draw_batch, model, variables),
            lambda numbers: jax.tree.map(lambda array: array[numbers], context),
            num,
            options,
            say,
            batch=AT_ONCE,
        )
        return Samples(drawn, named_arrays(context))

    def plot(self, samples: Samples) -> np.ndarray:
        """Returns an image `height width 3` that shows samples as points, histograms or lines.

        If `data` is a simulator and `sampling.context` is empty, reference samples of the posterior are drawn behind
        these samples.

        samples: the result of `draw`.
        """
        sampling, reference = self.sampling, None
        if isinstance(self.data, SimulatedConfig) and not sampling.context:
            num = min(len(samples.arrays), 10_000)
            key = jax.random.key(self.train.seed)
            reference = np.asarray(self.data.simulator.reference_samples(key, num, sampling.observation))
        title = observation_title(sampling, self.model, of_file=isinstance(self.data, NumbersConfig))
        return number_plot(samples.arrays, samples.conditions.get("mask"), reference, title)

    def evaluate(self, model: Any, variables: Any, options: TokenEvaluateOptions) -> Evaluation:
        """Returns the likelihood of the split `options.split` under the flow, and tests of samples that the flow draws.

        For a simulator, classifier two-sample tests (C2ST) compare `options.samples` samples for each fixed observation
        with reference samples of the posterior. The reference samples are exact for two moons, and come from a long run
        of the No-U-Turn sampler for SLCP. For vectors with contexts, simulation-based calibration and expected coverage
        are computed on up to `options.calibration` samples of the split. Either number may be 0 to leave out its tests.
        """
        key = jax.random.key(options.seed)
        if options.samples and isinstance(self.data, SimulatedConfig):
            check_observations(self.data.simulator, key, options.samples)
        dataset = self.dataset(options.split)
        nats = self._nats(model, variables, dataset, options.batch)
        check_computed(nats, "samples")
        per_sample, per_dim = mean_of(nats), ratio_of(nats, self._dims(dataset))
        lines = (f"{len(dataset)} samples ({options.split})", f"nats {per_sample}", f"nats/dim {per_dim}")
        evaluation = Evaluation(lines, {"nats": per_sample, "nats_per_dim": per_dim})
        variables = on_devices(variables, AT_ONCE)
        draw = partial(self._draw_under, model, variables)
        if options.samples and isinstance(self.data, SimulatedConfig):
            evaluation += evaluate_observations(self.data.simulator, draw, key, options.samples)
        if options.calibration and len(self.model.shape) == 1 and dataset.context is not None:
            log_prob = partial(self.log_prob, model, variables)
            evaluation += evaluate_calibration(draw, log_prob, dataset, key, options.calibration)
        return evaluation

    def debug(self) -> TokenFlowExperiment:
        """Returns a copy of the experiment that trains a tiny flow of the same kind for a few steps.

        The copy uses at most 200 simulations or, if the samples are in a file, the same file.
        """
        model, data = self.model, self.data
        width, head_dim = (16, 8) if model.width > 16 else (model.width, model.head_dim)
        small = dataclasses.replace(
            model,
            width=width,
            head_dim=head_dim,
            num_blocks=min(model.num_blocks, 2),
            layers_per_block=1,
            orders=model.orders if isinstance(model.orders, str) else model.orders[:2],
        )
        if isinstance(data, SimulatedConfig):
            data = dataclasses.replace(data, simulations=min(data.simulations, DEBUG_SIMULATIONS))
        return debug_run(self, model=small, data=data, sampling=dataclasses.replace(self.sampling, num=SAMPLES))

    def _held_out_metrics(self, flow: Any, held_out: NumbersDataset, variables: Any) -> dict[str, float]:
        nats = self._nats(flow, variables, held_out, self.train.batch_size)
        return {"nats_per_dim": ratio_of(nats, self._dims(held_out)).value, "nats": float(nats.mean())}

    def _dims(self, dataset: NumbersDataset) -> Float[np.ndarray, " n"]:
        """Returns the number of values in each sample of a dataset, without padding."""
        mask, _ = split_padded(dataset.context)
        rows = np.full(len(dataset), self.model.num_tokens) if mask is None else np.asarray(mask).sum(axis=1)
        return rows * float(self.model.token_dim)

    def _nats(self, flow: Any, variables: Any, dataset: NumbersDataset, batch_size: int) -> Float[np.ndarray, " n"]:
        """Returns -log p of each sample of a dataset, in float64."""
        parts = [
            -self.log_prob(flow, variables, np.asarray(batch.x), batch.context).astype(np.float64)[mask]
            for batch, mask in fixed_batches(dataset, min(batch_size, len(dataset)))
        ]
        return np.concatenate(parts)

    def _draw_under(self, flow: Any, variables: Any, key: jax.Array, context: Any) -> Float[np.ndarray, "n *event"]:
        """Returns one sample given each context."""
        count = len(jax.tree.leaves(context)[0])
        return draw_in_batches(
            lambda _, numbers, cond: self.draw_batch(flow, variables, key, numbers, cond),
            lambda numbers: jax.tree.map(lambda array: array[numbers], context),
            count,
            DrawOptions(),
            lambda line: None,
            batch=AT_ONCE,
        )

    def _context_of(self, opened: Callable[[], NumbersDataset]) -> Any:
        """Returns the context that `sampling` selects, without a batch axis, or None if the model has no context.

        opened: a function that opens the dataset in which `sampling.observation` is a position.
        """
        model, sampling = self.model, self.sampling
        if sampling.context:
            return np.asarray(sampling.context, np.float32)
        if isinstance(self.data, SimulatedConfig):
            return np.asarray(self.data.simulator.observations[sampling.observation])
        if model.context is None and not model.padded:
            return None
        dataset = opened()
        if sampling.observation >= len(dataset):
            raise ValueError(
                f"sampling.observation is {sampling.observation}, but there are only {len(dataset)} samples; lower it."
            )
        return jax.tree.map(lambda array: array[sampling.observation], dataset.context)

    def _sample_image(self, flow: Any, numbered: NumbersDataset, variables: Any) -> np.ndarray:
        num = self.sampling.num
        one = self._context_of(lambda: numbered)
        labels = asked_labels(self.model, self.data, num, "")
        context = with_labels(jax.tree.map(lambda array: np.repeat(array[None], num, axis=0), one), labels)
        drawn, _ = self.draw_batch(flow, variables, jax.random.key(self.train.seed), np.arange(num), context)
        return self.plot(Samples(drawn, named_arrays(context)))

    def _inventory(self, dataset: NumbersDataset, held_out: NumbersDataset | None) -> Inventory:
        held = 0 if held_out is None else len(held_out)
        simulated = isinstance(self.data, SimulatedConfig)
        marks = {} if simulated else numbers_marks(self.data.path)
        what = "simulations" if simulated else "vectors" if len(self.model.shape) == 1 else "sequences"
        classes = tuple(map(str, range(self.model.num_classes)))
        return Inventory(what, len(dataset), held, classes=classes, train_files=marks)
