"""Image flows: TARFlows and STARFlows, trained by maximum likelihood on pixels or latents and sampled by decoding."""

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
from flowgen.evaluation import flow_bits_per_dim, flow_nats_per_dim, gaussian_bits_per_dim
from flowgen.experiments.autoregressive import (
    AutoregressiveExperiment,
    FlowDrawOptions,
    FlowEvaluateOptions,
)
from flowgen.experiments.debug import debug_flow, debug_images, debug_run
from flowgen.experiments.decoding import decoded_by_all, decoding_line
from flowgen.experiments.distances import SAMPLES_AT_ONCE, sample_lines, sample_metrics, train_features
from flowgen.experiments.drawing import AT_ONCE, draw_in_batches, on_devices
from flowgen.experiments.experiment import Samples
from flowgen.experiments.plots import sample_grid
from flowgen.flows import STARFlowConfig, STARFlowVConfig, TARFlowConfig
from flowgen.flows.objective import nll_objective
from flowgen.guidance import Guidance
from flowgen.settings import config, type_name
from flowgen.training import Job
from flowgen.training.step import Objective


@config(kw_only=True)
class FlowExperiment(AutoregressiveExperiment):
    """A flow on images.

    model: the flow.
    data: the images to train on.

    Raises ValueError if the parts do not fit together.

    Example:
        experiment = FlowExperiment(name="digits", model=TARFlowConfig(image_size=8))
    """

    draw_options = FlowDrawOptions
    evaluate_options = FlowEvaluateOptions

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

        dataset, held_out, model: see `fit`.
        """
        flow = self.build() if model is None else model
        trained_on, evaluated = self.opened(dataset, held_out)
        return self.flow_job(
            flow,
            trained_on,
            held_out=evaluated,
            evaluate=None if evaluated is None else self._evaluator(flow, trained_on, evaluated),
            sample=self.sampler(flow, evaluated or trained_on, self.draw_batch, sample_grid),
        )

    def objective(self, flow: Any, **options: Any) -> Objective:
        """Returns the maximum-likelihood objective; see `nll_objective`."""
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
        """Returns images `b height width c` and a line about their decoding; image i depends only on (key, i).

        If the flow models latents, the codec decodes them to images.

        cond: labels, a `TextCondition`, or None. guidance: by default, the guidance that `sampling` describes.
        checks: `certify` and `strict` of `flowgen.decoding.sample`.
        """
        result = decoded_by_all(
            flow,
            variables,
            key,
            numbers,
            cond,
            None,
            lambda variables: self.sampling.denoise,
            plan=self.sampling.to_plan(),
            guidance=guidance or self.guidance(flow),
            **checks,
        )
        return np.asarray(self.encoding.open_codec().decode(result.x)), decoding_line(result)

    def draw(
        self, model: Any, variables: Any, options: FlowDrawOptions, say: Callable[[str], None] = lambda line: None
    ) -> Samples:
        """Returns `sampling.num` images, and calls `say` with a line about the speed of each batch."""
        flow = self.sized(model, options.aspect)
        conditions, about = self.asked(flow, options.classes)
        variables = on_devices(variables, min(options.batch or AT_ONCE, self.sampling.num))
        draw_batch = partial(self.draw_batch, flow, variables, guidance=self.guidance(flow), **options.checks)
        return Samples(draw_in_batches(draw_batch, conditions, self.sampling.num, options, say), about)

    def evaluate(self, model: Any, variables: Any, options: FlowEvaluateOptions) -> list[str]:
        """Returns lines that report a split's likelihood under the flow and under a Gaussian, and sample metrics."""
        compared = self._compared(options.split) if options.samples else None
        dataset = self.flow_dataset(options.split, labelled=not options.unconditional)
        lines = self.likelihood_lines(model, variables, dataset, options)
        if not self.is_latent:
            lines += self._baseline_lines(model, dataset, options)
        return lines if compared is None else lines + self._sample_lines(model, variables, options, *compared)

    def debug(self) -> FlowExperiment:
        """Returns the experiment with a tiny flow of the same kind, trained on the built-in digits.

        The tiny flow uses pixel blocks as latents, and random features of words as encoded texts.
        """
        return debug_run(self, **debug_flow(self), data=debug_images(self.data))

    def _compared(self, split: Split) -> tuple[Dataset, Dataset]:
        """Returns the images to compare samples with, and the images to train the feature extractor on."""
        data = self.dataset(split)
        train = self.dataset("train" if split == "eval" else split)
        return of_one_shape(data, "--samples"), of_one_shape(train, "--samples")

    def _sample_lines(
        self, flow: Any, variables: Any, options: FlowEvaluateOptions, data: Dataset, train: Dataset
    ) -> list[str]:
        conditions = self.conditions_of(data, unconditional=options.unconditional)
        extractor, num = train_features(train), options.samples
        draw_batch = partial(self.draw_batch, flow, on_devices(variables, min(num, SAMPLES_AT_ONCE)))
        metrics = sample_metrics(draw_batch, extractor, data, num, seed=options.seed, conditions=conditions)
        return sample_lines(metrics, extractor, num, f"guidance {self.sampling.guidance:g}")

    def _baseline_lines(self, flow: Any, dataset: Any, options: FlowEvaluateOptions) -> list[str]:
        """Returns lines with the likelihood under a Gaussian with the same noise; [] if image sizes differ."""
        split = "train" if options.split == "eval" else options.split
        fitted = self.flow_dataset(split, labelled=False)
        if isinstance(dataset, BucketedDataset) or isinstance(fitted, BucketedDataset):
            return []
        bits = gaussian_bits_per_dim(fitted, dataset, noise_std=options.noise_std(flow))
        images = "training" if options.split == "eval" else "same"
        return [f"bits/dim of a Gaussian fitted to the {images} images {bits:.4f}"]

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
