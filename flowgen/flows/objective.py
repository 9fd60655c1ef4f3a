"""The maximum-likelihood objective of flows."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from flowgen.batch import Batch, Moments
from flowgen.conditioning import AnyCondition, Condition, Padded, TextCondition, mean_tokens
from flowgen.flows.batches import batch_condition, models_images, noisy_batch
from flowgen.flows.block import Variables
from flowgen.flows.density import Flow, FlowConfig, bits_per_dim
from flowgen.flows.jacobi_error import JacobiPenalty, jacobi_penalty
from flowgen.flows.orders import without_padding
from flowgen.gaussian import gaussian_log_density
from flowgen.rows import Rows

PRIOR_VARIANCE_RATE = 0.1


def nll_objective(
    flow: Flow,
    *,
    label_dropout: float = 0.0,
    norm_penalty: float = 0.0,
    jacobi: JacobiPenalty | None = None,
    loss_scale: float = 1.0,
    null_text: Callable[[tuple[int, ...]], TextCondition] | None = None,
) -> Callable[..., tuple]:
    """Returns the maximum-likelihood objective (variables, batch, key) -> (loss, metrics[, carried state]).

    loss = loss_scale (½ mean z² - mean logdet / num_dims) + norm_penalty Σ_k mean x_k² + Jacobi penalty, where x_k are
    the tokens that enter block k. The loss is in nats per dimension, up to constants. For padded samples, num_dims is
    the mean number of values per sample without padding, over the batch on all devices. Means of squares exclude
    padding too, so more padding changes neither loss nor gradient. Without penalties, this is the loss of TARFlow. The
    norm penalty comes from STARFlow. The Jacobi penalty lets decoding converge in fewer sweeps (see
    `flowgen.flows.jacobi_error.jacobi_penalty`); jacobi=None leaves it out.
    batch: a `flowgen.data.Batch` of any image size that `flow.with_image_size` accepts. The batch's context contains
    the labels, texts or context that the flow requires. With probability `label_dropout`, a sample becomes
    unconditional: a label is replaced by -1, a context is masked out, and a text is replaced by
    null_text(([frames,] height, width)), which returns the encoded empty text.
    metrics: loss, bits_per_dim of the noisy images (nats_per_dim for other samples), mean_square_z, logdet_per_dim, and
    mean_square/<block> of the tokens after each block. A Jacobi penalty adds jacobi_error/<block>.
    For a volume-preserving flow with prior variance v, the carried state is the tracked variance
    v + 0.1 (mean_b z² - v).

    Raises ValueError if texts may be dropped but `null_text` is None.

    Example:
        loss, metrics, *state = nll_objective(flow, label_dropout=0.1)(params, batch, key)
    """
    condition = batch_condition(flow, label_dropout, null_text)

    def objective(variables, batch, key):
        x, cond = noisy_batch(flow, condition, batch, key)
        loss, metrics, states = nll(
            flow, variables, x, cond, norm_penalty=norm_penalty, loss_scale=loss_scale, rows=batch.rows
        )
        if jacobi is not None:
            penalty, errors = jacobi_penalty(on_samples_like(flow, x), variables, x, states, cond, jacobi)
            loss, metrics = loss + penalty, metrics | errors
        metrics |= {"loss": loss, **density_metric(flow, metrics.pop("nats_per_dim"), batch)}
        if flow.config.scale_parameterisation != "volume_preserving":
            return loss, metrics
        variance = variables["prior"]["variance"]
        batch_variance = jax.lax.stop_gradient(jnp.square(states[-1]).mean(axis=0))  # Devices can average this mean.
        tracked = variance + PRIOR_VARIANCE_RATE * (batch_variance - variance)
        return loss, metrics, {"prior": {"variance": tracked}}

    return objective


def nll(
    flow: Flow,
    variables: Variables,
    x: Float[Array, "b *event"],
    cond: Condition | None,
    *,
    norm_penalty: float = 0.0,
    loss_scale: float = 1.0,
    rows: Rows | None = None,
) -> tuple[Float[Array, ""], dict[str, Array], list[Float[Array, "b n token"]]]:
    """Returns the loss and the metrics of `nll_objective` without the Jacobi penalty, and the tokens after each block.

    x: noisy samples of any size that the flow accepts, 0 at padding. rows: the rows of the batch, if it has any.
    """
    sized = on_samples_like(flow, x)
    num_dims = mean_dims(sized.config, cond, rows)

    def mean_square(values: Array) -> Array:
        return jnp.square(values).mean() * (sized.config.num_dims / num_dims)  # Padding is 0.

    states, logdet = sized.apply(variables, x, cond, method="trajectory")
    z = states[-1]
    mean_square_z = mean_square(z)
    logdet_per_dim = logdet.mean() / num_dims
    loss = loss_scale * (0.5 * mean_square_z - logdet_per_dim)
    metrics = {"mean_square_z": mean_square_z, "logdet_per_dim": logdet_per_dim}
    for index, state in enumerate(states):
        metrics[f"mean_square/{index}"] = mean_square(state)
    if norm_penalty:
        entering = mean_square(x) + sum(metrics[f"mean_square/{index}"] for index in range(len(states) - 1))
        loss = loss + norm_penalty * entering
    variance = sized.apply(variables, method="prior_variance")
    density = without_padding(gaussian_log_density(z, variance[None]), cond)
    log_prob = (density.sum(axis=(1, 2)) + logdet).mean()
    return loss, metrics | {"nats_per_dim": -log_prob / num_dims}, states


def mean_dims(config: FlowConfig, cond: AnyCondition | None, rows: Rows | None = None) -> Float[Array, ""] | int:
    """Returns the mean number of values per sample, without padding, for nats per dimension.

    rows: the batch's rows, for the mean over the whole batch; by default, the mean is over the samples of `cond`.
    """
    if not isinstance(cond, Padded):
        return config.num_dims
    tokens = mean_tokens(cond) if rows is None or rows.mean_tokens is None else rows.mean_tokens
    return jnp.where(tokens > 0, tokens, 1) * config.token_dim  # Without any token, all sums are 0.


def density_metric(flow: Flow, nats_per_dim: Float[Array, ""], batch: Batch) -> dict[str, Array]:
    """Returns {name: density metric}: bits/dim for 8-bit images, and nats/dim for other samples."""
    if isinstance(batch.x, Moments) or jnp.issubdtype(batch.x.dtype, jnp.floating):
        return {"nats_per_dim": nats_per_dim}
    return {"bits_per_dim": bits_per_dim(-nats_per_dim, 1)}


def on_samples_like(flow: Flow, x: Shaped[Array | np.ndarray, "b *event"]) -> Flow:
    """Returns the flow, with the same parameters, for the image size of x and, for clips, its number of frames."""
    if not models_images(flow):
        return flow
    sized = flow.with_image_size(*x.shape[-3:-1])
    return sized.with_num_frames(x.shape[1]) if x.ndim == 5 else sized
