"""Evaluates the likelihood of data under a flow or a velocity field, with its standard error."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from flowgen.data import Dataset
from flowgen.data.dataset import BucketedDataset
from flowgen.evaluation import Evaluation, bits_of_nats, flow_nats, gaussian_bits, mean_of, velocity_bits
from flowgen.experiments.drawing import EvaluateOptions
from flowgen.experiments.flow_options import FlowEvaluateOptions
from flowgen.matching import log_prob
from flowgen.matching.solvers import Velocity


def check_computed(values: Float[np.ndarray, " n"], what: str, quantity: str = "likelihood") -> None:
    """Raises ValueError unless all values are finite.

    what: what the values were computed for, such as "images". quantity: name of the values in the error message.

    Example:
        check_computed(nats, "images")
    """
    if bad := np.count_nonzero(~np.isfinite(values)):
        raise ValueError(
            f"{bad} of {len(values)} {what} have no finite {quantity}, because the model's numbers overflow; evaluate "
            "another checkpoint with --step, or train with a lower --optim.lr."
        )


def check_likelihood(flow: Any, options: FlowEvaluateOptions, *, latent: bool) -> None:
    """Raises ValueError if the likelihood cannot be computed with these options.

    latent: whether the flow models latents.

    Example:
        check_likelihood(flow, FlowEvaluateOptions(noise="uniform"), latent=False)
    """
    if latent and options.noise == "uniform":
        raise ValueError("--noise is uniform, which works only for pixels, but this flow models latents; leave it out.")
    if flow.config.text_dim and options.unconditional:
        raise ValueError("--unconditional is set, but this flow needs texts to compute a likelihood; leave it out.")


def evaluate_likelihood(
    flow: Any,
    variables: Any,
    dataset: Dataset | BucketedDataset,
    options: FlowEvaluateOptions,
    *,
    latent: bool,
) -> Evaluation:
    """Returns the likelihood of a dataset under a flow: bits/dim, or nats/dim if the data are latents.

    Raises the errors of `check_likelihood` and `check_computed`.

    Example:
        evaluation = evaluate_likelihood(flow, variables, dataset, FlowEvaluateOptions(), latent=False)
    """
    check_likelihood(flow, options, latent=latent)
    sigma = options.noise_std(flow)
    nats = flow_nats(
        flow,
        variables,
        dataset,
        jax.random.key(options.seed),
        noise_std=sigma,
        batch_size=options.batch,
        conditional=not options.unconditional,
    )
    noise = f"Gaussian noise of std {sigma:g}" if sigma else "uniform dequantisation"
    what = "latents" if latent else "clips" if flow.config.event_shape[:-3] else "images"
    check_computed(nats, what)
    if latent:
        name, unit, estimate = "nats_per_dim", "nats/dim", mean_of(nats)
    else:
        name, unit, estimate = "bits_per_dim", "bits/dim", mean_of(bits_of_nats(nats))
    lines = (f"{len(dataset)} {what} ({options.split}), {noise}", f"{unit} {estimate}")
    return Evaluation(lines, {name: estimate}, {"noise": noise})


def evaluate_gaussian(
    flow: Any,
    fitted: Dataset | BucketedDataset,
    dataset: Dataset | BucketedDataset,
    options: FlowEvaluateOptions,
    *,
    fitted_to: str,
) -> Evaluation:
    """Returns the bits/dim of a dataset under a Gaussian, or an empty evaluation if image sizes differ.

    The data have the same noise as in `evaluate_likelihood`. fitted: the images to which the Gaussian is fitted.
    fitted_to: what to call these images in the output.

    Example:
        baseline = evaluate_gaussian(flow, train, held_out, FlowEvaluateOptions(), fitted_to="training images")
    """
    if isinstance(dataset, BucketedDataset) or isinstance(fitted, BucketedDataset):
        return Evaluation()
    estimate = mean_of(gaussian_bits(fitted, dataset, noise_std=options.noise_std(flow)))
    line = f"bits/dim of a Gaussian fitted to the {fitted_to} {estimate}"
    return Evaluation((line,), {"gaussian_bits_per_dim": estimate}, {"gaussian_fitted_to": fitted_to})


def evaluate_velocity(field: Velocity, dataset: Dataset, options: EvaluateOptions, *, conditional: bool) -> Evaluation:
    """Returns the bits/dim of images under a continuous flow with this velocity field.

    conditional: whether to pass labels to the field.

    Example:
        evaluation = evaluate_velocity(velocity, held_out, EvaluateOptions(), conditional=True)
    """

    def log_density(x, labels, key):
        return log_prob(field, x, labels if conditional else None, key=key)

    key = jax.random.key(options.seed)
    each = velocity_bits(log_density, dataset, key, batch_size=options.batch)
    check_computed(each, "images")
    bits = mean_of(each)
    how = "uniform dequantisation, Hutchinson's estimate, rk4 with 50 steps"
    lines = (f"{len(dataset)} images ({options.split})", f"bits/dim {bits} ({how})")
    return Evaluation(lines, {"bits_per_dim": bits}, {"noise": "uniform dequantisation", "likelihood": how})
