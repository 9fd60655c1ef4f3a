"""Negative log-likelihood of a dataset under a flow, a velocity field or a Gaussian, in bits or nats per dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from flowgen import backend
from flowgen.conditioning import split_padded
from flowgen.data.dataset import BucketedDataset, Dataset, buckets_of
from flowgen.data.latents import LatentDataset
from flowgen.data.loader import fixed_batches
from flowgen.data.media import from_uint8
from flowgen.flows.batches import add_noise, batch_input, flow_condition, models_images
from flowgen.flows.density import LEVELS, bits_per_dim

# Above FULL_COVARIANCE_DIMS dimensions, a full covariance would be too large. With fewer than IMAGES_PER_DIM images per
# dimension, its estimate would be poor. In both cases, the Gaussian baseline uses a diagonal covariance instead.
FULL_COVARIANCE_DIMS = 4096
IMAGES_PER_DIM = 5
READ_AT_ONCE = 1024


def flow_bits_per_dim(
    flow: Any,
    variables: Any,
    dataset: Dataset | BucketedDataset,
    key: Key[jax.Array, ""],
    *,
    noise_std: float | None = None,
    batch_size: int = 256,
    conditional: bool = True,
) -> float:
    """Returns a flow's mean bits/dim over a dataset, with one noise sample per image.

    noise_std: standard deviation of the Gaussian noise that is added to the images. 0 means uniform dequantisation
    instead, which published bits/dim usually assume; None means the noise with which the flow was trained.
    conditional: see `flow_nats_per_dim`.

    Raises ValueError for latents and other data without 256 levels (use `flow_nats_per_dim` instead), and in the same
    cases as `flow_nats`.

    Example:
        bpd = flow_bits_per_dim(flow, params, dataset, jax.random.key(0), noise_std=0.0)
    """
    if not models_images(flow) or any(isinstance(bucket, LatentDataset) for bucket in buckets_of(dataset)):
        what = "latents" if models_images(flow) else "numbers"
        raise ValueError(f"bits/dim needs data with 256 levels, but the data are {what}; use flow_nats_per_dim.")
    nats = flow_nats(flow, variables, dataset, key, noise_std=noise_std, batch_size=batch_size, conditional=conditional)
    return float(bits_of_nats(nats).mean())


def flow_nats_per_dim(
    flow: Any,
    variables: Any,
    dataset: Dataset | BucketedDataset,
    key: Key[jax.Array, ""],
    *,
    batch_size: int = 256,
    conditional: bool = True,
) -> float:
    """Returns a flow's mean negative log-likelihood over a dataset, in nats per dimension.

    The dataset contains latents or floating-point samples; for images, use `flow_bits_per_dim`. The latents of each
    image are drawn once from the encoder's posterior. To latents and to floating-point samples, one sample of the noise
    with which the flow was trained is added. Padding is not counted among the dimensions.

    conditional: whether to pass the dataset's labels, texts or contexts to a conditional flow; must be True for a flow
    conditioned on texts, and for padded samples.

    Raises ValueError in the same cases as `flow_nats`.

    Example:
        nats = flow_nats_per_dim(flow, params, dataset, jax.random.key(0))
    """
    nats = flow_nats(flow, variables, dataset, key, batch_size=batch_size, conditional=conditional)
    return float(nats.mean())


def flow_nats(
    flow: Any,
    variables: Any,
    dataset: Dataset | BucketedDataset,
    key: Key[jax.Array, ""],
    *,
    noise_std: float | None = None,
    batch_size: int = 256,
    conditional: bool = True,
) -> Float[np.ndarray, " n"]:
    """Returns the negative log-likelihood of each sample under a flow, in nats per dimension, in float64.

    The values are in the order of the samples in the dataset. For a `BucketedDataset`, they are in the order of the
    buckets. Padding is not counted among the dimensions.

    noise_std: see `flow_bits_per_dim`.
    conditional: see `flow_nats_per_dim`.

    Raises ValueError if `conditional` is False, but the flow is conditioned on texts or its samples are padded.

    Example:
        estimate = mean_of(flow_nats(flow, params, dataset, jax.random.key(0)))
    """
    if flow.config.text_dim and not conditional:
        raise ValueError(
            "this flow needs texts to compute a likelihood; do not pass --unconditional or conditional=False."
        )
    sigma = flow.config.noise_std if noise_std is None else noise_std
    parts = []
    for bucket in buckets_of(dataset):
        sized = flow.with_image_size(*bucket.event_shape[-3:-1]) if models_images(flow) else flow
        mesh = backend.sharing(min(batch_size, len(bucket)), variables)
        shared = backend.copies(jax.device_put(variables), mesh), key

        def nats(batch, positions, sized=sized, shared=shared):
            return backend.by_rows(
                _flow_nats, shared, batch, positions, flow=sized, sigma=sigma, conditional=conditional
            )

        parts.append(per_sample(bucket, batch_size, nats))
    return np.concatenate(parts)


def _flow_nats(shared, batch, positions, *, flow, sigma, conditional):
    variables, key = shared
    keys = jax.vmap(partial(jax.random.fold_in, key))(positions)
    noised = jax.vmap(lambda key, one: batch_input(key, jax.tree.map(lambda x: x[None], one), sigma)[0])(keys, batch.x)
    cond = flow_condition(flow, batch) if conditional else None
    mask, _ = split_padded(cond)
    dims = flow.config.num_dims if mask is None else flow.config.token_dim * jnp.maximum(mask.sum(axis=1), 1)
    return -flow.apply(variables, noised, cond, method="log_prob") / dims


def velocity_bits_per_dim(
    log_prob: Callable[[Array, Array, Key[Array, ""]], Float[Array, " b"]],
    dataset: Dataset,
    key: Key[Array, ""],
    *,
    batch_size: int = 256,
) -> float:
    """Returns the mean bits/dim of a continuous flow (a neural ODE) over a dataset, with uniform dequantisation.

    log_prob: a function (x, labels, key) that returns log p, in nats, for images in [-1, 1). It can, for example, call
    `flowgen.matching.log_prob` with a velocity field. The function is compiled. For every batch, it receives a
    new key; it can use this key to draw the probes of Hutchinson's trace estimator.

    Example:
        bpd = velocity_bits_per_dim(lambda x, y, key: fm.log_prob(velocity, x, y, key=key), dataset, key)
    """

    return float(velocity_bits(log_prob, dataset, key, batch_size=batch_size).mean())


def velocity_bits(
    log_prob: Callable[[Array, Array, Key[Array, ""]], Float[Array, " b"]],
    dataset: Dataset,
    key: Key[Array, ""],
    *,
    batch_size: int = 256,
) -> Float[np.ndarray, " n"]:
    """Returns the bits/dim of each image under a continuous flow, in float64; see `velocity_bits_per_dim`.

    Example:
        estimate = mean_of(velocity_bits(log_prob, dataset, jax.random.key(0)))
    """

    @jax.jit
    def bits(images, labels, keys):
        pairs = jax.vmap(jax.random.split)(keys)
        x = jax.vmap(lambda key, image: add_noise(key, image[None], 0.0)[0])(pairs[:, 0], images)
        return bits_per_dim(log_prob(x, labels, pairs[0, 1]), math.prod(dataset.event_shape))

    def measure(batch, positions):
        keys = jax.vmap(partial(jax.random.fold_in, key))(positions)
        # The probes are drawn for the whole batch, so the compiler is left to partition the program.
        mesh = backend.sharing(len(positions))
        return bits(*backend.share_rows((batch.pixels, batch.labels, keys), mesh))

    return per_sample(dataset, batch_size, measure)


def per_sample(dataset: Dataset, batch_size: int, measure: Callable[..., Any]) -> Float[np.ndarray, "n ..."]:
    """Returns the values that measure(batch, positions) returns for the batches of a dataset, joined, in float64.

    positions: the positions of the batch's samples in the dataset.

    Example:
        values = per_sample(dataset, 256, lambda batch, positions: score(batch.pixels))
    """
    parts = []
    for index, (batch, mask) in enumerate(fixed_batches(dataset, min(batch_size, len(dataset)))):
        positions = index * len(mask) + np.arange(len(mask))
        parts.append(np.asarray(measure(batch, positions), np.float64)[: len(mask)][mask])
    return np.concatenate(parts)


def gaussian_bits_per_dim(train: Dataset, dataset: Dataset, *, noise_std: float) -> float:
    """Returns the mean bits/dim of `dataset` under a Gaussian; see `gaussian_bits`.

    Example:
        baseline = gaussian_bits_per_dim(trained_on, held_out, noise_std=0.1)
    """
    return float(gaussian_bits(train, dataset, noise_std=noise_std).mean())


def gaussian_bits(train: Dataset, dataset: Dataset, *, noise_std: float) -> Float[np.ndarray, " n"]:
    """Returns the bits/dim of each image of `dataset` under a Gaussian with the mean and covariance of `train`.

    This is a baseline for the bits/dim of flows. Noise is added to both datasets: Gaussian noise of standard deviation
    `noise_std` if this is positive, and uniform dequantisation if it is 0. The result is the expectation over this
    noise, computed in closed form. The covariance is full if an image has at most 4096 values and `train` has at least
    5 images per value. Otherwise, it is diagonal. Neither dataset has to fit into memory.
    Example:
        baseline = mean_of(gaussian_bits(trained_on, held_out, noise_std=0.1))
    """
    dims = math.prod(train.event_shape)
    full = dims <= FULL_COVARIANCE_DIMS and len(train) >= IMAGES_PER_DIM * dims
    noise_variance = noise_std**2 if noise_std > 0 else (2 / LEVELS) ** 2 / 12
    mean = sum(batch.sum(axis=0) for batch in _flat(train, noise_std)) / len(train)
    if full:
        products = sum((batch - mean).T @ (batch - mean) for batch in _flat(train, noise_std))
        variances, directions = np.linalg.eigh(products / len(train) + noise_variance * np.eye(dims))
    else:
        variances = sum(np.square(batch - mean).sum(axis=0) for batch in _flat(train, noise_std)) / len(train)
        variances, directions = variances + noise_variance, None
    constant = (noise_variance / variances + np.log(2 * math.pi * variances)).sum()
    nats = []
    for batch in _flat(dataset, noise_std):
        deviation = batch - mean if directions is None else (batch - mean) @ directions
        nats.append(0.5 * ((np.square(deviation) / variances).sum(axis=1) + constant) / dims)
    return bits_of_nats(np.concatenate(nats))


def bits_of_nats(nats: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Returns (nats + log 128) / log 2, the bits/dim of 8-bit images.

    nats: negative log-likelihood of the same images, scaled to [-1, 1], in nats per dimension.

    Example:
        bits = bits_of_nats(flow_nats(flow, params, dataset, jax.random.key(0)))
    """
    return (nats + math.log(LEVELS / 2)) / math.log(2)


def _flat(dataset: Dataset, noise_std: float) -> Iterator[np.ndarray]:
    """Yields batches of images as float64 vectors, scaled in the same way as the flow's input, but without noise."""
    for batch, mask in fixed_batches(dataset, min(READ_AT_ONCE, len(dataset))):
        images = np.asarray(from_uint8(batch.pixels[mask]), np.float64)
        if noise_std == 0:
            # Dequantised images are (level + u) / 128 - 1, with u uniform in [0, 1). The mean of u is half a level.
            images = (images + 1) * 127.5 / 128 + 1 / LEVELS - 1
        yield images.reshape(len(images), -1)
