"""The affine token map, its parameterisations, and the token orders that every autoregressive flow is made of.

x = shift + exp(log_scale) · z,      z = (x - shift) · exp(-log_scale),      log|det dz/dx| = -Σ log_scale
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

TokenOrder = Literal["raster", "reversed"]
AffineForm = Literal["affine", "volume_preserving", "softplus"]
SOFTPLUS_OFFSET = 0.541324854612918  # softplus of this is 1
SOFTPLUS_UNDERFLOW = -40.0  # below, softplus(x) is exp(x) to float64's last digit


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


def soft_clip(raw: Float[Array, "*b c"], bound: float) -> Float[Array, "*b c"]:
    """Returns bound · tanh(raw / bound), within ±bound and the identity near 0; a bound of 0 leaves raw as it is.

    Example:
        raw = soft_clip(raw, 4.0)
    """
    return bound * jnp.tanh(raw / bound) if bound else raw


def log_softplus(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Returns log(log(1 + exp(x))), finite for every x.

    Example:
        log_scale = log_softplus(raw + SOFTPLUS_OFFSET)
    """
    small = x < SOFTPLUS_UNDERFLOW
    return jnp.where(small, x, jnp.log(jax.nn.softplus(jnp.where(small, 0, x))))


class AffineHead(NamedTuple):
    """How a network's outputs become parameters: outputs per channel, and outputs -> (shift, log_scale)."""

    outputs: int
    parameters: Callable[[Array], tuple[Array, Array]]


def _affine(out: Array) -> tuple[Array, Array]:
    log_scale, shift = jnp.split(out, 2, axis=-1)
    return shift, log_scale


def _softplus(out: Array) -> tuple[Array, Array]:
    raw, shift = jnp.split(out, 2, axis=-1)
    return shift, log_softplus(raw + SOFTPLUS_OFFSET)


# affine (TARFlow): σ = exp(a). softplus (STARFlow): σ = softplus(a + 0.5413). volume preserving: σ = 1.
AFFINE_HEADS: dict[str, AffineHead] = {
    "affine": AffineHead(2, _affine),
    "volume_preserving": AffineHead(1, lambda out: (out, jnp.zeros_like(out))),
    "softplus": AffineHead(2, _softplus),
}
