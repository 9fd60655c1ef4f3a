"""Density: Gaussian constant, bits per dimension, dequantisation, likelihood objective, score, denoising, Bayes.

For a flow z = f(x) with prior N(0, v):  log p(x) = Σ log N(z; 0, v) + log|det dz/dx|.  All in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from flowgen.conditioning import drop_labels
from flowgen.data.media import from_uint8

LEVELS = 256
PRIOR_VARIANCE_RATE = 0.1


@runtime_checkable
class Flow(Protocol):
    """What density and decoding ask of a flow: a Flax module with these methods and a config."""

    config: Any

    def apply(self, variables: Any, *args: Any, method: str) -> Any: ...


def gaussian_log_prob(z: Float[Array, "b n c"], variance: Float[Array, "n c"] | None = None) -> Float[Array, " b"]:
    """Returns log N(z; 0, variance) summed over tokens and channels, variance 1 by default.

    Example:
        lp = gaussian_log_prob(z) + logdet
    """
    if variance is None:
        variance = jnp.ones(z.shape[1:], z.dtype)
    terms = jnp.square(z) / variance[None] + jnp.log(2 * math.pi * variance)[None]
    return -0.5 * terms.sum(axis=(1, 2))


def bits_per_dim(log_prob: Float[Array, "*b"], num_dims: int) -> Float[Array, "*b"]:
    """Returns bits/dim on the 8-bit scale from nats of images in [-1, 1): (-log p / num_dims + log 128) / log 2.

    Example:
        bpd = bits_per_dim(flow.apply(params, x, method="log_prob"), flow.config.num_dims)
    """
    return (-log_prob / num_dims + math.log(LEVELS / 2)) / math.log(2)


def dequantise(key: Key[Array, ""], images: UInt8[Array, "b height width c"]) -> Float[Array, "b height width c"]:
    """Returns 8-bit images with uniform noise of one level, in [-1, 1): 2 (x + U[0, 1)) / 256 - 1.

    The expected bits/dim of dequantised images bounds the discrete bits/dim from above.

    Example:
        x = dequantise(key, batch["image"])
    """
    noise = jax.random.uniform(key, images.shape)
    return (images.astype(jnp.float32) + noise) * (2 / LEVELS) - 1


def add_noise(
    key: Key[Array, ""], images: UInt8[Array, "b height width c"], noise_std: float
) -> Float[Array, "b height width c"]:
    """Returns images as the flow is trained on them: σ > 0, x + σ N(0, I) on [-1, 1]; σ = 0, dequantised.

    Example:
        x = add_noise(key, batch["image"], flow.config.noise_std)
    """
    if noise_std == 0:
        return dequantise(key, images)
    return jnp.asarray(from_uint8(images)) + noise_std * jax.random.normal(key, images.shape)


def nll_objective(flow: Flow, *, label_dropout: float = 0.0) -> Callable[..., tuple]:
    """Returns the maximum-likelihood objective (variables, batch, key) -> (loss, metrics[, carried state]).

    loss = ½ mean z² - mean logdet / num_dims in nats per dimension, without constants (TARFlow, eq. of the loss).
    batch: `image` uint8 `b h w c`, and `label` int32 `b` where the flow has classes; labels become -1 with
    probability `label_dropout`. metrics: loss, bits_per_dim (of the noised images), mean_square_z,
    logdet_per_dim, and mean_square/<block> of the tokens after each block.
    Volume-preserving flows return their tracked prior variance, v + 0.1 (mean_b z² - v), as carried state.

    Example:
        loss, metrics, *state = nll_objective(flow, label_dropout=0.1)(params, batch, key)
    """
    config = flow.config

    def objective(variables, batch, key):
        noise_key, label_key = jax.random.split(key)
        x = add_noise(noise_key, batch["image"], config.noise_std)
        cond = drop_labels(label_key, batch["label"], label_dropout) if config.num_classes else None
        states, logdet = flow.apply(variables, x, cond, method="trajectory")
        z = states[-1]
        mean_square_z = jnp.square(z).mean()
        logdet_per_dim = logdet.mean() / config.num_dims
        loss = 0.5 * mean_square_z - logdet_per_dim
        log_prob = gaussian_log_prob(z, flow.apply(variables, method="prior_variance")) + logdet
        metrics = {
            "loss": loss,
            "bits_per_dim": bits_per_dim(log_prob.mean(), config.num_dims),
            "mean_square_z": mean_square_z,
            "logdet_per_dim": logdet_per_dim,
        }
        for index, state in enumerate(states):
            metrics[f"mean_square/{index}"] = jnp.square(state).mean()
        if config.transform != "volume_preserving":
            return loss, metrics
        variance = variables["prior"]["variance"]
        batch_variance = jax.lax.stop_gradient(jnp.square(z).mean(axis=0))
        tracked = variance + PRIOR_VARIANCE_RATE * (batch_variance - variance)
        return loss, metrics, {"prior": {"variance": tracked}}

    return objective


def score(
    flow: Flow, variables: Any, x: Float[Array, "b height width c"], cond: Int[Array, " b"] | None = None
) -> Float[Array, "b height width c"]:
    """Returns ∇_x log p(x | cond).

    Example:
        s = score(flow, params, x, cond)
    """
    return jax.grad(lambda x: flow.apply(variables, x, cond, method="log_prob").sum())(x)


def denoise(
    flow: Flow,
    variables: Any,
    x: Float[Array, "b height width c"],
    cond: Int[Array, " b"] | None = None,
    *,
    noise_std: float | None = None,
    strength: Float[Array, ""] | float = 1.0,
) -> Float[Array, "b height width c"]:
    """Returns E[clean | x] by Tweedie's formula, x + strength · σ² ∇_x log p(x | cond), not clipped.

    noise_std: σ; None takes the one in the flow's config. With σ = 0 there is nothing to remove.

    Example:
        clean = denoise(flow, params, sample.x, cond)
    """
    sigma = flow.config.noise_std if noise_std is None else noise_std
    if sigma == 0:
        return x
    return x + strength * sigma**2 * score(flow, variables, x, cond)


def class_posterior(
    flow: Flow,
    variables: Any,
    x: Float[Array, "b height width c"],
    log_prior: Float[Array, " classes"] | None = None,
) -> Float[Array, "b classes"]:
    """Returns p(class | x) ∝ p(x | class) p(class) by Bayes' rule, one likelihood per class, uniform prior.

    Raises ValueError where the flow has no classes.

    Example:
        labels = class_posterior(flow, params, x).argmax(axis=-1)
    """
    num_classes = flow.config.num_classes
    if num_classes == 0:
        raise ValueError("class_posterior needs a flow with classes; this one has num_classes 0.")

    def log_likelihood(label):
        cond = jnp.full(x.shape[0], label, jnp.int32)
        return flow.apply(variables, x, cond, method="log_prob")

    logits = jax.lax.map(log_likelihood, jnp.arange(num_classes)).T
    if log_prior is not None:
        logits = logits + log_prior[None]
    return jax.nn.softmax(logits, axis=-1)
