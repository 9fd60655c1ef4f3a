"""The training input of a flow: the noisy batch and its condition, drawn row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from flowgen.arrays import check_bytes, check_key, shown
from flowgen.conditioning import Condition, TextCondition, drop_labels, drop_texts
from flowgen.flows.density import LEVELS, Flow
from flowgen.rows import Rows, batch_rows


def noisy_batch(
    flow: Flow, condition: Callable[..., Condition | None], batch: Any, key: Key[Array, ""]
) -> tuple[Float[Array, "b *event"], Condition | None]:
    """Returns the training input of a flow: the noisy batch and its condition, drawn row by row.

    condition: from `batch_condition`.
    """
    check_batch(batch)
    check_key(key)
    arrays = {name: batch[name] for name in ("image", "mean", "std") if name in batch}
    noise_rows, label_rows = batch_rows(batch, key, len(next(iter(arrays.values())))).split(2)
    x = noise_rows.draw(lambda key, one: batch_input(key, one, flow.config.noise_std), arrays)
    return x, condition(label_rows, batch, x.shape[1:-1])


def check_batch(batch: Any) -> None:
    """Raises ValueError unless a batch is a dict that has images, or moments of latents."""
    if not isinstance(batch, Mapping) or not ("image" in batch or {"mean", "std"} <= batch.keys()):
        given = list(batch) if isinstance(batch, Mapping) else shown(batch)
        raise ValueError(f"batch is {given}; give a dict with 'image', or with 'mean' and 'std' of latents.")


def batch_input(key: Key[Array, ""], batch: Any, noise_std: float) -> Float[Array, "b *event"]:
    """Returns the input of a flow in training, from images or from moments of latents.

    `image` uint8: see `add_noise`. `mean` and `std` `b height width c`, an autoencoder's posterior: a sample from it
    plus σ N(0, I).
    """
    check_batch(batch)
    if "image" in batch:
        return add_noise(key, batch["image"], noise_std)
    posterior_key, key = jax.random.split(key)
    mean, std = (jnp.asarray(batch[name], jnp.float32) for name in ("mean", "std"))
    latents = mean + std * jax.random.normal(posterior_key, mean.shape)
    return latents + noise_std * jax.random.normal(key, mean.shape)


def add_noise(key: Key[Array, ""], images: UInt8[Array, "b *event"], noise_std: float) -> Float[Array, "b *event"]:
    """Returns images as a flow's training input: σ > 0, x + σ N(0, I) on [-1, 1]; σ = 0, dequantised.

    Example:
        x = add_noise(key, batch["image"], flow.config.noise_std)
    """
    if noise_std == 0:
        return dequantise(key, images)
    noise = jax.random.normal(key, images.shape)
    # As `from_uint8`, in the precision of the noise: float64 if enabled.
    return images.astype(noise.dtype) / (LEVELS // 2 - 0.5) - 1 + noise_std * noise


def dequantise(key: Key[Array, ""], images: UInt8[Array, "b *event"]) -> Float[Array, "b *event"]:
    """Returns 8-bit images with uniform noise of one level, in [-1, 1): 2 (x + U[0, 1)) / 256 - 1.

    The expected bits/dim of dequantised images bounds the discrete bits/dim from above.

    Example:
        x = dequantise(key, batch["image"])
    """
    check_bytes("images", images)
    noise = jax.random.uniform(key, images.shape)
    return (images.astype(jnp.float32) + noise) * (2 / LEVELS) - 1


def batch_condition(
    flow: Flow, label_dropout: float, null_text: Callable[[tuple[int, ...]], TextCondition] | None
) -> Callable[..., Condition | None]:
    """Returns (rows, batch, ([frames,] height, width)) -> the condition of a training batch, with dropout.

    Raises ValueError if texts are dropped and there is no null_text.
    """
    if label_dropout and flow.config.text_dim and null_text is None:
        raise ValueError(f"label_dropout is {label_dropout}, but no null_text is given for dropped texts; encode ''.")

    def condition(rows: Rows, batch: Any, shape: tuple[int, ...]):
        cond = condition_of(flow, batch)
        if cond is None or not label_dropout:
            return cond
        if isinstance(cond, TextCondition):
            assert null_text is not None  # checked above
            null = null_text(shape)
            return rows.draw(lambda key, texts: drop_texts(key, texts, null, label_dropout), cond)
        return rows.draw(lambda key, labels: drop_labels(key, labels, label_dropout), cond)

    return condition


def condition_of(flow: Flow, batch: Any) -> Condition | None:
    """Returns the labels or texts of a batch, without dropout, if the flow takes them."""
    needed = "text" if flow.config.text_dim else "label" if flow.config.num_classes else None
    if needed is not None and needed not in batch:
        raise ValueError(f"batch has {', '.join(map(repr, batch))} and no {needed!r}, which this flow takes; give it.")
    if flow.config.text_dim:
        features, mask = batch["text"]
        return TextCondition(jnp.asarray(features, jnp.float32), jnp.asarray(mask))
    return jnp.asarray(batch["label"]) if flow.config.num_classes else None
