"""AutoencoderKL: pictures to a Gaussian over latents and back (Rombach et al., arXiv 2112.10752).

With residual blocks r(x) = skip(x) + conv(silu(norm(conv(silu(norm(x)))))), the encoder is a convolution, at each level
some blocks and, but for the last, a halving, then block, attention, block, and a convolution to mean and log variance.
The decoder mirrors it, with one block more per level. Trained by flowgen or elsewhere, it is frozen beside a flow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import linen as nn
from jaxtyping import Array, Float, Key

from flowgen.arrays import check_floating
from flowgen.attention import softmax_attention
from flowgen.nn.checks import check_choices
from flowgen.nn.convolution import conv, group_norm
from flowgen.nn.layers import linear, master_dtype
from flowgen.ranges import MAX_LEVELS, AtMost, Channels, Groups, Loops, Width, check_ranges
from flowgen.sharding import OnMeshes
from flowgen.typed import typed

GROUP_NORM_EPS = 1e-6
LOG_VARIANCE_BOUNDS = (-30.0, 20.0)


@dataclass(frozen=True)
@typed
class AutoencoderConfig:
    """Shape of an autoencoder; the defaults are those of the published Stable Diffusion autoencoder.

    channels: of the images.
    latent_channels: of the latents.
    widths: channels of each level, multiples of num_groups; every level but the last halves the image.
    layers_per_block: residual blocks of a level on the way down, one fewer than on the way up.
    num_groups: of group norm.
    attention: of all places to all, in the middle, one head.
    dtype: of convolutions; norms, moments and images stay float32.
    remat: recompute blocks in the backward pass.
    """

    channels: Channels = 3
    latent_channels: Channels = 4
    widths: Annotated[tuple[Width, ...], AtMost(MAX_LEVELS)] = (128, 256, 512, 512)
    layers_per_block: Loops = 2
    num_groups: Groups = 32
    attention: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    def __post_init__(self):
        if not self.widths:
            raise ValueError("model.widths is empty; give the channels of each level.")
        for width in self.widths:
            if type(width) is not int or width < 1 or width % self.num_groups:
                raise ValueError(
                    f"model.widths has {width}, which is not a positive multiple of num_groups {self.num_groups}; "
                    "change one of the two."
                )
        check_ranges(self, "model")
        check_choices(self, {"dtype": ("float32", "bfloat16")})

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.widths) - 1)

    @property
    def smallest(self) -> tuple[int, ...]:
        """Shape of a batch of one picture that passes through every layer."""
        return (1, self.factor, self.factor, self.channels)


class Autoencoder(OnMeshes, nn.Module):
    """Encoder and decoder between pictures `b height width c` in [-1, 1] and latents `b h w z`.

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

    def encode(self, x: Float[Array, "b height width c"]) -> tuple[Float[Array, "b h w z"], Float[Array, "b h w z"]]:
        """Returns mean and log variance of the latents, the latter within [-30, 20]; neither is normalised."""
        check_floating("x", x)
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(x)), 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE_BOUNDS)

    def decode(self, latents: Float[Array, "b h w z"]) -> Float[Array, "b height width c"]:
        """Returns the pictures of latents that are not normalised."""
        check_floating("latents", latents)
        return self.decoder(self.post_quant_conv(latents))


class Encoder(nn.Module):
    """Pictures to the mean and log variance before their last 1 × 1 convolution."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b h w two_z"]:
        config, widths = self.config, self.config.widths
        block = _block(config)
        h = conv(widths[0], config.channels, config.dtype, name="conv_in")(x)
        for level, width in enumerate(widths):
            for i in range(config.layers_per_block):
                h = block(h.shape[-1], width, name=f"down_{level}_{i}")(h)
            if level < len(widths) - 1:
                # The published halving pads below and on the right alone.
                padding = ((0, 1), (0, 1))
                h = conv(width, width, config.dtype, stride=2, padding=padding, name=f"halve_{level}")(h)
        h = Middle(config, name="middle")(h)
        return _conv_out(config, h, 2 * config.latent_channels)


class Decoder(nn.Module):
    """Latents after their first 1 × 1 convolution to pictures."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, latents: Float[Array, "b h w z"]) -> Float[Array, "b height width c"]:
        config, widths = self.config, self.config.widths
        block = _block(config)
        h = conv(widths[-1], config.latent_channels, config.dtype, name="conv_in")(latents)
        h = Middle(config, name="middle")(h)
        for level, width in reversed(list(enumerate(widths))):
            for i in range(config.layers_per_block + 1):
                h = block(h.shape[-1], width, name=f"up_{level}_{i}")(h)
            if level:
                h = repeat(h, "b i j c -> b (i p) (j q) c", p=2, q=2)
                h = conv(width, width, config.dtype, name=f"double_{level}")(h)
        return _conv_out(config, h, config.channels)


class Middle(nn.Module):
    """Block, attention where there is any, block, at the lowest resolution."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        block, width = _block(self.config), h.shape[-1]
        h = block(width, width, name="block_0")(h)
        if self.config.attention:
            h = Attention(self.config, width, name="attention")(h)
        return block(width, width, name="block_1")(h)


class Block(nn.Module):
    """A residual block from `in_width` to `width` channels."""

    config: AutoencoderConfig
    in_width: int
    width: int

    def setup(self):
        dtype = self.config.dtype
        self.norm_in, self.norm_out = _group_norm(self.config), _group_norm(self.config)
        self.conv_in = conv(self.width, self.in_width, dtype)
        self.conv_out = conv(self.width, self.width, dtype)
        if self.in_width != self.width:
            self.skip = conv(self.width, self.in_width, dtype, side=1)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        dtype = self.config.dtype
        h = self.conv_in(jax.nn.silu(self.norm_in(x)).astype(dtype))
        h = self.conv_out(jax.nn.silu(self.norm_out(h)).astype(dtype))
        return h + (x if self.in_width == self.width else self.skip(x))


class Attention(nn.Module):
    """x + W attention(norm(x)) over all places, in one head."""

    config: AutoencoderConfig
    width: int

    def setup(self):
        dtype = self.config.dtype
        self.norm = _group_norm(self.config)
        self.query, self.key, self.value, self.proj = (linear(self.width, self.width, dtype) for _ in range(4))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        h = self.norm(x).astype(self.config.dtype)
        q, k, v = (rearrange(layer(h), "b i j c -> b (i j) 1 c") for layer in (self.query, self.key, self.value))
        return x + self.proj(softmax_attention(q, k, v).reshape(x.shape))


def _block(config: AutoencoderConfig) -> Any:
    return partial(nn.remat(Block) if config.remat else Block, config)


def _group_norm(config: AutoencoderConfig, name: str | None = None) -> nn.GroupNorm:
    return group_norm(config.num_groups, config.dtype, epsilon=GROUP_NORM_EPS, name=name)


def _conv_out(config: AutoencoderConfig, h: Array, features: int) -> Array:
    master = str(master_dtype(config.dtype))
    h = jax.nn.silu(_group_norm(config, name="norm_out")(h))
    return conv(features, h.shape[-1], master, name="conv_out")(h)


def init(autoencoder: nn.Module, key: Key[Array, ""]) -> Any:
    """Returns freshly initialised variables of an autoencoder, of pictures or of clips; shapes come from its config.

    Example:
        params = init(Autoencoder(AutoencoderConfig(widths=(32, 64))), jax.random.key(0))
    """
    return _init(autoencoder, key)


@partial(jax.jit, static_argnums=0)
def _init(autoencoder, key):
    return autoencoder.init(key, jnp.zeros(autoencoder.config.smallest))


# The published autoencoder of latent diffusion, 83,653,863 parameters.
AUTOENCODER_PRESETS: dict[str, AutoencoderConfig] = {"sd_vae": AutoencoderConfig()}
