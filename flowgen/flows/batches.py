"""The training input of a flow: a noisy batch and its condition. Each row has a separate random key."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from flowgen.arrays import check_bytes, check_key, shown
from flowgen.batch import Batch, Moments, check_arrays
from flowgen.conditioning import Condition, Padded, TextCondition, Unpadded, drop_condition, is_context, split_padded
from flowgen.contexts import check_context
from flowgen.flows.density import LEVELS, Flow
from flowgen.flows.orders import without_padding
from flowgen.rows import Rows, batch_rows


def noisy_batch(
    flow: Flow, condition: Callable[..., Condition | None], batch: Batch, key: Key[Array, ""]
) -> tuple[Float[Array, "b *event"], Condition | None]:
    """Returns the training input of a flow: a noisy batch and its condition.

    condition: the function that `batch_condition` returned.
    """
    check_batch(batch, flow)
    check_key(key)
    noise_rows, label_rows = batch_rows(batch, key, batch.size).split(2)
    x = noise_rows.draw(lambda key, one: batch_input(key, one, flow.config.noise_std), batch.x)
    cond = condition(label_rows, batch, x.shape[1:-1])
    return (without_padding(x, cond) if isinstance(cond, Padded) else x), cond


def check_batch(batch: Any, flow: Flow) -> None:
    """Raises ValueError unless this is a nonempty `Batch` for this flow, with one row of context per sample.

    For flows of images and clips, x must be uint8 or latent moments; for other flows, floating-point samples.
    """
    if not isinstance(batch, Batch):
        raise ValueError(f"batch is {shown(batch)}; give a flowgen.data.Batch(x, context).")
    check_arrays(batch)
    if not models_images(flow):
        flow.config.check_samples(batch.x)
    elif not isinstance(batch.x, Moments):
        check_bytes("batch.x", batch.x)
    if batch.size == 0:
        raise ValueError("the batch is empty; give at least one sample.")
    counts = {len(part) for part in jax.tree.leaves(batch.context)}
    if counts - {batch.size}:
        raise ValueError(
            f"batch.context has {counts.pop()} rows, and batch.x has {batch.size}; give both the same number."
        )


def models_images(flow: Flow) -> bool:
    """Returns True if a flow's samples are images or clips, and False if they are vectors or sequences."""
    return len(flow.config.event_shape) > 2


def batch_input(
    key: Key[Array, ""], x: UInt8[Array, "b *event"] | Moments | Float[Array, "b *event"], noise_std: float
) -> Float[Array, "b *event"]:
    """Returns a flow's training input: noisy images (see `add_noise`), latents or floating-point samples.

    Noisy latents are a sample from the encoder's posterior plus σ N(0, I). Floating-point x becomes x + σ N(0, I).
    """
    if not isinstance(x, Moments) and jnp.issubdtype(x.dtype, jnp.floating):
        return x if noise_std == 0 else x + noise_std * jax.random.normal(key, x.shape, x.dtype)
    if not isinstance(x, Moments):
        return add_noise(key, x, noise_std)
    posterior_key, key = jax.random.split(key)
    mean, std = (jnp.asarray(part, jnp.float32) for part in x)
    latents = mean + std * jax.random.normal(posterior_key, mean.shape)
    return latents + noise_std * jax.random.normal(key, mean.shape)


def add_noise(key: Key[Array, ""], images: UInt8[Array, "b *event"], noise_std: float) -> Float[Array, "b *event"]:
    """Returns the training input for these images.

    With σ = `noise_std` > 0, these are the images scaled to [-1, 1] plus σ N(0, I). With σ = 0, the images are
    dequantised.

    Example:
        x = add_noise(key, batch.x, flow.config.noise_std)
    """
    if noise_std == 0:
        return dequantise(key, images)
    noise = jax.random.normal(key, images.shape)
    # This computes the same as `from_uint8`, but in the precision of the noise, which is float64 if x64 is enabled.
    return images.astype(noise.dtype) / (LEVELS // 2 - 0.5) - 1 + noise_std * noise


def dequantise(key: Key[Array, ""], images: UInt8[Array, "b *event"]) -> Float[Array, "b *event"]:
    """Returns 8-bit images plus uniform noise one level wide, scaled to [-1, 1): 2 (x + U[0, 1)) / 256 - 1.

    The expected bits/dim of dequantised images is an upper bound on the discrete bits/dim.

    Example:
        x = dequantise(key, batch.x)
    """
    check_bytes("images", images)
    noise = jax.random.uniform(key, images.shape)
    return (images.astype(jnp.float32) + noise) * (2 / LEVELS) - 1


def batch_condition(
    flow: Flow, label_dropout: float, null_text: Callable[[tuple[int, ...]], TextCondition] | None
) -> Callable[..., Condition | None]:
    """Returns a function that computes the condition of a training batch, with label or text dropout.

    Its signature is (rows, batch, ([frames,] height, width)) -> condition.

    Raises ValueError if texts may be dropped but `null_text` is None.
    """
    if label_dropout and flow.config.text_dim and null_text is None:
        raise ValueError(
            f"label_dropout is {label_dropout}, but null_text is None; set null_text, which replaces dropped texts."
        )

    def condition(rows: Rows, batch: Batch, shape: tuple[int, ...]):
        padding, cond = split_padded(flow_condition(flow, batch))
        if cond is not None and label_dropout:
            null = null_text(shape) if isinstance(cond, TextCondition) and null_text is not None else None
            cond = rows.draw(partial(drop_condition, null=null, rate=label_dropout), cond)
        return cond if padding is None else Padded(padding, cond)

    return condition


def flow_condition(flow: Flow, batch: Batch) -> Condition | None:
    """Returns the condition of a batch, without dropout; None if the flow accepts no conditions.

    Raises ValueError if the flow requires another kind of context.
    """
    if isinstance(batch.context, Padded):
        if not getattr(flow.config, "padded", False):
            raise ValueError("batch.context is Padded, but this flow's samples have no padding; give its cond.")
        return Padded(jnp.asarray(batch.context.mask), _context_of(flow, batch.context.cond))
    return _context_of(flow, batch.context)


def _context_of(flow: Flow, context: Any) -> Unpadded | None:
    described = getattr(flow.config, "context", None)
    if described is not None:
        if context is None:
            raise ValueError("batch.context is None; this flow requires the context that its config describes.")
        return check_context(context, described, len(jax.tree.leaves(context)[0]))
    if flow.config.text_dim:
        if not isinstance(context, TextCondition):
            raise ValueError(f"batch.context is {shown(context)}; this flow requires texts, so give a TextCondition.")
        return TextCondition(jnp.asarray(context.embeddings, jnp.float32), jnp.asarray(context.mask))
    if not flow.config.num_classes:
        if is_context(context):
            raise ValueError(
                f"batch.context is {shown(context)}, but this flow has no context; describe it by the model's "
                "`context`."
            )
        return None
    labels = None if context is None or isinstance(context, tuple) else jnp.asarray(context)
    if labels is None or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"batch.context is {shown(context)}; this flow requires classes, so give integer labels.")
    return labels
