"""SLCP, a simple likelihood with a complex posterior: five parameters, and four observed points of a Gaussian in 2-D.

Papamakarios et al., arXiv 1805.07226; the constants are those of Lueckmann et al., arXiv 2101.04653, T.3:

    (1)  xᵢ ~ N((θ₁, θ₂), S), i = 1..4,  S = [[s₁², ρ s₁ s₂], [ρ s₁ s₂, s₂²]] + 10⁻⁶ I
    (2)  s₁ = θ₃²,  s₂ = θ₄²,  ρ = tanh θ₅

The signs of θ₃ and θ₄ do not matter, so the posterior has four modes of the same shape and probability.
"""

from __future__ import annotations

from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from flowgen.arrays import check_count
from flowgen.simulators.simulator import Simulator

NUM_POINTS = 4
RIDGE = 1e-6  # keeps S positive definite
STORED_LEVELS = 65535  # of the samples in slcp.npz


class SLCP(Simulator):
    """The simulator SLCP; see the module's description. The prior is uniform on [-3, 3]⁵.

    An observation lists the coordinates of the four points, one point after another: 8 values.

    Example:
        simulator = SLCP()
        parameters, observations = simulator.sample_joint(key, 10_000)
    """

    name = "slcp"
    low, high = (-3.0,) * 5, (3.0,) * 5
    observation_dim = 2 * NUM_POINTS
    fixed_observations = (
        (-1.779, 5.42, -1.455, 5.128, -1.727, 11.124, -0.972, -3.437),
        (-7.065, -0.513, -1.517, -1.574, 2.221, -1.889, -5.176, -0.374),
        (-2.574, 3.085, -0.778, 3.188, -1.846, 0.135, -3.017, -0.569),
    )

    def simulate(self, key: Key[Array, ""], parameters: Float[Array, "n 5"]) -> Float[Array, "n 8"]:
        first_std, slope, second_std = (x[:, None] for x in _factor(parameters))
        noise = jax.random.normal(key, (2, len(parameters), NUM_POINTS))
        first = parameters[:, 0:1] + first_std * noise[0]
        second = parameters[:, 1:2] + slope * noise[0] + second_std * noise[1]
        return jnp.stack([first, second], axis=2).reshape(len(parameters), self.observation_dim)

    def log_likelihood(
        self, parameters: Float[Array, "n 5"], observation: Float[Array, " 8"] | Float[Array, "n 8"]
    ) -> Float[Array, " n"]:
        """Returns log p(x | θ) in nats, the sum of the log-densities of the four points."""
        observations = jnp.broadcast_to(observation, (len(parameters), self.observation_dim))
        points = observations.reshape(-1, NUM_POINTS, 2) - parameters[:, None, :2]
        first_std, slope, second_std = (x[:, None] for x in _factor(parameters))
        first = points[:, :, 0] / first_std
        second = (points[:, :, 1] - slope * first) / second_std
        log_volume = jnp.log(2 * jnp.pi * first_std[:, 0] * second_std[:, 0])
        return -0.5 * (first**2 + second**2).sum(axis=1) - NUM_POINTS * log_volume

    def reference_samples(self, key: Key[Array, ""], num: int, index: int) -> Float[Array, "num 5"]:
        """Returns `num` of the 10,000 recorded samples of the posterior given fixed_observations[index], in random
        order, without repetition.

        The samples come from a long run of the No-U-Turn sampler (benchmarks/reference_posteriors.py), and are rounded
        to a grid of spacing 9.2 · 10⁻⁵.

        Raises ValueError if there is no such observation, or if `num` is not a whole number from 1 to 10,000.
        """
        self.check_index(index)
        check_count("num", num)
        with resources.files("flowgen.simulators").joinpath("slcp.npz").open("rb") as file, np.load(file) as arrays:
            stored = arrays[f"observation_{index}"]
        if num > len(stored):
            raise ValueError(f"num is {num}; it must be from 1 to {len(stored)}, the number of recorded samples.")
        low, high = np.array(self.low), np.array(self.high)
        samples = (low + (high - low) * stored / STORED_LEVELS).astype(np.float32)
        return jnp.asarray(samples)[jax.random.permutation(key, len(samples))[:num]]


def _factor(parameters: Float[Array, "n 5"]) -> tuple[Float[Array, " n"], Float[Array, " n"], Float[Array, " n"]]:
    """Returns the entries (1, 1), (2, 1) and (2, 2) of the Cholesky factor of S.

    The last one is √(S₂₂ - S₂₁² / S₁₁), written as a root of positive terms, which do not cancel.
    """
    first_variance, second_variance = parameters[:, 2] ** 4, parameters[:, 3] ** 4
    correlation = jnp.tanh(parameters[:, 4])
    first_std = jnp.sqrt(first_variance + RIDGE)
    slope = correlation * (parameters[:, 2] * parameters[:, 3]) ** 2 / first_std
    explained = correlation**2 * RIDGE / (first_variance + RIDGE)
    second_std = jnp.sqrt(RIDGE + second_variance * (1 / jnp.cosh(parameters[:, 4]) ** 2 + explained))
    return first_std, slope, second_std
