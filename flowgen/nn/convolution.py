"""Convolutions, group norm, residual blocks and spatial attention, for images `b height width c` and for clips.

A layer whose output may depend on earlier frames maps (x, cache) to (y, next cache); see `flowgen.codecs.causal`. For
images, caches contain only None.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float, PyTree

from flowgen.attention import softmax_attention
from flowgen.backend import Implementation
from flowgen.nn.layers import linear, master_dtype, uniform_bias

# What a layer stores from the frames before its input; None at the start of a clip, and for images.
Cache = PyTree
Padding = int | tuple[tuple[int, int], ...]


def conv(
    features: int,
    channels: int,
    dtype: str,
    *,
    side: int = 3,
    stride: int = 1,
    padding: Padding | None = None,
    zero: bool = False,
    name: str | None = None,
) -> nn.Conv:
    """Returns a side × side convolution with `channels` input channels and `features` output channels.

    padding: as in Flax; None means side // 2, which preserves the image size if the stride is 1 and the side is odd.
    zero: whether to initialise the parameters to zero; by default, they are initialised as in PyTorch.
    """
    padding = side // 2 if padding is None else padding
    return _conv(features, (side, side), (stride, stride), padding, channels, dtype, zero, name)


def clip_conv(
    features: int,
    channels: int,
    dtype: str,
    *,
    side: int = 3,
    stride: int = 1,
    zero: bool = False,
    name: str | None = None,
) -> nn.Conv:
    """Returns a convolution of clips over 3 frames and side × side positions.

    Height and width are padded, but frames are not: n frames yield n - 2 frames, of which every `stride`-th is kept.

    zero: whether to initialise the parameters to zero; by default, they are initialised as in PyTorch.
    """
    around = (side // 2, side // 2)
    return _conv(features, (3, side, side), (stride, 1, 1), ((0, 0), around, around), channels, dtype, zero, name)


def _conv(
    features: int,
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    padding: Padding,
    channels: int,
    dtype: str,
    zero: bool,
    name: str | None,
) -> nn.Conv:
    return nn.Conv(
        features,
        kernel,
        strides=strides,
        padding=padding,
        dtype=jnp.dtype(dtype),
        param_dtype=master_dtype(dtype),
        kernel_init=nn.initializers.zeros if zero else nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
        bias_init=nn.initializers.zeros if zero else uniform_bias(math.prod(kernel) * channels),
        name=name,
    )


def group_norm(num_groups: int, dtype: str, *, epsilon: float, name: str | None = None) -> nn.GroupNorm:
    """Returns a GroupNorm that computes in at least float32 and uses two-pass variance."""
    return nn.GroupNorm(
        num_groups,
        epsilon=epsilon,
        dtype=master_dtype(dtype),
        param_dtype=master_dtype(dtype),
        use_fast_variance=False,
        name=name,
    )


def convolve_image(
    x: Float[Array, "b height width c"], cache: Cache, features: int, dtype: str, *, name: str, zero: bool = False
) -> tuple[Float[Array, "b height width d"], Cache]:
    """Returns the images after a 3 × 3 convolution, and the unchanged cache.

    Call this function from a compact method of a module; the convolution becomes a submodule of that module.
    """
    return conv(features, x.shape[-1], dtype, zero=zero, name=name)(x), cache


class ResidualBlock(nn.Module):
    """skip(x) + conv(dropout(silu(norm(conv(silu(norm(x))))))).

    skip is the identity or, if x does not have `width` channels, a linear map. If an embedding e is passed, the outer
    norm(h) becomes norm(h + W e) or, with `scale_shift`, norm(h) (1 + a) + b with (a, b) = W e; W is a linear map. A
    call returns the result and the cache for the frames that follow x.

    norm: a function that returns a norm layer, given its `name`.
    convolve: `flowgen.nn.convolution.convolve_image`, or `flowgen.codecs.causal.convolve_clip` for clips.
    zero: whether the last convolution is initialised to zero.

    Example:
        block = ResidualBlock(64, "float32", functools.partial(group_norm, 32, "float32", epsilon=1e-6))
        y, _ = block.apply(params, x)
    """

    width: int
    dtype: str
    norm: Callable[..., nn.Module]
    convolve: Callable[..., tuple[Array, Cache]] = convolve_image
    scale_shift: bool = False
    dropout: float = 0.0
    zero: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *places c"],
        cache: Cache = None,
        e: Float[Array, "b e"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b *places d"], Cache]:
        before_in, before_out = (None, None) if cache is None else cache
        h = jax.nn.silu(self.norm(name="norm_in")(x).astype(self.dtype))
        h, after_in = self.convolve(h, before_in, self.width, self.dtype, name="conv_in")
        h = jax.nn.silu(self._conditioned(h, e).astype(self.dtype))
        h = nn.Dropout(self.dropout, name="dropout")(h, deterministic=not train)
        h, after_out = self.convolve(h, before_out, self.width, self.dtype, zero=self.zero, name="conv_out")
        skip = x if x.shape[-1] == self.width else linear(self.width, x.shape[-1], self.dtype, name="skip")(x)
        return h + skip, (after_in, after_out)

    def _conditioned(
        self, h: Float[Array, "b *places d"], e: Float[Array, "b e"] | None
    ) -> Float[Array, "b *places d"]:
        norm = self.norm(name="norm_out")
        if e is None:
            return norm(h)
        features = (2 if self.scale_shift else 1) * self.width
        condition = linear(features, e.shape[-1], str(master_dtype(self.dtype)), name="condition")(e)
        condition = jnp.expand_dims(condition, range(1, h.ndim - 1))
        if not self.scale_shift:
            return norm(h + condition)
        scale, shift = jnp.split(condition, 2, axis=-1)
        return norm(h) * (1 + scale) + shift


class SpatialAttention(nn.Module):
    """x + W attention(norm(x)) with a linear map W.

    Each position attends to all positions of its image or, in a clip, of its frame. A call returns (result, cache); the
    cache is the argument, unchanged, because no position attends to earlier frames.

    norm: a function that returns a norm layer, given its `name`.
    zero: whether W is initialised to zero, so that the layer is initially the identity.
    implementation: see `softmax_attention`.

    Example:
        attention = SpatialAttention("float32", functools.partial(group_norm, 32, "float32", epsilon=1e-6))
        y, _ = attention.apply(params, x)
    """

    dtype: str
    norm: Callable[..., nn.Module]
    num_heads: int = 1
    zero: bool = False
    implementation: Implementation = "auto"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *frames height width c"], cache: Cache = None
    ) -> tuple[Float[Array, "b *frames height width c"], Cache]:
        width = x.shape[-1]
        qkv = linear(3 * width, width, self.dtype, name="qkv")(self.norm(name="norm")(x).astype(self.dtype))
        images = qkv.reshape(-1, *qkv.shape[-3:])
        q, k, v = rearrange(images, "b i j (s h k) -> s b (i j) h k", s=3, h=self.num_heads)
        proj = linear(width, width, self.dtype, zero_kernel=self.zero, zero_bias=self.zero, name="proj")
        return x + proj(softmax_attention(q, k, v, implementation=self.implementation).reshape(x.shape)), cache
