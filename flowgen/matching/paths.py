"""Probability paths from source x0 (t = 0) to data x1 (t = 1), and what a network that follows one can predict.

An affine path is x_t = alpha_t x1 + beta_t x0 (+ spread_t · noise), with target velocity
u_t = alpha'_t x1 + beta'_t x0 (+ spread'_t/spread_t (x_t - mean)). With Gaussian x0, beta_t is often called sigma_t.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key

Prediction = Literal["velocity", "x1", "noise", "score"]
# How near to an end of a path conversions go, in time and in alpha/beta: there they are singular, not the path.
SMALLEST = 1e-5
# The same for networks that predict x1, noise or a score: what they get wrong is divided by it.
NETWORK_SMALLEST = 0.02


_NO_SPREAD = "the path has noise of its own, sigma {}, through which nothing can be converted; set sigma to 0"


class Schedule(NamedTuple):
    """alpha and beta of an affine path at times t, and their derivatives with respect to t."""

    alpha: Float[Array, "*t"]
    beta: Float[Array, "*t"]
    d_alpha: Float[Array, "*t"]
    d_beta: Float[Array, "*t"]


class PathSample(NamedTuple):
    """A point of a path and what it moves by: x_t, the target velocity u_t, and the noise added on top (or zeros)."""

    x_t: Float[Array, "b *event"]
    u_t: Float[Array, "b *event"]
    noise: Float[Array, "b *event"]


@runtime_checkable
class Path(Protocol):
    """What losses and samplers ask of a path."""

    def schedule(self, t: Float[Array, "*t"]) -> Schedule:
        """Returns alpha, beta and their derivatives."""
        ...

    def sample(
        self, key: Key[Array, ""], t: Float[Array, " b"], x0: Float[Array, "b *event"], x1: Float[Array, "b *event"]
    ) -> PathSample:
        """Returns x_t and u_t of pairs (x0, x1) at times t."""
        ...

    def __hash__(self) -> int:
        """Returns the same number for equal paths, as frozen dataclasses do."""
        ...


@dataclass(frozen=True)
class CondOT:
    """The straight line x_t = (1 - t) x0 + t x1, with Gaussian spread sigma (Lipman 2210.02747, Tong 2302.00482)."""

    sigma: float = 0.0

    def __post_init__(self):
        check_spread("sigma", self.sigma)

    def schedule(self, t):
        return Schedule(t, 1 - t, jnp.ones_like(t), -jnp.ones_like(t))

    def sample(self, key, t, x0, x1):
        return _affine_sample(self, self.sigma, key, t, x0, x1)


@dataclass(frozen=True)
class Target:
    """Lipman's path with a narrow end: x_t = t x1 + (1 - (1 - sigma) t) x0, where x0 is standard normal.

    The target is written with x0, x1 - (1 - sigma) x0, which is the published one without its 0/0 at t = 1.
    """

    sigma_min: float = 0.0

    def __post_init__(self):
        check_spread("sigma_min", self.sigma_min)
        if self.sigma_min >= 1:
            raise ValueError(f"sigma_min is {self.sigma_min}; the end of the path must be narrower than the source, 1.")

    def schedule(self, t):
        return Schedule(t, 1 - (1 - self.sigma_min) * t, jnp.ones_like(t), -(1 - self.sigma_min) * jnp.ones_like(t))

    def sample(self, key, t, x0, x1):
        return _affine_sample(self, 0.0, key, t, x0, x1)


@dataclass(frozen=True)
class Trigonometric:
    """The cosine path x_t = sin(πt/2) x1 + cos(πt/2) x0, variance preserving (Albergo 2209.15571), spread sigma."""

    sigma: float = 0.0

    def __post_init__(self):
        check_spread("sigma", self.sigma)

    def schedule(self, t):
        angle = jnp.pi / 2 * t
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        return Schedule(sin, cos, jnp.pi / 2 * cos, -jnp.pi / 2 * sin)

    def sample(self, key, t, x0, x1):
        return _affine_sample(self, self.sigma, key, t, x0, x1)


@dataclass(frozen=True)
class Polynomial:
    """x_t = tⁿ x1 + (1 - tⁿ) x0 with n = degree ≥ 1."""

    degree: float = 2.0

    def __post_init__(self):
        if not 1 <= self.degree < float("inf"):
            raise ValueError(f"degree is {self.degree}; a polynomial path needs at least 1.")

    def schedule(self, t):
        power, slope = t**self.degree, self.degree * t ** (self.degree - 1)
        return Schedule(power, 1 - power, slope, -slope)

    def sample(self, key, t, x0, x1):
        return _affine_sample(self, 0.0, key, t, x0, x1)


@dataclass(frozen=True)
class VariancePreserving:
    """The diffusion path alpha = e^(-T/2), beta = √(1 - e^(-T)), T = (1-t)²(B-b)/2 + (1-t)b (Song 2011.13456)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        if not 0 < self.beta_min <= self.beta_max < float("inf"):
            raise ValueError(
                f"beta_min is {self.beta_min} and beta_max {self.beta_max}; both must be positive, beta_max the larger."
            )

    def schedule(self, t):
        s, gap = 1 - t, self.beta_max - self.beta_min
        total = 0.5 * s**2 * gap + s * self.beta_min
        rate = s * gap + self.beta_min  # -dT/dt
        alpha = jnp.exp(-total / 2)
        beta = jnp.sqrt(-jnp.expm1(-total))
        return Schedule(alpha, beta, alpha * rate / 2, -(alpha**2) * rate / (2 * jnp.maximum(beta, SMALLEST)))

    def sample(self, key, t, x0, x1):
        return _affine_sample(self, 0.0, key, t, x0, x1)


@dataclass(frozen=True)
class LinearVariancePreserving:
    """The path x_t = t x1 + √(1 - t²) x0: variance preserving, with a straight alpha.

    beta' = -t/beta is infinite at t = 1: as a divisor beta is kept above √1e-5, the value 5e-6 before the end.

    Example:
        point = LinearVariancePreserving().sample(key, t, x0, x1)
    """

    def schedule(self, t):
        beta = jnp.sqrt((1 - t) * (1 + t))
        return Schedule(t, beta, jnp.ones_like(t), -t / jnp.maximum(beta, SMALLEST**0.5))

    def sample(self, key, t, x0, x1):
        return _affine_sample(self, 0.0, key, t, x0, x1)


@dataclass(frozen=True)
class SchroedingerBridge:
    """The Brownian bridge x_t = (1-t) x0 + t x1 + sigma √(t(1-t)) noise, for entropic couplings (Tong 2307.03672).

    u_t = (1 - 2t) / (2t(1-t)) (x_t - mean) + x1 - x0. Written with the noise, its singularities at both ends are of
    order t^-½; times are kept 1e-5 away from them. Raises ValueError unless sigma is positive.
    """

    sigma: float = 1.0

    def __post_init__(self):
        if not 0 < self.sigma < float("inf"):
            raise ValueError(f"sigma is {self.sigma}; a Schroedinger bridge needs a positive one.")

    def schedule(self, t):
        return CondOT().schedule(t)

    def sample(self, key, t, x0, x1):
        check_pair(t, x0, x1)
        t = jnp.clip(t, SMALLEST, 1 - SMALLEST)
        noise = jax.random.normal(key, x0.shape, x0.dtype)
        spread = jnp.sqrt(t * (1 - t))
        # Before they are rounded to the type of x0: in bfloat16 t is 1 from 0.998 on.
        alpha, beta, width, rate = (over_event(c, x0) for c in (t, 1 - t, spread, (1 - 2 * t) / (2 * spread)))
        x_t = beta * x0 + alpha * x1 + self.sigma * width * noise
        return PathSample(x_t, self.sigma * rate * noise + x1 - x0, noise)

    def score_scale(self, t: Float[Array, " b"]) -> Float[Array, " b"]:
        """Returns lambda_t = 2 √(t(1-t)) / sigma, by which score matching weighs: it regresses lambda s = -noise."""
        return 2 * jnp.sqrt(t * (1 - t)) / self.sigma


def velocity_of(
    path: Path,
    t: Float[Array, " b"],
    x_t: Float[Array, "b *event"],
    value: Float[Array, "b *event"],
    kind: Prediction,
    *,
    smallest: float = SMALLEST,
) -> Float[Array, "b *event"]:
    """Returns the velocity at x_t that a prediction of "x1", "noise" (x0) or "score" implies; a velocity as it is.

    v = alpha' x1 + beta' x0, where what is not predicted follows from x_t = alpha x1 + beta x0, and x0 is -beta times
    the score. What follows is singular where the path is all source or all data: it is taken at the nearest time that
    `inner_times(path, t, smallest)` allows, and so should the prediction be; derivatives are no larger than there.
    Raises ValueError for another kind, for a path with a spread, and for times outside [0, 1].

    Example:
        v = velocity_of(CondOT(), t, x_t, network(t, x_t), "x1")
    """
    check_prediction(kind, path)
    if kind == "velocity":
        return value
    here, _ = _inner(path, t, x_t, SMALLEST)
    inner, _ = _inner(path, t, x_t, smallest)
    # Slopes of the time itself, but none that grows without bounds towards the end.
    d_alpha, d_beta = (jnp.where(jnp.abs(a) < jnp.abs(b), a, b) for a, b in zip(here[2:], inner[2:], strict=True))
    if kind == "x1":
        return d_alpha * value + d_beta * (x_t - inner.alpha * value) / inner.beta
    noise = -inner.beta * value if kind == "score" else value
    return d_alpha * (x_t - inner.beta * noise) / inner.alpha + d_beta * noise


def x1_of(
    path: Path, t: Float[Array, " b"], x_t: Float[Array, "b *event"], velocity: Float[Array, "b *event"]
) -> Float[Array, "b *event"]:
    """Returns the data x1 = (beta v - beta' x_t) / D that a velocity implies, E[x1 | x_t] for the learned one.

    D = alpha' beta - beta' alpha. At the ends, and with a spread, as `velocity_of`.

    Example:
        x1 = x1_of(CondOT(), t, x_t, v)
    """
    schedule, determinant = _inner(path, t, x_t, SMALLEST)
    return (schedule.beta * velocity - schedule.d_beta * x_t) / determinant


def noise_of(
    path: Path, t: Float[Array, " b"], x_t: Float[Array, "b *event"], velocity: Float[Array, "b *event"]
) -> Float[Array, "b *event"]:
    """Returns the source x0 = (alpha' x_t - alpha v) / D that a velocity implies, E[x0 | x_t] for the learned one.

    D = alpha' beta - beta' alpha. At the ends, and with a spread, as `velocity_of`.

    Example:
        x0 = noise_of(CondOT(), t, x_t, v)
    """
    schedule, determinant = _inner(path, t, x_t, SMALLEST)
    return (schedule.d_alpha * x_t - schedule.alpha * velocity) / determinant


def score_of(
    path: Path, t: Float[Array, " b"], x_t: Float[Array, "b *event"], velocity: Float[Array, "b *event"]
) -> Float[Array, "b *event"]:
    """Returns ∇ log p_t(x_t) = -E[x0 | x_t] / beta_t, for the velocity learned from *independent* normal sources.

    Couplings other than `Independent` make sources and data dependent: the field then has no such score. At the ends,
    and with a spread, as `velocity_of`.

    Example:
        score = score_of(CondOT(), t, x_t, v)
    """
    schedule, _ = _inner(path, t, x_t, SMALLEST)
    return -noise_of(path, t, x_t, velocity) / schedule.beta


def inner_times(path: Path, t: Float[Array, " b"], smallest: float = SMALLEST) -> Float[Array, " b"]:
    """Returns times kept at least 1e-5 from both ends, and where alpha/beta is within [smallest, 1/smallest].

    Example:
        t = inner_times(Polynomial(10.0), t)  # 0.316 and later: before, x_t is x0 to five digits
    """
    first, last = _inner_ends(path, smallest)
    return jnp.clip(t, first, last)


def retimed(
    velocity: Callable[[Array, Array, Any], Array], path: Path, new_path: Path
) -> Callable[[Array, Array, Any], Array]:
    """Returns the field along new_path of a velocity that was trained along path; it ends in the same points.

    Let t be the time at which path has the signal ratio alpha/beta that new_path has at r, found by bisection, and
    s² = (alpha² + beta²)_new(r) / (alpha² + beta²)(t) the square of the scale between both. Then
    v_new(r, x) = (s'/s) x + s t' v(t, x/s), where t' = D_new / (D s²) and D = alpha' beta - beta' alpha (Pokle et al.,
    arXiv 2310.04432). End points agree up to s, which is 1 where both paths have alpha² + beta² = 1. r is kept 1e-5
    from both ends, where D of some paths is 0 or infinite; ratios that path does not reach are taken at its end. Not
    to be differentiated with respect to time. Raises ValueError for paths with a spread.

    Example:
        x1, nfe = integrate(retimed(velocity, CondOT(), Trigonometric()), x0, num_steps=25)
    """

    check_no_spread(path)
    check_no_spread(new_path)

    def field(r, x, cond):
        r = jnp.clip(r, SMALLEST, 1 - SMALLEST)
        new = new_path.schedule(r)
        t = time_of_ratio(path, new.alpha, new.beta)
        old = path.schedule(t)
        new_square, old_square = new.alpha**2 + new.beta**2, old.alpha**2 + old.beta**2
        scale = jnp.sqrt(new_square / old_square)
        rate = _determinant(new) / (_determinant(old) * scale**2)
        growth = (new.alpha * new.d_alpha + new.beta * new.d_beta) / new_square
        growth = growth - rate * (old.alpha * old.d_alpha + old.beta * old.d_beta) / old_square
        growth, scale, rate = (over_event(number, x) for number in (growth, scale, rate))
        return growth * x + scale * rate * velocity(t, x / scale, cond)

    return field


def time_of_ratio(path: Path, alpha: Float[Array, "*t"], beta: Float[Array, "*t"]) -> Float[Array, "*t"]:
    """Returns the time at which path has the signal ratio alpha/beta, its inverse signal-to-noise ratio.

    By bisection, comparing crosswise: nothing is divided, so that beta may be 0. A ratio that the path does not reach
    gives the end next to it.

    Example:
        t = time_of_ratio(VariancePreserving(), alpha, beta)
    """

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        here = path.schedule(middle)
        early = here.alpha * beta < alpha * here.beta
        return jnp.where(early, middle, low), jnp.where(early, high, middle)

    # Each step wins a bit: more than float32 has, and within 1e-12 for float64.
    low, high = jax.lax.fori_loop(0, 40, halve, (jnp.zeros_like(alpha), jnp.ones_like(alpha)))
    return (low + high) / 2


def check_output(output: Array, x: Array, name: str = "the velocity") -> Array:
    """Returns what a network answered; ValueError unless it has the shape of x, which broadcasting would hide.

    Example:
        v = check_output(velocity(t, x, cond), x)
    """
    if output.shape != x.shape:
        raise ValueError(f"{name} has shape {output.shape} at x of shape {x.shape}; it must have the shape of x.")
    return output


def check_floating(name: str, x: Array) -> None:
    """Raises ValueError unless x holds floating-point numbers.

    Example:
        check_floating("x0", x0)
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} is {x.dtype}; a flow moves floating-point numbers, so scale pictures to [-1, 1].")


def over_event(t: Float[Array, "..."], x: Float[Array, "b *event"]) -> Array:
    """Returns one number per sample in the shape that multiplies x.

    Example:
        x_t = over_event(t, x) * x
    """
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)).astype(x.dtype)


def check_prediction(kind: str, path: Path | None = None) -> None:
    """Raises ValueError unless a velocity can be had from what is predicted, along the path if one is given.

    Example:
        check_prediction("x1", CondOT())
    """
    if kind not in get_args(Prediction):
        raise ValueError(f"prediction is {kind!r}; choose 'velocity', 'x1', 'noise' or 'score'.")
    spread = getattr(path, "sigma", 0.0)
    if kind != "velocity" and spread:
        raise ValueError(f"prediction is {kind!r}, but {_NO_SPREAD.format(spread)}, or predict the velocity.")


def check_no_spread(path: Path) -> None:
    """Raises ValueError where a path has noise on top of source and data, which no velocity tells apart from them.

    Example:
        check_no_spread(CondOT())
    """
    spread = getattr(path, "sigma", 0.0)
    if spread:
        raise ValueError(f"{_NO_SPREAD.format(spread)}.")


def check_spread(name: str, value: float) -> None:
    """Raises ValueError unless a standard deviation is finite and not negative.

    Example:
        check_spread("sigma", 0.1)
    """
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} is {value}; it must be finite and at least 0.")


def check_pair(t: Array, x0: Array, x1: Array) -> None:
    """Raises ValueError unless x0 and x1 have one shape and t has one time in [0, 1] per sample.

    Times have values outside jit alone; there they are looked at.

    Example:
        check_pair(t, x0, x1)
    """
    if x0.shape != x1.shape:
        raise ValueError(f"x0 has shape {x0.shape} and x1 {x1.shape}; source and data must have the same shape.")
    check_times(t, x0)


def check_times(t: Array, x0: Array) -> None:
    """Raises ValueError unless there is one time in [0, 1] per sample; values are looked at outside jit.

    Example:
        check_times(t, x_t)
    """
    if t.shape != x0.shape[:1]:
        raise ValueError(f"t has shape {t.shape}; there must be one time per sample, {x0.shape[:1]}.")
    if not isinstance(t, Tracer) and not ((np.asarray(t) >= 0) & (np.asarray(t) <= 1)).all():
        raise ValueError(f"t runs from {np.min(t)} to {np.max(t)}; times are within [0, 1], source at 0, data at 1.")


@functools.lru_cache(maxsize=64)
def _inner_ends(path: Path, smallest: float) -> tuple[float, float]:
    """The times at which alpha/beta is smallest and 1/smallest, or 1e-5 away from 0 and 1 where these are nearer."""
    with jax.ensure_compile_time_eval():
        first, last = time_of_ratio(path, jnp.array([smallest, 1.0]), jnp.array([1.0, smallest]))
        return max(float(first), SMALLEST), min(float(last), 1 - SMALLEST)


def _inner(path: Path, t: Array, x: Array, smallest: float) -> tuple[Schedule, Array]:
    """The schedule in the shape of x at the time next to t at which conversions are regular, and its determinant."""
    check_times(t, x)
    check_no_spread(path)
    return _over(path, inner_times(path, t, smallest), x)


def _over(path: Path, t: Array, x: Array) -> tuple[Schedule, Array]:
    schedule = Schedule(*(over_event(c, x) for c in path.schedule(t)))
    return schedule, _determinant(schedule)


def _determinant(schedule: Schedule) -> Array:
    return schedule.d_alpha * schedule.beta - schedule.d_beta * schedule.alpha


def _affine_sample(path: Path, spread: float, key: Array, t: Array, x0: Array, x1: Array) -> PathSample:
    """A point of an affine path with constant Gaussian spread around it, which the velocity does not see."""
    check_pair(t, x0, x1)
    schedule, _ = _over(path, t, x0)
    noise = jax.random.normal(key, x0.shape, x0.dtype) if spread else jnp.zeros_like(x0)
    x_t = schedule.alpha * x1 + schedule.beta * x0 + spread * noise
    return PathSample(x_t, schedule.d_alpha * x1 + schedule.d_beta * x0, noise)
