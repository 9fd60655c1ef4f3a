"""The U-Net of ADM (Dhariwal and Nichol, arXiv 2105.05233), the usual velocity network for CIFAR-10.

Let e be the embedding of (t, interval, condition). A residual block computes

    h = conv(silu(norm(x))),    y = skip(x) + conv(dropout(silu(norm(h + W silu(e)))))

With `scale_shift_norm`, norm(h + W silu(e)) is replaced by norm(h) (1 + a) + b, where (a, b) = W silu(e). A block with
attention then computes y + W' attention(norm(y)).

On the way down, each level applies `blocks_per_level` blocks; each level except the last then downsamples the image by
a factor of 2. On the way up, each level applies one more block than on the way down. Each of these blocks also receives
a skip connection: the output of the first convolution, of a block or of a downsampling on the way down.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from einops import reduce, repeat
from flax import linen as nn
from jaxtyping import Array, Float

from flowgen.backend import Implementation, OnMeshes
from flowgen.contexts import Context, ImageContext, check_condition, check_one_condition
from flowgen.matching.contexts import (
    ContextEmbedding,
    as_channels,
    given_context,
    same_size,
    shrunk_context,
)
from flowgen.matching.velocity import check_inputs
from flowgen.nn.checks import image_sides
from flowgen.nn.convolution import Cache, ResidualBlock, SpatialAttention, conv, group_norm
from flowgen.nn.embeddings import TIME_SCALE, ConditionEmbedding
from flowgen.nn.layers import linear, master_dtype
from flowgen.nn.softmax_shape import SoftmaxShape
from flowgen.settings import config
from flowgen.settings.ranges import (
    MAX_LEVELS,
    Channels,
    Classes,
    Entries,
    Expansion,
    Groups,
    HeadDim,
    Loops,
    Positive,
    ProperFraction,
    Side,
    Width,
)

TORCH_GROUP_NORM_EPS = 1e-5
# Width of the time and class embedding, as a multiple of the network's width.
EMBEDDING_EXPANSION = 4
TABLE_STD = 1.0


@config
class UNetConfig:
    """Architecture of a U-Net, a convolutional velocity network for images.

    The architecture of torchcfm for CIFAR-10 is `UNetConfig(image_size=32, time_scale=1.0)`. The architecture of Meta's
    flow_matching for CIFAR-10 is `UNetConfig(image_size=32, multipliers=(2, 2, 2), blocks_per_level=4, resample="pool",
    head_dim=256, dropout=0.3, scale_shift_norm=True, time_scale=1.0)`.

    image_size: side of square images in pixels, or (height, width).
    channels: number of channels of the images.
    width: base number of channels, by which the entries of `multipliers` are multiplied; even.
    multipliers: number of channels of each level, as a multiple of width; from each level to the next, height and width
    are halved.
    blocks_per_level: number of residual blocks in each level on the way down; on the way up, each level has one more.
    resample: "conv" downsamples by a convolution of stride 2, "pool" by averages over 2 x 2 pixels. Both upsample by
    repeating pixels; "conv" then applies a convolution.
    attention_factors: downsampling factors (1, 2, 4, ...) of the levels whose blocks have attention; the middle of the
    network always has attention.
    head_dim: number of channels per attention head; a level with fewer channels has one head.
    attention_implementation: implementation of softmax attention: "xla" for all devices, "cudnn" for NVIDIA GPUs, "tpu"
    for TPUs; "auto" chooses one by device, dtype and shape. See docs/attention.md in the repository.
    num_groups: number of groups in group norm; must divide the number of channels of each level.
    dropout: probability with which an activation is set to 0 in training; at least 0 and below 1.
    num_classes: number of classes that the velocity is conditioned on; 0 for none.
    scale_shift_norm: whether the embedding of time and condition scales and shifts the normalised activations; if
    false, the embedding is added to the activations before the norm.
    time_scale: factor by which times in [0, 1] are multiplied before the sinusoidal embedding, which expects values up
    to 1,000.
    intervals: whether the network also predicts average velocities over time intervals; required by the loss MeanFlow.
    dtype: dtype of convolutions and activations; parameters, norms, the embedding and the velocity stay float32.
    remat: whether to recompute the activations of each block in the backward pass instead of storing them.
    context: the context that the velocity is conditioned on; None for no context. The embedding of a vector, or the
    mean of the tokens' embeddings, is added to the embedding of the time, so the order of the tokens has no effect. An
    image must have the same size as the network's images, and is concatenated to them as channels.
    """

    image_size: Side | tuple[Side, Side]
    channels: Channels = 3
    width: Width = 128
    multipliers: Annotated[tuple[Expansion, ...], Entries(1, MAX_LEVELS)] = (1, 2, 2, 2)
    blocks_per_level: Loops = 2
    resample: Literal["conv", "pool"] = "conv"
    attention_factors: Annotated[tuple[int, ...], Entries(0, MAX_LEVELS)] = (2,)
    head_dim: HeadDim = 64
    attention_implementation: Implementation = "auto"
    num_groups: Groups = 32
    dropout: ProperFraction = 0.1
    num_classes: Classes = 0
    scale_shift_norm: bool = False
    time_scale: Positive = TIME_SCALE
    intervals: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    context: Context | None = None

    def __post_init__(self):
        self._check_sizes()
        self._check_widths()
        check_one_condition(self.num_classes, self.context)
        if isinstance(self.context, ImageContext) and not same_size(self.context, self.image_hw):
            raise ValueError(
                f"context has image_size {self.context.image_size}, but image_size is {self.image_size}; resize the "
                "context images to the same size, or use a DiTConfig, which accepts other sizes."
            )

    def build(self) -> UNet:
        """Returns the network that this config describes, without parameters."""
        return UNet(self)

    def _check_sizes(self):
        factors = tuple(2**level for level in range(len(self.multipliers)))
        for side, length in zip(("height", "width"), image_sides(self.image_size), strict=True):
            if length % factors[-1]:
                raise ValueError(
                    f"image_size has {side} {length}, which cannot be halved {len(factors) - 1} times; "
                    f"use a multiple of {factors[-1]} or fewer multipliers."
                )
        for factor in self.attention_factors:
            if factor not in factors:
                known = ", ".join(map(str, factors))
                raise ValueError(
                    f"attention_factors contains {factor}; choose from the factors of this network's levels: {known}."
                )

    def _check_widths(self):
        if self.width % 2:
            raise ValueError(
                f"width is {self.width}; it must be even, because the time embedding is half sines and half cosines."
            )
        for level, width in enumerate(self.level_widths):
            if width % self.num_groups:
                raise ValueError(
                    f"num_groups is {self.num_groups}, which does not divide the {width} channels of level "
                    f"{level}; change width or num_groups."
                )
            attends = self.attends(level) or level == len(self.multipliers) - 1
            if attends and width > self.head_dim and width % self.head_dim:
                raise ValueError(
                    f"head_dim is {self.head_dim}, which does not divide the {width} channels of level {level}; "
                    "change width or head_dim."
                )

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return image_sides(self.image_size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image: (height, width, channels)."""
        return (*self.image_hw, self.channels)

    @property
    def event_shape(self) -> tuple[int, int, int]:
        """Shape of one sample: (height, width, channels)."""
        return self.image_shape

    @property
    def num_dims(self) -> int:
        """Number of values in one image: height · width · channels."""
        height, width = self.image_hw
        return height * width * self.channels

    @property
    def level_widths(self) -> tuple[int, ...]:
        """Number of channels of each level, from the full image to the lowest resolution."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def embedding_dim(self) -> int:
        """Width of the embedding of time, interval and condition."""
        return EMBEDDING_EXPANSION * self.width

    def attends(self, level: int) -> bool:
        """Returns whether the blocks of a level have attention; level 0 has the full resolution."""
        return 2**level in self.attention_factors

    @property
    def softmax_shapes(self) -> tuple[SoftmaxShape, ...]:
        """The shapes of self-attention, one for each resolution at which a level or the middle of the network has
        attention.
        """
        height, width = self.image_hw
        return tuple(
            SoftmaxShape(height * width // 4**level, heads, channels // heads, self.dtype)
            for level, channels in enumerate(self.level_widths)
            if self.attends(level) or level == len(self.multipliers) - 1
            for heads in [max(1, channels // self.head_dim)]
        )

    def shrunk(self) -> UNetConfig:
        """Returns a small version of this config, of at most 8 x 8 pixels, for tests and `--debug` runs."""
        multipliers = tuple(min(multiplier, 2) for multiplier in self.multipliers[:2])
        deepest = len(multipliers)  # 1 or 2, which is also the downsampling factor of the last level
        height, width = (deepest * max(1, min(8 // deepest, length // deepest)) for length in self.image_hw)
        return dataclasses.replace(
            self,
            image_size=(height, width),
            width=16,
            multipliers=multipliers,
            blocks_per_level=1,
            attention_factors=tuple(factor for factor in self.attention_factors if factor <= deepest),
            head_dim=16,
            num_groups=8,
            num_classes=10 if self.num_classes else 0,
            context=shrunk_context(self.context, self.image_hw, (height, width)),
        )


class UNet(OnMeshes, nn.Module):
    """A velocity network for images, with convolutions at several resolutions.

    Example:
        network = UNet(UNetConfig(image_size=32, num_classes=10))
        v = network.apply(variables, t, x, cond, train=True, rngs={"dropout": key})
    """

    config: UNetConfig

    @nn.compact
    def __call__(
        self,
        t: Float[Array, " b"],
        x: Float[Array, "b height width c"],
        cond: Any = None,
        interval: Float[Array, " b"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b height width c"]:
        """Returns the velocity at x and time t, averaged over `interval` if it is given and the config sets
        `intervals`.

        cond: labels (-1 for none), the context that the config describes, or None. Inside jit, an invalid label gives
        NaN.
        train: whether to apply dropout.

        Raises ValueError if x, t or cond does not match the config.
        """
        config = self.config
        check_inputs(config, t, x)
        cond = check_condition(config, cond, len(x))
        master = master_dtype(config.dtype)
        e, x = self._conditioned(t, x, cond, interval)
        widths, last = config.level_widths, len(config.level_widths) - 1

        h = conv(widths[0], x.shape[-1], config.dtype, name="conv_in")(x)
        skips = [h]
        for level in range(len(widths)):
            if level:
                h = _halved(config, h, name=f"halve_{level}")
                skips.append(h)
            for i in range(config.blocks_per_level):
                h, _ = _block(config, level, f"down_{level}_{i}")(h, None, e, train)
                skips.append(h)
        h, _ = _block(config, last, "middle_0", attends=True)(h, None, e, train)
        h, _ = _block(config, last, "middle_1", attends=False)(h, None, e, train)
        for level in reversed(range(len(widths))):
            for i in range(config.blocks_per_level + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h, _ = _block(config, level, f"up_{level}_{i}")(h, None, e, train)
            if level:
                h = _doubled(config, h, name=f"double_{level}")
        h = jax.nn.silu(group_norm(config.num_groups, config.dtype, epsilon=TORCH_GROUP_NORM_EPS, name="norm_out")(h))
        return conv(config.channels, widths[0], str(master), zero=True, name="conv_out")(h)

    def _conditioned(self, t: Array, x: Array, cond: Any, interval: Array | None) -> tuple[Array, Array]:
        """Returns silu(e), and the images with an image context as added channels."""
        config = self.config
        dense = partial(linear, dtype=str(master_dtype(config.dtype)))
        embed = ConditionEmbedding(
            config.embedding_dim,
            config.num_classes,
            config.intervals,
            frequencies=config.width,
            time_scale=config.time_scale,
            dense=dense,
            table_std=TABLE_STD,
            name="embedding",
        )
        if config.context is None:
            return jax.nn.silu(embed(t, cond, interval)), x
        e, given = embed(t, None, interval), given_context(config.context, cond, len(x), x.dtype)
        if isinstance(config.context, ImageContext):
            return jax.nn.silu(e), jnp.concatenate([x, as_channels(config.context, given)], axis=-1)
        return jax.nn.silu(e + ContextEmbedding(config.embedding_dim, dense, TABLE_STD, name="context")(given)), x


class Block(ResidualBlock):
    """A residual block conditioned on the embedding e, followed by attention if `num_heads` is positive."""

    num_heads: int = 0
    attention_implementation: Implementation = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *places c"],
        cache: Cache = None,
        e: Float[Array, "b e"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b *places d"], Cache]:
        h, cache = super().__call__(x, cache, e, train)
        if self.num_heads:
            attention = SpatialAttention(
                self.dtype, self.norm, self.num_heads, True, self.attention_implementation, name="attention"
            )
            h, _ = attention(h)
        return h, cache


def _block(config: UNetConfig, level: int, name: str, *, attends: bool | None = None) -> Block:
    width = config.level_widths[level]
    attends = config.attends(level) if attends is None else attends
    return (nn.remat(Block, static_argnums=(4,)) if config.remat else Block)(
        width,
        config.dtype,
        partial(group_norm, config.num_groups, config.dtype, epsilon=TORCH_GROUP_NORM_EPS),
        scale_shift=config.scale_shift_norm,
        dropout=config.dropout,
        zero=True,
        num_heads=max(1, width // config.head_dim) if attends else 0,
        attention_implementation=config.attention_implementation,
        name=name,
    )


def _halved(config: UNetConfig, h: Array, name: str) -> Array:
    if config.resample == "pool":
        return reduce(h, "b (i p) (j q) c -> b i j c", "mean", p=2, q=2)
    return conv(h.shape[-1], h.shape[-1], config.dtype, stride=2, name=name)(h)


def _doubled(config: UNetConfig, h: Array, name: str) -> Array:
    h = repeat(h, "b i j c -> b (i p) (j q) c", p=2, q=2)
    return h if config.resample == "pool" else conv(h.shape[-1], h.shape[-1], config.dtype, name=name)(h)
