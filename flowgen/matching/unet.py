"""U-Net in the shape of ADM (Dhariwal and Nichol, arXiv 2105.05233), the network of the CIFAR-10 recipes.

With e the embedding of (t, span, class), a residual block computes

    h = conv(silu(norm(x))),    y = skip(x) + conv(dropout(silu(norm(h + W silu(e)))))

and with `scale_shift_norm` norm(h) (1 + a) + b in place of norm(h + W silu(e)), where (a, b) = W silu(e). At each
level are some blocks, then the image is halved; on the way back it is the same with one block more, each of which also
sees what the block (or the halving) on the way down left at its place. Attention is x + W' attention(norm(x)).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import linen as nn
from jaxtyping import Array, Float, Int

from flowgen.attention import softmax_attention
from flowgen.conditioning import check_labels
from flowgen.matching.velocity import TIME_SCALE, check_inputs, check_time_scale, class_or_none, time_features
from flowgen.nn.checks import check_choices, image_sides
from flowgen.nn.convolution import conv, group_norm
from flowgen.nn.layers import flat_dot, linear, master_dtype
from flowgen.ranges import (
    MAX_LEVELS,
    AtMost,
    Channels,
    Classes,
    Expansion,
    Groups,
    HeadDim,
    Loops,
    Side,
    Width,
    check_ranges,
)
from flowgen.sharding import OnMeshes
from flowgen.typed import typed

TORCH_GROUP_NORM_EPS = 1e-5
# Width of the embedding of time and class, in widths of the network.
EMBEDDING_EXPANSION = 4


@dataclass(frozen=True)
@typed
class UNetConfig:
    """Shape of a U-Net; `UNetConfig(image_size=32)` is torchcfm's for CIFAR-10.

    Meta's is `UNetConfig(image_size=32, multipliers=(2, 2, 2), blocks_per_level=4, resample="pool", head_dim=256,
    dropout=0.3, scale_shift_norm=True)`; both feed t as it is, `time_scale=1.0`.

    image_size: side in pixels, or (height, width).
    channels: of the images.
    width: channels of the first level, a multiple of num_groups.
    multipliers: channels of each level, in widths; each level but the last halves the image.
    blocks_per_level: residual blocks of a level on the way down.
    resample: "conv" halves by a convolution of stride 2 and doubles by repetition and a convolution; "pool" halves by
    the mean of four pixels and doubles by repetition alone.
    attention_factors: blocks attend where the image is this many times smaller; between down and up they always do.
    head_dim: channels of an attention head; a level narrower than it is one head.
    num_groups: of group norm.
    dropout: share of activations that are set to 0 in training; at least 0 and below 1.
    num_classes: of the labels the field is conditioned on; 0 for none.
    scale_shift_norm: the time scales and shifts the normalised activations, instead of being added.
    time_scale: times are stretched by it before the sinusoids, which are made for 0 to 1,000.
    spans: also predict average velocities over a span (MeanFlow).
    dtype: of convolutions and activations; parameters, norms, the embedding and the velocity stay float32.
    remat: recompute blocks in the backward pass instead of storing them; less memory, more time.
    """

    image_size: Side | tuple[Side, Side]
    channels: Channels = 3
    width: Width = 128
    multipliers: Annotated[tuple[Expansion, ...], AtMost(MAX_LEVELS)] = (1, 2, 2, 2)
    blocks_per_level: Loops = 2
    resample: Literal["conv", "pool"] = "conv"
    attention_factors: Annotated[tuple[int, ...], AtMost(MAX_LEVELS)] = (2,)
    head_dim: HeadDim = 64
    num_groups: Groups = 32
    dropout: float = 0.1
    num_classes: Classes = 0
    scale_shift_norm: bool = False
    time_scale: float = TIME_SCALE
    spans: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    def __post_init__(self):
        if not self.multipliers or not all(type(factor) is int and factor >= 1 for factor in self.multipliers):
            raise ValueError(f"model.multipliers is {self.multipliers}; give a whole number of widths for each level.")
        image_sides(self.image_size)
        check_ranges(self, "model")
        self._check_sizes()
        self._check_widths()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout is {self.dropout}; it must be 0 (none) or more, and below 1.")
        check_time_scale(self.time_scale)
        check_choices(self, {"resample": ("conv", "pool"), "dtype": ("float32", "bfloat16")})

    def _check_sizes(self):
        factors = tuple(2**level for level in range(len(self.multipliers)))
        for side, length in zip(("height", "width"), image_sides(self.image_size), strict=True):
            if length < 1 or length % factors[-1]:
                raise ValueError(
                    f"model.image_size has {side} {length}, which cannot be halved {len(factors) - 1} times; "
                    f"use a multiple of {factors[-1]} or fewer multipliers."
                )
        for factor in self.attention_factors:
            if factor not in factors:
                known = ", ".join(map(str, factors))
                raise ValueError(f"model.attention_factors has {factor}; the levels of this network are {known}.")

    def _check_widths(self):
        if self.width % 2:
            raise ValueError(f"model.width is {self.width}; half of its features of time are sines: use an even one.")
        for level, width in enumerate(self.level_widths):
            if width % self.num_groups:
                raise ValueError(
                    f"model.num_groups is {self.num_groups}, which does not divide the {width} channels of level "
                    f"{level}; change width or num_groups."
                )
            attends = self.attends(level) or level == len(self.multipliers) - 1
            if attends and width > self.head_dim and width % self.head_dim:
                raise ValueError(
                    f"model.head_dim is {self.head_dim}, which does not divide the {width} channels of level {level}; "
                    "change width or head_dim."
                )

    @property
    def grid_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return image_sides(self.image_size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return (*self.grid_size, self.channels)

    @property
    def event_shape(self) -> tuple[int, int, int]:
        """Shape of one sample: `image_shape`."""
        return self.image_shape

    @property
    def num_dims(self) -> int:
        """Dimensions of one image, by which nats become nats or bits per dimension."""
        height, width = self.grid_size
        return height * width * self.channels

    @property
    def level_widths(self) -> tuple[int, ...]:
        """Channels of each level, the full image first."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def embedding_dim(self) -> int:
        """Width of the embedding of time, span and class."""
        return EMBEDDING_EXPANSION * self.width

    def attends(self, level: int) -> bool:
        """Whether the blocks of a level have attention."""
        return 2**level in self.attention_factors

    def shrunk(self) -> UNetConfig:
        """Returns a tiny config of the same kind, at most 8 pixels high and wide, for tests and `--debug`."""
        multipliers = tuple(min(multiplier, 2) for multiplier in self.multipliers[:2])
        deepest = len(multipliers)  # 1 or 2: also how many times smaller the last level is
        height, width = (deepest * max(1, min(8 // deepest, length // deepest)) for length in self.grid_size)
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
        )


class UNet(OnMeshes, nn.Module):
    """A velocity network on images `b height width c`: convolutions at several resolutions, with dropout.

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
        cond: Int[Array, " b"] | None = None,
        span: Float[Array, " b"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b height width c"]:
        """Returns the velocity at x and time t, averaged over `span` where given. train: drop activations.

        cond: labels, -1 for none; a traced label of no class gives NaN. Raises ValueError where x, t or cond do not
        fit the config.
        """
        config = self.config
        check_inputs(config, t, x)
        cond = check_labels(cond, num_classes=config.num_classes, batch=len(x))
        master = master_dtype(config.dtype)
        # Every block begins with the SiLU of the embedding.
        e = jax.nn.silu(Embedding(config, name="embedding")(t, cond, span))
        block = partial(nn.remat(Block, static_argnums=(3,)) if config.remat else Block, config)
        widths = config.level_widths

        h = conv(widths[0], x.shape[-1], config.dtype, name="conv_in")(x)
        skips = [h]
        for level, width in enumerate(widths):
            if level:
                h = _halved(config, h, name=f"halve_{level}")
                skips.append(h)
            for i in range(config.blocks_per_level):
                h = block(h.shape[-1], width, config.attends(level), name=f"down_{level}_{i}")(h, e, train)
                skips.append(h)
        h = block(widths[-1], widths[-1], True, name="middle_0")(h, e, train)
        h = block(widths[-1], widths[-1], False, name="middle_1")(h, e, train)
        for level, width in reversed(list(enumerate(widths))):
            for i in range(config.blocks_per_level + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(h.shape[-1], width, config.attends(level), name=f"up_{level}_{i}")(h, e, train)
            if level:
                h = _doubled(config, h, name=f"double_{level}")
        h = jax.nn.silu(_group_norm(config, name="norm_out")(h))
        return conv(x.shape[-1], widths[0], str(master), zero=True, name="conv_out")(h)


class Embedding(nn.Module):
    """The sum of embeddings of time, span and class, `b embedding_dim`, in float32 as in the published code.

    Example:
        e = Embedding(config).apply(params, t, cond, None)
    """

    config: UNetConfig

    def setup(self):
        config, dim = self.config, self.config.embedding_dim
        dtype = str(master_dtype(config.dtype))
        self.time_up, self.time_down = linear(dim, config.width, dtype), linear(dim, dim, dtype)
        if config.spans:
            self.span_up, self.span_down = linear(dim, config.width, dtype), linear(dim, dim, dtype)
        if config.num_classes:
            self.class_embed = self.param(
                "class_embed", nn.initializers.normal(1.0), (config.num_classes + 1, dim), jnp.float32
            )

    def __call__(
        self, t: Float[Array, " b"], cond: Int[Array, " b"] | None, span: Float[Array, " b"] | None
    ) -> Float[Array, "b d"]:
        config = self.config
        e = self.time_down(jax.nn.silu(self.time_up(time_features(t, config.width, scale=config.time_scale))))
        if config.spans:
            span = jnp.zeros_like(t) if span is None else span
            features = time_features(span, config.width, scale=config.time_scale)
            e = e + self.span_down(jax.nn.silu(self.span_up(features)))
        if config.num_classes:
            e = e + class_or_none(jnp.asarray(self.class_embed), cond, len(t))
        return e


class Block(nn.Module):
    """A residual block from `in_width` to `width` channels under the embedding e, and attention where asked.

    Example:
        h = Block(config, 128, 256, attends=True).apply(params, h, e, train=False)
    """

    config: UNetConfig
    in_width: int
    width: int
    attends: bool

    def setup(self):
        config = self.config
        features = 2 * self.width if config.scale_shift_norm else self.width
        self.norm_in = _group_norm(config)
        self.conv_in = conv(self.width, self.in_width, config.dtype)
        self.condition = linear(features, config.embedding_dim, str(master_dtype(config.dtype)))
        self.norm_out = _group_norm(config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv_out = conv(self.width, self.width, config.dtype, zero=True)
        if self.in_width != self.width:
            self.skip = linear(self.width, self.in_width, config.dtype)
        if self.attends:
            self.attention = Attention(config, self.width)

    def __call__(
        self, x: Float[Array, "b height width c"], e: Float[Array, "b d"], train: bool
    ) -> Float[Array, "b height width features"]:
        dtype = self.config.dtype
        h = self.conv_in(jax.nn.silu(self.norm_in(x).astype(dtype)))
        condition = self.condition(e)[:, None, None]
        if self.config.scale_shift_norm:
            scale, shift = jnp.split(condition, 2, axis=-1)
            h = self.norm_out(h) * (1 + scale) + shift
        else:
            h = self.norm_out(h + condition)
        h = self.conv_out(self.dropout(jax.nn.silu(h.astype(dtype)), deterministic=not train))
        h = h + (x if self.in_width == self.width else self.skip(x))
        return self.attention(h) if self.attends else h


class Attention(nn.Module):
    """x + W attention(norm(x)) over all places of the image; W starts at zero.

    Example:
        h = Attention(config, width=256).apply(params, h)
    """

    config: UNetConfig
    width: int

    def setup(self):
        dtype = self.config.dtype
        self.norm = _group_norm(self.config)
        self.qkv = linear(3 * self.width, self.width, dtype)
        self.proj = nn.Dense(
            self.width,
            dtype=jnp.dtype(dtype),
            param_dtype=master_dtype(dtype),
            kernel_init=nn.initializers.zeros,
            dot_general=flat_dot,
        )

    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b height width c"]:
        heads = max(1, self.width // self.config.head_dim)
        q, k, v = rearrange(self.qkv(self.norm(x)), "b i j (s h k) -> s b (i j) h k", s=3, h=heads)
        return x + self.proj(softmax_attention(q, k, v).reshape(x.shape))


def _halved(config: UNetConfig, h: Array, name: str) -> Array:
    if config.resample == "pool":
        return reduce(h, "b (i p) (j q) c -> b i j c", "mean", p=2, q=2)
    return conv(h.shape[-1], h.shape[-1], config.dtype, stride=2, name=name)(h)


def _doubled(config: UNetConfig, h: Array, name: str) -> Array:
    h = repeat(h, "b i j c -> b (i p) (j q) c", p=2, q=2)
    return h if config.resample == "pool" else conv(h.shape[-1], h.shape[-1], config.dtype, name=name)(h)


def _group_norm(config: UNetConfig, name: str | None = None) -> nn.GroupNorm:
    return group_norm(config.num_groups, config.dtype, epsilon=TORCH_GROUP_NORM_EPS, name=name)
