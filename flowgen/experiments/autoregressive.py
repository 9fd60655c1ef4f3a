"""The base class of image-flow and video-flow experiments."""

from __future__ import annotations

import abc
import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowgen.batch import Batch, Moments
from flowgen.conditioning import TextCondition
from flowgen.data import Dataset, LatentsConfig, take_inventory
from flowgen.data.dataset import BucketedDataset, Split, buckets_of
from flowgen.data.latent_files import Provenance, read_index
from flowgen.data.latents import LatentDataset, captions_of
from flowgen.decoding.plan import DecodePlan, rounded_dtypes
from flowgen.decoding.request import decode_request
from flowgen.experiments.codecs import CodecConfig
from flowgen.experiments.conditions import (
    captions_condition,
    check_command_needs_no_context,
    check_needs_no_context,
    check_not_flipped,
    chosen_texts,
    conditions_of,
    is_conditional,
)
from flowgen.experiments.drawing import (
    Conditions,
    asked_labels,
    cycled_labels,
    drawn_classes,
)
from flowgen.experiments.encoding import Encoding
from flowgen.experiments.estimates import decoding_cost, some_condition, tokens_of
from flowgen.experiments.experiment import Experiment, Rehearsal, SamplingCost
from flowgen.experiments.images import holds_latents, image_batches, tell_unused_classes, with_class_names
from flowgen.experiments.latents import FlowData, as_taken, flow_dataset, is_latent, null_texts, pixel_dataset
from flowgen.experiments.options import LikelihoodConfig, SamplingConfig
from flowgen.experiments.own_data import own_data
from flowgen.experiments.plots import DRAWABLE_CHANNELS
from flowgen.experiments.texts import TextConfig, release_text_encoders
from flowgen.flows import STARFlowConfig, TARFlowConfig
from flowgen.guidance import Guidance
from flowgen.nn import init
from flowgen.settings import in_group
from flowgen.training import Job, OptimConfig
from flowgen.training.step import Objective

# Text flows draw samples for this many held-out captions during training, unless sampling.prompts is set.
DRAWN_CAPTIONS = 16


@dataclass(frozen=True, kw_only=True)
class AutoregressiveExperiment(Experiment):
    """An autoregressive flow on images or clips, trained by maximum likelihood and sampled by decoding.

    codec: the codec that encodes images or clips as latents; None for a flow on pixels.
    text: the text encoder; None for a flow that is not conditioned on texts.
    likelihood: weight and penalties of the loss, and the optimizer of a denoiser.
    sampling: how samples are drawn: their number, the decoding plan, the guidance and the prompts.
    """

    model: TARFlowConfig | STARFlowConfig
    data: FlowData
    codec: CodecConfig | None = None
    text: TextConfig | None = None
    likelihood: LikelihoodConfig = LikelihoodConfig()
    sampling: SamplingConfig = SamplingConfig()

    @property
    def encoding(self) -> Encoding:
        """The codec and the text encoder."""
        return Encoding(self.model, self.codec, self.text)

    @property
    def is_latent(self) -> bool:
        """Whether the flow trains on encoded data: latents, or images with texts."""
        return is_latent(self.data, self.encoding)

    @property
    def best_metric(self) -> str:
        """The name of the evaluation metric by which checkpoints are ranked; lower is better.

        It is "nats_per_dim" if the flow trains on latents or with texts, and otherwise "bits_per_dim".
        """
        return "nats_per_dim" if self.is_latent else "bits_per_dim"

    @property
    def drawn_channels(self) -> int:
        """The number of channels of sampled images or clips."""
        return self.encoding.open_codec().pixel_channels

    @property
    def has_held_out(self) -> bool:
        """Whether there are held-out data to evaluate on."""
        if isinstance(self.data, LatentsConfig):
            return any(
                shard.split == "eval" and shard.kind in ("image", "clip") for shard in read_index(self.data.path).shards
            )
        return self.data.eval_fraction > 0

    def check_parts(self) -> None:
        """Raises ValueError if the fields do not fit together."""
        if bool(self.model.text_dim) != (self.text is not None):
            has = "missing" if self.text is None else "given"
            raise ValueError(
                f"text is {has}, but model.text_dim is {self.model.text_dim}; set both for a text model, or neither."
            )
        check_not_flipped(self.model, self.data)
        if not self.model.text_dim and self.sampling.prompts:
            raise ValueError(
                f"sampling.prompts is {self.sampling.prompts}, but the model accepts no texts; leave it out."
            )
        blocks, last = self.sampling.blocks or (), self.model.num_blocks - 1
        if self.sampling.guidance and (outside := [block for block in blocks if not 0 <= block <= last]):
            raise ValueError(f"sampling.blocks has {outside[0]}, but the model has blocks 0 to {last}; leave it out.")
        plan = self.sampling.plan
        if isinstance(plan, tuple) and len(plan) != self.model.num_blocks:
            raise ValueError(
                f"sampling.plan has plans for {len(plan)} blocks, but the model has {self.model.num_blocks}; give one "
                "per block."
            )
        if isinstance(plan, tuple) and self.model.dtype in rounded_dtypes(DecodePlan(plan)):
            raise ValueError(
                f"sampling.plan has dtype {self.model.dtype!r}, in which the model computes anyway; use the inner plan "
                "or 'int8'."
            )
        if self.likelihood.jacobi is not None:
            with in_group("likelihood.jacobi"):
                self.likelihood.jacobi.numbers(self.model.num_blocks)
        if self.is_latent and self.model.noise_std == 0:
            raise ValueError(
                "model.noise_std is 0, which works only for pixels; for latents, set it above 0, for example to 0.3."
            )

    def dataset(self, split: Split) -> Dataset | BucketedDataset:
        """Returns the images or clips in a split of `data`, resized so that their latents have the size that the flow
        expects.
        """
        check_needs_no_context(self.model, self.data)
        return pixel_dataset(self.data, self.encoding, split)

    def flow_dataset(self, split: Split, *, labelled: bool = True) -> Dataset | BucketedDataset:
        """Returns the data that the flow is trained on: pixels, or the outputs of the codec and the text encoder.

        labelled: whether the data must have labels if the model is class-conditional.
        """
        check_needs_no_context(self.model, self.data)
        return flow_dataset(self.data, self.encoding, split, labelled=labelled)

    def with_provenance(self) -> AutoregressiveExperiment:
        """Returns a copy of the experiment that records its class names and which frozen networks it uses.

        The fields `data.classes`, `codec.digest` and `text.digest`, if the experiment has them and they are not set
        yet, are set to the names of the classes in the data and the digests of the autoencoder and the text encoder.
        """
        cached = None
        if isinstance(self.data, LatentsConfig):
            needs = self.text is not None and self.text.digest is None and self.text.encoder
            cached = read_index(self.data.path).provenance if needs else Provenance()
        encoding = self.encoding.with_digests(cached)
        changed = dataclasses.replace(self, codec=encoding.codec, text=encoding.text)
        return with_class_names(changed)

    def opened(
        self, dataset: Dataset | None, held_out: Dataset | None
    ) -> tuple[Dataset | BucketedDataset, Dataset | BucketedDataset | None]:
        """Returns the training data and the held-out data: the given datasets or, by default, the experiment's own."""
        if dataset is not None:
            assert not isinstance(self.data, LatentsConfig)  # `fit` has replaced a LatentsConfig.
            codec, model = self.encoding.open_codec(), self.model
            *whole, height, width, _ = model.event_shape
            frames = [1 + (count - 1) * codec.stride for count in whole]
            expected = (*frames, height * codec.factor, width * codec.factor, codec.pixel_channels)
            dataset, held_out = own_data(dataset, held_out, expected, model.num_classes, model.context)
            evaluated = None if held_out is None else as_taken(held_out, self.data, self.encoding, flip=False)
            return as_taken(dataset, self.data, self.encoding, flip=self.data.flip), evaluated
        return self.flow_dataset("train"), self.flow_dataset("eval") if self.has_held_out else None

    def flow_job(
        self,
        flow: Any,
        dataset: Dataset | BucketedDataset,
        *,
        held_out: Dataset | BucketedDataset | None,
        evaluate: Callable[[Any], dict[str, float]] | None,
        sample: Callable[[Any], np.ndarray] | None,
        optims: dict[str, OptimConfig] | None = None,
    ) -> Job:
        """Returns the training job for the datasets that `opened` returned, and frees the text encoder.

        held_out: the held-out data, if any. For the other arguments, see `Job`.
        """
        self.warn_of_guidance()
        if self.text is None:  # The names of classes are the captions of images that have none.
            tell_unused_classes(dataset, self.data, self.model.num_classes)
        made = Job(
            init=lambda key: init(flow, key),
            objective=self.objective(
                flow,
                label_dropout=self.train.label_dropout,
                loss_scale=self.likelihood.loss_scale(self.model.noise_std),
                null_text=null_texts(dataset),
            ),
            batches=image_batches(dataset, self.data, self.train),
            evaluate=evaluate,
            sample=sample,
            best_metric=self.best_metric,
            optims=optims or {},
            inventory=take_inventory(self.data, dataset, held_out),
            tokens=partial(tokens_of, self.model),
        )
        release_text_encoders()
        return made

    @abc.abstractmethod
    def objective(self, flow: Any, **options: Any) -> Objective:
        """Returns the training objective of a flow.

        options: label_dropout, loss_scale and null_text; see `nll_objective`.
        """

    def rehearsal(self, model: Any, rows: int) -> Rehearsal:
        """Returns what is needed to trace a training step of the flow `model` on `rows` samples."""
        shape = (rows, *self.model.event_shape)

        def batch() -> Batch:
            latents = jnp.zeros(shape)
            x = Moments(latents, latents) if self.is_latent else jnp.zeros(shape, jnp.uint8)
            return Batch(x, some_condition(self.model, rows))

        return Rehearsal(lambda key: init(model, key), self.objective(model), jax.eval_shape(batch))

    def sampling_cost(self, model: Any, variables: Any, num: int) -> SamplingCost:
        """Returns the FLOP and the memory of drawing `num` samples at a time, token by token.

        The codec and the text encoder are not included.
        """
        sampling = self.sampling
        blocks = range(self.model.num_blocks) if sampling.blocks is None else sampling.blocks
        by_score = self.model.noise_std > 0 and sampling.denoise > 0 and not getattr(self.model, "denoiser_layers", 0)
        guided = blocks if sampling.guidance else ()
        plan = DecodePlan(sampling.plan) if isinstance(sampling.plan, tuple) else None
        return decoding_cost(model, variables, num, guided=guided, by_score=by_score, plan=plan)

    def sampler(
        self,
        flow: Any,
        dataset: Dataset | BucketedDataset,
        draw_batch: Callable[..., tuple[np.ndarray, str]],
        show: Callable[[np.ndarray, int], np.ndarray],
    ) -> Callable[[Any], np.ndarray] | None:
        """Returns a function that draws a run's sample grid, or None if samples cannot be shown in grey or colour.

        The samples cycle through the classes, through `sampling.prompts`, or through the captions or contexts of the
        dataset.

        draw_batch: the experiment's method of this name. show: a function (samples, number of classes) -> one image.
        """
        without_codec = isinstance(self.data, LatentsConfig) and self.codec is None
        if without_codec or self.encoding.open_codec().pixel_channels not in DRAWABLE_CHANNELS:
            return None
        num, classes = self.sampling.num, drawn_classes(self.model, self.data)
        bucket = buckets_of(dataset)[0]
        # The captions may state the aspect ratio of their images, so samples have the shape of those images.
        prompts = self.sampling.prompts
        sized = flow if prompts or not holds_latents(dataset) else flow.with_image_size(*bucket.event_shape[-3:-1])
        texts = null = None
        if self.model.text_dim:
            # Prompts are encoded before the first step, so that an invalid one raises an error at once.
            texts = (
                self.encoding.condition(prompts)
                if prompts
                else captions_condition(bucket, np.arange(min(num, DRAWN_CAPTIONS, len(bucket))))
            )
            null_text = null_texts(dataset)
            if not prompts and null_text is not None and isinstance(bucket, LatentDataset):
                null = null_text(bucket.event_shape[:-1])
        guidance = self.guidance(flow, null)

        def draw_image(variables: Any) -> np.ndarray:
            numbers = np.arange(num)
            if self.model.context is not None:
                cond = bucket[numbers % len(bucket)].context
            else:
                cond = cycled_labels(num, classes) if texts is None else chosen_texts(texts, numbers)
            key = jax.random.key(self.train.seed)
            samples, _ = draw_batch(sized, variables, key, numbers, cond, guidance=guidance)
            return show(samples, classes)

        return draw_image

    def sized(self, flow: Any, aspect: str) -> Any:
        """Returns the flow for images with an aspect ratio such as 16:9, or the same flow if `aspect` is empty."""
        return flow.with_image_size(*self.encoding.latent_size(aspect)) if aspect else flow

    def guidance(self, flow: Any, null: TextCondition | None = None) -> Guidance:
        """Returns the guidance for samples. The guidance of a text flow includes the text of the unconditional branch.

        null: the encoded text of the unconditional branch. By default, it is the encoded empty text.
        """
        guidance = self.sampling.to_guidance()
        if not (self.model.text_dim and guidance.scale):
            return guidance
        null = self.encoding.empty_text(flow.config.image_hw) if null is None else null
        return dataclasses.replace(guidance, null=null)

    def check_sampling(self, flow: Any) -> None:
        """Raises ValueError if the flow cannot be decoded as `sampling` describes. No samples are drawn."""
        cond, guidance = some_condition(self.model, 1), self.sampling.to_guidance()
        guidance = dataclasses.replace(guidance, null=cond) if self.model.text_dim else guidance
        noise = jnp.zeros((1, flow.config.num_tokens, flow.config.token_dim))
        decode_request(flow, {}, noise, cond, self.sampling.to_plan(), guidance)

    def warn_of_guidance(self) -> None:
        """Issues a UserWarning if samples are guided, but the unconditional branch is not trained."""
        conditional = is_conditional(self.model) or self.model.text_dim
        if self.sampling.guidance and conditional and not self.train.label_dropout:
            warnings.warn(
                f"sampling.guidance is {self.sampling.guidance:g}, but train.label_dropout is 0, so the unconditional "
                "branch is not trained; train with train.label_dropout 0.1, or set sampling.guidance to 0.",
                stacklevel=2,
            )

    def asked(self, flow: Any, classes: str) -> tuple[Conditions, dict[str, Any]]:
        """Returns a function from sample numbers to conditions, and the labels or prompts to save with samples.

        classes: the value of --classes (see `parse_classes`). If it is empty, all classes are drawn in turn.

        Raises ValueError if the model does not accept the given conditions.
        """
        check_command_needs_no_context(self.model)
        num = self.sampling.num
        if not self.model.text_dim:
            labels = asked_labels(self.model, self.data, num, classes)
            known = np.full(num, -1) if labels is None else labels
            return lambda numbers: None if labels is None else labels[numbers], {"labels": known}
        if classes:
            raise ValueError(f"--classes is {classes}, but this model requires texts; give --prompt instead.")
        prompts = self.sampling.prompts
        if not prompts:
            raise ValueError("this model requires texts; give --prompt.")
        texts = self.encoding.condition(prompts, flow.config.image_hw)
        return partial(chosen_texts, texts), {"prompts": np.resize(np.array(prompts), num)}

    def conditions_of(self, data: Dataset, *, unconditional: bool = False) -> Conditions | None:
        """Returns a function from dataset positions to conditions, or None if there are no conditions.

        The conditions are labels, encoded captions or contexts.

        unconditional: whether to leave out the labels of a class-conditional model.
        """

        def labels(positions):
            return data[positions].labels

        def texts(positions):
            if isinstance(data, LatentDataset):
                return captions_condition(data, positions)
            assert self.text is not None
            captions = captions_of(data, positions, labels(positions))
            return self.encoding.condition(captions, truncate=self.text.truncate)

        if self.model.context is not None:
            return conditions_of(self.model, data)
        if self.model.text_dim:
            return texts
        return labels if self.model.num_classes and not unconditional else None
