"""Importance weights of samples of a flow, which estimate a target's averages and normalising constant.

Let q be the density of the flow, and p̃ = Z p the density of the target up to an unknown normalising constant Z. Then

    w = p̃(x) / q(x),  x ~ q        Z = E_q[w]        E_p[f] = E_q[w f] / E_q[w]

The functions of this module expect log w in nats, and compute in at least float32. A log weight of -inf is a weight of
0: the sample lies outside the support of p. All samples of an estimate must have the same condition; for several
conditions, map the functions over them with `jax.vmap`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Key, Num, PyTree

from flowgen.arrays import at_least_float32, check_count, check_floating, check_key, shown
from flowgen.backend import nan_if, take_rows
from flowgen.conditioning import AnyCondition
from flowgen.decoding.plan import Plan
from flowgen.decoding.sampler import sample_and_log_prob
from flowgen.flows.block import Variables
from flowgen.flows.density import Flow
from flowgen.inference.densities import LogDensity, density_at
from flowgen.weights import check_any_weight, check_log_weight, log_mean_exp, systematic_indices, weights_along


class WeightedSamples(NamedTuple):
    """Samples with their log weights, in nats.

    Weighted averages over x estimate averages under the target; see `self_normalised`.
    """

    x: Float[Array, "b *event"]
    log_weight: Float[Array, " b"]


class WeightedEstimate(NamedTuple):
    """An estimate from weighted samples, and its standard error.

    standard_error: estimated standard deviation of `value` over independent sets of samples (delta method); NaN for
    a single sample. If the effective sample size is small, the standard error is often too small, because the rare
    samples with the largest weights are missing.
    """

    value: Float[Array, "..."]
    standard_error: Float[Array, "..."]


def importance_sample(
    flow: Flow,
    params: Variables,
    key: Key[Array, ""],
    num: int | range | Integer[Array, " b"],
    log_target: LogDensity,
    cond: AnyCondition | None = None,
    *,
    plan: Plan | str = "auto",
) -> WeightedSamples:
    """Returns samples of the flow with log weights log_target(x) - log q(x | cond).

    log_target: a function of x that returns the log-density `b` of the target, in nats, up to a constant.
    num, cond, plan: as for `flowgen.decoding.sample`. If the samples have different conditions, compute estimates for
    each condition from its own samples.

    Raises ValueError if a log-density is NaN or +inf (outside jit), and in the same cases as `sample_and_log_prob`.

    Example:
        s = importance_sample(flow, params, jax.random.key(0), 1_000, ManyWell(4).log_density)
    """
    r, log_prob = sample_and_log_prob(flow, params, key, num, cond, plan=plan)
    return WeightedSamples(r.x, log_weights(density_at("log_target", log_target, r.x), log_prob))


def log_weights(log_target: Float[Array, "*b"], log_prob: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Returns log w = log_target - log_prob, in nats.

    log_target: log-density of the target, up to a constant; -inf outside its support.
    log_prob: log-density of the distribution from which the samples were drawn.

    Raises ValueError if the shapes differ, or if log_target, log_prob or a log weight is NaN or +inf (outside jit).

    Example:
        log_weight = log_weights(log_target(x), log_prob)
    """
    log_target, log_prob = at_least_float32("log_target", log_target), at_least_float32("log_prob", log_prob)
    if log_target.shape != log_prob.shape:
        raise ValueError(
            f"log_target has shape {log_target.shape}, but log_prob has shape {log_prob.shape}; give one number per "
            "sample in both."
        )
    check_log_weight(log_target, "log_target")
    check_log_weight(log_prob, "log_prob")
    log_weight = log_target - log_prob
    check_log_weight(log_weight, "log_target - log_prob")
    return log_weight


def forward_effective_sample_size(log_weight: Float[Array, "*b"], axis: int = -1) -> Float[Array, "*rest"]:
    """Returns the effective sample size, as a share of b, from b samples of the target: b² / (Σw Σ 1/w).

    With many samples, the result approaches that of `effective_sample_size` at samples of q. If q misses modes of the
    target, the share at samples of the target is near 0, whereas the share at samples of q may be high. A log weight of
    +inf makes the result exactly 0.

    log_weight: log p̃(x) - log q(x) at samples x of p, not of q.

    Raises ValueError if there is no log weight, or if a log weight is NaN or -inf (outside jit). A log weight of -inf
    is wrong, because the density of the target is positive at its own samples.

    Example:
        ess = forward_effective_sample_size(log_target(x) - log_q(x))
    """
    check_floating("log_weight", log_weight)
    log_weight = -weights_along(-log_weight, axis, "-log_weight")
    return jnp.exp(-log_mean_exp(log_weight, axis) - log_mean_exp(-log_weight, axis))


def log_normaliser(log_weight: Float[Array, "*b"], axis: int = -1) -> WeightedEstimate:
    """Returns log mean w, an estimate of log Z in nats, with its standard error std(w) / (mean(w) √b).

    On average, the estimate is below log Z by about half its squared standard error (Jensen's inequality).

    The standard error assumes independent samples. It is NaN if all weights are equal, because equal weights do not
    show the error. Resampling makes weights equal or dependent, so use `Annealed.log_normaliser` for the result of
    `anneal`. If all weights are 0, the estimate is -inf, and its standard error is NaN.

    Raises ValueError if there is no log weight, or if a log weight is NaN or +inf (outside jit).

    Example:
        log_z, standard_error = log_normaliser(log_weight)
    """
    log_weight = weights_along(log_weight, axis)
    value = log_mean_exp(log_weight, axis)
    relative = jnp.exp(log_weight - jnp.expand_dims(value, axis))  # Its mean is 1.
    count = log_weight.shape[axis]
    error = jnp.sqrt(jnp.square(relative - 1).sum(axis=axis) / (count - 1) / count)
    alike = log_weight.max(axis=axis) == log_weight.min(axis=axis)
    return WeightedEstimate(value, error + nan_if(alike, error.dtype))


def self_normalised(values: Num[Array, "b *shape"], log_weight: Float[Array, " b"]) -> WeightedEstimate:
    """Returns the weighted mean Σ w f / Σ w of f = `values`, an estimate of E_p[f], and its standard error.

    The standard error is √(b / (b - 1) Σ w² (f - mean)²) / Σ w. The bias of the estimate is of order 1 / b.

    values: f(x) of each sample, a number or an array; samples of weight 0 may have any value, even NaN.

    If all weights are 0, the result is NaN inside jit.

    Raises ValueError if values and log_weight differ in their number of samples, or (outside jit) if a log weight is
    NaN or +inf, or all weights are 0.

    Example:
        mean, standard_error = self_normalised(s.x, s.log_weight)
    """
    log_weight = weights_along(log_weight)
    if getattr(values, "shape", ())[:1] != log_weight.shape:
        raise ValueError(
            f"values is {shown(values)}, and log_weight has shape {log_weight.shape}; give one value per weight, "
            "along the first axis of an array."
        )
    check_any_weight(log_weight)
    share = jax.nn.softmax(log_weight).reshape(-1, *[1] * (values.ndim - 1))
    values = jnp.where(share > 0, values, 0)
    mean = (share * values).sum(axis=0)
    count = len(values)
    variance = jnp.square(share * (values - mean[None])).sum(axis=0) * count / (count - 1)
    return WeightedEstimate(mean, jnp.sqrt(variance))


def resample(key: Key[Array, ""], x: PyTree, log_weight: Float[Array, " b"], num: int | None = None) -> Any:
    """Returns samples of equal weight, by systematic resampling.

    Sample i appears num w_i / Σw times, rounded up or down at random so that the expected number of copies is exact.
    The variance of averages over the result is usually lower than with independent draws (Douc, Cappé & Moulines 2005).
    Copies of a sample are adjacent.

    x: an array, or a tree of arrays, with one row per weight.
    num: number of samples to return; None means as many as there are weights.

    If all weights are 0 inside jit, floating-point numbers in the result are NaN.

    Raises ValueError if `num` is not positive, if a part of x does not have one row per weight, or (outside jit) if a
    log weight is NaN or +inf, or all weights are 0.

    Example:
        x = resample(key, s.x, s.log_weight)
    """
    check_key(key)
    log_weight = weights_along(log_weight)
    num = len(log_weight) if num is None else num
    check_count("num", num)
    for part in jax.tree.leaves(x):
        if getattr(part, "shape", ())[:1] != log_weight.shape:
            raise ValueError(
                f"x contains {shown(part)}, and log_weight has shape {log_weight.shape}; give arrays with one row per "
                "weight."
            )
    check_any_weight(log_weight)
    chosen = systematic_indices(log_weight, num, jax.random.uniform(key, dtype=log_weight.dtype))
    none = jnp.isneginf(log_weight).all()

    def taken(part):
        rows = take_rows(part, chosen)
        return rows + nan_if(none, rows.dtype) if jnp.issubdtype(rows.dtype, jnp.floating) else rows

    return jax.tree.map(taken, x)
