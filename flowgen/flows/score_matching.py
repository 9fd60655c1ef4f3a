"""Flow-score matching: a denoiser learns the score of a jointly trained flow (arXiv 2511.20462).

x̃ = x + σ ε,   t = -σ ∇_x̃ log p(x̃ | cond),   loss = NLL(x̃) + mean |s(x̃, cond) - t|²

One backward pass computes the gradients with respect to x̃ and to the flow's parameters. The second term of the loss
does not contribute to the gradient of the flow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from flowgen.conditioning import Condition, TextCondition
from flowgen.flows.batches import batch_condition, noisy_batch
from flowgen.flows.block import Variables
from flowgen.flows.denoiser import ClipDenoiser, denoiser_variables
from flowgen.flows.density import Flow, score
from flowgen.flows.jacobi_error import JacobiPenalty, jacobi_penalty
from flowgen.flows.objective import density_metric, nll, on_samples_like
from flowgen.flows.starflow_v import STARFlowV


def score_target(
    flow: Flow, variables: Variables, x: Float[Array, "b *event"], cond: Condition | None = None
) -> Float[Array, "b *event"]:
    """Returns t = -σ ∇_x log p(x | cond), which a denoiser learns to predict from x. Gradients of t are stopped.

    x: noisy samples. σ is `flow.config.noise_std`, the standard deviation of their noise.

    Example:
        t = score_target(flow, params, noisy, cond)
    """
    return -flow.config.noise_std * jax.lax.stop_gradient(score(flow, variables, x, cond))


def score_matching_loss(
    denoiser: nn.Module,
    variables: Variables,
    x: Float[Array, "b *event"],
    target: Float[Array, "b *event"],
    cond: Condition | None = None,
) -> Float[Array, ""]:
    """Returns the flow-score matching loss: the mean of (s - target)² over all values of all samples.

    The denoiser's output is s = denoiser.apply(variables, x, cond).

    Example:
        loss = score_matching_loss(denoiser, variables, noisy, score_target(flow, params, noisy, cond), cond)
    """
    answer: Any = denoiser.apply(variables, x, cond)
    return jnp.square(answer - target).mean()


def flow_score_objective(
    flow: STARFlowV,
    *,
    label_dropout: float = 0.0,
    jacobi: JacobiPenalty | None = None,
    loss_scale: float = 1.0,
    null_text: Callable[[tuple[int, ...]], TextCondition] | None = None,
) -> Callable[..., tuple]:
    """Returns the objective (variables, batch, key) -> (loss, metrics) that trains a STARFlow-V with its denoiser.

    The arguments and the batch are those of `flowgen.flows.objective.nll_objective`. Clips may have any number
    of frames; an image is a clip of one frame, `b 1 height width c`. The metrics are the same as for `nll_objective`,
    except that `flow_loss`, which does not include the Jacobi penalty, replaces `loss`. There are two more metrics:
    `denoiser_loss` is the mean of (s - t)², and `score_square` is the mean of t², the loss of a denoiser that always
    predicts 0. Here, s is the denoiser's output and t is the result of `score_target`.

    Raises ValueError if the flow has no denoiser, or if a flow on texts has a `label_dropout` above 0 but `null_text`
    is None.

    Example:
        loss, metrics = flow_score_objective(flow, label_dropout=0.1)(params, batch, key)
    """
    if not flow.config.denoiser_layers:
        raise ValueError("model.denoiser_layers is 0, so there is no denoiser to train; use nll_objective.")
    condition = batch_condition(flow, label_dropout, null_text)

    def objective(variables, batch, key):
        x, cond = noisy_batch(flow, condition, batch, key)
        sized = on_samples_like(flow, x)
        assert isinstance(sized, STARFlowV)
        blocks = {name: value for name, value in variables["params"].items() if name != "denoiser"}

        def flow_loss_of(blocks, x):
            loss, *rest = nll(flow, {"params": blocks}, x, cond, loss_scale=loss_scale)
            return loss, rest

        both = jax.value_and_grad(flow_loss_of, argnums=(0, 1), has_aux=True)
        (flow_loss, (metrics, states)), (of_blocks, of_x) = both(*jax.lax.stop_gradient((blocks, x)))
        flow_loss = with_gradient(flow_loss, blocks, of_blocks)
        # Up to a constant, the flow loss is loss_scale times the mean of -log p over the batch and the dimensions.
        target = of_x * (flow.config.noise_std * len(x) * sized.config.num_dims / loss_scale)
        denoiser_loss = score_matching_loss(
            ClipDenoiser(sized.config, parent=None), denoiser_variables(variables), x, target, cond
        )
        metrics |= density_metric(flow, metrics.pop("nats_per_dim"), batch)
        metrics |= {"denoiser_loss": denoiser_loss, "score_square": jnp.square(target).mean()}
        loss, metrics = flow_loss + denoiser_loss, metrics | {"flow_loss": flow_loss}
        if jacobi is None:
            return loss, metrics
        # The penalty does not change the score, because it is not part of the flow loss.
        penalty, errors = jacobi_penalty(sized, {"params": blocks}, x, states, cond, jacobi)
        return loss + penalty, metrics | errors

    return objective


@jax.custom_vjp
def with_gradient(value: Float[Array, ""], variables: Variables, gradient: Any) -> Float[Array, ""]:
    """Returns `value` with the precomputed `gradient` as its gradient with respect to `variables`."""
    return value


with_gradient.defvjp(
    lambda value, variables, gradient: (value, gradient),
    lambda gradient, cotangent: (None, jax.tree.map(lambda leaf: cotangent * leaf, gradient), None),
)
