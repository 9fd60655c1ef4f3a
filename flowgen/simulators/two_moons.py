"""Two moons: two parameters, two observed values, and a posterior of two crescents that can be sampled exactly.

An observation is a random point of a crescent, shifted by a function of the parameters (Greenberg et al., arXiv
1905.07488; the constants are those of Lueckmann et al., arXiv 2101.04653, T.8):

    (1)  x = p + (-|z₁|, z₂),  z₁ = (θ₁ + θ₂) / √2,  z₂ = (θ₂ - θ₁) / √2
    (2)  p = (r cos a + 0.25, r sin a),  a ~ U(-π/2, π/2),  r ~ N(0.1, 0.01²)

The map θ -> z is a rotation, so the prior is uniform in z too. Posterior samples therefore follow from samples of p by
(1): |z₁| = p₁ - x₁ and z₂ = x₂ - p₂. Both signs of z₁ are equally likely.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from flowgen.arrays import at_least_float32, check_count
from flowgen.simulators.simulator import Simulator

CENTRE = 0.25  # of the crescent, along the first axis
RADIUS, RADIUS_STD = 0.1, 0.01
MOST_ROUNDS = 1000  # of redrawing samples of the posterior outside the prior


class TwoMoons(Simulator):
    """The simulator of two moons; see the module's description. The prior is uniform on [-1, 1]².

    Observation 0 is (0, 0), which is common in the literature. The other observations were drawn at random.

    Example:
        simulator = TwoMoons()
        reference = simulator.reference_samples(key, 10_000, 0)
    """

    name = "two_moons"
    low, high = (-1.0, -1.0), (1.0, 1.0)
    observation_dim = 2
    fixed_observations = ((0.0, 0.0), (-0.022, -0.628), (-0.69, 0.173), (-0.659, -0.348))

    def simulate(self, key: Key[Array, ""], parameters: Float[Array, "n 2"]) -> Float[Array, "n 2"]:
        return _crescent(key, len(parameters)) + _shift(parameters)

    def log_likelihood(
        self, parameters: Float[Array, "n 2"], observation: Float[Array, " 2"] | Float[Array, "n 2"]
    ) -> Float[Array, " n"]:
        """Returns log p(x | θ) = log N(r; 0.1, 0.01²) - log(π r) in nats; -inf if |a| > π/2.

        Here r and a solve equations (1) and (2) of the module's description. The factor 1 / (π r) is the density of the
        uniform angle per arc length; the code of the benchmark sbibm omits it.
        """
        p = jnp.broadcast_to(observation, parameters.shape) - _shift(parameters)
        across, along = p[:, 0] - CENTRE, p[:, 1]
        radius = jnp.sqrt(jnp.maximum(across**2 + along**2, jnp.finfo(p.dtype).tiny))
        log_radius = jax.scipy.stats.norm.logpdf(radius, RADIUS, RADIUS_STD)
        return jnp.where(across >= 0, log_radius - jnp.log(jnp.pi * radius), -jnp.inf)

    def sample_posterior(self, key: Key[Array, ""], num: int, observation: Float[Array, " 2"]) -> Float[Array, "num 2"]:
        """Returns `num` exact, independent samples of the posterior given `observation`.

        Points p of the crescent are drawn, and equation (1) of the module's description is solved for θ. If this
        requires a negative |z₁|, or if θ is outside the bounds of the prior, the point is drawn again. If 1,000 draws
        yield no valid point, for example because the observation is impossible, the sample is NaN. The samples have the
        precision of the observation, but at least float32. The function is compiled again for each new value of `num`.

        Raises ValueError if `num` is not a whole number of at least 1, or if `observation` is not an array of two
        floating-point numbers.

        Example:
            reference = TwoMoons().sample_posterior(key, 10_000, jnp.zeros(2))
        """
        check_count("num", num)
        observation = at_least_float32("observation", observation)
        if observation.shape != (2,):
            raise ValueError(f"observation has shape {observation.shape}; give one observation, of shape (2,).")
        return _sample_posterior(key, num, observation, jnp.array([self.low]), jnp.array([self.high]))

    def reference_samples(self, key: Key[Array, ""], num: int, index: int) -> Float[Array, "num 2"]:
        """Returns `num` exact, independent samples of the posterior given fixed_observations[index], in float32; see
        `sample_posterior`.

        Raises ValueError if there is no such observation, or if `num` is not a whole number of at least 1.
        """
        self.check_index(index)
        return self.sample_posterior(key, num, jnp.array(self.fixed_observations[index], jnp.float32))


@partial(jax.jit, static_argnames="num")
def _sample_posterior(
    key: Key[Array, ""], num: int, observation: Float[Array, " 2"], low: Float[Array, "1 2"], high: Float[Array, "1 2"]
) -> Float[Array, "num 2"]:
    """Returns samples of the posterior under a uniform prior with bounds `low` and `high`."""

    def unfinished(state):
        rounds, _, found = state
        return (rounds < MOST_ROUNDS) & ~found.all()

    def draw_again(state):
        rounds, parameters, found = state
        proposed, solved = _proposal(jax.random.fold_in(key, rounds), num, observation)
        fits = solved & ((proposed >= low) & (proposed <= high)).all(axis=1)
        return rounds + 1, jnp.where((fits & ~found)[:, None], proposed, parameters), found | fits

    blank = jnp.full((num, 2), jnp.nan, observation.dtype)
    return jax.lax.while_loop(unfinished, draw_again, (0, blank, jnp.zeros(num, bool)))[1]


def _proposal(
    key: Key[Array, ""], num: int, observation: Float[Array, " 2"]
) -> tuple[Float[Array, "num 2"], Bool[Array, " num"]]:
    """Returns solutions θ of (1) for random points of the crescent, and whether each has a |z₁| that is not
    negative."""
    crescent_key, sign_key = jax.random.split(key)
    p = _crescent(crescent_key, num, observation.dtype)
    size, second = p[:, 0] - observation[0], observation[1] - p[:, 1]
    first = size * jax.random.rademacher(sign_key, (num,), size.dtype)
    parameters = jnp.stack([first - second, first + second], axis=1) / jnp.sqrt(2.0).astype(p.dtype)
    return parameters, size >= 0


def _crescent(key: Key[Array, ""], num: int, dtype: Any = float) -> Float[Array, "num 2"]:
    """Returns random points p of the crescent (2)."""
    angle_key, radius_key = jax.random.split(key)
    angle = jnp.pi * (jax.random.uniform(angle_key, (num,), dtype) - 0.5)
    radius = RADIUS + RADIUS_STD * jax.random.normal(radius_key, (num,), dtype)
    return jnp.stack([radius * jnp.cos(angle) + CENTRE, radius * jnp.sin(angle)], axis=1)


def _shift(parameters: Float[Array, "n 2"]) -> Float[Array, "n 2"]:
    """Returns (-|z₁|, z₂) of (1)."""
    first, second = parameters[:, 0], parameters[:, 1]
    return jnp.stack([-jnp.abs(first + second), second - first], axis=1) / jnp.sqrt(2.0).astype(parameters.dtype)
