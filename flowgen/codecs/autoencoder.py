"""AutoencoderKL: maps images to a Gaussian over latents, and latents back to images (Rombach et al., arXiv 2112.10752).

The encoder begins with a convolution, followed by several levels. Each level consists of residual blocks; every level
but the last then halves the height and width. The levels are followed by a residual block, attention, another residual
block, and a convolution that returns the mean and log variance. A residual block computes

    r(x) = skip(x) + conv(silu(norm(conv(silu(norm(x)))))).

The decoder mirrors the encoder, but has one more residual block per level. While a flow is trained on the latents, both
the encoder and the decoder are frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from einops import repeat
from flax import linen as nn
from jaxtyping import Array, Float

from flowgen.arrays import check_floating
from flowgen.backend import OnMeshes
from flowgen.codecs.causal import chain
from flowgen.nn.convolution import Cache, ResidualBlock, SpatialAttention, conv, group_norm
from flowgen.nn.layers import master_dtype
from flowgen.settings import config
from flowgen.settings.ranges import MAX_LEVELS, Channels, Entries, Groups, Loops, Width

GROUP_NORM_EPS = 1e-6
LOG_VARIANCE_BOUNDS = (-30.0, 20.0)


@config
class AutoencoderConfig:
    """The architecture of an autoencoder; the defaults match the published Stable Diffusion autoencoder.

    channels: number of channels of the images.
    latent_channels: number of channels of the latents.
    widths: number of channels in each level of the encoder, from the highest resolution to the lowest; every level but
    the last halves height and width. The decoder runs the same levels in reverse and doubles height and width.
    layers_per_block: number of residual blocks in each level of the encoder; the decoder has one more in each level.
    num_groups: number of groups in group norm; must divide all widths.
    attention: whether the encoder and the decoder have single-head attention at the lowest resolution.
    dtype: dtype of the convolutions; norms are computed in float32, and decoded images and the means and log variances
    of latents are float32.
    remat: whether to recompute the activations of residual blocks in the backward pass instead of storing them, to save
    memory.
    """

    channels: Channels = 3
    latent_channels: Channels = 4
    widths: Annotated[tuple[Width, ...], Entries(1, MAX_LEVELS)] = (128, 256, 512, 512)
    layers_per_block: Loops = 2
    num_groups: Groups = 32
    attention: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    def __post_init__(self):
        for width in self.widths:
            if width % self.num_groups:
                raise ValueError(
                    f"widths contains {width}, which is not a multiple of num_groups {self.num_groups}; "
                    "change one of them."
                )

    def build(self) -> Autoencoder:
        """Returns the Flax module that this config describes."""
        return Autoencoder(self)

    @property
    def factor(self) -> int:
        """The factor by which the encoder reduces the height and width of images."""
        return 2 ** (len(self.widths) - 1)

    @property
    def inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The input with which `flowgen.init` initialises the autoencoder: one image of `factor` × `factor` pixels."""
        return (jax.ShapeDtypeStruct((1, self.factor, self.factor, self.channels), jnp.float32),)


class Autoencoder(OnMeshes, nn.Module):
    """Maps images `b height width c` in [-1, 1] to Gaussians over latents `b rows columns z`, and latents to images.

    Latents have height / factor rows and width / factor columns, where factor is `config.factor`.

    Example:
        mean, log_variance = Autoencoder(config).apply(params, x, method="encode")
        x = Autoencoder(config).apply(params, latents, method="decode")
    """

    config: AutoencoderConfig

    def setup(self):
        z, master = self.config.latent_channels, str(master_dtype(self.config.dtype))
        self.encoder = Encoder(self.config)
        self.quant_conv = conv(2 * z, 2 * z, master, side=1)
        self.post_quant_conv = conv(z, z, master, side=1)
        self.decoder = Decoder(self.config)

    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b height width c"]:
        return self.decode(self.encode(x)[0])

    def encode(
        self, x: Float[Array, "b height width c"]
    ) -> tuple[Float[Array, "b rows columns z"], Float[Array, "b rows columns z"]]:
        """Returns the mean and log variance of the latents of x; the log variance is clipped to [-30, 20].

        These latents are not normalised; an `AutoencoderCodec` normalises them.
        """
        check_floating("x", x)
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(x)), 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE_BOUNDS)

    def decode(self, latents: Float[Array, "b rows columns z"]) -> Float[Array, "b height width c"]:
        """Decodes unnormalised latents, like those of `encode`, to images whose values are not clipped to [-1, 1]."""
        check_floating("latents", latents)
        return self.decoder(self.post_quant_conv(latents))


class Encoder(nn.Module):
    """Maps images to features. A 1 × 1 convolution in `Autoencoder` turns these into the mean and log variance."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b rows columns two_z"]:
        config, widths = self.config, self.config.widths
        block = _block(config)
        h = conv(widths[0], config.channels, config.dtype, name="conv_in")(x)
        for level, width in enumerate(widths):
            for i in range(config.layers_per_block):
                h, _ = block(width, name=f"down_{level}_{i}")(h)
            if level < len(widths) - 1:
                # As in the published code, only the bottom and the right are padded.
                padding = ((0, 1), (0, 1))
                h = conv(width, width, config.dtype, stride=2, padding=padding, name=f"halve_{level}")(h)
        h, _ = _middle(config)(h)
        return _conv_out(config, h, 2 * config.latent_channels)


class Decoder(nn.Module):
    """Maps latents to images. `Autoencoder` first applies a 1 × 1 convolution to the latents."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, latents: Float[Array, "b rows columns z"]) -> Float[Array, "b height width c"]:
        config, widths = self.config, self.config.widths
        block = _block(config)
        h = conv(widths[-1], config.latent_channels, config.dtype, name="conv_in")(latents)
        h, _ = _middle(config)(h)
        for level, width in reversed(list(enumerate(widths))):
            for i in range(config.layers_per_block + 1):
                h, _ = block(width, name=f"up_{level}_{i}")(h)
            if level:
                h = repeat(h, "b i j c -> b (i p) (j q) c", p=2, q=2)
                h = conv(width, width, config.dtype, name=f"double_{level}")(h)
        return _conv_out(config, h, config.channels)


class Middle(nn.Module):
    """Two residual blocks at the lowest resolution, with optional attention between them, for images or clips.

    block: a function that creates a residual block, called as block(width, name).
    attention: a function that creates the attention layer, called as attention(name); None means no attention.
    """

    block: Callable[..., ResidualBlock]
    attention: Callable[..., SpatialAttention] | None

    @nn.compact
    def __call__(
        self, h: Float[Array, "b *places c"], cache: Cache = None
    ) -> tuple[Float[Array, "b *places c"], Cache]:
        attention = [] if self.attention is None else [self.attention(name="attention")]
        first, last = (self.block(h.shape[-1], name=f"block_{i}") for i in range(2))
        return chain([first, *attention, last], h, cache)


def _norm(config: AutoencoderConfig) -> Callable[..., nn.GroupNorm]:
    return partial(group_norm, config.num_groups, config.dtype, epsilon=GROUP_NORM_EPS)


def _block(config: AutoencoderConfig) -> Callable[..., ResidualBlock]:
    block = nn.remat(ResidualBlock) if config.remat else ResidualBlock
    return partial(block, dtype=config.dtype, norm=_norm(config))


def _middle(config: AutoencoderConfig) -> Middle:
    attention = partial(SpatialAttention, config.dtype, _norm(config)) if config.attention else None
    return Middle(_block(config), attention, name="middle")


def _conv_out(config: AutoencoderConfig, h: Array, features: int) -> Array:
    master = str(master_dtype(config.dtype))
    h = jax.nn.silu(_norm(config)(name="norm_out")(h))
    return conv(features, h.shape[-1], master, name="conv_out")(h)


# The published autoencoder for latent diffusion models, which has 83,653,863 parameters.
AUTOENCODER_PRESETS: dict[str, AutoencoderConfig] = {"sd_vae": AutoencoderConfig()}
