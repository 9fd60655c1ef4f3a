"""Autoencoders as a task: the small ones whose latents flows are trained on; reconstruction, and a little divergence.

loss = mean |x - x̂| + mean (x - x̂)² + kl_weight · mean over latents of KL(N(mean, std²) || N(0, 1))
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flowgen.codecs import VideoAutoencoderConfig
from flowgen.data import (
    ClipsConfig,
    DataConfig,
    Source,
    check_classes,
    fixed_batches,
    from_uint8,
    load,
    load_clips,
    take_inventory,
)
from flowgen.data.sources import Split
from flowgen.evaluation import psnr
from flowgen.models import init
from flowgen.ranges import OtherFrames, Side, check_ranges
from flowgen.rows import Rows, StatefulObjective, batch_rows
from flowgen.tasks.flow_options import SamplingConfig
from flowgen.tasks.frozen import STATISTICS, open_autoencoder
from flowgen.tasks.images import check_foreign, image_batches, shrink_images, shrink_run
from flowgen.tasks.pictures import DRAWABLE_CHANNELS, picture, strips
from flowgen.training import Job
from flowgen.typed import typed

SAMPLE_OPTIONS: tuple[str, ...] = ()
EVALUATE_OPTIONS: tuple[str, ...] = ()
# How fast the mean and variance of latents follow the batches.
STATISTICS_RATE = 0.02


@dataclass(frozen=True)
@typed
class AutoencodingConfig:
    """How an autoencoder is trained.

    image_size: side of its pictures, or (height, width), multiples of the model's factor.
    frames: of clips; 0 for pictures.
    kl_weight: of the divergence of the posterior from N(0, 1), in nats per latent; 0 or more.
    noise: std of the noise added to normalised latents before they are decoded, so that the decoder takes those of a
    flow as they are; 0 for none.
    decoder_of: run or published folder of an autoencoder, whose encoder stays as it is while the decoder is trained on.
    """

    image_size: Side | tuple[Side, Side] = 8
    frames: OtherFrames = 0
    kl_weight: float = 1e-4
    noise: float = 0.0
    decoder_of: str = ""

    def __post_init__(self):
        if min(self.grid_size) < 1:
            raise ValueError(f"autoencoding.image_size is {self.image_size}; sides must be positive.")
        check_ranges(self, "autoencoding")
        for name in ("kl_weight", "noise"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"autoencoding.{name} is {getattr(self, name)}; it must be 0 or positive.")

    @property
    def grid_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)


def check(experiment: Any) -> None:
    """Raises ValueError where the parts of an experiment do not belong to an autoencoder."""
    check_foreign(experiment, "Autoencoder", "reconstruction", ("matching", "likelihood", "codec", "text"))
    if experiment.autoencoding is None:
        raise ValueError("autoencoding is missing; an Autoencoder is trained by it, so give an AutoencodingConfig.")
    if isinstance(experiment.model, VideoAutoencoderConfig):
        _check_clips(experiment)
    else:
        _check_pictures(experiment)
    if not isinstance(experiment.sampling, SamplingConfig):
        raise ValueError(f"sampling is {experiment.sampling}; an Autoencoder shows pictures, so give a SamplingConfig.")
    if experiment.autoencoding.decoder_of and experiment.optim.weight_decay:
        raise ValueError(
            f"optim.weight_decay is {experiment.optim.weight_decay}, which would change the encoder of "
            "autoencoding.decoder_of; set it to 0."
        )
    factor = experiment.model.factor
    if any(length % factor for length in experiment.autoencoding.grid_size):
        raise ValueError(
            f"autoencoding.image_size is {experiment.autoencoding.image_size}, but the model makes one latent of "
            f"{factor} x {factor} pixels; use a multiple of {factor}."
        )


def _check_pictures(experiment: Any) -> None:
    if not isinstance(experiment.data, DataConfig) or experiment.data.source == "encoded" or experiment.data.aspects:
        raise ValueError(f"data is {experiment.data}; an Autoencoder is trained on pictures of one size.")
    if experiment.autoencoding.frames:
        raise ValueError(
            f"autoencoding.frames is {experiment.autoencoding.frames}, and an Autoencoder is of pictures; set it to 0."
        )


def _check_clips(experiment: Any) -> None:
    if not isinstance(experiment.data, ClipsConfig) or experiment.data.source == "encoded":
        raise ValueError(f"data is {experiment.data}; a VideoAutoencoder is trained on clips, so give a ClipsConfig.")
    for name in ("images", "drop_first"):
        if getattr(experiment.data, name):
            raise ValueError(f"data.{name} is given, and a VideoAutoencoder is trained on whole clips; leave it out.")
    frames, stride = experiment.autoencoding.frames, experiment.model.stride
    if frames < 1 or (frames - 1) % stride:
        raise ValueError(
            f"autoencoding.frames is {frames}, but the model makes one latent of a first frame and of {stride} more "
            f"each; use 1 + a multiple of {stride}."
        )


def best_metric(experiment: Any) -> str:
    """Returns the evaluated metric by which checkpoints are compared; lower is better."""
    return "mean_square_error"


def shrink(experiment: Any) -> Any:
    """Returns the experiment with a tiny autoencoder of the same factor on the built-in digits."""
    model = experiment.model
    levels = len(model.widths)
    autoencoding = dataclasses.replace(experiment.autoencoding, image_size=max(8, 2 * model.factor))
    if not isinstance(model, VideoAutoencoderConfig):
        model = dataclasses.replace(model, widths=(8,) * levels, num_groups=4, layers_per_block=1)
        return shrink_images(experiment, model, autoencoding=autoencoding)
    model = dataclasses.replace(model, widths=(8,) * levels, decoder_widths=(8,) * levels, layers_per_block=1)
    side = model.factor * -(-10 // model.factor)  # Bouncing digits have 8 pixels.
    autoencoding = dataclasses.replace(autoencoding, image_size=side, frames=1 + model.stride)
    data = ClipsConfig(num=200, eval_fraction=experiment.data.eval_fraction)
    return shrink_run(dataclasses.replace(experiment, model=model, data=data, autoencoding=autoencoding))


def pictures(experiment: Any, split: Split) -> Source:
    """Returns the pictures or clips of a split at the size that the autoencoder is trained on."""
    if isinstance(experiment.data, ClipsConfig):
        size, frames = experiment.autoencoding.grid_size, experiment.autoencoding.frames
        channels = experiment.model.channels
        return load_clips(experiment.data, frames=frames, image_size=size, channels=channels, split=split)
    source = load(
        experiment.data, image_size=experiment.autoencoding.grid_size, channels=experiment.model.channels, split=split
    )
    assert isinstance(source, Source)  # `check` refuses several sizes
    check_classes(source, 0)
    return source


def job(experiment: Any) -> Job:
    """Returns what the training loop needs, with the data opened."""
    autoencoder, source = experiment.flow(), pictures(experiment, "train")
    held_out = pictures(experiment, "eval") if experiment.data.eval_fraction > 0 else None
    shown = held_out or source

    def picture_of(variables: Any) -> np.ndarray:
        images = np.asarray(from_uint8(shown[np.arange(min(experiment.sampling.num, len(shown)))]["image"]))
        pairs = np.stack([images, _reconstruct(autoencoder, variables, images)], axis=1)
        if experiment.autoencoding.frames:
            return strips(pairs.reshape(-1, *images.shape[1:]))
        return picture(pairs.reshape(-1, *images.shape[1:]), 2 * max(1, round(math.sqrt(len(images) / 2))))

    return Job(
        init=lambda key: _initial(experiment, autoencoder, key),
        objective=autoencoding_objective(autoencoder, experiment.autoencoding),
        batches=image_batches(experiment, source),
        evaluate=None if held_out is None else lambda variables: _distortion(autoencoder, variables, held_out),
        sample=picture_of if experiment.model.channels in DRAWABLE_CHANNELS else None,
        best_metric=best_metric(experiment),
        inventory=take_inventory(experiment.data, source, held_out),
    )


def autoencoding_objective(autoencoder: Any, config: AutoencodingConfig) -> Callable[..., tuple]:
    """Returns the objective (variables, batch, key) -> (loss, metrics, carried state) of an autoencoder.

    batch: `image` uint8 `b height width c`, or clips with frames before that.
    Carried state: collection "latents", the mean and variance of the latents per channel, followed at a rate of 0.02;
    latents are normalised by them when a flow is trained on them. They are those of the whole batch, on any number of
    devices and with accumulation; noise has the size that each micro-batch finds.

    Example:
        loss, metrics, state = autoencoding_objective(autoencoder, AutoencodingConfig())(variables, batch, key)
    """

    rate = 0.0 if config.decoder_of else STATISTICS_RATE

    def normal(rows, like):
        return rows.draw(lambda key, x: jax.random.normal(key, x.shape), like)

    def objective(variables, batch, key):
        rows = batch_rows(batch, key, len(batch["image"]))
        posterior_rows, noise_rows = rows.split(2)
        weights = {"params": variables["params"]}
        x = from_uint8(batch["image"])
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
        # The variance of all rows is the mean of the micro-batches' and the variance of their means, which are followed
        # at `rate`.
        between = followed["mean"].var(axis=0) / rate if rate else 0.0
        mean, variance = (followed[name].mean(axis=0) for name in ("mean", "variance"))
        return {STATISTICS: {"mean": mean, "variance": variance + between}}

    return StatefulObjective(objective, combine)


def channel_moments(rows: Rows, latents: Float[Array, "b *event c"]) -> dict[str, Float[Array, " c"]]:
    """Returns mean and variance of each channel over the whole batch, of which a device has these rows.

    Example:
        moments = channel_moments(rows, latents)
    """
    others = tuple(range(latents.ndim - 1))
    mean = rows.mean(latents.mean(axis=others))
    spread = jnp.square(latents - jnp.expand_dims(mean, others))
    return {"mean": mean, "variance": rows.mean(spread.mean(axis=others))}


def evaluate(experiment: Any, autoencoder: Any, variables: Any, options: Any) -> list[str]:
    """Returns lines with the error of reconstructions on a split, and the statistics of the latents."""
    source = pictures(experiment, options.split)
    metrics = _distortion(autoencoder, variables, source)
    statistics, factor = variables[STATISTICS], experiment.model.factor
    what = "clips" if experiment.autoencoding.frames else "images"
    return [
        f"{len(source)} {what} ({options.split}), one latent per {factor} x {factor} pixels",
        f"PSNR {metrics['psnr']:.2f} dB, mean square error {metrics['mean_square_error']:.5f}",
        f"latents: mean {_shown(statistics['mean'])}, variance {_shown(statistics['variance'])}",
    ]


def drawn_channels(experiment: Any) -> int:
    """Returns the channels of its pictures."""
    return experiment.model.channels


def _shown(values: Any) -> str:
    return " ".join(f"{value:.3f}" for value in np.asarray(values).tolist())


def _initial(experiment: Any, autoencoder: Any, key: jax.Array) -> Any:
    """Fresh variables with statistics of nothing, or those of the autoencoder whose decoder is trained on."""
    channels, path = experiment.model.latent_channels, experiment.autoencoding.decoder_of
    if not path:
        return {**init(autoencoder, key), STATISTICS: {"mean": jnp.zeros(channels), "variance": jnp.ones(channels)}}
    codec = open_autoencoder(path)
    found = codec.autoencoder.config
    if found != dataclasses.replace(experiment.model, dtype=found.dtype, remat=found.remat):
        raise ValueError(f"autoencoding.decoder_of '{path}' has the shape {found}, not that of the model; set it.")
    scale = np.asarray(codec.normalisation.scale, np.float64)
    statistics = {"mean": codec.normalisation.shift, "variance": 1 / np.square(scale)}
    return {
        "params": codec.variables["params"],
        STATISTICS: {name: jnp.full(channels, value, jnp.float32) for name, value in statistics.items()},
    }


@partial(jax.jit, static_argnums=0)
def _decoded_mean(autoencoder, params, images):
    mean, _ = autoencoder.apply({"params": params}, images, method="encode")
    return autoencoder.apply({"params": params}, mean, method="decode")


def _reconstruct(autoencoder: Any, variables: Any, images: np.ndarray) -> np.ndarray:
    return np.asarray(_decoded_mean(autoencoder, variables["params"], images))


def _distortion(autoencoder: Any, variables: Any, source: Source) -> dict[str, float]:
    """Mean square error of decoded posterior means, and the ratio of peak to error in decibels."""
    total = 0.0
    for batch in fixed_batches(source, min(256, len(source))):
        images = np.asarray(from_uint8(batch["image"]))
        squares = np.square(_reconstruct(autoencoder, variables, images) - images)
        error = squares.reshape(len(squares), -1).mean(axis=1)
        total += float(error[batch["mask"]].sum())
    mean = total / len(source)
    return {"mean_square_error": mean, "psnr": psnr(mean)}
