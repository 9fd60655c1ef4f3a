"""Conversions between velocities and predictions of x1, noise or score, and of velocities from one path to another."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowgen.matching.checks import check_times
from flowgen.matching.paths import SMALLEST, Path, Schedule, over_event, schedule_over

Prediction = Literal["velocity", "x1", "noise", "score"]
# Replaces SMALLEST if a network predicts x1, noise or a score, because the conversion divides the network's errors by
# this number.
NETWORK_SMALLEST = 0.02


_NO_SPREAD = "the path adds noise (sigma {}), which makes conversion impossible; set sigma to 0"


def prediction_to_velocity(
    path: Path,
    t: Float[Array, " b"],
    x_t: Float[Array, "b *event"],
    value: Float[Array, "b *event"],
    kind: Prediction,
    *,
    smallest: float = SMALLEST,
) -> Float[Array, "b *event"]:
    """Returns the velocity at x_t that follows from a prediction `value` of kind "x1" (data), "noise" (x0) or "score".

    On the path x_t = alpha x1 + beta x0, the velocity is v = alpha' x1 + beta' x0, where alpha' and beta' are the
    derivatives with respect to t. Given x_t, a predicted x1 determines x0, and vice versa; a predicted score determines
    x0 = -beta · score. A prediction of "velocity" is returned unchanged.

    The conversion divides by alpha or beta, which are 0 where x_t is pure noise or pure data. Therefore, alpha and beta
    are taken at the time `clip_times(path, t, smallest)`; evaluate the network at that time too. The derivatives alpha'
    and beta' are taken at t itself, but their magnitudes are limited to those at the clipped time.

    Raises ValueError for an unknown kind. Unless the kind is "velocity", the function also raises ValueError for a path
    with sigma above 0 and, outside jit, for times outside [0, 1].

    Example:
        v = prediction_to_velocity(CondOT(), t, x_t, network(t, x_t), "x1")
    """
    check_prediction(kind, path)
    if kind == "velocity":
        return value
    here, _ = _inner(path, t, x_t, SMALLEST)
    inner, _ = _inner(path, t, x_t, smallest)
    # Use the derivatives at time t itself, except for those that diverge at an end of the path.
    d_alpha, d_beta = (jnp.where(jnp.abs(a) < jnp.abs(b), a, b) for a, b in zip(here[2:], inner[2:], strict=True))
    if kind == "x1":
        return d_alpha * value + d_beta * (x_t - inner.alpha * value) / inner.beta
    noise = -inner.beta * value if kind == "score" else value
    return d_alpha * (x_t - inner.beta * noise) / inner.alpha + d_beta * noise


def velocity_to_x1(
    path: Path, t: Float[Array, " b"], x_t: Float[Array, "b *event"], velocity: Float[Array, "b *event"]
) -> Float[Array, "b *event"]:
    """Returns the data x1 = (beta v - beta' x_t) / D that a velocity v at x_t implies.

    Here, alpha and beta are the coefficients of x1 and x0 in x_t, from `path.schedule`, and D = alpha' beta - beta'
    alpha. For a learned velocity, the result is E[x1 | x_t]. Times are clipped with `clip_times(path, t)`, because D is
    0 or infinite at the ends of some paths. Raises ValueError for a path with sigma above 0 and, outside jit, for times
    outside [0, 1].

    Example:
        x1 = velocity_to_x1(CondOT(), t, x_t, v)
    """
    schedule, determinant = _inner(path, t, x_t, SMALLEST)
    return (schedule.beta * velocity - schedule.d_beta * x_t) / determinant


def velocity_to_noise(
    path: Path, t: Float[Array, " b"], x_t: Float[Array, "b *event"], velocity: Float[Array, "b *event"]
) -> Float[Array, "b *event"]:
    """Returns the noise x0 = (alpha' x_t - alpha v) / D that a velocity v at x_t implies.

    Here, alpha and beta are the coefficients of x1 and x0 in x_t, from `path.schedule`, and D = alpha' beta - beta'
    alpha. For a learned velocity, the result is E[x0 | x_t]. Times are clipped with `clip_times(path, t)`, because D is
    0 or infinite at the ends of some paths. Raises ValueError for a path with sigma above 0 and, outside jit, for times
    outside [0, 1].

    Example:
        x0 = velocity_to_noise(CondOT(), t, x_t, v)
    """
    schedule, determinant = _inner(path, t, x_t, SMALLEST)
    return (schedule.d_alpha * x_t - schedule.alpha * velocity) / determinant


def velocity_to_score(
    path: Path, t: Float[Array, " b"], x_t: Float[Array, "b *event"], velocity: Float[Array, "b *event"]
) -> Float[Array, "b *event"]:
    """Returns the score ∇ log p_t(x_t) = -E[x0 | x_t] / beta for a velocity learned with *independent* normal noise.

    Here, beta is the coefficient of x0 in x_t, from `path.schedule`. With couplings other than `Independent`, noise and
    data depend on each other, and the result is not the score. Times are clipped with `clip_times(path, t)`, because
    beta is 0 at t = 1 on most paths. Raises ValueError for a path with sigma above 0 and, outside jit, for times
    outside [0, 1].

    Example:
        score = velocity_to_score(CondOT(), t, x_t, v)
    """
    schedule, _ = _inner(path, t, x_t, SMALLEST)
    return -velocity_to_noise(path, t, x_t, velocity) / schedule.beta


def clip_times(path: Path, t: Float[Array, " b"], smallest: float = SMALLEST) -> Float[Array, " b"]:
    """Returns t clipped to [1e-5, 1 - 1e-5] and to the times at which alpha/beta is within [smallest, 1/smallest].

    Here, alpha and beta are the coefficients of data x1 and noise x0 in x_t, from `path.schedule`. Conversions clip
    times because they divide by these numbers, which may be 0 at the ends of a path.

    Example:
        t = clip_times(Polynomial(10.0), t)  # at least 0.316; earlier, x_t equals x0 to five digits
    """
    first, last = _inner_ends(path, smallest)
    return jnp.clip(t, first, last)


def change_path(
    velocity: Callable[[Array, Array, Any], Array], path: Path, new_path: Path
) -> Callable[[Array, Array, Any], Array]:
    """Returns the velocity field for sampling along new_path, computed from a velocity that was trained along path.

    On a path, x_t = alpha x1 + beta x0. Let r be a time on new_path, and t the time at which path has the same ratio
    alpha/beta; bisection finds t. Let s² = (alpha² + beta²)_new(r) / (alpha² + beta²)(t) be the squared scale between
    the two paths. Then v_new(r, x) = (s'/s) x + s t' v(t, x/s), where s' and t' are derivatives with respect to r, t' =
    D_new / (D s²), and D = alpha' beta - beta' alpha (Pokle et al., arXiv 2310.04432). Trajectories of the two fields
    agree up to the factor s, which is 1 if alpha² + beta² = 1 on both paths.

    The time r is clipped to [1e-5, 1 - 1e-5], because D is 0 or infinite at the ends of some paths. If path never has
    the ratio alpha/beta of new_path at time r, t is 0 if this ratio is too small for path, and 1 if it is too large. Do
    not differentiate the field with respect to time: the derivative of the bisection is 0 instead of t'. Raises
    ValueError if path or new_path has a sigma above 0.

    Example:
        x1, nfe = integrate(change_path(velocity, CondOT(), Trigonometric()), x0, num_steps=25)
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
    """Returns the time at which path has the ratio alpha/beta of the coefficients of data and noise in x_t.

    The square of this ratio is the signal-to-noise ratio. alpha or beta may be 0. If path never has the ratio, the
    result is 0 if the ratio is too small for path, and 1 if it is too large.

    Example:
        t = time_of_ratio(VariancePreserving(), alpha, beta)
    """

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        here = path.schedule(middle)
        early = here.alpha * beta < alpha * here.beta
        return jnp.where(early, middle, low), jnp.where(early, high, middle)

    # Each step adds one bit of precision. 40 bits exceed the precision of float32; the error in float64 is 1e-12.
    low, high = jax.lax.fori_loop(0, 40, halve, (jnp.zeros_like(alpha), jnp.ones_like(alpha)))
    return (low + high) / 2


def check_prediction(kind: str, path: Path | None = None) -> None:
    """Raises ValueError unless predictions of this kind can be converted to a velocity (along `path`, if given).

    Example:
        check_prediction("x1", CondOT())
    """
    if kind not in get_args(Prediction):
        raise ValueError(f"prediction is {kind!r}; choose 'velocity', 'x1', 'noise' or 'score'.")
    spread = getattr(path, "sigma", 0.0)
    if kind != "velocity" and spread:
        raise ValueError(f"prediction is {kind!r}, but {_NO_SPREAD.format(spread)}, or predict the velocity.")


def check_no_spread(path: Path) -> None:
    """Raises ValueError if a path adds noise, because a velocity does not determine that noise.

    Example:
        check_no_spread(CondOT())
    """
    spread = getattr(path, "sigma", 0.0)
    if spread:
        raise ValueError(f"{_NO_SPREAD.format(spread)}.")


@functools.lru_cache(maxsize=64)
def _inner_ends(path: Path, smallest: float) -> tuple[float, float]:
    """Returns the times at which alpha/beta is `smallest` and 1/`smallest`, at least 1e-5 away from 0 and 1."""
    with jax.ensure_compile_time_eval():
        first, last = time_of_ratio(path, jnp.array([smallest, 1.0]), jnp.array([1.0, smallest]))
        return max(float(first), SMALLEST), min(float(last), 1 - SMALLEST)


def _inner(path: Path, t: Array, x: Array, smallest: float) -> tuple[Schedule, Array]:
    """Returns the schedule and D at the clipped time, broadcast over x."""
    check_times(t, x)
    check_no_spread(path)
    schedule = schedule_over(path, clip_times(path, t, smallest), x)
    return schedule, _determinant(schedule)


def _determinant(schedule: Schedule) -> Array:
    return schedule.d_alpha * schedule.beta - schedule.d_beta * schedule.alpha
