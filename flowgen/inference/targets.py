"""Targets with a known normalising constant, for testing samplers and objectives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from flowgen.arrays import at_least_float32, check_count, check_key, shown

# The density of x₁ beyond ±4.5 is below exp(-280) of its maximum. In between, the trapezoidal rule for this smooth
# density is accurate to the last digit of float64.
EDGE, NUM_POINTS = 4.5, 1 << 14


@dataclass(frozen=True)
class ManyWell:
    """The many-well target of flow annealed importance sampling bootstrap (FAB, arXiv 2208.01893): dim / 2 independent
    double wells in the plane, with 2^(dim/2) modes in all.

        log p̃(x) = Σ over pairs of -(x₁⁴ - 6 x₁² - ½ x₁ + ½ x₂²)

    Each pair (x₁, x₂) consists of two consecutive coordinates of the flattened sample. In each pair, x₂ is standard
    normal, and x₁ has modes near -1.7 and 1.7, with 84 % of the mass around 1.7.

    dim: number of coordinates of a sample.

    Raises ValueError if dim is odd or below 2.

    Example:
        target = ManyWell(32)
        log_p = target.log_density(jnp.zeros((10, 4, 4, 2)))
    """

    dim: int = 32

    def __post_init__(self):
        check_count("dim", self.dim)
        if self.dim % 2:
            raise ValueError(f"dim is {self.dim}; give an even number, two coordinates per well.")

    def log_density(self, x: Float[Array, "b *event"]) -> Float[Array, " b"]:
        """Returns the unnormalised log-density log p̃(x) of each sample, in nats.

        Raises ValueError unless each sample has `dim` coordinates.

        Example:
            log_p = ManyWell(4).log_density(jnp.zeros((10, 4)))
        """
        x = at_least_float32("x", x)
        if x.ndim < 2 or math.prod(x.shape[1:]) != self.dim:
            raise ValueError(f"x is {shown(x)}; give samples `b *event` of {self.dim} coordinates each.")
        pairs = x.reshape(len(x), self.dim // 2, 2)
        return (_log_first(pairs[..., 0]) - 0.5 * jnp.square(pairs[..., 1])).sum(axis=-1)

    @property
    def log_normaliser(self) -> float:
        """log ∫ p̃(x) dx, by quadrature in float64; 164.696 for dim = 32.

        Example:
            error = log_normaliser(s.log_weight).value - ManyWell(32).log_normaliser
        """
        points, density = _table()
        return self.dim / 2 * float(np.log(np.trapezoid(density, points)) + 0.5 * np.log(2 * np.pi))

    def sample(self, key: Key[Array, ""], num: int, event_shape: tuple[int, ...] | None = None) -> Array:
        """Returns independent samples of the target, with shape (num, *event_shape), or (num, dim) by default.

        The x₁ of each pair is drawn by inverting its cumulative distribution, which is tabulated in float64 at steps of
        0.00055.

        Raises ValueError if `num` is not positive, or if `event_shape` does not have `dim` coordinates.

        Example:
            x = ManyWell(32).sample(jax.random.key(0), 1_000, (4, 4, 2))
        """
        check_key(key)
        check_count("num", num)
        shape = (self.dim,) if event_shape is None else tuple(event_shape)
        if np.prod(shape) != self.dim:
            raise ValueError(f"event_shape is {shape}; give a shape of {self.dim} coordinates.")
        first_key, second_key = jax.random.split(key)
        points, density = _table()
        cumulative = np.cumsum((density[1:] + density[:-1]) / 2)
        known = cumulative > 0  # Equal values at the edges have no inverse.
        # Float32 draws are multiples of 2⁻²³. Half a multiple more keeps 0, whose quantile is the edge, out.
        uniform = jax.random.uniform(first_key, (num, self.dim // 2)) + 2**-24
        first = jnp.interp(uniform, jnp.asarray(cumulative[known] / cumulative[-1]), jnp.asarray(points[1:][known]))
        second = jax.random.normal(second_key, first.shape)
        return jnp.stack([first, second], axis=-1).reshape(num, *shape)


def _log_first(x):
    """Returns the log-density of x₁, up to a constant, for a NumPy or JAX array."""
    return -(x**4 - 6 * x**2 - 0.5 * x)


def _table() -> tuple[np.ndarray, np.ndarray]:
    points = np.linspace(-EDGE, EDGE, NUM_POINTS + 1)
    return points, np.exp(_log_first(points))
