"""Convolutions and group norm with published initialisation, for images `b height width c` and clips."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from flowgen.nn.layers import master_dtype, uniform_bias


def conv(
    features: int,
    channels: int,
    dtype: str,
    *,
    side: int = 3,
    stride: int = 1,
    padding: Any = None,
    zero: bool = False,
    name: str | None = None,
) -> nn.Conv:
    """Returns a side × side convolution of `channels`, initialised as PyTorch's or at zero.

    padding: as flax takes it; None keeps the size at stride 1.

    Example:
        layer = conv(64, channels=3, dtype="float32")
    """
    return nn.Conv(
        features,
        (side, side),
        strides=stride,
        padding=side // 2 if padding is None else padding,
        dtype=jnp.dtype(dtype),
        param_dtype=master_dtype(dtype),
        kernel_init=nn.initializers.zeros if zero else nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
        bias_init=nn.initializers.zeros if zero else uniform_bias(side**2 * channels),
        name=name,
    )


def clip_conv(
    features: int, channels: int, dtype: str, *, side: int = 3, stride: int = 1, name: str | None = None
) -> nn.Conv:
    """Returns a convolution over 3 frames of side × side places, initialised as PyTorch's, for clips `b f h w c`.

    Places are padded, frames are not: of n frames come n - 2, every `stride`-th of them.

    Example:
        layer = clip_conv(64, channels=3, dtype="float32")
    """
    around = (side // 2, side // 2)
    return nn.Conv(
        features,
        (3, side, side),
        strides=(stride, 1, 1),
        padding=((0, 0), around, around),
        dtype=jnp.dtype(dtype),
        param_dtype=master_dtype(dtype),
        kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
        bias_init=uniform_bias(3 * side**2 * channels),
        name=name,
    )


def group_norm(num_groups: int, dtype: str, *, epsilon: float, name: str | None = None) -> nn.GroupNorm:
    """Returns group norm in float32 with two-pass variance.

    Example:
        norm = group_norm(32, "bfloat16", epsilon=1e-6)
    """
    return nn.GroupNorm(
        num_groups,
        epsilon=epsilon,
        dtype=master_dtype(dtype),
        param_dtype=master_dtype(dtype),
        use_fast_variance=False,
        name=name,
    )
