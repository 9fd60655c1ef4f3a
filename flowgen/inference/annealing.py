"""Annealed importance sampling and sequential Monte Carlo, which turn samples of a flow into those of a target.

Let q be the density of the flow, and p̃ that of the target, which need not be normalised. Samples of q move along the
geometric path log p_β = (1 - β) log q + β log p̃, from β = 0 to β = 1. Stage t first reweights the samples from
p_{β_{t-1}} to p_{β_t}:

    log w <- log w + (β_t - β_{t-1}) (log p̃(x) - log q(x))

It then resamples them if their weights are too unequal. Finally, it moves them with a Markov kernel that leaves p_{β_t}
invariant. With a fixed schedule of β, the final mean of w is an unbiased estimate of Z = ∫ p̃(x) dx for any such
kernel, whether or not stages resample (Neal 2001; Del Moral, Doucet & Jasra 2006).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Key

from flowgen.arrays import at_least_float32, check_count, check_floating, check_key, shown
from flowgen.backend import nan_if, take_rows
from flowgen.inference.densities import LogDensity, density_at, flow_log_densities, tempered, value_and_score
from flowgen.inference.programs import call_program
from flowgen.weights import (
    check_any_weight,
    check_share,
    effective_sample_size,
    log_mean_exp,
    systematic_indices,
    weights_along,
)

# (key, x `b *event`, log_density) -> (x, share of accepted proposals). The move leaves log_density invariant.
Move = Callable[[Any, Any, LogDensity], tuple[Any, Any]]
# Bisections of [β, 1]; more do not change a float32.
BISECTIONS = 30


class Annealed(NamedTuple):
    """Weighted samples of the target, with diagnostics of each stage.

    x, log_weight: the samples and their log weights. After resampling, the samples depend on each other; if the last
    stage resamples, all weights are equal. To find the error of an estimate, compare several runs with different keys.
    betas: β at the end of each stage.
    ess: effective sample size in each stage before resampling, as a share of b.
    acceptance: share of accepted proposals in each stage.

    `anneal_adaptively` returns betas, ess and acceptance of length `max_stages`, with NaN after its last stage.
    """

    x: Float[Array, "b *event"]
    log_weight: Float[Array, " b"]
    betas: Float[Array, " stages"]
    ess: Float[Array, " stages"]
    acceptance: Float[Array, " stages"]

    @property
    def log_normaliser(self) -> Float[Array, "*runs"]:
        """The log of the mean weight, an estimate of log Z in nats.

        It has no standard error, because the spread of the weights reflects only the stages since the last resampling.
        """
        return log_mean_exp(self.log_weight)

    @property
    def schedule(self) -> Float[np.ndarray, " t"]:
        """The schedule of the stages, for the argument `betas` of `anneal`: 0, followed by β at the end of each stage.

        Raises ValueError inside jit, where the number of stages is unknown, or if the result contains several runs,
        such as those of `jax.vmap`.
        """
        if isinstance(self.betas, Tracer):
            raise ValueError("betas is traced; read the schedule outside jit, where the number of stages is known.")
        if self.betas.ndim != 1:
            raise ValueError(f"betas is {shown(self.betas)}; read the schedule of each run separately.")
        betas = np.asarray(self.betas)
        return np.concatenate([np.zeros(1, betas.dtype), betas[~np.isnan(betas)]])


@partial(jax.tree_util.register_dataclass, data_fields=["step_size"], meta_fields=["num_steps"])
@dataclass(frozen=True)
class MALA:
    """The Metropolis-adjusted Langevin algorithm for a density p, with proposals
    x' = x + step_size ∇ log p(x) + √(2 step_size) N(0, I).

    The proposal for each sample is accepted or rejected independently of the others (Roberts & Tweedie 1996). Proposals
    whose log-density is -inf or NaN are rejected.

    step_size: a number, or an array that broadcasts against x. Tune it for an acceptance rate of about 0.6.
    num_steps: number of proposals per sample in each call.

    Raises ValueError if `num_steps` is not positive, or if `step_size` is a number that is not positive and finite.

    Example:
        x, acceptance = MALA(0.05, num_steps=5)(key, x, log_density)
    """

    step_size: Any = 0.1
    num_steps: int = 1

    def __post_init__(self):
        check_count("num_steps", self.num_steps)
        if isinstance(self.step_size, int | float | np.number) and not 0 < self.step_size < float("inf"):
            raise ValueError(f"step_size is {self.step_size}; it must be positive and finite.")

    def __call__(
        self, key: Key[Array, ""], x: Float[Array, "b *event"], log_density: LogDensity
    ) -> tuple[Float[Array, "b *event"], Float[Array, ""]]:
        """Returns the moved samples and the share of accepted proposals."""
        return call_program(_langevin, (log_density,), key, x, self.step_size, num_steps=self.num_steps)


def _langevin(functions: tuple[LogDensity], key: Array, x: Array, step_size: Any, *, num_steps: int) -> tuple:
    (log_density,) = functions
    axes = tuple(range(1, x.ndim))
    step_size = jnp.asarray(step_size, x.dtype)

    def log_transition(to, x, score):
        """Returns the log-density of the proposal `to` from x, up to a constant."""
        return -(jnp.square(to - x - step_size * score) / (4 * step_size)).sum(axis=axes)

    def step(state, key):
        x, log_p, score = state
        noise_key, accept_key = jax.random.split(key)
        new = x + step_size * score + jnp.sqrt(2 * step_size) * jax.random.normal(noise_key, x.shape, x.dtype)
        new_log_p, new_score = value_and_score(log_density, new)
        log_ratio = new_log_p + log_transition(x, new, new_score) - log_p - log_transition(new, x, score)
        accepted = jnp.log(jax.random.uniform(accept_key, log_p.shape, log_p.dtype)) < log_ratio

        def kept(new, old):
            return jnp.where(accepted.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        state = kept(new, x), kept(new_log_p, log_p), kept(new_score, score)
        return state, accepted.mean()

    begin = (x, *value_and_score(log_density, x))
    (x, *_), acceptance = lax.scan(step, begin, jax.random.split(key, num_steps))
    return x, acceptance.mean()


def anneal(
    key: Key[Array, ""],
    x: Float[Array, "b *event"],
    log_q: LogDensity,
    log_target: LogDensity,
    move: Move,
    *,
    betas: Float[Array | np.ndarray, " t"],
    resample_below: float = 0.5,
) -> Annealed:
    """Returns weighted samples of the target, annealed from samples of q over the fixed schedule `betas`.

    The mean weight is an unbiased estimate of the target's normalising constant.

    Unless resample_below is 0, all samples must have the same condition, because resampling moves samples to other
    rows, but not their conditions. For several conditions, map this function over them with `jax.vmap`.

    Outside jit, later calls with the same shapes reuse the compiled program if log_q, log_target and move are objects
    of flowgen, such as `flow_log_density(flow, params)`, `ManyWell(4).log_density` and `MALA(0.05)`. If one of them is
    a function of your own, each call compiles again, because variables that it reads may have changed. To avoid this,
    call `anneal` inside `jax.jit`.

    x: independent samples of q, such as those of `flowgen.decoding.sample_and_log_prob`.
    log_q: x -> log q(x), normalised, such as `flow_log_density(flow, params)`.
    log_target: x -> log p̃(x), the log-density of the target up to a constant.
    move: `MALA(step_size)`, or any function (key, x, log_density) -> (x, acceptance) that leaves log_density invariant.
    betas: at least two numbers, ascending from 0 to 1.
    resample_below: a stage resamples if its effective sample size, as a share of b, is below this number. With 0, no
    stage resamples, which is annealed importance sampling. With 1, each stage with unequal weights resamples.

    Raises ValueError if betas do not ascend from 0 to 1, if resample_below is not from 0 to 1, if log_q or log_target
    does not return one number per sample, or if all weights are 0 at the end (outside jit). If resample_below is above
    0 and the rows of a condition in `flow_log_density` differ, the function also raises ValueError; if the condition is
    traced, it returns log weights of NaN instead.

    Example:
        r = anneal(key, x, log_q, ManyWell(4).log_density, MALA(0.05), betas=jnp.linspace(0, 1, 21))
    """
    _check_start(key, x, log_q, log_target, resample_below)
    if np.ndim(betas) != 1 or len(betas) < 2:
        raise ValueError(f"betas is {shown(betas)}; give at least two numbers in one axis, ascending from 0 to 1.")
    if not isinstance(betas, Tracer):
        known = np.asarray(betas)
        if known[0] != 0 or known[-1] != 1 or not (np.diff(known) > 0).all():
            raise ValueError(f"betas run from {known[0]} to {known[-1]}; they must ascend from 0 to 1.")
    result = call_program(_anneal, (log_q, log_target, move), key, jnp.asarray(x), jnp.asarray(betas), resample_below)
    check_any_weight(result.log_weight)
    return result


def _anneal(functions: Functions, key: Array, x: Array, betas: Array, resample_below: Array | float) -> Annealed:
    begin = _begin(x, functions, resample_below)
    betas = jnp.asarray(betas, begin[1].dtype)

    def stage(state, parts):
        begin, end, key = parts
        return _stage(state, begin, end, key, functions, resample_below)

    (x, log_weight, _), (ess, acceptance) = lax.scan(
        stage, begin, (betas[:-1], betas[1:], jax.random.split(key, len(betas) - 1))
    )
    return Annealed(x, log_weight, betas[1:], ess, acceptance)


def anneal_adaptively(
    key: Key[Array, ""],
    x: Float[Array, "b *event"],
    log_q: LogDensity,
    log_target: LogDensity,
    move: Move,
    *,
    ess: float = 0.9,
    max_stages: int = 100,
    resample_below: float = 0.5,
) -> Annealed:
    """Returns weighted samples of the target, annealed over a schedule that is chosen from the samples.

    Each stage ends at the β that `next_beta` returns, except that stage `max_stages` always ends at 1. The mean weight
    is a consistent estimate of the target's normalising constant. It is slightly biased, because the schedule depends
    on the samples. For an unbiased estimate, call `anneal` with new samples, another key, and betas=result.schedule.

    ess: the share of the effective sample size that the reweighting of a stage should keep; between 0 and 1.
    max_stages: the largest number of stages.
    Other arguments: as for `anneal`.

    Raises ValueError if ess is not between 0 and 1, if max_stages is not positive, and in the same cases as `anneal`.

    Example:
        r = anneal_adaptively(key, x, log_q, ManyWell(4).log_density, MALA(0.05), ess=0.9)
    """
    _check_start(key, x, log_q, log_target, resample_below)
    check_share(ess)
    check_count("max_stages", max_stages)
    result = call_program(
        _anneal_adaptively, (log_q, log_target, move), key, jnp.asarray(x), ess, resample_below, max_stages=max_stages
    )
    check_any_weight(result.log_weight)
    return result


def _anneal_adaptively(
    functions: Functions,
    key: Array,
    x: Array,
    ess: Array | float,
    resample_below: Array | float,
    *,
    max_stages: int,
) -> Annealed:
    def unfinished(carry):
        return carry[1] < 1

    def stage(carry):
        index, beta, key, state, reports = carry
        key, own = jax.random.split(key)
        allowed = _next_beta(state[2], state[1], beta, ess)
        end = jnp.where(index == max_stages - 1, 1, allowed)
        state, found = _stage(state, beta, end, own, functions, resample_below)
        reports = [report.at[index].set(value) for report, value in zip(reports, (end, *found), strict=True)]
        return index + 1, end, key, state, reports

    state = _begin(x, functions, resample_below)
    reports = [jnp.full(max_stages, jnp.nan, state[1].dtype)] * 3
    start = (jnp.asarray(0), jnp.zeros((), state[1].dtype), key, state, reports)
    *_, (x, log_weight, _), reports = lax.while_loop(unfinished, stage, start)
    return Annealed(x, log_weight, *reports)


def next_beta(
    log_ratio: Float[Array, " b"], log_weight: Float[Array, " b"], beta: Float[Array, ""] | float, ess: float = 0.9
) -> Float[Array, ""]:
    """Returns the β at which the next stage of annealing ends: the largest β, at most 1, at which the effective sample
    size of the reweighted samples is at least `ess` times that at `beta`.

    log_ratio: log p̃(x) - log q(x) of the current samples.
    log_weight: log weights of the current samples at `beta`.

    Raises ValueError if ess is not between 0 and 1, or (outside jit) if a log weight is NaN or +inf.

    Example:
        beta = next_beta(log_target(x) - log_q(x), jnp.zeros(len(x)), 0.0, ess=0.9)
    """
    check_share(ess)
    log_ratio, log_weight = at_least_float32("log_ratio", log_ratio), weights_along(log_weight)
    return _next_beta(log_ratio, log_weight, beta, ess)


@jax.jit
def _next_beta(log_ratio: Array, log_weight: Array, beta: Array | float, ess: Array | float) -> Array:
    beta = jnp.asarray(beta, log_weight.dtype)
    least = ess * effective_sample_size(log_weight)

    def kept(end):
        return effective_sample_size(_weighted(log_weight, end - beta, log_ratio)) >= least

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        enough = kept(middle)
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    _, high = lax.fori_loop(0, BISECTIONS, halve, (beta, jnp.ones_like(beta)))
    return jnp.where(kept(jnp.ones_like(beta)), 1, high)


Functions = tuple[LogDensity, LogDensity, Move]
State = tuple[Array, Array, Array]


def _begin(x: Array, functions: Functions, resample_below: Array | float) -> State:
    """Returns the initial state of samples of q: (x, log_weight, log_ratio).

    log_ratio is NaN if samples with different conditions would be resampled.
    """
    log_q, log_target, _ = functions
    log_ratio = _log_ratio(x, log_q, log_target)
    for density in flow_log_densities(log_q, log_target):
        mixed = ~density.has_one_condition() & (resample_below > 0)
        log_ratio = log_ratio + nan_if(jnp.asarray(mixed), log_ratio.dtype)
    return x, jnp.zeros_like(log_ratio), log_ratio


def _stage(
    state: State, begin: Array, end: Array, key: Array, functions: Functions, resample_below: Array | float
) -> tuple[State, tuple[Array, Array]]:
    """Returns the state after a stage from β = begin to β = end, and (ess, acceptance)."""
    log_q, log_target, move = functions
    x, log_weight, log_ratio = state
    resample_key, move_key = jax.random.split(key)
    log_weight = _weighted(log_weight, end - begin, log_ratio)
    ess = effective_sample_size(log_weight)

    offset = jax.random.uniform(resample_key, dtype=ess.dtype)

    def resampled(x, log_weight):
        chosen = systematic_indices(log_weight, len(x), offset)
        return take_rows(x, chosen), jnp.zeros_like(log_weight) + log_mean_exp(log_weight)

    unequal = (ess < resample_below) & (ess > 0)  # The ess is 0 if all weights are.
    x, log_weight = lax.cond(unequal, resampled, lambda *unchanged: unchanged, x, log_weight)
    x, acceptance = move(move_key, x, tempered(log_q, log_target, end))
    return (x, log_weight, _log_ratio(x, log_q, log_target)), (ess, jnp.asarray(acceptance, ess.dtype))


def _log_ratio(x: Array, log_q: LogDensity, log_target: LogDensity) -> Array:
    """Returns log p̃(x) - log q(x), or -inf if p̃(x) is 0, whatever q(x) is."""
    log_p = density_at("log_target", log_target, x)
    return jnp.where(jnp.isneginf(log_p), -jnp.inf, log_p - density_at("log_q", log_q, x))


def _weighted(log_weight: Array, step: Array, log_ratio: Array) -> Array:
    """Returns the log weights after β has grown by `step`; weights of 0 stay 0."""
    return jnp.where(jnp.isneginf(log_weight), -jnp.inf, log_weight + step * log_ratio)


def _check_start(key: Any, x: Any, log_q: Any, log_target: Any, resample_below: float) -> None:
    check_key(key)
    check_floating("x", x)
    if not 0 <= resample_below <= 1:
        raise ValueError(f"resample_below is {resample_below}; give a share from 0 (never) to 1 (in each stage).")
    for density in flow_log_densities(log_q, log_target):
        density.flow.config.check_cond(density.cond, len(x))
        one = density.has_one_condition()
        if resample_below > 0 and isinstance(one, np.ndarray | np.bool_) and not one:
            raise ValueError(
                "the rows of cond in flow_log_density differ, but resampling moves samples to other rows; give all "
                "samples one condition, with jax.vmap over conditions, or set resample_below=0."
            )
