"""Transport plans between two batches. Exact plans are computed on the host, entropic plans in the compiled program."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from scipy.optimize import linear_sum_assignment

from flowgen.backend import call_host, keep_axes, varying

# Sinkhorn potentials speed up the assignment. Their settings are epsilon, in units of the mean cost, and the number of
# sweeps.
ASSIGNMENT_EPSILON, ASSIGNMENT_SWEEPS = 0.02, 5
# Epsilon starts at the mean cost, and is divided by ANNEALING after each stage. All stages except the last are solved
# only to the tolerance ROUGHLY, in at most ROUGH_SWEEPS sweeps.
ANNEALING, ROUGHLY, ROUGH_SWEEPS = 4.0, 0.1, 50
# Over-relaxation factor of a sweep while the error decreases (Thibault et al., arXiv 1711.01851).
OVER_RELAXATION = 1.8


class EntropicPlan(NamedTuple):
    """A transport plan over a batch. Row sums are exact; `error` is the mean relative error of the column sums.

    log_plan: logarithm of b² times the plan; each row of this product has mean 1, and each column approximately.
    sweeps: number of sweeps in the last stage.
    """

    log_plan: Float[Array, "b b"]
    error: Float[Array, ""]
    sweeps: Int[Array, ""]


def entropic_plan(
    cost: Float[Array, "b b"], allowed: Bool[Array, "b b"], epsilon: float, *, tolerance: float, max_sweeps: int
) -> EntropicPlan:
    """Returns the plan that minimises cost minus epsilon times entropy over the `allowed` pairs.

    The method is Sinkhorn's iteration in the log domain, in stages with decreasing epsilon. After each stage, the
    potentials are added to the matrix. This keeps the potentials of the next stage small and the marginals accurate to
    float32. The last stage ends when the mean relative errors of the row and column sums are within `tolerance`, or
    after max_sweeps sweeps, possibly with a larger `error`.

    epsilon is in units of the mean cost. The diagonal must be allowed. If all costs are 0, the plan is uniform.
    """
    solve = partial(_entropic_plan, epsilon=epsilon, tolerance=tolerance, max_sweeps=max_sweeps)
    return EntropicPlan(*keep_axes(solve, cost, allowed, named=[(cost, "b m")], out=("b m", "", "")))


def _entropic_plan(
    cost: Float[Array, "b b"], allowed: Bool[Array, "b b"], epsilon: float, tolerance: float, max_sweeps: int
) -> tuple[Float[Array, "b b"], Float[Array, ""], Int[Array, ""]]:
    reduced = jnp.where(allowed, -lax.stop_gradient(relative_cost(cost)), -jnp.inf)
    stages = _falling(epsilon)
    rough = len(stages) - 1
    settings = (
        jnp.array(stages, cost.dtype),
        jnp.array([ROUGHLY] * rough + [tolerance / 2], cost.dtype),
        jnp.array([ROUGH_SWEEPS] * rough + [max_sweeps], jnp.int32),
    )

    def stage(reduced, setting):
        epsilon, tolerance, most = setting
        f, g, sweeps = _potentials(reduced / epsilon, tolerance, most)
        return reduced + epsilon * (f[:, None] + g[None, :]), sweeps

    reduced, sweeps = lax.scan(stage, reduced, settings)
    logits = reduced / epsilon
    log_size = jnp.log(jnp.asarray(len(cost), cost.dtype))
    logits = logits - jax.nn.logsumexp(logits, axis=1, keepdims=True) + log_size
    columns = jnp.exp(jax.nn.logsumexp(logits, axis=0) - log_size)
    return logits, jnp.abs(columns - 1).mean(), sweeps[-1]


def relative_cost(cost: Float[Array, "b m"]) -> Float[Array, "b m"]:
    """Returns costs of any magnitude divided by their mean; zeros if all are 0."""
    # Clip the divisor to the range of numbers by which float32 can divide.
    scaled = cost / jnp.clip(jnp.abs(cost).max(), 1e-30, 1e30)
    mean = scaled.mean()
    return scaled / jnp.where(mean == 0, 1, mean)


def _falling(epsilon: float) -> list[float]:
    """Returns the epsilons of all stages, decreasing from 1 to the requested one."""
    stages, current = [], 1.0
    while current > epsilon:
        stages.append(current)
        current /= ANNEALING
    return [*stages, epsilon]


def _potentials(
    logits: Float[Array, "b b"], tolerance: Float[Array, ""], most: Int[Array, ""]
) -> tuple[Float[Array, " b"], Float[Array, " b"], Int[Array, ""]]:
    """Returns f, g and the number of sweeps.

    The rows and columns of exp(logits + f + g) have mean 1 within the tolerance, unless `most` sweeps do not suffice.
    """
    log_size = jnp.log(jnp.asarray(len(logits), logits.dtype))

    def sweep(state):
        f, g, last, relaxation, count = state
        exact = log_size - jax.nn.logsumexp(logits + g[None, :], axis=1)
        rows = jnp.abs(jnp.expm1(f - exact)).mean()
        f = f + relaxation * (exact - f)
        exact = log_size - jax.nn.logsumexp(logits + f[:, None], axis=0)
        columns = jnp.abs(jnp.expm1(g - exact)).mean()
        g = g + relaxation * (exact - g)
        error = jnp.maximum(rows, columns)
        return f, g, error, jnp.where(error < last, OVER_RELAXATION, 1.0).astype(f.dtype), count + 1

    def unfinished(state):
        return (state[2] > tolerance) & (state[4] < most)

    zeros, one = jnp.zeros(len(logits), logits.dtype), jnp.ones((), logits.dtype)
    start = varying((zeros, zeros, jnp.inf * one, one, jnp.int32(0)), logits)
    f, g, _, _, count = lax.while_loop(unfinished, sweep, start)
    return f, g, count


def sinkhorn_potentials(logits: Float[Array, "b b"], num_sweeps: int) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Returns f and g such that the rows and columns of exp(logits_ij + f_i + g_j) have mean 1.

    After num_sweeps sweeps of Sinkhorn's iteration, the columns have mean 1 exactly, and the rows approximately. The
    sweeps are in the log domain, so finite logits give finite potentials. If num_sweeps is 0, f and g are 0.

    Example:
        f, g = sinkhorn_potentials(-cost / epsilon, 50)
    """
    log_size = jnp.log(len(logits))

    def solve(logits):
        def sweep(_, potentials):
            _, g = potentials
            f = log_size - jax.nn.logsumexp(logits + g[None, :], axis=1)
            return f, log_size - jax.nn.logsumexp(logits + f[:, None], axis=0)

        zeros = jnp.zeros(len(logits), logits.dtype)
        return jax.lax.fori_loop(0, num_sweeps, sweep, varying((zeros, zeros), logits))

    return keep_axes(solve, logits, named=[(logits, "b m")], out=("b", "m"))


def corrected_log_weight(logits: Float[Array, "b b"], num_sweeps: int) -> Float[Array, " b"]:
    """Returns the log-weights logits_ii + f_i + g_i of the pairs (i, i) in the entropic plan over the batch."""

    def solve(logits):
        f, g = sinkhorn_potentials(logits, num_sweeps)
        return jnp.diagonal(logits) + f + g

    return keep_axes(solve, logits, named=[(logits, "b m")], out="b")


def assignment(cost: Float[Array, "b b"]) -> Int[Array, " b"]:
    """Returns the column of each row in the assignment with the smallest total cost. Scipy computes the assignment on
    the host.

    First, Sinkhorn potentials are subtracted from the costs: one constant from each row and one from each column. This
    speeds up scipy without changing the optimal assignment. Costs that are not finite count as 0.
    """
    return keep_axes(_assignment, cost, named=[(cost, "b m")], out="b")


def _assignment(cost: Float[Array, "b b"]) -> Int[Array, " b"]:
    cost = relative_cost(lax.stop_gradient(jnp.where(jnp.isfinite(cost), cost, 0)))
    f, g = sinkhorn_potentials(-cost / ASSIGNMENT_EPSILON, ASSIGNMENT_SWEEPS)
    columns = jax.ShapeDtypeStruct((len(cost),), jnp.int32)
    return call_host(_solved, columns, cost, ASSIGNMENT_EPSILON * f, ASSIGNMENT_EPSILON * g)


def _solved(*arrays: Any) -> Int[np.ndarray, " b"]:
    """Returns the assignment for costs minus row and column potentials, given as arrays or buffers on the host."""
    cost, rows, columns = (np.asarray(x).astype(np.float64) for x in arrays)
    return linear_sum_assignment(cost - rows[:, None] - columns[None, :])[1].astype(np.int32)
