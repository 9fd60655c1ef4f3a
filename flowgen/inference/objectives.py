"""Objectives that fit a flow to a target density, to samples, or to both.

Each objective returns (loss, metrics). Losses are in nats, summed over dimensions and averaged over samples;
`weighted_sum` adds those of one flow. For `flowgen.training`, write an objective as `lambda params, batch, key:
reverse_kl(flow, params, key, 256, log_target)`.
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
from flowgen.weights import check_any_weight, effective_sample_size, log_mean_exp, weights_along

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
    """Returns the mean of log q(x) - log p̃(x) over samples of the flow, an estimate of KL(q | p) - log Z, and metrics.

    Here q is the density of the flow, p that of the target, and p̃ = Z p the density that `log_target` computes.

    Training needs only the target's density, no data. The flow tends to miss modes of the target, and its own samples
    do not reveal this. The target's density must be positive wherever q is positive.

    log_target: a function of x that returns log p̃(x) `b`, in nats; it must be differentiable.
    num, cond, plan: as for `flowgen.decoding.sample`.
    gradient: how the gradient with respect to the parameters θ is estimated. "total" differentiates the loss; "path"
    leaves out the term ∇_θ log q_θ(x) at fixed x, whose mean is 0 (Roeder et al., arXiv 1703.09194). Both estimates are
    unbiased. With "path", the gradient of each sample vanishes as the flow approaches the target. Near the end of
    training, the variance is therefore lower with "path"; earlier, it may be higher.

    metrics: loss, elbo (-loss, a lower bound on log Z), log_normaliser (log mean w with w = p̃(x) / q(x), an estimate
    of log Z) and ess (effective sample size of the weights w, as a share of the samples). If the samples have different
    conditions, loss and elbo are averages over the conditions, but log_normaliser and ess are meaningless; to compute
    these, map this function over the conditions with `jax.vmap`.

    Raises ValueError if `gradient` is unknown, if log_target does not return one number per sample, if a log-density is
    NaN or +inf (outside jit), and in the same cases as `sample_and_log_prob`.

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
    """Returns the weighted mean of -log q(x), an estimate of KL(p | q) plus the entropy of the target p, and metrics.

    The weights are normalised over the batch, so a constant factor has no effect. x and log_weight receive no gradient.
    Training on this loss makes the flow cover all modes among the samples. x and log_weight may come from
    `importance_sample` with these parameters or with other ones, or from `anneal`. Samples of weight 0 may have any
    value, even NaN. If all weights are 0 inside jit, the loss is NaN.

    cond: the condition of each sample. All rows of cond must be equal, unless the weights are those of a joint density
    of x and cond. For several conditions, map this function over them with `jax.vmap`.

    metrics: loss, and ess (effective sample size of the weights, as a share of b).

    Raises ValueError if x and log_weight differ in their number of samples, or (outside jit) if a log weight is NaN or
    +inf, or all weights are 0.

    Example:
        s = importance_sample(flow, params, jax.random.key(0), 256, ManyWell(4).log_density)
        loss, metrics = forward_kl(flow, params, s.x, s.log_weight)
    """
    check_floating("x", x)
    x, log_weight = jax.lax.stop_gradient((jnp.asarray(x), weights_along(log_weight)))
    if len(x) != len(log_weight):
        raise ValueError(f"x has {len(x)} samples, but log_weight has {len(log_weight)}; give one weight per sample.")
    check_any_weight(log_weight)
    # The gradient of NaN is NaN, even with a weight of 0.
    x = jnp.where(jax.nn.softmax(log_weight).reshape(-1, *[1] * (x.ndim - 1)) > 0, x, 0)
    loss = -self_normalised(flow_log_density(flow, params, cond)(x), log_weight).value
    return loss, {"loss": loss, "ess": effective_sample_size(log_weight)}


def maximum_likelihood(
    flow: Flow, params: Variables, x: Float[Array, "b *event"], cond: AnyCondition | None = None
) -> Outcome:
    """Returns the mean of -log q(x) over samples of the target, in nats, and metrics.

    This is `forward_kl` with equal weights. The loss is summed over dimensions and includes all constants, and no noise
    is added to x. In these points it differs from the loss of `flowgen.flows.objective.nll_objective`.

    metrics: loss.

    Example:
        loss, metrics = maximum_likelihood(flow, params, x)
    """
    check_floating("x", x)
    loss = -flow_log_density(flow, params, cond)(x).mean()
    return loss, {"loss": loss}


def weighted_sum(outcomes: Mapping[str, tuple[float | int, Outcome]]) -> Outcome:
    """Returns the sum of the losses, each multiplied by its factor, and metrics.

    outcomes: maps a name for each objective to (factor, (loss, metrics)), where the objective returned (loss, metrics).

    metrics: the sum under the key "loss", and each objective's metrics under keys "name/metric".

    Raises ValueError if `outcomes` is empty, or if a factor is negative or not finite.

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
