"""The log-density of Gaussian noise."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float


def gaussian_log_density(x: Float[Array, "..."], variance: Float[Array, "..."] | float = 1.0) -> Float[Array, "..."]:
    """Returns log N(x; 0, variance) for each element, in nats: -½ (x² / variance + log(2π variance)).

    Example:
        log_prob = gaussian_log_density(z).sum(axis=(1, 2)) + logdet
    """
    return -0.5 * (jnp.square(x) / variance + jnp.log(2 * math.pi * variance))
