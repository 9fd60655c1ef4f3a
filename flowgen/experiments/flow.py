"""Experiments that train image flows (TARFlow, STARFlow) on pixels or latents, and sample images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from flowgen.data import DataConfig, Dataset, LatentsConfig
from flowgen.data.dataset import BucketedDataset, Split, of_one_shape
from flowgen.evaluation import Evaluation, flow_bits_per_dim, flow_nats_per_dim, gaussian_bits_per_dim
from flowgen.experiments.anomalies import evaluate_anomalies, open_anomalies
from flowgen.experiments.autoregressive import AutoregressiveExperiment
from flowgen.experiments.comparison import (
    Comparison,
    check_features,
    check_sampled,
    compare_samples,
    open_comparison,
)
from flowgen.experiments.debug import debug_flow, debug_images, debug_run
from flowgen.experiments.decoding import decoded_by_all, decoding_line
from flowgen.experiments.distances import SAMPLES_AT_ONCE
from flowgen.experiments.drawing import AT_ONCE, CompareOptions, check_compared, draw_in_batches, on_devices
from flowgen.experiments.experiment import Samples
from flowgen.experiments.flow_options import FlowDrawOptions, FlowEvaluateOptions
from flowgen.experiments.images import compared_split, training_images
from flowgen.experiments.likelihoods import check_likelihood, evaluate_gaussian, evaluate_likelihood
from flowgen.experiments.plots import sample_grid
from flowgen.flows import STARFlowConfig, STARFlowVConfig, TARFlowConfig
from flowgen.flows.objective import nll_objective
from flowgen.guidance import Guidance
from flowgen.settings import config, type_name
from flowgen.training import Job
from flowgen.training.step import Objective


@config
class ImageEvaluateOptions(FlowEvaluateOptions, CompareOptions):
    """Options for evaluating a flow on images.

    anomaly: images to distinguish from the data by their likelihood: "corrupted" for corrupted copies of the data, a
    dataset such as mnist, or the path of a folder, .npz or .tar file. If the flow models latents, the likelihood is
    that of latents.
    """

    anomaly: str = ""

    def __post_init__(self):
        check_compared(self.samples)
        check_sampled(self, self.samples)
        if self.neighbours > self.samples:
            raise ValueError(f"neighbours is {self.neighbours}, but samples is {self.samples}; lower it.")


@config(kw_only=True)
class FlowExperiment(AutoregressiveExperiment):
    """An experiment that trains a flow on images by maximum likelihood.

    model: the flow.
    data: the images to train on, or latents of images that `python -m flowgen encode` has cached.

    Raises ValueError if the fields do not fit together.

    Example:
        experiment = FlowExperiment(name="digits", model=TARFlowConfig(image_size=8))
    """

    draw_options = FlowDrawOptions
    evaluate_options = ImageEvaluateOptions

    model: TARFlowConfig | STARFlowConfig
    data: DataConfig | LatentsConfig = DataConfig()

    def __post_init__(self):
        if isinstance(self.data, DataConfig) and self.data.aspects and isinstance(self.model, TARFlowConfig):
            raise ValueError(
                "data.aspects is set, but the parameters of a TARFlow are tied to one image size; use a STARFlow."
            )
        for name in ("drop_first", "images_fraction"):
            if getattr(self.data, name, 0):
                raise ValueError(
                    f"data.{name} is set, but it applies only to clips, and model is an image flow; set it to 0."
                )
        if self.likelihood.denoiser is not None:
            kind = type_name(self.model)
            raise ValueError(f"likelihood.denoiser is given, but a {kind} has no denoiser; leave it out.")
        if isinstance(self.model, STARFlowVConfig):
            raise ValueError("model is a STARFlowV, which models clips; use a VideoFlowExperiment.")
        self.check_parts()
        self.check_warmups()

    def job(self, *, dataset: Dataset | None = None, held_out: Dataset | None = None, model: Any = None) -> Job:
        """Opens the data, encodes them if necessary, and returns the training job.

        Encoding is necessary if the flow needs latents or encoded texts that are not cached.

        dataset, held_out, model: see `fit`.
        """
        flow = self.build() if model is None else model
        self.check_sampling(flow)
        trained_on, evaluated = self.opened(dataset, held_out)
        return self.flow_job(
            flow,
            trained_on,
            held_out=evaluated,
            evaluate=None if evaluated is None else self._evaluator(flow, trained_on, evaluated),
            sample=self.sampler(flow, evaluated or trained_on, self.draw_batch, sample_grid),
        )

    def objective(self, flow: Any, **options: Any) -> Objective:
        """Returns the maximum-likelihood objective of `flow`, with the penalties that `likelihood` gives.

        options: further arguments of `flowgen.flows.objective.nll_objective`, such as label_dropout.
        """
        likelihood = self.likelihood
        return nll_objective(flow, norm_penalty=likelihood.norm_penalty, jacobi=likelihood.jacobi, **options)

    def draw_batch(
        self,
        flow: Any,
        variables: Any,
        key: jax.Array,
        numbers: Int[np.ndarray, " b"],
        cond: Any,
        *,
        guidance: Guidance | None = None,
        **checks: bool,
    ) -> tuple[np.ndarray, str]:
        """Returns images `b height width c`, and a line of text about how the flow was inverted to draw them.

        Each image depends only on `key`, its entry of `numbers` and its condition, not on the other images of the
        batch. If the experiment has a codec, the flow draws latents, which the codec decodes to images.

        cond: the conditions of the images, as the flow requires: labels, a `TextCondition` or contexts; None for
        unconditional images. guidance: None for the guidance that `sampling` describes. checks: the options `certify`
        and `strict` of `flowgen.decoding.sample`.
        """
        result = decoded_by_all(
            flow,
            variables,
            key,
            numbers,
            cond,
            None,
            partial(self.denoiser, flow),
            plan=self.sampling.to_plan(),
            guidance=guidance or self.guidance(flow),
            **checks,
        )
        return np.asarray(self.encoding.open_codec().decode(result.x)), decoding_line(result)

    def denoiser(self, flow: Any, variables: Any) -> float:
        """Returns `sampling.denoise`, the strength of the Tweedie step that removes the training noise from samples; 0
        for none.
        """
        return self.sampling.denoise

    def draw(
        self, model: Any, variables: Any, options: FlowDrawOptions, say: Callable[[str], None] = lambda line: None
    ) -> Samples:
        """Returns `sampling.num` images, and calls `say` with a line about the speed of each batch."""
        flow = self.sized(model, options.aspect)
        conditions, about = self.asked(flow, options.classes)
        variables = on_devices(variables, min(options.batch or AT_ONCE, self.sampling.num))
        draw_batch = partial(self.draw_batch, flow, variables, guidance=self.guidance(flow), **options.checks)
        return Samples(draw_in_batches(draw_batch, conditions, self.sampling.num, options, say), about)

    def evaluate(
        self,
        model: Any,
        variables: Any,
        options: ImageEvaluateOptions,
        *,
        trained_on: DataConfig | LatentsConfig | None = None,
    ) -> Evaluation:
        """Returns the likelihood of the split `options.split` under the flow and, if requested, other metrics.

        If `options.samples` is above 0, samples are drawn and compared with the data. If `options.anomaly` is set, the
        likelihood is tested as a detector of anomalies.

        For a flow on pixels, the result also contains the likelihood of the split under a Gaussian, as a baseline. The
        Gaussian is fitted to the split "train" if `options.split` is "eval", and otherwise to the evaluated split
        itself.

        trained_on: the config of the data that the flow was trained on; None if the flow was trained on the
        experiment's `data`.
        """
        check_features(options)
        check_likelihood(model, options, latent=self.is_latent)
        if options.samples:
            self.check_sampling(model)

        def read(one: FlowExperiment, split: Split) -> Dataset:
            return of_one_shape(one.dataset(split), "--samples" if options.samples else "--anomaly")

        train = functools.cache(lambda: training_images(self, trained_on, options.split, read))
        anomalies = open_anomalies(self, options, train) if options.anomaly else None
        comparison = open_comparison(options, read(self, options.split), train) if options.samples else None
        dataset = self.flow_dataset(options.split, labelled=not options.unconditional)
        evaluation = evaluate_likelihood(model, variables, dataset, options, latent=self.is_latent)
        if not self.is_latent:
            split, images = compared_split(options.split)
            fitted_to = "same images" if split == options.split else images if trained_on else "training images"
            fitted = self.flow_dataset(split, labelled=False)
            evaluation += evaluate_gaussian(model, fitted, dataset, options, fitted_to=fitted_to)
        if comparison is not None:
            evaluation += self._compare(model, variables, options, comparison)
        if anomalies is not None:
            data = of_one_shape(dataset, "--anomaly")
            evaluation += evaluate_anomalies(self, model, variables, options, data, anomalies)
        return evaluation

    def debug(self) -> FlowExperiment:
        """Returns a copy of the experiment that trains a tiny flow of the same kind on the built-in digits for a few
        steps.

        If there is a codec, it becomes a `SpaceToDepth`. If there is a text encoder, it becomes the one that
        `TextConfig` calls "words".
        """
        return debug_run(self, **debug_flow(self), data=debug_images(self.data))

    def _compare(self, flow: Any, variables: Any, options: ImageEvaluateOptions, comparison: Comparison) -> Evaluation:
        return compare_samples(
            partial(self.draw_batch, flow, on_devices(variables, min(options.samples, SAMPLES_AT_ONCE))),
            comparison,
            options.samples,
            options,
            conditions=self.conditions_of(comparison.data, unconditional=options.unconditional),
            how=f"guidance {self.sampling.guidance:g}",
        )

    def _evaluator(self, flow: Any, trained_on: Any, held_out: Any) -> Callable[[Any], dict[str, float]]:
        if self.is_latent:
            return lambda variables: {"nats_per_dim": flow_nats_per_dim(flow, variables, held_out, jax.random.key(0))}

        @functools.cache  # The data do not change, and a run that is never evaluated need not read them all.
        def baseline() -> dict[str, float]:
            if isinstance(held_out, BucketedDataset):
                return {}
            bits = gaussian_bits_per_dim(trained_on, held_out, noise_std=flow.config.noise_std)
            return {"gaussian_bits_per_dim": bits}

        def evaluated(variables: Any) -> dict[str, float]:
            bits = flow_bits_per_dim(flow, variables, held_out, jax.random.key(0))
            return {"bits_per_dim": bits, **baseline()}

        return evaluated
