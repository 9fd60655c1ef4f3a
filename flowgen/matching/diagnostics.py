"""Diagnostics of pair weights (effective sample size, tilt) and of learned velocity fields (path energy, distances)."""

from __future__ import annotations

import dataclasses
import warnings
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowgen.backend import take_rows
from flowgen.matching.checks import check_batch, check_positive
from flowgen.matching.couplings import Cost, GibbsWeights, cost_matrix, paired_cost, square_root
from flowgen.matching.plans import assignment, corrected_log_weight
from flowgen.matching.solvers import Velocity, time_grid, trajectory
from flowgen.weights import check_share, effective_sample_size, systematic_indices

# Number of samples of noise and of data that are used when every x0 is compared with every x1.
BLOCK = 1024


class WeightReport(NamedTuple):
    """Statistics of the Gibbs weights w of all pairs of a noise sample and a data sample.

    ess: effective sample size as a share of the pairs.
    row_std, column_std, interaction_std: standard deviations of the parts of log w that depend on the noise alone, on
    the data alone, and on the pair. Only the third part couples noise and data. The first two parts tilt noise and
    data, which means that they change the distributions of noise and data.
    noise_tilt, data_tilt: relative variances (variance / mean²) of the factors by which w re-weights the samples of
    noise and of data.
    """

    ess: Float[Array, ""]
    row_std: Float[Array, ""]
    column_std: Float[Array, ""]
    interaction_std: Float[Array, ""]
    noise_tilt: Float[Array, ""]
    data_tilt: Float[Array, ""]


def weight_report(
    x0: Float[Array, "b *event"], x1: Float[Array, "m *event"], epsilon: float, cost: Cost = "euclidean"
) -> WeightReport:
    """Returns statistics of the Gibbs weights exp(-cost/epsilon) of all pairs (x0_i, x1_j) of noise and data.

    If the row_std or column_std of the report exceeds its interaction_std, the weights change the distribution of noise
    or data more than they couple the two; `warn_if_tilted(report)` warns of this. All three standard deviations are
    inversely proportional to epsilon, so their ratios depend only on the samples and the cost. The report does not
    describe the corrected weights of `GibbsWeights(sinkhorn_sweeps=...)`, which have almost no tilt. The computation
    stores a matrix of shape `b m`.

    Example:
        report = weight_report(x0, x1, epsilon=2.0)
    """
    check_positive("epsilon", epsilon)
    logits = -cost_matrix(x0, x1, cost) / epsilon
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


def warn_if_tilted(report: WeightReport) -> None:
    """Warns (UserWarning) if Gibbs weights change the distribution of noise or data more than they couple the two.

    This is the case if the row_std or column_std of the report exceeds its interaction_std.

    Example:
        warn_if_tilted(weight_report(x0, x1, epsilon=2.0))
    """
    parts = {"noise": float(report.row_std), "data": float(report.column_std)}
    coupling = float(report.interaction_std)
    tilted = [f"{std:.2g} from the {name}" for name, std in parts.items() if std > coupling]
    if tilted:
        warnings.warn(
            f"Gibbs weights tilt noise or data more than they couple them: the standard deviation of log w is "
            f"{' and '.join(tilted)}, but {coupling:.2g} from the pairing. Set sinkhorn_sweeps to about 10, increase "
            "epsilon (which weakens every part), or put the data on a sphere with flowgen.matching.to_sphere.",
            UserWarning,
            stacklevel=2,
        )


class TiltedDistances(NamedTuple):
    """2-Wasserstein distances (W2) by which Gibbs weights tilt (change) the distributions of noise and of data.

    noise, data: W2 between the given samples and their tilted version, for noise and for data.
    noise_floor, data_floor: W2 between two halves of the given samples. A comparison of independent samples cannot
    reveal differences below this floor. `noise` and `data` do reveal them, because they compare samples with a tilted
    version of the same samples.
    """

    noise: Float[Array, ""]
    data: Float[Array, ""]
    noise_floor: Float[Array, ""]
    data_floor: Float[Array, ""]


def tilted_wasserstein(
    x0: Float[Array, "b *event"], x1: Float[Array, "m *event"], epsilon: float, cost: Cost = "euclidean"
) -> TiltedDistances:
    """Returns the 2-Wasserstein distances between noise x0 and tilted noise, and between data x1 and tilted data.

    Let mu and nu be the distributions of noise and data, and w = exp(-cost/epsilon). A velocity network trained with
    these pair weights learns to transport tilted noise f(x) mu(dx) to tilted data g(y) nu(dy). The factors are f(x) =
    E_data[w(x, .)] / E[w] and g(y) = E_noise[w(., y)] / E[w], estimated by means over x1 and x0. `resample` turns x0
    with weights f, and x1 with weights g, into samples of equal weight, and `wasserstein` compares these with x0 and
    x1. The time on the host grows with the cube of the number of samples: seconds for 1,000.

    Example:
        distances = tilted_wasserstein(x0, x1, epsilon=2.0)
    """
    check_positive("epsilon", epsilon)
    if min(len(x0), len(x1)) < 2:
        raise ValueError(f"x0 has {len(x0)} samples and x1 has {len(x1)}; each needs at least two.")
    logits = -cost_matrix(x0, x1, cost) / epsilon
    noise, data = (jax.nn.logsumexp(logits, axis=axis) for axis in (1, 0))
    return TiltedDistances(
        wasserstein(x0, resample(x0, noise)), wasserstein(x1, resample(x1, data)), _floor(x0), _floor(x1)
    )


def resample(x: Float[Array, "b *event"], log_weight: Float[Array, " b"]) -> Float[Array, "b *event"]:
    """Returns b samples of equal weight, chosen from the b samples in x according to the weights w = exp(log_weight).

    Sample i appears b w_i / Σw times, rounded up or down so that the total is b.

    This is systematic resampling with a fixed offset, so it needs no key. With equal weights, the result is x itself.

    Raises ValueError unless there is one log weight per sample, and at least one sample.

    Example:
        tilted = resample(x, log_weight)
    """
    if log_weight.shape != x.shape[:1] or len(x) == 0:
        raise ValueError(
            f"log_weight has shape {log_weight.shape} for {len(x)} samples; give at least one sample, and one log "
            "weight per sample."
        )
    return take_rows(x, systematic_indices(log_weight, len(x)))


def choose_epsilon(
    x0: Float[Array, "b *event"],
    x1: Float[Array, "b *event"],
    *,
    ess: float | None = 0.5,
    tilt: float | None = None,
    cost: Cost = "euclidean",
    sinkhorn_sweeps: int = 0,
) -> float:
    """Returns the smallest epsilon at which the Gibbs weights of noise x0 and data x1 meet the target `ess` or `tilt`.

    The pairs (x0_i, x1_i) must be random. With `tilt` or `sinkhorn_sweeps`, the computation stores a matrix of b²
    costs.

    ess: lower bound on the effective sample size, as a share of the pairs (x0_i, x1_i); above 0 and below 1.
    tilt: upper bound on the relative variances (variance / mean²) of the factors by which the weights re-weight noise
    and data; to use this target, set ess to None.
    sinkhorn_sweeps: number of Sinkhorn sweeps that correct the weights before their ess is computed; no effect with
    `tilt`.

    Raises ValueError if not exactly one of ess and tilt is given, if the target is out of range, or if the mean cost is
    0 or not finite.

    Example:
        epsilon = choose_epsilon(x0, x1, ess=0.5)
    """
    check_batch(x0, x1)
    if (ess is None) == (tilt is None):
        raise ValueError(f"ess is {ess} and tilt is {tilt}; give exactly one target, and set the other to None.")
    if ess is not None:
        check_share(ess)
    if tilt is not None:
        check_positive("tilt", tilt)
    costs = cost_matrix(x0, x1, cost) if tilt is not None or sinkhorn_sweeps else paired_cost(x0, x1, cost)
    scale = float(jnp.abs(costs).mean())
    if not 0 < scale < float("inf"):
        raise ValueError(f"the mean cost is {scale}; to choose epsilon, the costs must be finite and not all 0.")
    return scale * float(_smallest_epsilon(costs, scale, ess=ess, tilt=tilt, sinkhorn_sweeps=sinkhorn_sweeps))


@partial(jax.jit, static_argnames="sinkhorn_sweeps")
def _smallest_epsilon(
    costs: Float[Array, "..."],
    scale: Array | float,
    *,
    ess: Array | float | None,
    tilt: Array | float | None,
    sinkhorn_sweeps: int,
) -> Float[Array, ""]:
    """Returns the epsilon of `choose_epsilon` in units of `scale`, the mean cost, found by bisection."""

    def kept(log_epsilon):
        logits = -costs / (scale * jnp.exp(log_epsilon))
        if ess is not None:
            log_weight = corrected_log_weight(logits, sinkhorn_sweeps) if sinkhorn_sweeps else logits
            return effective_sample_size(log_weight) >= ess
        sides = [_relative_variance(jax.nn.logsumexp(logits, axis=axis)) for axis in (0, 1)]
        return jnp.maximum(*sides) <= jnp.asarray(tilt)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        enough = kept(middle)
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    # The search covers epsilon from 6e-6 to 2e5 in units of the mean cost. It is accurate to the last digit of float32.
    bounds = jax.lax.fori_loop(0, 30, halve, (jnp.array(-12.0), jnp.array(12.0)))
    return jnp.exp(bounds[1])


def fit_epsilon(coupling: GibbsWeights, x0: Float[Array, "b *event"], x1: Float[Array, "b *event"]) -> GibbsWeights:
    """Returns the coupling with an epsilon chosen from noise x0 and data x1 by `choose_epsilon`.

    The target is the coupling's `tilt` if that is not None, otherwise its `ess`. With a tilt or Sinkhorn sweeps, only
    the first 1,024 pairs are used. A coupling that already has an epsilon is returned unchanged.

    Example:
        coupling = fit_epsilon(GibbsWeights(ess=0.5), x0, x1)
    """
    if coupling.epsilon is not None:
        return coupling
    by_block = coupling.tilt is not None or coupling.sinkhorn_sweeps > 0
    block = BLOCK if by_block else len(x0)
    epsilon = choose_epsilon(
        x0[:block],
        x1[:block],
        ess=coupling.ess if coupling.tilt is None else None,
        tilt=coupling.tilt,
        cost=coupling.cost,
        sinkhorn_sweeps=coupling.sinkhorn_sweeps,
    )
    return dataclasses.replace(coupling, epsilon=epsilon)


class PathReport(NamedTuple):
    """Mean energy and curvature of the paths x(t) that a velocity field v generates.

    E is the mean over the paths, and |.|² is the sum of squares over dimensions.

    energy: E ∫|v|² dt.
    curvature: E ∫|v - (x(1) - x(0))|² dt, which is 0 for straight paths of constant speed.
    """

    energy: Float[Array, ""]
    curvature: Float[Array, ""]


def path_report(
    velocity: Velocity, x0: Float[Array, "b *event"], cond: Any = None, *, num_steps: int = 100
) -> PathReport:
    """Returns the mean energy and curvature of the paths that start at the noise x0 and follow `velocity`.

    The method is rk4 with num_steps equal steps; the trapezoidal rule computes the integrals over time.

    Outside jit, every call compiles its loops again, so apply jit to the calling function.

    Raises ValueError if x0 contains no samples, and in the same cases as `trajectory`.

    Example:
        report = path_report(velocity, x0)
    """
    if len(x0) == 0:
        raise ValueError("x0 contains no samples; give at least one.")
    states, _ = trajectory(velocity, x0, cond, method="rk4", num_steps=num_steps)
    times = time_grid(num_steps, None, x0)
    speeds = jax.lax.map(lambda pair: velocity(jnp.full(len(x0), pair[0]), pair[1], cond), (times, states))
    chord = (states[-1] - states[0])[None]

    def integral(x):
        values = jnp.square(x.astype(times.dtype)).reshape(len(times), len(x0), -1).sum(axis=2).mean(axis=1)
        return jnp.trapezoid(values, times)

    return PathReport(integral(speeds), integral(speeds - chord))


def signed_path_energy(energy: Float[Array, ""] | float, squared_distance: Float[Array, ""] | float) -> Any:
    """Returns the signed path energy, (energy - squared_distance) / squared_distance.

    energy: path energy from `path_report`.
    squared_distance: squared 2-Wasserstein distance between noise and data.

    If the result is negative, the paths are too short to transport the distribution of noise to the distribution of
    data. The usual normalised path energy is the absolute value of the result, which hides this case.

    Example:
        npe = signed_path_energy(path_report(velocity, x0).energy, wasserstein(x0, x1) ** 2)
    """
    return (energy - squared_distance) / squared_distance


def wasserstein(x: Float[Array, "b *event"], y: Float[Array, "b *event"]) -> Float[Array, ""]:
    """Returns the exact 2-Wasserstein distance between two samples of equal size.

    Even between two samples of the same distribution, the distance is positive; the distance between two samples of
    data serves as a baseline. Raises ValueError if x and y differ in shape.

    Example:
        distance, floor = wasserstein(generated, data), wasserstein(data, more_data)
    """
    check_batch(x, y)
    partner = assignment(cost_matrix(x, y, "sqeuclidean"))
    return square_root(paired_cost(x, take_rows(y, partner), "sqeuclidean").mean())


def _relative_variance(log_factor: Float[Array, " b"]) -> Float[Array, ""]:
    factor = jnp.exp(log_factor - log_factor.max())
    return factor.var() / jnp.square(factor.mean())


def _floor(x: Array) -> Float[Array, ""]:
    half = len(x) // 2
    # Each half takes every other sample, because the samples may be ordered.
    return wasserstein(*(take_rows(x, jnp.arange(first, 2 * half, 2)) for first in (0, 1)))
