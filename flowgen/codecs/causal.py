"""Layers of clips `b f h w c` that are causal in time, for clips run whole or in chunks in the order of time.

A layer maps (x, cache) to (y, next cache). `cache` is what the layer keeps of the frames before x, None where x begins
the clip. A convolution of frame t sees frames t-2, t-1 and t, with zeros before the clip. The first frame is a picture:
halving and doubling of time leave it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import linen as nn
from jaxtyping import Array, Float

from flowgen.attention import softmax_attention
from flowgen.nn.convolution import clip_conv, conv
from flowgen.nn.layers import linear, master_dtype

Features = Float[Array, "b f h w c"]
# What layers make of them, of as many frames, places and channels or of others.
NewFeatures = Float[Array, "b g i j d"]
Cache = Any

CHANNEL_NORM_EPS = 1e-12


def chain(layers: Sequence[Callable[..., Any]], h: Array, cache: Cache) -> tuple[Array, Cache]:
    """Returns what layers make of h one after another, and their caches for the frames after it.

    Example:
        h, cache = chain([block, attention, block], h, None)
    """
    caches = [None] * len(layers) if cache is None else cache
    after = []
    for layer, mine in zip(layers, caches, strict=True):
        h, mine = layer(h, mine)
        after.append(mine)
    return h, tuple(after)


def causal(layer: Callable[[Array], Array], x: Features, cache: Cache) -> tuple[NewFeatures, Float[Array, "b 2 h w c"]]:
    """Returns a convolution over 3 frames ending at each frame of x, and the last two frames for what comes after.

    cache: the two frames before x; None where the clip begins, and they are zeros.

    Example:
        y, cache = causal(clip_conv(8, channels=3, dtype="float32"), x, None)
    """
    before = jnp.zeros_like(x, shape=(x.shape[0], 2, *x.shape[2:])) if cache is None else cache
    x = jnp.concatenate([before, x], axis=1)
    return layer(x), x[:, -2:]


def average_down(x: Features, width: int, *, time: int, space: int, begins: bool) -> NewFeatures:
    """Returns means over groups of the numbers in blocks of `time` frames and space × space places, `width` of them.

    The numbers of a block are in the order channel, frame, row, column. Where x begins the clip, zeros before it fill
    the first block up.

    Example:
        h = average_down(x, 64, time=2, space=2, begins=True)
    """
    if begins:
        x = jnp.pad(x, ((0, 0), (time - 1, 0), (0, 0), (0, 0), (0, 0)))
    x = rearrange(x, "b (f r) (i p) (j q) c -> b f i j (c r p q)", r=time, p=space, q=space)
    return reduce(x, "b f i j (c g) -> b f i j c", "mean", c=width)


def copy_up(x: Features, width: int, *, time: int, space: int, begins: bool) -> NewFeatures:
    """Returns blocks of `time` frames and space × space places that hold copies of the channels of x, `width` channels.

    The order in a block is that of `average_down`. Where x begins the clip, the first block is its last frame alone.

    Example:
        h = copy_up(x, 32, time=2, space=2, begins=True)
    """
    x = repeat(x, "b f i j c -> b f i j (c g)", g=width * time * space**2 // x.shape[-1])
    x = rearrange(x, "b f i j (c r p q) -> b (f r) (i p) (j q) c", r=time, p=space, q=space)
    return x[:, time - 1 :] if begins else x


class Block(nn.Module):
    """skip(x) + conv(silu(norm(conv(silu(norm(x)))))) from `in_width` to `width` channels."""

    dtype: str
    in_width: int
    width: int

    def setup(self):
        self.norm_in, self.norm_out = ChannelNorm(self.dtype), ChannelNorm(self.dtype)
        self.conv_in = clip_conv(self.width, self.in_width, self.dtype)
        self.conv_out = clip_conv(self.width, self.width, self.dtype)
        if self.in_width != self.width:
            self.skip = linear(self.width, self.in_width, self.dtype)

    def __call__(self, x: Features, cache: Cache) -> tuple[NewFeatures, Cache]:
        cache_in, cache_out = (None, None) if cache is None else cache
        h, cache_in = causal(self.conv_in, jax.nn.silu(self.norm_in(x)).astype(self.dtype), cache_in)
        h, cache_out = causal(self.conv_out, jax.nn.silu(self.norm_out(h)).astype(self.dtype), cache_out)
        return h + (x if self.in_width == self.width else self.skip(x)), (cache_in, cache_out)


class FrameAttention(nn.Module):
    """x + W attention(norm(x)) over the places of each frame, in one head."""

    dtype: str
    width: int

    def setup(self):
        self.norm = ChannelNorm(self.dtype)
        self.qkv = linear(3 * self.width, self.width, self.dtype)
        self.proj = linear(self.width, self.width, self.dtype)

    def __call__(self, x: Features, cache: Cache) -> tuple[Features, Cache]:
        qkv = self.qkv(self.norm(x).astype(self.dtype))
        q, k, v = (rearrange(part, "b f i j c -> (b f) (i j) 1 c") for part in jnp.split(qkv, 3, axis=-1))
        return x + self.proj(softmax_attention(q, k, v).reshape(x.shape)), ()


class Convolution(nn.Module):
    """A causal convolution."""

    dtype: str
    in_width: int
    width: int

    def setup(self):
        self.conv = clip_conv(self.width, self.in_width, self.dtype)

    def __call__(self, x: Features, cache: Cache) -> tuple[NewFeatures, Cache]:
        return causal(self.conv, x, cache)


class Head(nn.Module):
    """conv(silu(norm(x))) in float32."""

    dtype: str
    in_width: int
    width: int

    def setup(self):
        self.norm = ChannelNorm(self.dtype)
        self.conv = clip_conv(self.width, self.in_width, str(master_dtype(self.dtype)))

    def __call__(self, x: Features, cache: Cache) -> tuple[NewFeatures, Cache]:
        return causal(self.conv, jax.nn.silu(self.norm(x)), cache)


class HalveSpace(nn.Module):
    """Every second place along both sides, by a convolution of each frame."""

    dtype: str
    width: int

    def setup(self):
        # The published halving pads below and on the right alone.
        self.conv = conv(self.width, self.width, self.dtype, stride=2, padding=((0, 1), (0, 1)))

    def __call__(self, x: Features, cache: Cache) -> tuple[NewFeatures, Cache]:
        return self.conv(x), ()


class HalveTime(nn.Module):
    """The first frame as it is, then convolutions of frames (0, 1, 2), (2, 3, 4), ..."""

    dtype: str
    width: int

    def setup(self):
        self.conv = clip_conv(self.width, self.width, self.dtype, side=1, stride=2)

    def __call__(self, x: Features, cache: Cache) -> tuple[NewFeatures, Cache]:
        if cache is None:
            return jnp.concatenate([x[:, :1], self.conv(x)], axis=1), x[:, -1:]
        return self.conv(jnp.concatenate([cache, x], axis=1)), x[:, -1:]


class DoubleTime(nn.Module):
    """The first frame as it is, then two frames for each, by a causal convolution that never sees the first."""

    dtype: str
    width: int

    def setup(self):
        self.conv = clip_conv(2 * self.width, self.width, self.dtype, side=1)

    def __call__(self, x: Features, cache: Cache) -> tuple[NewFeatures, Cache]:
        alone = 1 if cache is None else 0
        h, cache = causal(self.conv, x[:, alone:], cache)
        h = rearrange(h, "b f i j (r c) -> b (f r) i j c", r=2)
        return jnp.concatenate([x[:, :alone], h], axis=1), cache


class DoubleSpace(nn.Module):
    """Every place twice along both sides, then a convolution of each frame."""

    dtype: str
    in_width: int
    width: int

    def setup(self):
        self.conv = conv(self.width, self.in_width, self.dtype)

    def __call__(self, x: Features, cache: Cache) -> tuple[NewFeatures, Cache]:
        return self.conv(repeat(x, "b f i j c -> b f (i p) (j q) c", p=2, q=2)), ()


class ChannelNorm(nn.Module):
    """scale · √c x / |x| over the c channels of each place, in float32."""

    dtype: str

    @nn.compact
    def __call__(self, x: Features) -> Features:
        master = master_dtype(self.dtype)
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), master)
        x = x.astype(master)
        # |x| is at least 1e-12, as published.
        square = jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), CHANNEL_NORM_EPS**2)
        return x * jax.lax.rsqrt(square) * (x.shape[-1] ** 0.5 * scale).reshape(1, 1, 1, 1, -1)
