"""Bits per dimension of a flow on a source, and of the Gaussian that fits the same data."""

from __future__ import annotations

import math
from collections.abc import Iterator
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

# The baseline Gaussian has independent pixels where its covariance would be too large, or fit to too few images.
FULL_COVARIANCE_DIMS = 4096
IMAGES_PER_DIM = 5
READ_AT_ONCE = 1024


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
    variables = jax.device_put(variables)
    total = 0.0
    for index, batch in enumerate(fixed_batches(source, min(batch_size, len(source)))):
        labels = None
        if config.num_classes:
            labels = jnp.asarray(batch["label"] if conditional else np.full_like(batch["label"], UNCONDITIONAL))
        positions = index * len(batch["mask"]) + np.arange(len(batch["mask"]))
        keys = jax.vmap(partial(jax.random.fold_in, key))(positions)  # Noise of an image for any batch size.
        bits = _batch_bits(flow, variables, batch["image"], labels, keys, sigma=sigma)
        total += float(np.asarray(bits)[batch["mask"]].sum())
    return total / len(source)


@partial(jax.jit, static_argnames=("flow", "sigma"))
def _batch_bits(flow, variables, images, labels, keys, *, sigma):
    noised = jax.vmap(lambda key, image: add_noise(key, image[None], sigma)[0])(keys, images)
    return flow.apply(variables, noised, labels, method="bits_per_dim")


def gaussian_bits_per_dim(train: Source, source: Source, *, noise_std: float) -> float:
    """Returns the mean bits/dim on `source` of a Gaussian with the mean and covariance of `train`.

    Both carry the noise that the flow sees (σ > 0 Gaussian, σ = 0 uniform dequantisation); its part in the
    covariance and in the expectation is exact, so no noise is drawn. The covariance is full up to 4096
    dimensions where `train` has at least 5 images per dimension, else diagonal. Both sources are read in batches.

    Example:
        baseline = gaussian_bits_per_dim(train_source, eval_source, noise_std=0.1)
    """
    dims = math.prod(train.image_shape)
    full = dims <= FULL_COVARIANCE_DIMS and len(train) >= IMAGES_PER_DIM * dims
    noise_variance = noise_std**2 if noise_std > 0 else (2 / LEVELS) ** 2 / 12
    mean = sum(batch.sum(axis=0) for batch in _flat(train, noise_std)) / len(train)
    if full:
        products = sum((batch - mean).T @ (batch - mean) for batch in _flat(train, noise_std))
        variances, directions = np.linalg.eigh(products / len(train) + noise_variance * np.eye(dims))
    else:
        variances = sum(np.square(batch - mean).sum(axis=0) for batch in _flat(train, noise_std)) / len(train)
        variances, directions = variances + noise_variance, None
    squares = np.zeros(dims)
    for batch in _flat(source, noise_std):
        deviation = batch - mean if directions is None else (batch - mean) @ directions
        squares += np.square(deviation).sum(axis=0)
    terms = (squares / len(source) + noise_variance) / variances + np.log(2 * math.pi * variances)
    return float(bits_per_dim(jnp.asarray(-0.5 * terms.sum()), dims))


def _flat(source: Source, noise_std: float) -> Iterator[np.ndarray]:
    """Batches of images as float64 vectors, as the flow sees them less their noise."""
    for batch in fixed_batches(source, min(READ_AT_ONCE, len(source))):
        images = np.asarray(from_uint8(batch["image"][batch["mask"]]), np.float64)
        if noise_std == 0:
            # Dequantised images are (level + U[0, 1)) / 128 - 1, with their mean half a level up.
            images = (images + 1) * 127.5 / 128 + 1 / LEVELS - 1
        yield images.reshape(len(images), -1)
