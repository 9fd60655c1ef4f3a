"""The effective sample size of weights, and systematic resampling.

Weights are given by their logarithms, in nats, so that they neither overflow nor underflow. A log weight of -inf is a
weight of 0.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from flowgen.arrays import at_least_float32, check_floating, shown
from flowgen.backend import keep_axes


def check_log_weight(log_weight: Any, name: str = "log_weight") -> None:
    """Raises ValueError unless the log weights are floating-point numbers without NaN and +inf.

    The values are checked only outside jit and if this host can access all of them.

    Example:
        check_log_weight(log_weight)
    """
    check_floating(name, log_weight)
    if isinstance(log_weight, Tracer) or not getattr(log_weight, "is_fully_addressable", True):
        return
    values = np.asarray(log_weight, np.float64)
    wrong = {"NaN": np.isnan(values).sum(), "+inf": np.isposinf(values).sum()}
    found = " and ".join(f"{count} × {kind}" for kind, count in wrong.items() if count)
    if found:
        raise ValueError(
            f"{name} contains {found} among {values.size} values; log weights must be numbers or -inf (weight 0), so "
            "check the two log-densities at these samples."
        )


def weights_along(log_weight: Any, axis: int = -1, name: str = "log_weight") -> Array:
    """Returns log weights in at least float32, after checks.

    Raises ValueError if there is no log weight along `axis`, or in the same cases as `check_log_weight`.

    Example:
        log_weight = weights_along(log_weight)
    """
    log_weight = at_least_float32(name, log_weight)
    if not log_weight.ndim or log_weight.shape[axis] == 0:
        raise ValueError(f"{name} is {shown(log_weight)}; give at least one log weight.")
    check_log_weight(log_weight, name)
    return log_weight


def check_any_weight(log_weight: Array, name: str = "log_weight") -> None:
    """Raises ValueError if all weights are 0; only outside jit, and only if this host has all of them.

    Example:
        check_any_weight(log_weight)
    """
    if isinstance(log_weight, Tracer) or not log_weight.is_fully_addressable:
        return
    if np.isneginf(np.asarray(log_weight)).all():
        raise ValueError(
            f"{name} is -inf for all {log_weight.size} samples, so all weights are 0; no sample lies in the support, "
            "so draw more samples, or samples closer to the target."
        )


def check_share(ess: float) -> None:
    """Raises ValueError unless ess, an effective sample size as a share of the samples, is above 0 and below 1.

    Example:
        check_share(0.5)
    """
    if not 0 < ess < 1:
        raise ValueError(f"ess is {ess}; it must be above 0 and below 1.")


def effective_sample_size(log_weight: Float[Array, "*b"], axis: int = -1) -> Float[Array, "*rest"]:
    """Returns Kish's effective sample size as a share of the b samples along `axis`: (Σw)² / (b Σw²).

    The share is between 1/b and 1, or 0 if all weights w are 0. Multiply it by b for the effective number of samples.
    It is computed in at least float32.

    Raises ValueError if there is no log weight along `axis` or, outside jit, if a log weight is NaN or +inf.

    Example:
        ess = effective_sample_size(log_weight)
    """
    log_weight = weights_along(log_weight, axis)
    top = log_weight.max(axis=axis, keepdims=True)
    w = jnp.exp(log_weight - jnp.where(jnp.isneginf(top), 0, top))
    square_of_sum, sum_of_squares = jnp.square(w.sum(axis=axis)), jnp.square(w).sum(axis=axis)
    return square_of_sum / jnp.where(sum_of_squares == 0, 1, log_weight.shape[axis] * sum_of_squares)


def log_mean_exp(x: Float[Array, "*b"], axis: int = -1) -> Float[Array, "*rest"]:
    """Returns the log of the mean of exp(x), computed in at least float32.

    Example:
        log_normaliser = log_mean_exp(log_weight)
    """
    x = at_least_float32("x", x)
    return jax.nn.logsumexp(x, axis=axis) - jnp.log(x.shape[axis])


def systematic_indices(
    log_weight: Float[Array, " b"], num: int, offset: Float[Array, ""] | float = 0.5
) -> Int[Array, " num"]:
    """Returns `num` indices in ascending order; index i appears num w_i / Σw times, rounded up or down.

    The points (k + offset) / num, k = 0 ... num - 1, are looked up in the cumulative weights. If `offset` is uniform in
    [0, 1), this is systematic resampling, and index i appears num w_i / Σw times on average. An index with weight 0
    never appears. The computation uses at least float32; draw `offset` in float32 too.

    Example:
        chosen = x[systematic_indices(log_weight, len(x), jax.random.uniform(key))]
    """
    log_weight = at_least_float32("log_weight", log_weight)

    def chosen(log_weight, offset):
        ends = jnp.cumsum(jax.nn.softmax(log_weight))
        ends = ends / ends[-1]
        points = (jnp.arange(num) + jnp.asarray(offset, ends.dtype)) / num
        # Rounding may bring the last point to 1, behind all weights.
        return jnp.minimum(jnp.searchsorted(ends, points, side="right"), jnp.searchsorted(ends, ends[-1]))

    # As many indices as weights are sharded like the weights.
    out = "b" if num == len(log_weight) else "num"
    return keep_axes(chosen, log_weight, offset, named=[(log_weight, "b")], out=out)
