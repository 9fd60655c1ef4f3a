"""Transforms from bounded to unbounded variables: intervals, positive values and shares that sum to 1.

All transforms are accurate to float32's precision even close to the bounds. For example, `Box` computes u from the
distances to the bounds, and logdet from log-sigmoids of u, which neither overflow nor cancel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from flowgen.arrays import at_least_float32, check_count
from flowgen.transforms.events import (
    EVENT_NDIM,
    Numbers,
    Pair,
    as_field,
    check_values,
    exp_within_range,
    of_events,
    pytree,
    sum_over_event,
)

# The largest distance between the sum of shares and 1 that is taken for rounding, and divided out.
SHARES_TOLERANCE = 1e-3
# The width of an interval in units of the last digit of its bounds, at least. Rounding of the bounds changes the width
# by up to one unit, and therefore logdet by up to 0.01.
LEAST_UNITS = 100


@pytree
@dataclass(frozen=True, eq=False)
class Box:
    """Maps each entry x of an event from its interval (low, high) to a u on the real line.

    If both bounds are finite, u is log((x - low) / (high - x)), and the inverse is a scaled sigmoid. If only `low` is
    finite, u is log(exp(x - low) - 1); if only `high` is finite, u is -log(exp(high - x) - 1). In both of these cases,
    the inverse is a shifted softplus. If neither bound is finite, u is x. Far from the bound, the softplus is close to
    the identity, so errors of u are not amplified in x. Since the softplus depends on the unit of x, scale x to values
    of about 1 first. For values that span several orders of magnitude, use `Positive`.

    `inverse` returns values strictly between the bounds, even if rounding would reach a bound. Two finite bounds must
    therefore differ by at least 100 ε times the larger of their magnitudes, where ε is the machine epsilon of the dtype
    of x: in float32, 1e8 and 1e8 + 1 are even equal.

    low, high: bounds, which are broadcast to the shape of an event; -inf and inf mean no bound.
    event_ndim: number of axes of an event.

    The constructor raises ValueError unless low < high for all entries. `forward` and `inverse` raise ValueError if
    finite bounds are too close together or too large for the dtype; traced bounds are not checked. `forward` raises
    ValueError if an entry of x is not strictly between its bounds; if x or a bound is traced, u is infinite or NaN for
    such an entry instead.

    Example:
        u, logdet = Box(low=jnp.asarray([0.0, -1.0]), high=jnp.asarray([1.0, jnp.inf])).forward(x)
    """

    low: Numbers
    high: Numbers
    event_ndim: int = EVENT_NDIM

    def __post_init__(self):
        low, high = (as_field(self, name) for name in ("low", "high"))
        check_count("event_ndim", self.event_ndim)
        if isinstance(low, Tracer) or isinstance(high, Tracer):
            return
        try:
            low, high = np.broadcast_arrays(low, high)
        except ValueError:
            raise ValueError(f"low has shape {low.shape} and high {high.shape}; give shapes that fit.") from None
        wrong = ~((low < high) & (low < np.inf) & (high > -np.inf))
        if wrong.any():
            raise ValueError(f"low is {low[wrong][0]} and high is {high[wrong][0]}; low must be below high.")

    def forward(self, x: Float[Array, "..."]) -> Pair:
        """Returns u and log|det du/dx|."""
        x, low, high = self._events(x)
        check_values("x", x, (x > low) & (x < high), "values must be strictly between low and high")
        has_low, has_high = jnp.isfinite(low), jnp.isfinite(high)
        above_low, below_high = jnp.where(has_low, x - low, 1), jnp.where(has_high, high - x, 1)
        one = jnp.where(has_low, _inverse_softplus(above_low), -_inverse_softplus(below_high))
        u = jnp.where(has_low & has_high, jnp.log(above_low) - jnp.log(below_high), one)
        u = jnp.where(has_low | has_high, u, x)
        return u, sum_over_event(self.event_ndim, _log_slope(u, low, high))

    def inverse(self, u: Float[Array, "..."]) -> Pair:
        """Returns x and log|det du/dx|."""
        u, low, high = self._events(u)
        has_low, has_high = jnp.isfinite(low), jnp.isfinite(high)
        from_low, from_high = jnp.where(has_low, low, 0), jnp.where(has_high, high, 0)
        width = from_high - from_low
        both = jnp.where(u < 0, from_low + width * jax.nn.sigmoid(u), from_high - width * jax.nn.sigmoid(-u))
        one = jnp.where(has_low, from_low + jax.nn.softplus(u), from_high - jax.nn.softplus(-u))
        x = jnp.where(has_low & has_high, both, jnp.where(has_low | has_high, one, u))
        return _strictly_within(x, low, high), sum_over_event(self.event_ndim, _log_slope(u, low, high))

    def _events(self, x: Any) -> list[Array]:
        """Returns x and the bounds in the dtype and shape of x; see `of_events`."""
        x = at_least_float32("x", x)
        _check_precision(self.low, self.high, x.dtype)
        return of_events(self.event_ndim, x, low=self.low, high=self.high)


@pytree
@dataclass(frozen=True)
class Positive:
    """Maps each positive entry x of an event to u = log x.

    Use this transform for values that span several orders of magnitude, such as scales and rates. Changing the unit of
    x only shifts u. For values of about the same size, use `Box(0.0, jnp.inf)`, whose inverse does not amplify errors
    of u. `inverse` limits x to the normal numbers of its dtype; in float32, this affects u below about -87 and above
    about 88.

    event_ndim: number of axes of an event.

    `forward` raises ValueError if an entry of x is not positive and finite; if x is traced, u is infinite or NaN there.

    Example:
        u, logdet = Positive().forward(x)
    """

    event_ndim: int = EVENT_NDIM

    def __post_init__(self):
        check_count("event_ndim", self.event_ndim)

    def forward(self, x: Float[Array, "..."]) -> Pair:
        """Returns u and log|det du/dx|."""
        (x,) = of_events(self.event_ndim, x)
        check_values("x", x, (x > 0) & (x < jnp.inf), "values must be positive and finite")
        u = jnp.log(x)
        return u, sum_over_event(self.event_ndim, -u)

    def inverse(self, u: Float[Array, "..."]) -> Pair:
        """Returns x and log|det du/dx|."""
        (u,) = of_events(self.event_ndim, u)
        return exp_within_range(u), sum_over_event(self.event_ndim, -u)


@pytree
@dataclass(frozen=True)
class Simplex:
    """Maps k positive shares x on the last axis, which sum to 1, to k - 1 unbounded log-ratios u.

    For i < k, u_i = log(x_i / x_k). The inverse is the softmax of (u, 0). The first k - 1 shares determine the last
    one, so the density of x is defined with respect to the Lebesgue measure of these k - 1 shares:

        log|det du/dx| = -Σ_i log x_i   over all k shares

    Unlike in stick-breaking, the order of the shares does not matter, except that the last one is the denominator.

    event_ndim: number of axes of an event; the last of them contains the shares.

    `forward` divides the shares by their sum, and raises ValueError unless all shares are positive and their sum is
    within 0.001 of 1. If x is traced, these checks are skipped, and u is infinite or NaN if a share is not positive.

    Example:
        u, logdet = Simplex().forward(jnp.asarray([[0.2, 0.3, 0.5]]))  # u `1 2`
    """

    event_ndim: int = EVENT_NDIM

    def __post_init__(self):
        check_count("event_ndim", self.event_ndim)

    def forward(self, x: Float[Array, "..."]) -> Pair:
        """Returns u, whose last axis is shorter by 1, and log|det du/dx|."""
        (x,) = of_events(self.event_ndim, x)
        if x.shape[-1] < 2:
            raise ValueError(f"x has shape {x.shape}; give at least two shares on the last axis.")
        total = x.sum(axis=-1, keepdims=True)
        check_values("x", x, x > 0, "shares must be positive")
        check_values("the sum of x", total, jnp.abs(total - 1) <= SHARES_TOLERANCE, "shares must sum to 1")
        log_x = jnp.log(x) - jnp.log(total)
        return log_x[..., :-1] - log_x[..., -1:], sum_over_event(self.event_ndim, -log_x)

    def inverse(self, u: Float[Array, "..."]) -> Pair:
        """Returns x, whose last axis is longer by 1, and log|det du/dx|."""
        (u,) = of_events(self.event_ndim, u)
        log_x = jax.nn.log_softmax(jnp.pad(u, (*((0, 0),) * (u.ndim - 1), (0, 1))))
        return exp_within_range(log_x), sum_over_event(self.event_ndim, -log_x)


def _inverse_softplus(x: Array) -> Array:
    """Returns log(exp(x) - 1) for x > 0."""
    return x + jnp.log(-jnp.expm1(-x))


def _log_slope(u: Array, low: Array, high: Array) -> Array:
    """Returns log du/dx; dx/du is the product of one sigmoid per finite bound and, if both are finite, of the width."""
    has_low, has_high = jnp.isfinite(low), jnp.isfinite(high)
    log_width = jnp.log(jnp.where(has_low & has_high, high - low, 1))
    return -log_width - jnp.where(has_low, jax.nn.log_sigmoid(u), 0) - jnp.where(has_high, jax.nn.log_sigmoid(-u), 0)


def _check_precision(low: Numbers, high: Numbers, dtype: Any) -> None:
    """Raises ValueError if intervals between finite bounds are too narrow or too large for a dtype; see `Box`."""
    if isinstance(low, Tracer) or isinstance(high, Tracer):
        return
    low, high = np.broadcast_arrays(np.asarray(low, np.float64), np.asarray(high, np.float64))
    limits = jnp.finfo(dtype)
    largest = np.maximum(np.where(np.isfinite(low), np.abs(low), 0), np.where(np.isfinite(high), np.abs(high), 0))
    with np.errstate(over="ignore"):  # of widths above the largest float64
        width = high - low
        units = width / np.maximum(largest * float(limits.eps), float(limits.tiny))
    large = (largest > limits.max) | (np.isfinite(low) & np.isfinite(high) & (width > limits.max))
    for wrong, what, fix in (
        (large, "too large", "divide x and the bounds by a constant"),
        (units < LEAST_UNITS, "too close together", "subtract a constant, such as low, from x and the bounds"),
    ):
        if wrong.any():
            raise ValueError(
                f"low is {low[wrong][0]} and high is {high[wrong][0]}, which are {what} for {dtype}; {fix}."
            )


@jax.custom_jvp
def _strictly_within(x: Array, low: Array, high: Array) -> Array:
    """Returns x, clipped to the least and the largest normal number inside (low, high).

    Only rounding brings x to a bound, so the derivatives are those of x.
    """
    tiny = jnp.finfo(x.dtype).tiny
    least = jnp.maximum(jnp.nextafter(low, jnp.full_like(low, jnp.inf)), low + tiny)
    most = jnp.minimum(jnp.nextafter(high, jnp.full_like(high, -jnp.inf)), high - tiny)
    return jnp.clip(x, jnp.where(jnp.isfinite(low), least, low), jnp.where(jnp.isfinite(high), most, high))


@_strictly_within.defjvp
def _strictly_within_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    return _strictly_within(*primals), tangents[0]
