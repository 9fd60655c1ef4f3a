"""What weights and learned fields are worth: effective sample size, tilt against coupling, path energy, distances."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowgen.matching.couplings import Cost, assignment, check_positive, pairwise_cost
from flowgen.matching.solvers import Velocity, time_grid, trajectory


class WeightReport(NamedTuple):
    """What Gibbs weights do to a block of source and data samples.

    ess: effective sample size as a share of the pairs. row_std, column_std, interaction_std: of the three parts of
    log w: of the source (row tilt), of the data (column tilt), of the pair. Only the last is coupling.
    source_tilt, data_tilt: relative variances of the factors by which w re-weights source and data.
    """

    ess: Float[Array, ""]
    row_std: Float[Array, ""]
    column_std: Float[Array, ""]
    interaction_std: Float[Array, ""]
    source_tilt: Float[Array, ""]
    data_tilt: Float[Array, ""]


def effective_sample_size(log_weight: Float[Array, " b"]) -> Float[Array, ""]:
    """Returns (Σw)² / (b Σw²), between 1/b and 1.

    Example:
        ess = effective_sample_size(log_weight)
    """
    w = jnp.exp(log_weight - log_weight.max())
    return jnp.square(w.sum()) / (len(w) * jnp.square(w).sum())


def weight_report(
    x0: Float[Array, "b *event"], x1: Float[Array, "m *event"], epsilon: float, cost: Cost = "euclidean"
) -> WeightReport:
    """Returns what exp(-cost/epsilon) does to all pairs of a block; costs b x m memory.

    Where column_std exceeds interaction_std the weights mostly change which data are learned, not the coupling:
    raise epsilon, put the data on a sphere, or use `GibbsWeights(sinkhorn_sweeps=...)`.

    Example:
        report = weight_report(x0, x1, epsilon=2.0)
    """
    check_positive("epsilon", epsilon)
    logits = -pairwise_cost(x0, x1, cost) / epsilon
    row = logits.mean(axis=1, keepdims=True)
    column = logits.mean(axis=0, keepdims=True)
    interaction = logits - row - column + logits.mean()
    return WeightReport(
        effective_sample_size(logits.reshape(-1)),
        row.std(),
        column.std(),
        interaction.std(),
        _relative_variance(jax.nn.logsumexp(logits, axis=1)),
        _relative_variance(jax.nn.logsumexp(logits, axis=0)),
    )


def choose_epsilon(
    x0: Float[Array, "b *event"],
    x1: Float[Array, "b *event"],
    *,
    ess: float | None = 0.5,
    tilt: float | None = None,
    cost: Cost = "euclidean",
) -> float:
    """Returns the smallest epsilon at which independent pairs keep an effective sample size, or a bounded tilt.

    ess: the share to keep, of pairs (x0_i, x1_i). tilt: instead (ess None), the largest relative variance that either
    marginal's re-weighting may have. Bisection on log epsilon. Raises ValueError unless exactly one target is given.

    Example:
        epsilon = choose_epsilon(x0, x1, ess=0.5)
    """
    if (ess is None) == (tilt is None):
        raise ValueError(f"ess is {ess} and tilt is {tilt}; give exactly one target, the other as None.")
    if ess is not None and not 0 < ess < 1:
        raise ValueError(f"ess is {ess}; it is a share, between 0 and 1.")
    costs = pairwise_cost(x0, x1, cost)

    def kept(log_epsilon):
        logits = -costs / jnp.exp(log_epsilon)
        if ess is not None:
            return effective_sample_size(jnp.diagonal(logits)) >= ess
        sides = [_relative_variance(jax.nn.logsumexp(logits, axis=axis)) for axis in (0, 1)]
        return jnp.maximum(*sides) <= check_tilt(tilt)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        enough = kept(middle)
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    centre = jnp.log(costs.mean())
    bounds = jax.lax.fori_loop(0, 50, halve, (centre - 12.0, centre + 12.0))
    return float(jnp.exp(bounds[1]))


def check_tilt(tilt: float | None) -> float:
    """Returns the tilt target; ValueError unless it is a positive number.

    Example:
        tilt = check_tilt(0.05)
    """
    check_positive("tilt", 0.0 if tilt is None else tilt)
    return float(tilt or 0.0)


class PathReport(NamedTuple):
    """Of the paths that a field generates. energy: E ∫|v|² dt. curvature: E ∫|v - (x(1) - x(0))|² dt, 0 for lines."""

    energy: Float[Array, ""]
    curvature: Float[Array, ""]


def path_report(
    velocity: Velocity, x0: Float[Array, "b *event"], cond: Any = None, *, num_steps: int = 100
) -> PathReport:
    """Returns energy and curvature of the generated paths, by rk4 and the trapezium rule on its grid.

    Example:
        report = path_report(velocity, x0)
    """
    states, _ = trajectory(velocity, x0, cond, method="rk4", num_steps=num_steps)
    times = time_grid(num_steps, None)
    speeds = jax.lax.map(lambda pair: velocity(jnp.full(len(x0), pair[0]), pair[1], cond), (times, states))
    chord = (states[-1] - states[0])[None]

    def integral(x):
        values = jnp.square(x).reshape(len(times), len(x0), -1).sum(axis=2).mean(axis=1)
        return jnp.trapezoid(values, times)

    return PathReport(integral(speeds), integral(speeds - chord))


def signed_path_energy(energy: Float[Array, ""] | float, squared_distance: Float[Array, ""] | float) -> Any:
    """Returns (path energy - W2²) / W2² with its sign: below 0 the paths are too short to transport the marginals.

    The usual normalised path energy is its absolute value, which hides that case.

    Example:
        npe = signed_path_energy(path_report(velocity, x0).energy, wasserstein(x0, x1) ** 2)
    """
    return (energy - squared_distance) / squared_distance


def wasserstein(x: Float[Array, "b *event"], y: Float[Array, "b *event"]) -> Float[Array, ""]:
    """Returns the 2-Wasserstein distance of two equally large samples, exactly; its floor is that of two fresh samples.

    Example:
        distance, floor = wasserstein(generated, data), wasserstein(data, more_data)
    """
    cost = pairwise_cost(x, y, "sqeuclidean")
    partner = assignment(cost)
    return jnp.sqrt(jnp.take_along_axis(cost, partner[:, None], axis=1).mean())


def _relative_variance(log_factor: Float[Array, " b"]) -> Float[Array, ""]:
    factor = jnp.exp(log_factor - log_factor.max())
    return factor.var() / jnp.square(factor.mean())
