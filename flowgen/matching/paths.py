"""Probability paths from noise x0 (t = 0) to data x1 (t = 1).

An affine path is x_t = m_t + spread_t · noise, with mean m_t = alpha_t x1 + beta_t x0. Its target velocity is u_t =
m'_t + spread'_t/spread_t (x_t - m_t), or m'_t if the spread is constant. If x0 is Gaussian, papers often write sigma_t
for beta_t.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flowgen.matching.checks import check_pair
from flowgen.settings import config
from flowgen.settings.ranges import NonNegative, Positive, ProperFraction, Within

# Conversions, unlike paths, are singular at both ends of a path, so they stay this far away in time and in alpha/beta.
SMALLEST = 1e-5


class Schedule(NamedTuple):
    """The coefficients alpha of data x1 and beta of noise x0 on a path at times t, and their derivatives with respect
    to t.
    """

    alpha: Float[Array, "*t"]
    beta: Float[Array, "*t"]
    d_alpha: Float[Array, "*t"]
    d_beta: Float[Array, "*t"]


class PathSample(NamedTuple):
    """Points x_t on a path, their target velocities u_t, and the standard normal noise that the path scales and adds to
    x_t (zeros if it adds none).
    """

    x_t: Float[Array, "b *event"]
    u_t: Float[Array, "b *event"]
    noise: Float[Array, "b *event"]


@runtime_checkable
class Path(Protocol):
    """The interface that losses and samplers require of a path."""

    def schedule(self, t: Float[Array, "*t"]) -> Schedule:
        """Returns the coefficients alpha of x1 and beta of x0 at times t, and their derivatives."""
        ...

    def sample(
        self, key: Key[Array, ""], t: Float[Array, " b"], x0: Float[Array, "b *event"], x1: Float[Array, "b *event"]
    ) -> PathSample:
        """Returns x_t, u_t and noise for the pairs (x0, x1) at times t; the noise is drawn with key."""
        ...

    def __hash__(self) -> int:
        """Returns equal numbers for equal paths, as the hash of a frozen dataclass does."""
        ...


class AffinePath:
    """Base class of paths defined by a schedule, with optional Gaussian noise of constant standard deviation."""

    @property
    def spread(self) -> float:
        """Standard deviation of the noise added to x_t."""
        return 0.0

    def schedule(self, t: Float[Array, "*t"]) -> Schedule:
        """Returns the coefficients alpha of x1 and beta of x0 at times t, and their derivatives."""
        raise NotImplementedError

    def sample(
        self, key: Key[Array, ""], t: Float[Array, " b"], x0: Float[Array, "b *event"], x1: Float[Array, "b *event"]
    ) -> PathSample:
        """Returns the points x_t and velocities u_t for pairs (x0, x1) at times t.

        u_t is the velocity of the path without the noise that `spread` adds to x_t.
        """
        check_pair(t, x0, x1)
        schedule = schedule_over(self, t, x0)
        noise = jax.random.normal(key, x0.shape, x0.dtype) if self.spread else jnp.zeros_like(x0)
        x_t = schedule.alpha * x1 + schedule.beta * x0 + self.spread * noise
        return PathSample(x_t, schedule.d_alpha * x1 + schedule.d_beta * x0, noise)


@config
class CondOT(AffinePath):
    """The straight line x_t = (1 - t) x0 + t x1 from noise x0 to data x1 (arXiv 2210.02747, arXiv 2302.00482).

    sigma: standard deviation of Gaussian noise around the line; 0 for none.
    """

    sigma: NonNegative = 0.0

    @property
    def spread(self) -> float:
        return self.sigma

    def schedule(self, t: Float[Array, "*t"]) -> Schedule:
        return Schedule(t, 1 - t, jnp.ones_like(t), -jnp.ones_like(t))


@config
class Target(AffinePath):
    """The path of Lipman et al. to a narrow Gaussian around x1: x_t = t x1 + (1 - (1 - sigma_min) t) x0, with standard
    normal x0.

    The target velocity is computed as x1 - (1 - sigma_min) x0. The published formula in terms of x_t (arXiv 2210.02747)
    has the same value, but is 0/0 at t = 1 if sigma_min is 0.

    sigma_min: standard deviation of x_t around x1 at t = 1; at least 0 and below 1.
    """

    sigma_min: ProperFraction = 0.0

    def schedule(self, t: Float[Array, "*t"]) -> Schedule:
        return Schedule(t, 1 - (1 - self.sigma_min) * t, jnp.ones_like(t), -(1 - self.sigma_min) * jnp.ones_like(t))


@config
class Trigonometric(AffinePath):
    """The variance-preserving cosine path x_t = sin(πt/2) x1 + cos(πt/2) x0 (arXiv 2209.15571).

    sigma: standard deviation of Gaussian noise around the path; 0 for none.
    """

    sigma: NonNegative = 0.0

    @property
    def spread(self) -> float:
        return self.sigma

    def schedule(self, t: Float[Array, "*t"]) -> Schedule:
        angle = jnp.pi / 2 * t
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        return Schedule(sin, cos, jnp.pi / 2 * cos, -jnp.pi / 2 * sin)


@config
class Polynomial(AffinePath):
    """The polynomial path x_t = tⁿ x1 + (1 - tⁿ) x0, with n = `degree`, of the Flow Matching Guide (arXiv 2412.06264).

    degree: exponent n, at least 1.
    """

    degree: Annotated[float, Within(1)] = 2.0

    def schedule(self, t: Float[Array, "*t"]) -> Schedule:
        power, slope = t**self.degree, self.degree * t ** (self.degree - 1)
        return Schedule(power, 1 - power, slope, -slope)


@config
class VariancePreserving(AffinePath):
    """The diffusion path x_t = e^(-T/2) x1 + √(1 - e^(-T)) x0, with T = (1-t)²(B-b)/2 + (1-t)b, b = `beta_min` and B =
    `beta_max` (arXiv 2011.13456).

    beta_min: value of b, positive.
    beta_max: value of B, at least b.
    """

    beta_min: Positive = 0.1
    beta_max: Positive = 20.0

    def __post_init__(self):
        if self.beta_min > self.beta_max:
            raise ValueError(f"beta_min is {self.beta_min}, which is above beta_max {self.beta_max}; lower beta_min.")

    def schedule(self, t: Float[Array, "*t"]) -> Schedule:
        s, gap = 1 - t, self.beta_max - self.beta_min
        total = 0.5 * s**2 * gap + s * self.beta_min
        rate = s * gap + self.beta_min  # -dT/dt
        alpha = jnp.exp(-total / 2)
        beta = jnp.sqrt(-jnp.expm1(-total))
        return Schedule(alpha, beta, alpha * rate / 2, -(alpha**2) * rate / (2 * jnp.maximum(beta, SMALLEST)))


@config
class LinearVariancePreserving(AffinePath):
    """The variance-preserving path whose coefficient of x1 is t: x_t = t x1 + √(1 - t²) x0.

    The derivative beta' = -t/beta is infinite at t = 1. The divisor beta is therefore kept at or above √1e-5, its value
    at t = 1 - 5e-6.

    Example:
        point = LinearVariancePreserving().sample(key, t, x0, x1)
    """

    def schedule(self, t: Float[Array, "*t"]) -> Schedule:
        beta = jnp.sqrt((1 - t) * (1 + t))
        return Schedule(t, beta, jnp.ones_like(t), -t / jnp.maximum(beta, SMALLEST**0.5))


@config
class SchroedingerBridge:
    """The Brownian bridge x_t = (1-t) x0 + t x1 + sigma √(t(1-t)) noise, for entropic couplings (arXiv 2307.03672).

    The noise is standard normal. The target velocity is u_t = x1 - x0 + sigma (1 - 2t) / (2 √(t(1-t))) · noise. It
    diverges like t^-½ at t = 0 and like (1-t)^-½ at t = 1. Times are therefore clipped to [1e-5, 1 - 1e-5].

    sigma: diffusion coefficient of the bridge; positive.
    """

    sigma: Positive = 1.0

    def schedule(self, t: Float[Array, "*t"]) -> Schedule:
        return CondOT().schedule(t)

    def sample(
        self, key: Key[Array, ""], t: Float[Array, " b"], x0: Float[Array, "b *event"], x1: Float[Array, "b *event"]
    ) -> PathSample:
        check_pair(t, x0, x1)
        t = jnp.clip(t, SMALLEST, 1 - SMALLEST)
        noise = jax.random.normal(key, x0.shape, x0.dtype)
        spread = jnp.sqrt(t * (1 - t))
        # Compute these factors before rounding to the dtype of x0, because in bfloat16, times above 0.998 become 1.
        alpha, beta, width, rate = (over_event(c, x0) for c in (t, 1 - t, spread, (1 - 2 * t) / (2 * spread)))
        x_t = beta * x0 + alpha * x1 + self.sigma * width * noise
        return PathSample(x_t, self.sigma * rate * noise + x1 - x0, noise)

    def score_scale(self, t: Float[Array, " b"]) -> Float[Array, " b"]:
        """Returns the factor lambda_t = 2 √(t(1-t)) / sigma of the score in `score_and_flow_matching_loss`.

        The loss fits lambda_t s to -noise, where s is a prediction of the scaled score sigma²/2 ∇ log p_t.
        """
        return 2 * jnp.sqrt(t * (1 - t)) / self.sigma


def schedule_over(path: Path, t: Float[Array, " b"], x: Float[Array, "b *event"]) -> Schedule:
    """Returns the schedule of a path at one time per sample, in a shape that broadcasts over x."""
    return Schedule(*(over_event(number, x) for number in path.schedule(t)))


def over_event(t: Float[Array, "..."], x: Float[Array, "b *event"]) -> Float[Array, "..."]:
    """Returns t, which has one number per sample, in the dtype of x and in a shape that broadcasts over x."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)).astype(x.dtype)
