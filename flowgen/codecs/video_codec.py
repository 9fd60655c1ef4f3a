"""Video codecs: frozen maps from clips to latents and back, for flows trained on the latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from flowgen import backend
from flowgen.arrays import check_floating
from flowgen.backend import in_parts, samples_at_once
from flowgen.codecs.codec import Codec, LatentNormalisation
from flowgen.codecs.video_autoencoder import VideoAutoencoder, check_clips, decode_in_chunks, encode_in_chunks

Clips = Float[Array | np.ndarray, "b frames height width c"]
ClipLatents = Float[Array | np.ndarray, "b f rows columns z"]


@runtime_checkable
class ClipCodec(Protocol):
    """Clips in [-1, 1] to normalised latents, and back; 1 + k · stride frames are 1 + k latent ones.

    factor: pixels per latent along a side. stride: frames per latent after the first frame. channels: latent channels.
    pixel_channels: channels of clips.

    Example:
        mean, std = codec.moments(clips)
        clips = codec.decode(mean)
    """

    @property
    def factor(self) -> int: ...

    @property
    def stride(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def pixel_channels(self) -> int: ...

    def moments(self, x: Clips) -> tuple[ClipLatents, ClipLatents]:
        """Returns mean and standard deviation of the latents of clips, as numpy arrays."""
        ...

    def decode(self, latents: ClipLatents) -> Clips:
        """Returns the clips of latents, as a numpy array."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class FrameCodec:
    """A codec that applies an image codec to each frame of a clip; stride 1.

    Example:
        codec = FrameCodec(PixelCodec(pixel_channels=1, factor=2))
        mean, std = codec.moments(clips)  # `b frames height/2 width/2 4`
    """

    codec: Codec

    @property
    def factor(self) -> int:
        return self.codec.factor

    @property
    def stride(self) -> int:
        return 1

    @property
    def channels(self) -> int:
        return self.codec.channels

    @property
    def pixel_channels(self) -> int:
        return self.codec.pixel_channels

    def moments(self, x: Clips) -> tuple[ClipLatents, ClipLatents]:
        """Returns mean and standard deviation of the latents of all frames, as numpy arrays."""
        check_clips(x, channels=self.pixel_channels, factor=self.factor, stride=self.stride)
        mean, std = self.codec.moments(_frames(x))
        return _clips(mean, len(x)), _clips(std, len(x))

    def decode(self, latents: ClipLatents) -> Clips:
        """Returns the clips of latents, as a numpy array; clipped only if the image codec clips."""
        check_clip_latents(self, latents)
        return _clips(self.codec.decode(_frames(latents)), len(latents))


def _frames(x: Clips) -> np.ndarray:
    x = np.asarray(x)
    return x.reshape(-1, *x.shape[2:])


def _clips(x: Any, count: int) -> np.ndarray:
    x = np.asarray(x)
    return x.reshape(count, -1, *x.shape[1:])


@dataclass(frozen=True, eq=False)
class VideoAutoencoderCodec:
    """A frozen video autoencoder with its variables, as a codec of normalised latents.

    temporal_scale: factor on all latent frames but the first, after normalisation. The codec runs as many clips at a
    time as memory allows, and longer clips in chunks.

    Example:
        codec = VideoAutoencoderCodec(autoencoder, params, LatentNormalisation(scale=0.5), temporal_scale=0.6)
    """

    autoencoder: VideoAutoencoder
    variables: PyTree
    normalisation: LatentNormalisation = LatentNormalisation()
    temporal_scale: float = 1.0

    def __post_init__(self):
        if not 0 < self.temporal_scale < float("inf"):
            raise ValueError(f"temporal_scale is {self.temporal_scale}; it must be a positive number, 1 for none.")

    @property
    def factor(self) -> int:
        return self.autoencoder.config.factor

    @property
    def stride(self) -> int:
        return self.autoencoder.config.stride

    @property
    def channels(self) -> int:
        return self.autoencoder.config.latent_channels

    @property
    def pixel_channels(self) -> int:
        return self.autoencoder.config.channels

    def moments(self, x: Clips) -> tuple[ClipLatents, ClipLatents]:
        """Returns mean and standard deviation of normalised latents, as numpy arrays.

        Both are in the units of normalised latents, so mean + std · ε is the latent of a sample, normalised. The code
        published with STARFlow-V does not divide the standard deviation by `latents_std`.
        """
        check_clips(x, channels=self.pixel_channels, factor=self.factor, stride=self.stride)
        frames, height, width = x.shape[1:4]
        run, most = self._plan(_moments, frames, height * width)
        mean, std = in_parts(run, most, np.asarray(x, np.float32))
        scale = self._scale(mean.shape[1])
        return self.normalisation.apply(mean) * scale, self.normalisation.apply_to_std(std) * scale

    def decode(self, latents: ClipLatents) -> Clips:
        """Returns the clips of normalised latents, as a numpy array; not clipped."""
        frames, height, width = check_clip_latents(self, latents)
        plain = self.normalisation.undo(np.asarray(latents, np.float32) / self._scale(frames))
        run, most = self._plan(_decode, 1 + (frames - 1) * self.stride, height * width * self.factor**2)
        (x,) = in_parts(run, most, np.asarray(plain))
        return x

    def _scale(self, frames: int) -> np.ndarray:
        scale = np.full((1, frames, 1, 1, 1), self.temporal_scale, np.float32)
        scale[:, 0] = 1
        return scale

    def _plan(self, run: Callable[..., Any], frames: int, pixels: int) -> tuple[Callable[..., Any], int]:
        """A function for parts of a batch of clips with this many frames and pixels, and the size of a part."""
        whole = frames * pixels <= backend.PIXELS_AT_ONCE
        together = frames if whole else min(frames, self.stride)
        return partial(run, self.autoencoder, whole, self.variables), samples_at_once(together * pixels)


def check_clip_latents(codec: ClipCodec, latents: Any) -> tuple[int, int, int]:
    """Returns frames, height and width of latents; ValueError if the codec cannot take them."""
    check_floating("latents", latents)
    if latents.ndim != 5 or latents.shape[-1] != codec.channels or not all(latents.shape[1:]):
        raise ValueError(
            f"latents have shape {tuple(latents.shape)}; this codec takes (batch, frames, height, width, "
            f"{codec.channels})."
        )
    if not len(latents):
        raise ValueError("the batch is empty; give at least one clip.")
    return latents.shape[1:4]


@partial(jax.jit, static_argnums=(0, 1))
def _moments(autoencoder, whole, variables, x):
    if whole:
        mean, log_variance = autoencoder.apply(variables, x, method="encode")
    else:
        mean, log_variance = encode_in_chunks(autoencoder, variables, x)
    return mean, jnp.exp(0.5 * log_variance)


@partial(jax.jit, static_argnums=(0, 1))
def _decode(autoencoder, whole, variables, latents):
    if whole:
        return (autoencoder.apply(variables, latents, method="decode"),)
    return (decode_in_chunks(autoencoder, variables, latents),)
