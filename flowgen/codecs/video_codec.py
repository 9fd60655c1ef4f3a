"""A codec that encodes and decodes clips with a frozen video autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from flowgen import backend
from flowgen.backend import in_parts, samples_at_once
from flowgen.codecs.codec import LatentNormalisation, Latents, Pixels, check_latents, check_pixels
from flowgen.codecs.video_autoencoder import VideoAutoencoder, decode_in_chunks, encode_in_chunks


@dataclass(frozen=True, eq=False)
class VideoAutoencoderCodec:
    """A codec that uses a frozen video autoencoder and normalises its latents.

    An image is encoded as a clip of one frame. To save memory, large batches are split, and a clip with more than two
    million pixels over all its frames is processed in chunks of frames.

    temporal_scale: a factor by which all latent frames except the first are multiplied after normalisation; `decode`
    divides by it.

    Example:
        codec = VideoAutoencoderCodec(autoencoder, params, LatentNormalisation(scale=0.5), temporal_scale=0.6)
    """

    autoencoder: VideoAutoencoder
    variables: PyTree
    normalisation: LatentNormalisation = LatentNormalisation()
    temporal_scale: float = 1.0

    def __post_init__(self):
        if not 0 < self.temporal_scale < float("inf"):
            raise ValueError(
                f"temporal_scale is {self.temporal_scale}; it must be a positive number (1 for no scaling)."
            )

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

    def moments(self, x: Pixels) -> tuple[Latents, Latents]:
        """Returns the mean and standard deviation of the normalised latents of x, as numpy arrays.

        If ε is standard Gaussian noise, mean + std · ε is a sample of the normalised latents. The mean and the standard
        deviation are both multiplied by `normalisation.scale`; in the published STARFlow-V code, only the mean is.
        """
        if len(check_pixels(self, x)) == 2:
            mean, std = self.moments(np.asarray(x)[:, None])
            return mean[:, 0], std[:, 0]
        frames, height, width = x.shape[1:4]
        run, most = self._plan(_moments, frames, height * width)
        mean, std = in_parts(run, most, np.asarray(x, np.float32))
        scale = self._scale(mean.shape[1])
        return self.normalisation.apply(mean) * scale, self.normalisation.apply_to_std(std) * scale

    def decode(self, latents: Latents) -> Pixels:
        """Decodes normalised latents to a numpy array of images or clips, whose values are not clipped to [-1, 1]."""
        if len(check_latents(self, latents)) == 2:
            return self.decode(np.asarray(latents)[:, None])[:, 0]
        frames, rows, columns = latents.shape[1:4]
        plain = self.normalisation.undo(np.asarray(latents, np.float32) / self._scale(frames))
        run, most = self._plan(_decode, 1 + (frames - 1) * self.stride, rows * columns * self.factor**2)
        (x,) = in_parts(run, most, np.asarray(plain))
        return x

    def _scale(self, frames: int) -> np.ndarray:
        scale = np.full((1, frames, 1, 1, 1), self.temporal_scale, np.float32)
        scale[:, 0] = 1
        return scale

    def _plan(self, run: Callable[..., Any], frames: int, pixels: int) -> tuple[Callable[..., Any], int]:
        """Returns a function that processes part of a batch of clips, and the largest number of clips to pass to it.

        frames: number of frames per clip. pixels: number of pixels per frame.
        """
        whole = frames * pixels <= backend.PIXELS_AT_ONCE
        together = frames if whole else min(frames, self.stride)
        return partial(run, self.autoencoder, whole, self.variables), samples_at_once(together * pixels)


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
