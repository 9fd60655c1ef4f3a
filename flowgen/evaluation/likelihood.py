"""Bits per dimension of a flow on a source, and of the Gaussian that fits the same data."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Key

from flowgen.conditioning import UNCONDITIONAL
from flowgen.data.loader import fixed_batches
from flowgen.data.media import from_uint8
from flowgen.data.sources import Source
from flowgen.flows.density import LEVELS, add_noise, bits_per_dim

# Beyond this many dimensions the baseline Gaussian has independent pixels: its covariance would not fit.
FULL_COVARIANCE_DIMS = 4096


def flow_bits_per_dim(
    flow: Any,
    variables: Any,
    source: Source,
    key: Key[jax.Array, ""],
    *,
    noise_std: float | None = None,
    batch_size: int = 256,
    conditional: bool = True,
) -> float:
    """Returns the mean bits/dim over a source, one draw of noise per image.

    noise_std: of the Gaussian noise added to images, 0 for uniform dequantisation (the published measure), None
    for what the flow was trained under. conditional: give the labels to a flow that has classes.

    Example:
        bpd = flow_bits_per_dim(flow, params, source, jax.random.key(0), noise_std=0.0)
    """
    config = flow.config
    sigma = config.noise_std if noise_std is None else noise_std
    total = 0.0
    for index, batch in enumerate(fixed_batches(source, min(batch_size, len(source)))):
        labels = None
        if config.num_classes:
            labels = jnp.asarray(batch["label"] if conditional else np.full_like(batch["label"], UNCONDITIONAL))
        batch_key = jax.random.fold_in(key, index)
        bits = _batch_bits(flow, variables, batch["image"], labels, batch_key, sigma=sigma)
        total += float(np.asarray(bits)[batch["mask"]].sum())
    return total / len(source)


@partial(jax.jit, static_argnames=("flow", "sigma"))
def _batch_bits(flow, variables, images, labels, key, *, sigma):
    return flow.apply(variables, add_noise(key, images, sigma), labels, method="bits_per_dim")


def gaussian_bits_per_dim(train: Source, source: Source, *, noise_std: float) -> float:
    """Returns the mean bits/dim on `source` of a Gaussian with the mean and covariance of `train`.

    Both carry the noise that the flow sees (σ > 0 Gaussian, σ = 0 uniform dequantisation); its part in the
    covariance and in the expectation is exact, so no noise is drawn. The covariance is full up to 4096
    dimensions and diagonal beyond.

    Example:
        baseline = gaussian_bits_per_dim(train_source, eval_source, noise_std=0.1)
    """
    fitted, held_out = _flat(train, noise_std), _flat(source, noise_std)
    dims = fitted.shape[1]
    noise_variance = noise_std**2 if noise_std > 0 else (2 / LEVELS) ** 2 / 12
    centred, deviation = fitted - fitted.mean(axis=0), held_out - fitted.mean(axis=0)
    if dims <= FULL_COVARIANCE_DIMS:
        covariance = centred.T @ centred / len(centred) + noise_variance * np.eye(dims)
        variances, directions = np.linalg.eigh(covariance)
        squares = np.square(deviation @ directions)
    else:
        variances = np.square(centred).mean(axis=0) + noise_variance
        squares = np.square(deviation)
    nats = 0.5 * ((squares.mean(axis=0) + noise_variance) / variances + np.log(2 * math.pi * variances)).sum()
    return float(bits_per_dim(jnp.asarray(-nats), dims))


def _flat(source: Source, noise_std: float) -> np.ndarray:
    images = np.asarray(from_uint8(source[np.arange(len(source))]["image"]), np.float64)
    if noise_std == 0:
        # Dequantised images are (level + U[0, 1)) / 128 - 1, with their mean half a level up.
        images = (images + 1) * 127.5 / 128 + 1 / LEVELS - 1
    return images.reshape(len(images), -1)
