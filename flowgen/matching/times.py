"""Distributions of training times on [0, 1]: functions (key, batch) -> t, as classes so that they print readably."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flowgen.settings import config
from flowgen.settings.ranges import Positive


@config
class Uniform:
    """Uniform times.

    stratified: for a batch of b, draw one time in each interval of length 1/b, in random order.
    """

    stratified: bool = False

    def __call__(self, key: Key[Array, ""], batch: int) -> Float[Array, " b"]:
        draw, order = jax.random.split(key)
        t = jax.random.uniform(draw, (batch,))
        return jax.random.permutation(order, (jnp.arange(batch) + t) / batch) if self.stratified else t


@config
class LogitNormal:
    """t = sigmoid(mean + std z), z normal (Esser 2403.03206). With data at t = 1, EDM's choice is mean 1.2, std 1.2.

    mean: mean of the logit; if positive, times tend towards the data.
    std: standard deviation of the logit; positive.
    """

    mean: float = 0.0
    std: Positive = 1.0

    def __call__(self, key: Key[Array, ""], batch: int) -> Float[Array, " b"]:
        return jax.nn.sigmoid(self.mean + self.std * jax.random.normal(key, (batch,)))


@config
class Shifted:
    """Uniform times moved towards the noise: with s = 1 - t and k = shift, s' = k s / (1 + (k - 1) s).

    shift: k, positive; 1 for no shift.
    """

    shift: Positive = 3.0

    def __call__(self, key: Key[Array, ""], batch: int) -> Float[Array, " b"]:
        s = jax.random.uniform(key, (batch,))
        return jnp.clip(1 - self.shift * s / (1 + (self.shift - 1) * s), 0, 1)  # rounding may leave [0, 1]
