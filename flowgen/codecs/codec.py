"""Codecs: frozen maps from images to latents and back, for flows trained on the latents."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from flowgen.arrays import at_least_float32, check_floating
from flowgen.backend import in_parts, samples_at_once
from flowgen.codecs.autoencoder import Autoencoder
from flowgen.nn.layers import patchify, unpatchify

Images = Float[Array | np.ndarray, "b height width c"]
Latents = Float[Array | np.ndarray, "b rows columns z"]
# A codec of images or of clips.
AnyLatents = Float[Array | np.ndarray, "*b z"]


@runtime_checkable
class Codec(Protocol):
    """Images in [-1, 1] to normalised latents, and back.

    factor: pixels per latent along a side. channels: latent channels. pixel_channels: image channels.

    Example:
        mean, std = codec.moments(images)
        images = codec.decode(mean)
    """

    @property
    def factor(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def pixel_channels(self) -> int: ...

    def moments(self, x: Images) -> tuple[Latents, Latents]:
        """Returns the mean and standard deviation of images' latents."""
        ...

    def decode(self, latents: Latents) -> Images:
        """Returns the images of latents."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class PixelCodec:
    """Space-to-depth, a codec without a network: factor × factor pixels become the channels of a latent; std is 0.

    Example:
        mean, std = PixelCodec(pixel_channels=1, factor=2).moments(images)  # `b height/2 width/2 4`
    """

    pixel_channels: int
    factor: int = 1

    @property
    def channels(self) -> int:
        return self.pixel_channels * self.factor**2

    def moments(self, x: Images) -> tuple[Latents, Latents]:
        """Returns the pixels of each block, in the order row, column, channel, and zeros."""
        height, width = check_images(self, x)
        tokens = patchify(at_least_float32("images", x), self.factor, "channel_last")
        mean = tokens.reshape(len(x), height // self.factor, width // self.factor, self.channels)
        return mean, jnp.zeros_like(mean)

    def decode(self, latents: Latents) -> Images:
        """Returns the images of latents."""
        height, width = check_latents(self, latents)
        tokens = jnp.asarray(latents).reshape(len(latents), height * width, self.channels)
        return unpatchify(tokens, self.factor, (height * self.factor, width * self.factor), "channel_last")


@dataclass(frozen=True)
class LatentNormalisation:
    """normalised = (latents - shift) · scale, numbers or one per channel.

    Example:
        normalisation = LatentNormalisation(shift=0.0, scale=0.18215)
    """

    shift: Float[np.ndarray, "..."] | float = 0.0
    scale: Float[np.ndarray, "..."] | float = 1.0

    def apply(self, latents: AnyLatents) -> AnyLatents:
        """Returns normalised latents."""
        return (latents - _per_channel(self.shift, latents)) * _per_channel(self.scale, latents)

    def apply_to_std(self, std: AnyLatents) -> AnyLatents:
        """Returns the standard deviation of normalised latents."""
        return std * np.abs(_per_channel(self.scale, std))

    def undo(self, normalised: AnyLatents) -> AnyLatents:
        """Returns the latents of normalised ones."""
        return normalised / _per_channel(self.scale, normalised) + _per_channel(self.shift, normalised)


def _per_channel(values: ArrayLike, latents: AnyLatents) -> np.ndarray:
    return np.asarray(values, np.float32).reshape(*(1,) * (latents.ndim - 1), -1)


@dataclass(frozen=True, eq=False)
class AutoencoderCodec:
    """A frozen autoencoder with its variables, as a codec of normalised latents; runs as many images at a time as
    memory allows, with few compiled programs.

    Example:
        codec = AutoencoderCodec(autoencoder, params, LatentNormalisation(scale=0.18215))
    """

    autoencoder: Autoencoder
    variables: PyTree
    normalisation: LatentNormalisation = LatentNormalisation()

    @property
    def factor(self) -> int:
        return self.autoencoder.config.factor

    @property
    def channels(self) -> int:
        return self.autoencoder.config.latent_channels

    @property
    def pixel_channels(self) -> int:
        return self.autoencoder.config.channels

    def moments(self, x: Images) -> tuple[Latents, Latents]:
        """Returns mean and standard deviation of normalised latents, as numpy arrays."""
        height, width = check_images(self, x)
        run = partial(_moments, self.autoencoder, self.variables)
        mean, std = in_parts(run, samples_at_once(height * width), np.asarray(x, np.float32))
        return self.normalisation.apply(mean), self.normalisation.apply_to_std(std)

    def decode(self, latents: Latents) -> Images:
        """Returns the images of normalised latents, as a numpy array; not clipped."""
        height, width = check_latents(self, latents)
        plain = np.asarray(self.normalisation.undo(np.asarray(latents, np.float32)))
        run = partial(_decode, self.autoencoder, self.variables)
        (x,) = in_parts(run, samples_at_once(height * width * self.factor**2), plain)
        return x


def check_images(codec: Codec, x: Any) -> tuple[int, int]:
    """Returns height and width of images; ValueError if the codec cannot take them."""
    check_floating("images", x)
    if x.ndim != 4 or x.shape[-1] != codec.pixel_channels:
        raise ValueError(
            f"images have shape {tuple(x.shape)}; this codec takes (batch, height, width, {codec.pixel_channels})."
        )
    height, width = x.shape[1:3]
    if 0 in x.shape:
        raise ValueError(f"images have shape {tuple(x.shape)}, which is empty; give at least one of each.")
    if height % codec.factor or width % codec.factor:
        raise ValueError(f"images are {height} x {width}; this codec takes sides that are multiples of {codec.factor}.")
    return height, width


def check_latents(codec: Codec, latents: Any) -> tuple[int, int]:
    """Returns height and width of latents; ValueError if the codec cannot take them."""
    check_floating("latents", latents)
    if latents.ndim != 4 or latents.shape[-1] != codec.channels:
        raise ValueError(
            f"latents have shape {tuple(latents.shape)}; this codec takes (batch, height, width, {codec.channels})."
        )
    if 0 in latents.shape:
        raise ValueError(f"latents have shape {tuple(latents.shape)}, which is empty; give at least one of each.")
    return latents.shape[1:3]


@partial(jax.jit, static_argnums=0)
def _moments(autoencoder, variables, x):
    mean, log_variance = autoencoder.apply(variables, x, method="encode")
    return mean, jnp.exp(0.5 * log_variance)


@partial(jax.jit, static_argnums=0)
def _decode(autoencoder, variables, latents):
    return (autoencoder.apply(variables, latents, method="decode"),)
