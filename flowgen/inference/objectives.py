"""Objectives that fit a flow to a target density, to samples, or to both.

Reverse KL, forward KL and maximum likelihood, as functions of a flow's parameters that return (loss, metrics). Losses
are in nats, summed over dimensions and averaged over samples, so that losses of one flow can be added. All objectives
can be compiled and differentiated; `objective = lambda params, batch, key: reverse_kl(flow, params, key, 256,
log_target)` has the signature that `flowgen.training` expects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flowgen.arrays import check_floating, shown
from flowgen.conditioning import AnyCondition
from flowgen.decoding.plan import Plan
from flowgen.decoding.sampler import sample, sample_and_log_prob
from flowgen.flows.block import Variables
from flowgen.flows.density import Flow
from flowgen.inference.densities import LogDensity, density_at, flow_log_density
from flowgen.inference.importance import log_weights, self_normalised
from flowgen.weights import effective_sample_size, log_mean_exp

# How the gradient of the reverse KL is estimated.
Gradient = Literal["total", "path"]
Outcome = tuple[Float[Array, ""], dict[str, Array]]


def reverse_kl(
    flow: Flow,
    params: Variables,
    key: Key[Array, ""],
    num: int,
    log_target: LogDensity,
    cond: AnyCondition | None = None,
    *,
    plan: Plan | str = "auto",
    gradient: Gradient = "total",
) -> Outcome:
    """Returns the mean of log q(x) - log p̃(x) over samples of the flow, which is KL(q | p) - log Z, and metrics.

    The flow learns from the target's density alone, without data. The flow tends to cover some modes of the target and
    to miss others, which its own samples do not reveal. The target needs a positive density wherever the flow has
    samples.

    log_target: x -> log p̃(x) `b`, in nats; its gradient in x is used. num, cond, plan: as for
    `flowgen.decoding.sample`.
    gradient: "total" differentiates the loss; "path" leaves out the term ∇_θ log q_θ(x) at fixed x, whose mean is 0
    (Roeder et al., arXiv 1703.09194). Both estimate the same gradient. With "path", the gradient of each sample
    vanishes as the flow approaches the target. The variance is therefore lower near the end of training, but not always
    before.
    metrics: loss, elbo (-loss, a lower bound on log Z), log_normaliser (log mean w, an estimate of log Z) and ess.

    Raises ValueError if `gradient` is unknown, and in the same cases as `sample_and_log_prob`.

    Example:
        loss, metrics = reverse_kl(flow, params, jax.random.key(0), 256, ManyWell(4).log_density)
    """
    if gradient not in get_args(Gradient):
        raise ValueError(f'gradient is {shown(gradient)}; it must be "total" or "path".')
    if gradient == "total":
        r, log_prob = sample_and_log_prob(flow, params, key, num, cond, plan=plan)
    else:
        r = sample(flow, params, key, num, cond, plan=plan, denoise=False)
        log_prob = flow_log_density(flow, jax.lax.stop_gradient(params), cond)(r.x)
    log_p = density_at("log_target", log_target, r.x)
    loss = (log_prob - log_p).mean()
    log_weight = jax.lax.stop_gradient(log_weights(log_p, log_prob))
    metrics = {
        "loss": loss,
        "elbo": -loss,
        "log_normaliser": log_mean_exp(log_weight),
        "ess": effective_sample_size(log_weight),
    }
    return loss, metrics


def forward_kl(
    flow: Flow,
    params: Variables,
    x: Float[Array, "b *event"],
    log_weight: Float[Array, " b"],
    cond: AnyCondition | None = None,
) -> Outcome:
    """Returns the weighted mean of -log q(x), which is KL(p | q) up to the entropy of the target, and metrics.

    The weights are normalised over the batch, so a constant factor has no effect. No gradient flows through samples or
    weights. The flow covers all modes that the samples cover. Samples may come from the flow itself
    (`importance_sample`), from an earlier flow, or from `anneal`, each with the weights of this source.

    metrics: loss, and ess of the weights.

    Raises ValueError if x and log_weight differ in their number of samples, and for weights that are NaN or +inf,
    outside jit.

    Example:
        s = importance_sample(flow, params, jax.random.key(0), 256, ManyWell(4).log_density)
        loss, metrics = forward_kl(flow, params, s.x, s.log_weight)
    """
    check_floating("x", x)
    x, log_weight = jax.lax.stop_gradient((x, log_weight))
    loss = -self_normalised(flow_log_density(flow, params, cond)(x), log_weight).value
    return loss, {"loss": loss, "ess": effective_sample_size(log_weight)}


def maximum_likelihood(
    flow: Flow, params: Variables, x: Float[Array, "b *event"], cond: AnyCondition | None = None
) -> Outcome:
    """Returns the mean of -log q(x) over samples of the target, in nats, and metrics.

    This is `forward_kl` with equal weights. Unlike `flowgen.flows.objective.nll_objective`, the loss is summed over
    dimensions and contains all constants, and x gets no noise.

    metrics: loss.

    Example:
        loss, metrics = maximum_likelihood(flow, params, x)
    """
    check_floating("x", x)
    loss = -flow_log_density(flow, params, cond)(x).mean()
    return loss, {"loss": loss}


def weighted_sum(outcomes: Mapping[str, tuple[float | int, Outcome]]) -> Outcome:
    """Returns the sum of several objectives, each times its factor, and the metrics of all, as "name/metric".

    outcomes: name -> (factor, (loss, metrics)).

    Raises ValueError if there is no objective, or if a factor is negative or not finite.

    Example:
        likelihood, energy = maximum_likelihood(flow, params, x), reverse_kl(flow, params, key, 64, log_target)
        loss, metrics = weighted_sum({"likelihood": (0.5, likelihood), "energy": (0.5, energy)})
    """
    if not outcomes:
        raise ValueError("outcomes is empty; give at least one objective, as name: (factor, (loss, metrics)).")
    for name, (factor, _) in outcomes.items():
        if isinstance(factor, int | float) and not 0 <= factor < float("inf"):
            raise ValueError(f"the factor of {name!r} is {factor}; it must be finite and not negative.")
    total, metrics = jnp.zeros(()), {}
    for name, (factor, (loss, part)) in outcomes.items():
        total = total + factor * loss
        metrics |= {f"{name}/{key}": value for key, value in part.items()}
    return total, {"loss": total, **metrics}
