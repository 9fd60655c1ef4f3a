"""Layers that are causal in time, for clips `b f rows columns c`.

Because the layers are causal, a clip can be processed whole or in chunks. A layer maps (x, cache) to (y, next cache).
The cache contains the earlier frames that the layer needs; it is None if x starts the clip. The output of a convolution
at frame t depends on frames t-2, t-1 and t; two frames of zeros precede the clip. The first frame is treated as an
image, so layers that halve or double the number of frames pass it through unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import linen as nn
from jaxtyping import Array, Float

from flowgen.nn.convolution import Cache, clip_conv, conv
from flowgen.nn.layers import RMSNorm, master_dtype

Features = Float[Array, "b f rows columns c"]
# The output of a layer. The numbers of frames, positions and channels may differ from those of the input.
NewFeatures = Float[Array, "b new_frames new_rows new_columns d"]

CHANNEL_NORM_EPS = 1e-12


def chain(layers: Sequence[Callable[..., tuple[Array, Cache]]], h: Array, cache: Cache) -> tuple[Array, Cache]:
    """Applies the layers to h in sequence; returns the result and the layers' caches for later frames."""
    caches = [None] * len(layers) if cache is None else cache
    after = []
    for layer, mine in zip(layers, caches, strict=True):
        h, mine = layer(h, mine)
        after.append(mine)
    return h, tuple(after)


def convolve_clip(
    x: Features, cache: Cache, features: int, dtype: str, *, name: str, side: int = 3, zero: bool = False
) -> tuple[NewFeatures, Float[Array, "b 2 rows columns c"]]:
    """Convolves each frame of x together with the two frames before it; also returns the cache for the next chunk.

    The convolution becomes a submodule, so call this function in a method decorated with `nn.compact`.

    cache: the two frames before x; None if x starts the clip.
    """
    before = jnp.zeros_like(x, shape=(x.shape[0], 2, *x.shape[2:])) if cache is None else cache
    x = jnp.concatenate([before, x], axis=1)
    return clip_conv(features, x.shape[-1], dtype, side=side, zero=zero, name=name)(x), x[:, -2:]


def channel_norm(name: str) -> RMSNorm:
    """Returns a layer that computes scale · √c x / |x| over the c channels of each position, in float32.

    As in the published code, the divisor is at least 1e-12.
    """
    return RMSNorm("float32", epsilon=CHANNEL_NORM_EPS**2, offset=0.0, name=name)


def average_down(x: Features, width: int, *, time: int, space: int, begins: bool) -> NewFeatures:
    """Reduces each block of `time` frames and space × space positions to one position with `width` channels.

    The values of a block are ordered by channel, frame, row and column, and divided into `width` groups of equal size.
    The mean of each group becomes one channel. If x starts the clip, frames of zeros are prepended, so that the first
    frame of x is the last frame of a block.
    """
    if begins:
        x = jnp.pad(x, ((0, 0), (time - 1, 0), (0, 0), (0, 0), (0, 0)))
    x = rearrange(x, "b (f r) (i p) (j q) c -> b f i j (c r p q)", r=time, p=space, q=space)
    return reduce(x, "b f i j (c g) -> b f i j c", "mean", c=width)


def copy_up(x: Features, width: int, *, time: int, space: int, begins: bool) -> NewFeatures:
    """Expands each position to a block of `time` frames, space × space positions and `width` channels.

    Each channel of a position is repeated to fill the block. The values of a block are in the same order as in
    `average_down`. If x starts the clip, only the last frame of the first block is kept.
    """
    x = repeat(x, "b f i j c -> b f i j (c g)", g=width * time * space**2 // x.shape[-1])
    x = rearrange(x, "b f i j (c r p q) -> b (f r) (i p) (j q) c", r=time, p=space, q=space)
    return x[:, time - 1 :] if begins else x


class Convolution(nn.Module):
    """A causal convolution."""

    dtype: str
    width: int

    @nn.compact
    def __call__(self, x: Features, cache: Cache) -> tuple[NewFeatures, Cache]:
        return convolve_clip(x, cache, self.width, self.dtype, name="conv")


class Head(nn.Module):
    """Computes conv(silu(norm(x))) in float32."""

    dtype: str
    width: int

    @nn.compact
    def __call__(self, x: Features, cache: Cache) -> tuple[NewFeatures, Cache]:
        h = jax.nn.silu(channel_norm("norm")(x))
        return convolve_clip(h, cache, self.width, str(master_dtype(self.dtype)), name="conv")


class HalveSpace(nn.Module):
    """Halves the height and width of each frame with a strided convolution."""

    dtype: str

    @nn.compact
    def __call__(self, x: Features, cache: Cache) -> tuple[NewFeatures, Cache]:
        # As in the published code, only the bottom and the right are padded.
        width = x.shape[-1]
        return conv(width, width, self.dtype, stride=2, padding=((0, 1), (0, 1)), name="conv")(x), ()


class HalveTime(nn.Module):
    """Halves the number of frames after the first, which is passed through unchanged.

    Each later output frame is a convolution over three consecutive frames: (0, 1, 2), (2, 3, 4), and so on.
    """

    dtype: str

    @nn.compact
    def __call__(self, x: Features, cache: Cache) -> tuple[NewFeatures, Cache]:
        layer = clip_conv(x.shape[-1], x.shape[-1], self.dtype, side=1, stride=2, name="conv")
        if cache is None:
            return jnp.concatenate([x[:, :1], layer(x)], axis=1), x[:, -1:]
        return layer(jnp.concatenate([cache, x], axis=1)), x[:, -1:]


class DoubleTime(nn.Module):
    """Doubles the number of frames after the first, which is passed through unchanged.

    A causal convolution turns each later frame into two. The first frame is never an input to the convolution.
    """

    dtype: str

    @nn.compact
    def __call__(self, x: Features, cache: Cache) -> tuple[NewFeatures, Cache]:
        alone = 1 if cache is None else 0
        h, cache = convolve_clip(x[:, alone:], cache, 2 * x.shape[-1], self.dtype, side=1, name="conv")
        h = rearrange(h, "b f i j (r c) -> b (f r) i j c", r=2)
        return jnp.concatenate([x[:, :alone], h], axis=1), cache


class DoubleSpace(nn.Module):
    """Doubles the height and width of each frame by nearest-neighbour upsampling, then applies a convolution."""

    dtype: str
    width: int

    @nn.compact
    def __call__(self, x: Features, cache: Cache) -> tuple[NewFeatures, Cache]:
        doubled = repeat(x, "b f i j c -> b f (i p) (j q) c", p=2, q=2)
        return conv(self.width, x.shape[-1], self.dtype, name="conv")(doubled), ()
