"""Codecs map images or clips to the latents on which flows are trained, and back.

A codec is frozen while a flow is trained on its latents.
"""

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
from flowgen.codecs.video_autoencoder import check_clips
from flowgen.nn.layers import patchify, unpatchify

# Images or clips; clips have an axis of frames.
Pixels = Float[Array | np.ndarray, "b *frames height width c"]
Latents = Float[Array | np.ndarray, "b *latent_frames rows columns z"]


@runtime_checkable
class Codec(Protocol):
    """Maps images or clips with values in [-1, 1] to the latents on which a flow is trained, and back.

    An image is encoded like the first frame of a clip.

    factor: height of the images or frames divided by the number of rows of their latents; the same for width and
    columns.
    stride: number of frames per latent frame, except that the first frame alone becomes the first latent frame; thus,
    1 + k · stride frames become 1 + k latent frames.
    channels: number of channels of the latents.
    pixel_channels: number of channels of the images or clips.

    Example:
        mean, std = codec.moments(images)
        images = codec.decode(mean)
    """

    @property
    def factor(self) -> int: ...

    @property
    def stride(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def pixel_channels(self) -> int: ...

    def moments(self, x: Pixels) -> tuple[Latents, Latents]:
        """Returns the mean and standard deviation of each value of the latents, given the images or clips x."""
        ...

    def decode(self, latents: Latents) -> Pixels:
        """Decodes latents to images or clips, whose values may lie outside [-1, 1]."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class PixelCodec:
    """A codec without a network, also known as space-to-depth: each factor × factor block of pixels becomes one vector.

    The encoding is exact, so the standard deviation of the latents is 0. Clips are encoded frame by frame.

    Example:
        mean, std = PixelCodec(pixel_channels=1, factor=2).moments(images)  # `b height/2 width/2 4`
    """

    pixel_channels: int
    factor: int = 1

    @property
    def stride(self) -> int:
        return 1

    @property
    def channels(self) -> int:
        return self.pixel_channels * self.factor**2

    def moments(self, x: Pixels) -> tuple[Latents, Latents]:
        """Returns the latents of the images or clips x as the mean, and zeros as the standard deviation.

        At each position, the mean lists the values of one block row by row, with the channels of each pixel together.
        """
        *frames, height, width = check_pixels(self, x)
        tokens = patchify(_images(at_least_float32("images", x)), self.factor, "channel_last")
        mean = tokens.reshape(len(x), *frames, height // self.factor, width // self.factor, self.channels)
        return mean, jnp.zeros_like(mean)

    def decode(self, latents: Latents) -> Pixels:
        """Returns the images or clips that `moments` maps to these latents."""
        *frames, rows, columns = check_latents(self, latents)
        tokens = jnp.asarray(latents).reshape(-1, rows * columns, self.channels)
        images = unpatchify(tokens, self.factor, (rows * self.factor, columns * self.factor), "channel_last")
        return images.reshape(len(latents), *frames, *images.shape[1:])


@dataclass(frozen=True)
class LatentNormalisation:
    """Normalises latents, usually to mean 0 and standard deviation 1: normalised = (latents - shift) · scale.

    shift, scale: each is either one number for all channels, or an array with one number per channel.

    Example:
        normalisation = LatentNormalisation(shift=0.0, scale=0.18215)
    """

    shift: Float[np.ndarray, "..."] | float = 0.0
    scale: Float[np.ndarray, "..."] | float = 1.0

    def apply(self, latents: Latents) -> Latents:
        """Returns the normalised latents."""
        return (latents - _per_channel(self.shift, latents)) * _per_channel(self.scale, latents)

    def apply_to_std(self, std: Latents) -> Latents:
        """Returns the standard deviation of the normalised latents; `std` is that of the unnormalised latents."""
        return std * np.abs(_per_channel(self.scale, std))

    def undo(self, normalised: Latents) -> Latents:
        """Returns the latents that `apply` maps to `normalised`."""
        return normalised / _per_channel(self.scale, normalised) + _per_channel(self.shift, normalised)


def _per_channel(values: ArrayLike, latents: Latents) -> np.ndarray:
    return np.asarray(values, np.float32).reshape(*(1,) * (latents.ndim - 1), -1)


@dataclass(frozen=True, eq=False)
class AutoencoderCodec:
    """A codec that uses a frozen image autoencoder and normalises its latents.

    Clips are encoded and decoded frame by frame. Large batches are split to save memory. The batch sizes of the parts
    are powers of two, so few programs are compiled.

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
    def stride(self) -> int:
        return 1

    @property
    def channels(self) -> int:
        return self.autoencoder.config.latent_channels

    @property
    def pixel_channels(self) -> int:
        return self.autoencoder.config.channels

    def moments(self, x: Pixels) -> tuple[Latents, Latents]:
        """Returns the mean and standard deviation of the normalised latents of x, as numpy arrays."""
        *frames, height, width = check_pixels(self, x)
        run = partial(_moments, self.autoencoder, self.variables)
        mean, std = (
            part.reshape(len(x), *frames, *part.shape[1:])
            for part in in_parts(run, samples_at_once(height * width), _images(np.asarray(x, np.float32)))
        )
        return self.normalisation.apply(mean), self.normalisation.apply_to_std(std)

    def decode(self, latents: Latents) -> Pixels:
        """Decodes normalised latents to a numpy array of images or clips, whose values are not clipped to [-1, 1]."""
        *frames, rows, columns = check_latents(self, latents)
        plain = np.asarray(self.normalisation.undo(_images(np.asarray(latents, np.float32))))
        run = partial(_decode, self.autoencoder, self.variables)
        (x,) = in_parts(run, samples_at_once(rows * columns * self.factor**2), plain)
        return x.reshape(len(latents), *frames, *x.shape[1:])


def _images(x: Any) -> Any:
    """Returns images unchanged; for clips, returns all their frames as one batch of images."""
    return x.reshape(-1, *x.shape[-3:])


def check_pixels(codec: Codec, x: Any) -> tuple[int, ...]:
    """Returns (height, width) for images, or (frames, height, width) for clips.

    Raises ValueError if the codec does not accept these images or clips.

    Example:
        height, width = check_pixels(codec, images)
    """
    if getattr(x, "ndim", 0) == 5:
        check_clips(x, channels=codec.pixel_channels, factor=codec.factor, stride=codec.stride)
        return tuple(x.shape[1:-1])
    height, width = _event_shape("images", x, codec.pixel_channels)
    if height % codec.factor or width % codec.factor:
        raise ValueError(f"images are {height} x {width}; this codec needs sides that are multiples of {codec.factor}.")
    return height, width


def check_latents(codec: Codec, latents: Any) -> tuple[int, ...]:
    """Returns (rows, columns) for the latents of images, or (frames, rows, columns) for the latents of clips.

    Raises ValueError if the codec does not accept these latents.

    Example:
        height, width = check_latents(codec, latents)
    """
    return _event_shape("latents", latents, codec.channels)


def _event_shape(what: str, x: Any, channels: int) -> tuple[int, ...]:
    """Returns the shape of one sample, without the channel axis."""
    check_floating(what, x)
    if x.ndim not in (4, 5) or x.shape[-1] != channels:
        raise ValueError(
            f"{what} have shape {tuple(x.shape)}; this codec needs (batch, height, width, {channels}), with an "
            "axis of frames after the batch axis for clips."
        )
    if 0 in x.shape:
        raise ValueError(f"{what} have shape {tuple(x.shape)}, but no axis may be empty.")
    return tuple(x.shape[1:-1])


@partial(jax.jit, static_argnums=0)
def _moments(autoencoder, variables, x):
    mean, log_variance = autoencoder.apply(variables, x, method="encode")
    return mean, jnp.exp(0.5 * log_variance)


@partial(jax.jit, static_argnums=0)
def _decode(autoencoder, variables, latents):
    return (autoencoder.apply(variables, latents, method="decode"),)
