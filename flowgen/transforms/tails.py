"""The lower tails of the standard normal and the standard logistic distribution, on a logarithmic scale.

Let Φ be the CDF and φ the density of either distribution. Both are symmetric: the upper tail at t is the lower tail at
-t.

    log_cdf(t) = log Φ(t),      log_hazard(t) = log(φ(t) / Φ(t)),      quantile(log Φ(t)) = t

The normal tail is computed from Mills' ratio M(a) = (1 - Φ(a)) / φ(a), which neither underflows nor cancels:

    Φ(-a) = φ(a) M(a),      φ(-a) / Φ(-a) = 1 / M(a)

For all a ≥ 0, (1 + a) M(a) is smooth and between 1 and 1.32. A Chebyshev series in (a - 4) / (a + 4) approximates it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import special

Kind = Literal["gaussian", "logistic"]
LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)
MIDPOINT = 4.0
# Degrees of the Chebyshev series, with relative errors of 4e-8 and 5e-15.
DEGREE, DEGREE_FLOAT64 = 10, 24
# Two steps from the initial guess reach float32's last digits, and three reach float64's.
NEWTON_STEPS = 3


def _scaled_mills(y: np.ndarray) -> np.ndarray:
    """Returns (1 + a) M(a) with y = (a - 4) / (a + 4); SciPy's erfcx(a / √2) is √(2/π) M(a)."""
    a = MIDPOINT * (1 + y) / (1 - y)
    return (1 + a) * math.sqrt(math.pi / 2) * special.erfcx(a / math.sqrt(2))


# Chebyshev's points exclude y = 1.
_SERIES = {
    degree: np.polynomial.Chebyshev.interpolate(_scaled_mills, degree).coef.tolist()
    for degree in (DEGREE, DEGREE_FLOAT64)
}


def mills_ratio(a: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns (1 - Φ(a)) / φ(a) of the standard normal distribution for a ≥ 0.

    Example:
        mills_ratio(jnp.asarray(0.0))  # √(π/2)
    """
    first, *rest = _SERIES[DEGREE_FLOAT64 if a.dtype == jnp.float64 else DEGREE]
    y = (a - MIDPOINT) / (a + MIDPOINT)
    last, before = jnp.zeros_like(y), jnp.zeros_like(y)
    for coefficient in reversed(rest):  # Clenshaw's recurrence
        last, before = coefficient + 2 * y * last - before, last
    return (first + y * last - before) / (1 + a)


@jax.custom_jvp
def normal_log_cdf(t: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns log Φ(t) of the standard normal distribution.

    Example:
        normal_log_cdf(jnp.asarray(-30.0))  # -454.3
    """
    a = jnp.abs(t)
    log_tail = jnp.log(mills_ratio(a)) - 0.5 * jnp.square(t) - LOG_ROOT_2PI
    return jnp.where(t < 0, log_tail, jnp.log1p(-jnp.exp(log_tail)))


@jax.custom_jvp
def normal_log_hazard(t: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns log(φ(t) / Φ(t)) of the standard normal distribution.

    Example:
        normal_log_hazard(jnp.asarray(-30.0))  # log 30.03
    """
    log_mills = jnp.log(mills_ratio(jnp.abs(t)))
    log_density = -0.5 * jnp.square(t) - LOG_ROOT_2PI
    return jnp.where(t < 0, -log_mills, log_density - jnp.log1p(-jnp.exp(log_density + log_mills)))


@jax.custom_jvp
def normal_quantile(log_p: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the quantile t of the standard normal distribution with log Φ(t) = log_p, for log_p up to about log ½.

    Newton steps refine the initial guess, formula 26.2.22 of Abramowitz and Stegun (1964), whose error is below 0.003.

    Example:
        normal_quantile(jnp.asarray(-454.3))  # -30.0
    """
    y = jnp.sqrt(-2 * log_p)
    t = (2.30753 + 0.27061 * y) / (1 + 0.99229 * y + 0.04481 * jnp.square(y)) - y
    for _ in range(NEWTON_STEPS):
        t = t - (normal_log_cdf(t) - log_p) * jnp.exp(-normal_log_hazard(t))
    return t


def logistic_log_cdf(t: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns log(1 / (1 + exp(-t))), the log-CDF of the standard logistic distribution.

    Example:
        logistic_log_cdf(jnp.asarray(-30.0))  # -30.0
    """
    return jax.nn.log_sigmoid(t)


def logistic_log_hazard(t: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the log of density / CDF of the standard logistic distribution, which is log(1 / (1 + exp(t))).

    Example:
        logistic_log_hazard(jnp.asarray(-30.0))  # -9e-14
    """
    return jax.nn.log_sigmoid(-t)


def logistic_quantile(log_p: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns log(p / (1 - p)), the quantile of the standard logistic distribution at the level p = exp(log_p).

    Example:
        logistic_quantile(jnp.asarray(-30.0))  # -30.0
    """
    return log_p - jnp.log(-jnp.expm1(log_p))


@normal_log_cdf.defjvp
def _normal_log_cdf_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (t,), (change,) = primals, tangents
    return normal_log_cdf(t), jnp.exp(normal_log_hazard(t)) * change


@normal_log_hazard.defjvp
def _normal_log_hazard_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (t,), (change,) = primals, tangents
    log_hazard = normal_log_hazard(t)
    return log_hazard, -(t + jnp.exp(log_hazard)) * change


@normal_quantile.defjvp
def _normal_quantile_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (log_p,), (change,) = primals, tangents
    t = normal_quantile(log_p)
    return t, jnp.exp(-normal_log_hazard(t)) * change


class Tail(NamedTuple):
    """The lower tail of a symmetric distribution: functions of arrays of any shape."""

    log_cdf: Callable[[Array], Array]
    log_hazard: Callable[[Array], Array]
    quantile: Callable[[Array], Array]
    std: float


TAILS: dict[str, Tail] = {
    "gaussian": Tail(normal_log_cdf, normal_log_hazard, normal_quantile, 1.0),
    "logistic": Tail(logistic_log_cdf, logistic_log_hazard, logistic_quantile, math.pi / math.sqrt(3)),
}
