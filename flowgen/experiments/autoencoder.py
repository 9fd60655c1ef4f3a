"""Trains autoencoders for latent flows, with a reconstruction loss and a small KL term.

loss = mean |x - x̂| + mean (x - x̂)² + kl_weight · mean over latents of KL(N(mean, std²) || N(0, 1))
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flowgen import backend
from flowgen.batch import Batch
from flowgen.codecs import AutoencoderConfig, VideoAutoencoderConfig
from flowgen.data import (
    ClipsConfig,
    DataConfig,
    Dataset,
    check_classes,
    fixed_batches,
    from_uint8,
    load,
    load_clips,
    take_inventory,
)
from flowgen.data.dataset import Split, of_one_shape
from flowgen.evaluation import Estimate, Evaluation, mean_of, psnr
from flowgen.experiments.codecs import STATISTICS, open_autoencoder
from flowgen.experiments.debug import SAMPLES, debug_clips, debug_images, debug_run
from flowgen.experiments.drawing import EvaluateOptions
from flowgen.experiments.experiment import Experiment, Rehearsal
from flowgen.experiments.images import image_batches
from flowgen.experiments.likelihoods import check_computed
from flowgen.experiments.own_data import own_data
from flowgen.experiments.plots import DRAWABLE_CHANNELS, sample_grid, strips
from flowgen.nn import init
from flowgen.rows import Rows, StatefulObjective, batch_rows
from flowgen.settings import config
from flowgen.settings.ranges import NonNegative, OtherFrames, Side
from flowgen.settings.ranges import Samples as NumSamples
from flowgen.training import Job

# Update rate of the running mean and variance of the latents: the weight of each new batch.
STATISTICS_RATE = 0.02


@config
class AutoencodingConfig:
    """Options for training an autoencoder: the field `autoencoding` of an `AutoencoderExperiment`. Names such as
    `model.factor` and `optim.weight_decay` are fields of the same experiment.

    image_size: side of square images or frames, or (height, width), in pixels; each side must be a multiple of
    `model.factor`, the number of pixels per latent along a side.
    frames: number of frames per clip; 0 for images. The first frame is encoded alone, and each group of `model.stride`
    later frames becomes one latent frame, so the number must be 1 plus a multiple of `model.stride`.
    kl_weight: weight of the KL term in the loss; 0 or more. The term is KL(q || N(0, 1)) in nats, averaged over all
    values of the latents, where q is the normal distribution that the encoder predicts for a value.
    noise: standard deviation of the noise that is added to the latents in training before they are decoded, in units of
    the standard deviation of each latent channel; 0 for none. Noise prepares the decoder for the inexact latents that a
    flow samples.
    decoder_of: path of a trained or published autoencoder, as in `PretrainedAutoencoder`, whose decoder is fine-tuned
    while its encoder stays frozen; `optim.weight_decay` must then be 0, and `init.path` empty. If decoder_of is empty,
    encoder and decoder are trained.
    shown: largest number of images or clips that the run's sample grid shows next to their reconstructions; at least 1.
    """

    image_size: Side | tuple[Side, Side] = 8
    frames: OtherFrames = 0
    kl_weight: NonNegative = 1e-4
    noise: NonNegative = 0.0
    decoder_of: str = ""
    shown: NumSamples = 64

    @property
    def image_hw(self) -> tuple[int, int]:
        """The (height, width) of the images or frames, in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)


@config(kw_only=True)
class AutoencoderExperiment(Experiment):
    """An experiment that trains an autoencoder on images or clips.

    model: the autoencoder.
    data: the images or clips to train on.
    autoencoding: training options, such as the size of the images or clips and the weight of the KL divergence in the
    loss.

    Raises ValueError if the model, the data and the training options do not fit together.

    Example:
        experiment = AutoencoderExperiment(name="digits", model=AutoencoderConfig())
    """

    model: AutoencoderConfig | VideoAutoencoderConfig
    data: DataConfig | ClipsConfig = DataConfig()
    autoencoding: AutoencodingConfig = AutoencodingConfig()

    def __post_init__(self):
        if isinstance(self.model, VideoAutoencoderConfig):
            self._check_clips(self.model)
        else:
            self._check_images()
        autoencoding, factor = self.autoencoding, self.model.factor
        if autoencoding.decoder_of and self.optim.weight_decay:
            raise ValueError(
                f"optim.weight_decay is {self.optim.weight_decay}, but weight decay would change the frozen "
                "encoder of autoencoding.decoder_of; set it to 0."
            )
        if autoencoding.decoder_of and self.init.path:
            raise ValueError(
                f"autoencoding.decoder_of is '{autoencoding.decoder_of}' and init.path is '{self.init.path}'; a run "
                "starts from one of them, so leave out the other."
            )
        if any(length % factor for length in autoencoding.image_hw):
            raise ValueError(
                f"autoencoding.image_size is {autoencoding.image_size}, but the model encodes blocks of "
                f"{factor} x {factor} pixels; use a multiple of {factor}."
            )
        self.check_warmups()

    def _check_images(self) -> None:
        data = self.data
        if not isinstance(data, DataConfig) or data.aspects:
            raise ValueError(
                f"data is {data}, but an Autoencoder trains on images of one size; give a DataConfig without aspects."
            )
        if self.autoencoding.frames:
            raise ValueError(
                f"autoencoding.frames is {self.autoencoding.frames}, but an Autoencoder trains on images; set it to 0."
            )

    def _check_clips(self, model: VideoAutoencoderConfig) -> None:
        data, frames, stride = self.data, self.autoencoding.frames, model.stride
        if not isinstance(data, ClipsConfig):
            raise ValueError(f"data is {data}, but a VideoAutoencoder trains on clips; give a ClipsConfig.")
        for name in ("images", "drop_first"):
            if getattr(data, name):
                raise ValueError(
                    f"data.{name} is given, but a VideoAutoencoder trains only on whole clips; leave it out."
                )
        if frames < 1 or (frames - 1) % stride:
            raise ValueError(
                f"autoencoding.frames is {frames}, but the model encodes the first frame alone and the others "
                f"{stride} at a time; use 1 plus a multiple of {stride}."
            )

    @property
    def best_metric(self) -> str:
        """The name of the held-out metric by which checkpoints are ranked, "mean_square_error"; lower is better."""
        return "mean_square_error"

    def dataset(self, split: Split) -> Dataset:
        """Returns the images or clips in a split of `data`, in the size and with the number of frames that
        `autoencoding` gives.
        """
        shape: dict[str, Any] = {"image_size": self.autoencoding.image_hw, "channels": self.model.channels}
        if isinstance(self.data, ClipsConfig):
            return load_clips(self.data, frames=self.autoencoding.frames, split=split, **shape)
        dataset = of_one_shape(load(self.data, split=split, **shape), "an Autoencoder")
        check_classes(dataset, 0)
        return dataset

    def job(self, *, dataset: Dataset | None = None, held_out: Dataset | None = None, model: Any = None) -> Job:
        """Opens the data and returns the training job.

        dataset, held_out, model: see `fit`.
        """
        autoencoder, dataset = self.build() if model is None else model, dataset
        if dataset is None:
            dataset = self.dataset("train")
            held_out = self.dataset("eval") if self.data.eval_fraction > 0 else None
        else:
            frames = (self.autoencoding.frames,) if self.autoencoding.frames else ()
            shape = (*frames, *self.autoencoding.image_hw, self.model.channels)
            dataset, held_out = own_data(dataset, held_out, shape, 0)
        shown = held_out or dataset

        def draw_image(variables: Any) -> np.ndarray:
            images = np.asarray(from_uint8(shown[np.arange(min(self.autoencoding.shown, len(shown)))].pixels))
            pairs = np.stack([images, _reconstruct(autoencoder, variables, images)], axis=1)
            if self.autoencoding.frames:
                return strips(pairs.reshape(-1, *images.shape[1:]))
            return sample_grid(pairs.reshape(-1, *images.shape[1:]), 2 * max(1, round(math.sqrt(len(images) / 2))))

        return Job(
            init=lambda key: _initial(self.model, self.autoencoding.decoder_of, autoencoder, key),
            objective=autoencoding_objective(autoencoder, self.autoencoding),
            batches=image_batches(dataset, self.data, self.train),
            evaluate=None if held_out is None else lambda variables: _distortion(autoencoder, variables, held_out),
            sample=draw_image if self.model.channels in DRAWABLE_CHANNELS else None,
            best_metric=self.best_metric,
            inventory=take_inventory(self.data, dataset, held_out),
        )

    def rehearsal(self, model: Any, rows: int) -> Rehearsal:
        """Returns what is needed to trace a training step of the autoencoder `model` on `rows` images or clips."""
        frames = (self.autoencoding.frames,) if self.autoencoding.frames else ()
        shape = (rows, *frames, *self.autoencoding.image_hw, self.model.channels)
        return Rehearsal(
            init=lambda key: _initial(self.model, "", model, key),
            objective=autoencoding_objective(model, self.autoencoding),
            batch=jax.eval_shape(lambda: Batch(jnp.zeros(shape, jnp.uint8))),
        )

    def evaluate(self, model: Any, variables: Any, options: EvaluateOptions) -> Evaluation:
        """Returns the mean square error and the PSNR of reconstructions of the images or clips in `options.split`.

        The lines to print also contain the mean and variance of each latent channel, as tracked in training.
        """
        dataset = self.dataset(options.split)
        errors, what = _errors(model, variables, dataset), "clips" if self.autoencoding.frames else "images"
        check_computed(errors, what, "reconstruction error")
        error = mean_of(errors)
        ratio = psnr(error.value)
        statistics, factor = variables[STATISTICS], self.model.factor
        lines = (
            f"{len(dataset)} {what} ({options.split}), one latent per {factor} x {factor} pixels",
            f"PSNR {ratio:.2f} dB, mean square error {error.value:.5f}",
            f"latents: mean {_shown(statistics['mean'])}, variance {_shown(statistics['variance'])}",
        )
        return Evaluation(lines, {"psnr": Estimate(ratio, count=len(dataset)), "mean_square_error": error})

    def debug(self) -> AutoencoderExperiment:
        """Returns a copy of the experiment that trains a tiny autoencoder on digits for a few steps.

        The tiny autoencoder has the same downsampling factors. The data are digits that ship with flowgen or, for
        clips, bouncing digits.
        """
        model, few = self.model, {"shown": SAMPLES}
        widths = (8,) * len(model.widths)
        if not isinstance(model, VideoAutoencoderConfig):
            model = dataclasses.replace(model, widths=widths, num_groups=4, layers_per_block=1)
            autoencoding = dataclasses.replace(self.autoencoding, image_size=max(8, 2 * model.factor), **few)
            assert isinstance(self.data, DataConfig)
            return debug_run(self, model=model, autoencoding=autoencoding, data=debug_images(self.data))
        model = dataclasses.replace(model, widths=widths, decoder_widths=widths, layers_per_block=1)
        side = model.factor * -(-10 // model.factor)  # At least 10, so that digits of 8 pixels can move.
        frames = 1 + model.stride
        autoencoding = dataclasses.replace(self.autoencoding, image_size=side, frames=frames, **few)
        assert isinstance(self.data, ClipsConfig)
        return debug_run(self, model=model, autoencoding=autoencoding, data=debug_clips(self.data))


def autoencoding_objective(autoencoder: Any, config: AutoencodingConfig) -> Callable[..., tuple]:
    """Returns an autoencoder's objective, a function (variables, batch, key) -> (loss, metrics, carried state).

    batch: a `flowgen.data.Batch` of images or clips.

    The carried state is the collection "latents". It contains running averages of the mean and variance of each latent
    channel, in which each new batch has weight 0.02; with `decoder_of`, they stay constant. Flows use these statistics
    to normalise latents. The statistics are computed over the whole batch, even if the batch is split into
    micro-batches or among devices.

    Example:
        loss, metrics, state = autoencoding_objective(autoencoder, AutoencodingConfig())(variables, batch, key)
    """

    rate = 0.0 if config.decoder_of else STATISTICS_RATE

    def normal(rows, like):
        return rows.draw(lambda key, x: jax.random.normal(key, x.shape), like)

    def objective(variables, batch, key):
        rows = batch_rows(batch, key, batch.size)
        posterior_rows, noise_rows = rows.split(2)
        weights = {"params": variables["params"]}
        x = from_uint8(batch.pixels)
        mean, log_variance = autoencoder.apply(weights, x, method="encode")
        if config.decoder_of:
            mean, log_variance = jax.lax.stop_gradient((mean, log_variance))
        latents = mean + jnp.exp(0.5 * log_variance) * normal(posterior_rows, mean)
        moments = channel_moments(rows, jax.lax.stop_gradient(latents))
        followed = jax.tree.map(lambda old, new: old + rate * (new - old), variables[STATISTICS], moments)
        if config.noise:
            std = jnp.expand_dims(jnp.sqrt(followed["variance"]), tuple(range(latents.ndim - 1)))
            latents = latents + config.noise * std * normal(noise_rows, mean)
        error = autoencoder.apply(weights, latents, method="decode") - x
        divergence = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).mean()
        square = jnp.square(error).mean()
        loss = jnp.abs(error).mean() + square + config.kl_weight * divergence
        metrics = {"loss": loss, "mean_square_error": square, "divergence": divergence}
        return loss, metrics, {STATISTICS: followed}

    def combine(before, parts):
        followed = parts[STATISTICS]
        # The variance over all rows is the mean of the micro-batches' variances plus the variance of their means.
        # The running means contain those means times `rate`. Their variance divided by `rate` is therefore what the
        # running variance lacks.
        between = followed["mean"].var(axis=0) / rate if rate else 0.0
        mean, variance = (followed[name].mean(axis=0) for name in ("mean", "variance"))
        return {STATISTICS: {"mean": mean, "variance": variance + between}}

    return StatefulObjective(objective, combine)


def channel_moments(rows: Rows, latents: Float[Array, "b *event c"]) -> dict[str, Float[Array, " c"]]:
    """Returns the mean and variance of each channel over the whole batch, given the latents of this device's rows.

    Example:
        moments = channel_moments(rows, latents)
    """
    others = tuple(range(latents.ndim - 1))
    mean = rows.mean(latents.mean(axis=others))
    spread = jnp.square(latents - jnp.expand_dims(mean, others))
    return {"mean": mean, "variance": rows.mean(spread.mean(axis=others))}


def _shown(values: Any) -> str:
    return " ".join(f"{value:.3f}" for value in np.asarray(values).tolist())


def _initial(model: Any, path: str, autoencoder: Any, key: jax.Array) -> Any:
    """Returns the variables of the autoencoder at `path`, or new variables with latent mean 0 and variance 1."""
    channels = model.latent_channels
    if not path:
        return {**init(autoencoder, key), STATISTICS: {"mean": jnp.zeros(channels), "variance": jnp.ones(channels)}}
    codec = open_autoencoder(path)
    found = codec.autoencoder.config
    if found != dataclasses.replace(model, dtype=found.dtype, remat=found.remat):
        raise ValueError(f"autoencoding.decoder_of '{path}' has a different architecture; set model to {found}.")
    scale = np.asarray(codec.normalisation.scale, np.float64)
    statistics = {"mean": codec.normalisation.shift, "variance": 1 / np.square(scale)}
    return {
        "params": codec.variables["params"],
        STATISTICS: {name: jnp.full(channels, value, jnp.float32) for name, value in statistics.items()},
    }


def _decoded_mean(params, images, *, autoencoder):
    mean, _ = autoencoder.apply({"params": params}, images, method="encode")
    return autoencoder.apply({"params": params}, mean, method="decode")


def _reconstruct(autoencoder: Any, variables: Any, images: np.ndarray) -> np.ndarray:
    return backend.by_rows(_decoded_mean, variables["params"], images, autoencoder=autoencoder)


def _distortion(autoencoder: Any, variables: Any, dataset: Dataset) -> dict[str, float]:
    """Returns the mean square error and the PSNR in dB of decoded posterior means."""
    mean = float(_errors(autoencoder, variables, dataset).mean())
    return {"mean_square_error": mean, "psnr": psnr(mean)}


def _errors(autoencoder: Any, variables: Any, dataset: Dataset) -> np.ndarray:
    """Returns the mean square error of each image or clip after decoding its posterior mean."""
    parts = []
    for batch, mask in fixed_batches(dataset, min(256, len(dataset))):
        images = np.asarray(from_uint8(batch.pixels))
        squares = np.square(_reconstruct(autoencoder, variables, images) - images)
        parts.append(squares.reshape(len(squares), -1).mean(axis=1)[mask])
    return np.concatenate(parts).astype(np.float64)
