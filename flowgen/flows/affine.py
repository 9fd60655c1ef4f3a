"""The affine token map and the token orders that every autoregressive flow here is made of.

x = shift + exp(log_scale) · z,      z = (x - shift) · exp(-log_scale),      log|det dz/dx| = -Σ log_scale
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

TokenOrder = Literal["raster", "reversed"]


def to_noise(
    x: Float[Array, "b n c"], shift: Float[Array, "b n c"], log_scale: Float[Array, "b n c"]
) -> tuple[Float[Array, "b n c"], Float[Array, " b"]]:
    """Returns z = (x - shift)·exp(-log_scale) and its logdet, -Σ log_scale over tokens and channels in nats.

    Example:
        z, logdet = to_noise(x, shift, log_scale)
    """
    return (x - shift) * jnp.exp(-log_scale), -log_scale.sum(axis=(1, 2))


def to_data(
    z: Float[Array, "b n c"], shift: Float[Array, "b n c"], log_scale: Float[Array, "b n c"]
) -> Float[Array, "b n c"]:
    """Returns x = shift + exp(log_scale)·z, the inverse of `to_noise`.

    Example:
        x = to_data(z, shift, log_scale)
    """
    return shift + jnp.exp(log_scale) * z


def reorder(tokens: Float[Array, "*b n c"], order: TokenOrder) -> Float[Array, "*b n c"]:
    """Returns tokens in a block's order; both orders are their own inverse.

    Example:
        tokens = reorder(reorder(tokens, "reversed"), "reversed")
    """
    return tokens if order == "raster" else jnp.flip(tokens, axis=-2)
