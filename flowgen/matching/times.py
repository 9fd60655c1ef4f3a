"""Distributions of training times on [0, 1]. An instance draws times when called as (key, batch) -> t."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flowgen.settings import config
from flowgen.settings.ranges import Positive


@config
class Uniform:
    """Times drawn uniformly from [0, 1].

    stratified: whether to divide [0, 1] into as many equal intervals as the batch has samples, and to draw one time
    from each.
    """

    stratified: bool = False

    def __call__(self, key: Key[Array, ""], batch: int) -> Float[Array, " b"]:
        draw, order = jax.random.split(key)
        t = jax.random.uniform(draw, (batch,))
        return jax.random.permutation(order, (jnp.arange(batch) + t) / batch) if self.stratified else t


@config
class LogitNormal:
    """Logit-normal times: t = sigmoid(mean + std z), where z is standard normal (Esser et al., arXiv 2403.03206).

    EDM's noise levels (ln sigma with mean -1.2 and standard deviation 1.2) correspond to mean 1.2 and std 1.2. The sign
    changes because t = 1 / (1 + sigma), so the logit of t is -ln sigma.

    mean: mean of the logit of t; a positive mean favours times near the data.
    std: standard deviation of the logit of t; positive.
    """

    mean: float = 0.0
    std: Positive = 1.0

    def __call__(self, key: Key[Array, ""], batch: int) -> Float[Array, " b"]:
        return jax.nn.sigmoid(self.mean + self.std * jax.random.normal(key, (batch,)))


@config
class Shifted:
    """Uniform times that are shifted towards the noise: s = 1 - t is replaced by k s / (1 + (k - 1) s), where k is
    `shift`.

    shift: the factor k, positive; 1 for no shift, below 1 for a shift towards the data.
    """

    shift: Positive = 3.0

    def __call__(self, key: Key[Array, ""], batch: int) -> Float[Array, " b"]:
        s = jax.random.uniform(key, (batch,))
        return jnp.clip(1 - self.shift * s / (1 + (self.shift - 1) * s), 0, 1)  # rounding may exceed [0, 1]
