"""Video autoencoders, which map clips to a Gaussian over latents, and latents back to clips. They are causal in time.

The architectures are those of Wan (arXiv 2503.20314) and Wan 2.2. They differ from that of `flowgen.codecs.autoencoder`
in two ways. Each convolution also covers the two previous frames. In addition, some levels halve the number of frames,
so that 1 + k · stride frames become 1 + k latent frames. The first latent frame depends only on the first frame. Levels
may have parameter-free shortcuts, which average groups of values in the encoder and copy values in the decoder. Every
layer accepts and returns a cache of earlier frames (see `flowgen.codecs.causal`), so clips can be processed whole or in
chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float, PyTree

from flowgen.arrays import check_floating
from flowgen.backend import OnMeshes
from flowgen.codecs.autoencoder import LOG_VARIANCE_BOUNDS, Middle
from flowgen.codecs.causal import (
    Convolution,
    DoubleSpace,
    DoubleTime,
    Features,
    HalveSpace,
    HalveTime,
    Head,
    NewFeatures,
    average_down,
    chain,
    channel_norm,
    convolve_clip,
    copy_up,
)
from flowgen.nn.convolution import Cache, ResidualBlock, SpatialAttention
from flowgen.nn.layers import linear, master_dtype
from flowgen.settings import config
from flowgen.settings.ranges import MAX_LEVELS, Channels, Entries, Loops, Side, Width

Clips = Float[Array, "b frames height width c"]
Moments = tuple[Float[Array, "b f rows columns z"], Float[Array, "b f rows columns z"]]


@config
class VideoAutoencoderConfig:
    """The architecture of a video autoencoder; the defaults match the published autoencoder of Wan 2.2 (5B).

    channels: number of channels of the clips.
    latent_channels: number of channels of the latents.
    widths: number of channels in each level of the encoder, from the highest resolution to the lowest; every level but
    the last halves height and width.
    decoder_widths: number of channels in each level of the decoder, also from the highest resolution to the lowest,
    although the decoder runs its levels in reverse.
    halve_time: for each level but the last, whether the level also halves the number of frames after the first.
    layers_per_block: number of residual blocks in each level of the encoder; the decoder has one more in each level.
    patch_size: side, in pixels, of the square patches whose pixels are stacked as channels before the first level.
    shortcuts: whether shortcuts without parameters connect the input of each level to its output, except in the
    decoder's level of highest resolution; if False, spatial upsampling halves the number of channels, as in Wan 2.1.
    dtype: dtype of the convolutions; norms are computed in float32, and decoded clips and the means and log variances
    of latents are float32.
    remat: whether to recompute the activations of residual blocks in the backward pass instead of storing them, to save
    memory.
    """

    channels: Channels = 3
    latent_channels: Channels = 48
    widths: Annotated[tuple[Width, ...], Entries(1, MAX_LEVELS)] = (160, 320, 640, 640)
    decoder_widths: Annotated[tuple[Width, ...], Entries(1, MAX_LEVELS)] = (256, 512, 1024, 1024)
    halve_time: Annotated[tuple[bool, ...], Entries(0, MAX_LEVELS)] = (False, True, True)
    layers_per_block: Loops = 2
    patch_size: Side = 2
    shortcuts: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    def __post_init__(self):
        for name, count in (("decoder_widths", len(self.widths)), ("halve_time", len(self.widths) - 1)):
            if len(getattr(self, name)) != count:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; with {len(self.widths)} widths, it must have {count} entries."
                )
        if self.shortcuts:
            _check_shortcuts(self)
        elif any(width % 2 for width in self.decoder_widths[1:]):
            raise ValueError(
                f"decoder_widths is {self.decoder_widths}; without shortcuts, every entry but the first must be even."
            )

    def build(self) -> VideoAutoencoder:
        """Returns the Flax module that this config describes."""
        return VideoAutoencoder(self)

    @property
    def strides(self) -> tuple[tuple[int, int], ...]:
        """The (temporal, spatial) downsampling factors of each level of the encoder, in the order of `widths`."""
        return (*((2 if halve else 1, 2) for halve in self.halve_time), (1, 1))

    @property
    def factor(self) -> int:
        """The factor by which the encoder, including its patches, reduces the height and width of clips."""
        return self.patch_size * 2 ** len(self.halve_time)

    @property
    def stride(self) -> int:
        """The number of frames per latent frame, except that the first frame alone becomes the first latent frame."""
        return 2 ** sum(self.halve_time)

    @property
    def inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The input with which `flowgen.init` initialises the autoencoder: the smallest clip that uses every layer."""
        shape = (1, 1 + self.stride, self.factor, self.factor, self.channels)
        return (jax.ShapeDtypeStruct(shape, jnp.float32),)


def _check_shortcuts(config: VideoAutoencoderConfig) -> None:
    below = config.widths[0]
    for width, (time, space) in zip(config.widths, config.strides, strict=True):
        numbers = below * time * space**2
        if numbers % width:
            raise ValueError(
                f"widths contains {width} after {below}, but the shortcut between them has {numbers} values per "
                f"position, which is not a multiple of {width}; change one of the two, or set shortcuts to False."
            )
        below = width
    # The decoder runs its levels in descending order. Level 0, which runs last, has no shortcut.
    above = config.decoder_widths[-1]
    for width, (time, space) in list(zip(config.decoder_widths, _strides_up(config), strict=True))[:0:-1]:
        numbers = width * time * space**2
        if numbers % above:
            raise ValueError(
                f"decoder_widths contains {width} before {above}, but the shortcut between them has {numbers} values "
                f"per position, which is not a multiple of {above}; change one of the two, or set shortcuts to False."
            )
        above = width


def _strides_up(config: VideoAutoencoderConfig) -> tuple[tuple[int, int], ...]:
    """Returns the (temporal, spatial) upsampling factors of each level of the decoder."""
    return ((1, 1), *config.strides[:-1])


def check_clips(x: Any, *, channels: int, factor: int, stride: int) -> None:
    """Raises ValueError unless clips have `channels` channels, 1 + k · stride frames, and sides divisible by factor."""
    check_floating("clips", x)
    if x.ndim != 5 or x.shape[-1] != channels:
        raise ValueError(
            f"clips have shape {tuple(x.shape)}; this codec needs (batch, frames, height, width, {channels})."
        )
    count, frames, height, width = x.shape[:4]
    if not count:
        raise ValueError("the batch is empty; give at least one clip.")
    if frames < 1 or (frames - 1) % stride:
        some = ", ".join(str(1 + k * stride) for k in range(3))
        raise ValueError(f"clips have {frames} frames; this codec needs {some}, ... frames (1 + k · {stride}).")
    if not height or not width or height % factor or width % factor:
        raise ValueError(f"clips are {height} x {width}; this codec needs sides that are multiples of {factor}.")


def _check(config: VideoAutoencoderConfig, x: Any) -> None:
    check_clips(x, channels=config.channels, factor=config.factor, stride=config.stride)


class VideoAutoencoder(OnMeshes, nn.Module):
    """Maps clips `b frames height width c` to Gaussians over latents `b f rows columns z`, and latents to clips.

    The values of clips are in [-1, 1]. A clip of 1 + k · stride frames has 1 + k latent frames, where stride is
    `config.stride`. Latent frame t depends only on frames 0 to t · stride. Latents have height / factor rows and
    width / factor columns, where factor is `config.factor`.

    Example:
        mean, log_variance = VideoAutoencoder(config).apply(params, x, method="encode")
        x = VideoAutoencoder(config).apply(params, latents, method="decode")
    """

    config: VideoAutoencoderConfig

    def setup(self):
        z, master = self.config.latent_channels, str(master_dtype(self.config.dtype))
        self.encoder = Encoder(self.config)
        self.quant_conv = linear(2 * z, 2 * z, master)
        self.post_quant_conv = linear(z, z, master)
        self.decoder = Decoder(self.config)

    def __call__(self, x: Clips) -> Clips:
        return self.decode(self.encode(x)[0])

    def encode(self, x: Clips) -> Moments:
        """Returns the mean and log variance of the latents of x; the log variance is clipped to [-30, 20].

        These latents are not normalised; a `VideoAutoencoderCodec` normalises them.

        Raises ValueError unless x has the channels, number of frames and sides that the config requires.
        """
        return self.encode_part(x, None)[0]

    def decode(self, latents: Float[Array, "b f rows columns z"]) -> Clips:
        """Decodes unnormalised latents, like those of `encode`, to clips whose values are not clipped to [-1, 1]."""
        return self.decode_part(latents, None)[0]

    def encode_part(self, x: Clips, cache: Cache) -> tuple[Moments, Cache]:
        """Encodes a chunk of frames of clips like `encode`; also returns the cache to pass with the next chunk.

        x: the first 1 + k · stride frames of the clips if `cache` is None; otherwise, k · stride frames that follow the
        previous chunk. k may differ between chunks. cache: None, or the cache returned for the previous chunk.
        """
        side = self.config.patch_size
        if cache is None:
            _check(self.config, x)
        h = rearrange(x, "b f (i p) (j q) c -> b f i j (c q p)", p=side, q=side)
        h, cache = self.encoder(h, cache)
        mean, log_variance = jnp.split(self.quant_conv(h), 2, axis=-1)
        return (mean, jnp.clip(log_variance, *LOG_VARIANCE_BOUNDS)), cache

    def decode_part(self, latents: Float[Array, "b f rows columns z"], cache: Cache) -> tuple[Clips, Cache]:
        """Decodes a chunk of latent frames like `decode`; also returns the cache to pass with the next chunk.

        cache: None for the first chunk; otherwise, the cache returned for the previous chunk.
        """
        check_floating("latents", latents)
        side = self.config.patch_size
        h, cache = self.decoder(self.post_quant_conv(latents), cache)
        return rearrange(h, "b f i j (c q p) -> b f (i p) (j q) c", p=side, q=side), cache


class Encoder(nn.Module):
    """Maps patches to features. A linear layer in `VideoAutoencoder` turns these into the mean and log variance."""

    config: VideoAutoencoderConfig

    @nn.compact
    def __call__(self, x: Features, cache: Cache) -> tuple[NewFeatures, Cache]:
        config = self.config
        layers = [
            Convolution(config.dtype, config.widths[0], name="conv_in"),
            *(Down(config, level, name=f"down_{level}") for level in range(len(config.widths))),
            _middle(config),
            Head(config.dtype, 2 * config.latent_channels, name="head"),
        ]
        return chain(layers, x, cache)


class Decoder(nn.Module):
    """Maps latents to patches of pixels. `VideoAutoencoder` first applies a linear layer to the latents."""

    config: VideoAutoencoderConfig

    @nn.compact
    def __call__(self, latents: Features, cache: Cache) -> tuple[NewFeatures, Cache]:
        config = self.config
        layers = [
            Convolution(config.dtype, config.decoder_widths[-1], name="conv_in"),
            _middle(config),
            *(Up(config, level, name=f"up_{level}") for level in reversed(range(len(config.widths)))),
            Head(config.dtype, config.channels * config.patch_size**2, name="head"),
        ]
        return chain(layers, latents, cache)


class Down(nn.Module):
    """A level of the encoder: residual blocks and, in all levels but the last, downsampling.

    An optional shortcut connects the input of the level to its output.
    """

    config: VideoAutoencoderConfig
    level: int

    @nn.compact
    def __call__(self, x: Features, cache: Cache) -> tuple[NewFeatures, Cache]:
        config, (time, space) = self.config, self.config.strides[self.level]
        width, block = config.widths[self.level], _block(config)
        layers: list[nn.Module] = [block(width, name=f"block_{i}") for i in range(config.layers_per_block)]
        if space == 2:
            layers.append(HalveSpace(config.dtype, name="halve"))
        if time == 2:
            layers.append(HalveTime(config.dtype, name="halve_time"))
        h, after = chain(layers, x, cache)
        if config.shortcuts:
            h = h + average_down(x, width, time=time, space=space, begins=cache is None)
        return h, after


class Up(nn.Module):
    """A level of the decoder: residual blocks and, in all levels but the final one, upsampling.

    An optional shortcut connects the input of the level to its output.
    """

    config: VideoAutoencoderConfig
    level: int

    @nn.compact
    def __call__(self, x: Features, cache: Cache) -> tuple[NewFeatures, Cache]:
        config, (time, space) = self.config, _strides_up(self.config)[self.level]
        width, block = config.decoder_widths[self.level], _block(config)
        layers: list[nn.Module] = [block(width, name=f"block_{i}") for i in range(config.layers_per_block + 1)]
        if time == 2:
            layers.append(DoubleTime(config.dtype, name="double_time"))
        if space == 2:
            # Without shortcuts, spatial upsampling also halves the number of channels.
            layers.append(DoubleSpace(config.dtype, width if config.shortcuts else width // 2, name="double"))
        h, after = chain(layers, x, cache)
        if config.shortcuts and space == 2:
            h = h + copy_up(x, width, time=time, space=space, begins=cache is None)
        return h, after


def _block(config: VideoAutoencoderConfig) -> Callable[..., ResidualBlock]:
    block = nn.remat(ResidualBlock) if config.remat else ResidualBlock
    return partial(block, dtype=config.dtype, norm=channel_norm, convolve=convolve_clip)


def _middle(config: VideoAutoencoderConfig) -> Middle:
    return Middle(_block(config), partial(SpatialAttention, config.dtype, channel_norm), name="middle")


def encode_in_chunks(autoencoder: VideoAutoencoder, variables: PyTree, x: Clips) -> Moments:
    """Encodes clips like `VideoAutoencoder.encode`, but in chunks: first one frame, then `config.stride` at a time.

    This saves memory, because only the activations of one chunk are needed at a time.

    Example:
        mean, log_variance = encode_in_chunks(autoencoder, params, x)
    """
    _check(autoencoder.config, x)
    part = partial(autoencoder.apply, variables, method="encode_part")
    return _in_chunks(part, x, autoencoder.config.stride)


def decode_in_chunks(
    autoencoder: VideoAutoencoder, variables: PyTree, latents: Float[Array, "b f rows columns z"]
) -> Clips:
    """Decodes latents to clips like `VideoAutoencoder.decode`, but one latent frame at a time.

    This saves memory, because only the activations of one latent frame are needed at a time.

    Example:
        x = decode_in_chunks(autoencoder, params, latents)
    """
    return _in_chunks(partial(autoencoder.apply, variables, method="decode_part"), latents, 1)


def _in_chunks(part: Callable[..., tuple[PyTree, Cache]], x: Array, size: int) -> PyTree:
    first, cache = part(x[:, :1], None)
    chunks = x[:, 1:].reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

    def step(cache, chunk):
        out, cache = part(chunk, cache)
        return cache, out

    _, rest = jax.lax.scan(step, cache, chunks)

    def joined(first, rest):
        rest = rest.swapaxes(0, 1)
        return jnp.concatenate([first, rest.reshape(rest.shape[0], -1, *rest.shape[3:])], axis=1)

    return jax.tree.map(joined, first, rest)


# The published autoencoders of Wan 2.2 and 2.1, which have 704,688,668 and 126,892,531 parameters.
VIDEO_AUTOENCODER_PRESETS: dict[str, VideoAutoencoderConfig] = {
    "wan_2_2": VideoAutoencoderConfig(),
    "wan_2_1": VideoAutoencoderConfig(
        latent_channels=16,
        widths=(96, 192, 384, 384),
        decoder_widths=(96, 192, 384, 384),
        patch_size=1,
        shortcuts=False,
    ),
}
