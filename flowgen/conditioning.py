"""The conditions of models (labels, texts and continuous contexts), and functions that check and drop them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key

UNCONDITIONAL = -1


class TextCondition(NamedTuple):
    """Texts as the condition of a model: the features that a frozen encoder has computed for the tokens of each text.

    mask: True for tokens, False for padding.

    Example:
        cond = TextCondition(encoder(ids), mask=ids != 0)
    """

    embeddings: Float[Array | np.ndarray, "b n e"]
    mask: Bool[Array | np.ndarray, "b n"]


class ContextTokens(NamedTuple):
    """A continuous context as tokens. A model's `check_cond` converts vectors, images and token features to this form.

    mask: True for tokens, False for padding. A sample whose mask is False everywhere is unconditional.

    Example:
        cond = ContextTokens(network.apply(variables, sets), mask=is_point)
    """

    tokens: Float[Array | np.ndarray, "b m e"]
    mask: Bool[Array | np.ndarray, "b m"]


class Padded(NamedTuple):
    """The condition of padded samples: the mask of their tokens, and their labels, texts or context, if any.

    The density of a sample is the density of its tokens without the padding, given their number and cond.

    mask: True for the tokens of each sample, False for padding, which may be anywhere.

    Example:
        cond = Padded(mask=jnp.arange(8) < lengths[:, None], cond=labels)
    """

    mask: Bool[Array | np.ndarray, "b n"]
    cond: Unpadded | None = None


Unpadded = Integer[Array, " b"] | TextCondition | ContextTokens
Condition = Unpadded | Padded
# What users may pass as a condition; a model's `check_cond` returns it as a `Condition`. Arrays of floating-point
# numbers are the vectors, tokens or images of a continuous context.
AnyCondition = Condition | Integer[np.ndarray, " b"] | list[int] | Float[Array | np.ndarray, "b *context"]


def is_context(cond: Any) -> bool:
    """Returns True if a condition is `ContextTokens` or an array of floating-point numbers."""
    return isinstance(cond, ContextTokens) or jnp.issubdtype(getattr(cond, "dtype", jnp.int32), jnp.floating)


def zero_padding(
    values: Float[Array | np.ndarray, "b n c"], mask: Bool[Array | np.ndarray, "b n"]
) -> Float[Array, "b n c"]:
    """Returns the values, with exactly 0 where the mask is False, even if the value there is NaN."""
    return jnp.where(jnp.asarray(mask)[:, :, None], values, 0)


def no_labels(shape: tuple[int, ...]) -> Int[Array, "..."]:
    """Returns int32 labels of -1, which means unconditional."""
    return jnp.full(shape, UNCONDITIONAL, jnp.int32)


def drop_labels(key: Key[Array, ""], labels: Integer[Array, " b"], rate: float) -> Int[Array, " b"]:
    """Returns int32 labels, each replaced by -1 with probability `rate`."""
    return jnp.where(jax.random.bernoulli(key, rate, labels.shape), UNCONDITIONAL, labels.astype(jnp.int32))


def drop_texts(key: Key[Array, ""], texts: TextCondition, null: TextCondition, rate: float) -> TextCondition:
    """Returns the texts, each replaced with probability `rate` by the null text, usually the encoded ""."""
    dropped = jax.random.bernoulli(key, rate, texts.mask.shape[:1])
    null = broadcast_text(null, len(dropped))
    return TextCondition(
        jnp.where(dropped[:, None, None], null.embeddings, texts.embeddings),
        jnp.where(dropped[:, None], null.mask, texts.mask),
    )


def broadcast_text(text: TextCondition, batch: int) -> TextCondition:
    """Returns one text per sample: repeats a single text, and returns a whole batch of texts unchanged."""
    return TextCondition(*(jnp.broadcast_to(part, (batch, *part.shape[1:])) for part in text))


def drop_context(key: Key[Array, ""], context: ContextTokens, rate: float) -> ContextTokens:
    """Returns the context, in which each sample is made unconditional with probability `rate`."""
    dropped = jax.random.bernoulli(key, rate, context.mask.shape[:1])
    return ContextTokens(context.tokens, context.mask & ~dropped[:, None])


def drop_condition(key: Key[Array, ""], cond: Unpadded, null: TextCondition | None, rate: float) -> Unpadded:
    """Returns the condition, in which each sample is made unconditional with probability `rate`.

    null: the null text; used only if cond is a `TextCondition`.
    """
    if isinstance(cond, ContextTokens):
        return drop_context(key, cond, rate)
    if isinstance(cond, TextCondition):
        assert null is not None  # text flows require it
        return drop_texts(key, cond, null, rate)
    return drop_labels(key, cond, rate)


def split_padded(cond: AnyCondition | None) -> tuple[Bool[Array, "b n"] | None, Any]:
    """Returns the mask of padded samples, or None, and the rest of the condition."""
    return (jnp.asarray(cond.mask), cond.cond) if isinstance(cond, Padded) else (None, cond)


def mean_tokens(cond: Padded) -> Float[Array, ""]:
    """Returns the mean number of tokens per sample, without padding."""
    return jnp.asarray(cond.mask).sum(axis=1).mean(dtype=float)


def unconditional(cond: Condition, null: TextCondition | None) -> Condition:
    """Returns the condition for the unconditional branch of guidance: label -1, the null text, or no context."""
    if isinstance(cond, Padded):
        return cond if cond.cond is None else Padded(cond.mask, _unconditional(cond.cond, null))
    return _unconditional(cond, null)


def _unconditional(cond: Unpadded, null: TextCondition | None) -> Unpadded:
    if isinstance(cond, ContextTokens):
        return ContextTokens(cond.tokens, jnp.zeros_like(cond.mask))
    if isinstance(cond, TextCondition):
        assert null is not None  # text flows require it
        return broadcast_text(null, len(cond.mask))
    return no_labels(cond.shape)


def check_text(text: Any, *, length: int, dim: int, batch: int) -> TextCondition:
    """Returns a text condition as JAX arrays. Raises ValueError unless it has the shapes that the model expects."""
    if not isinstance(text, TextCondition):
        raise ValueError(f"cond is {type(text).__name__}; it must be a flowgen.conditioning.TextCondition.")
    embeddings, mask = (part if isinstance(part, jax.Array) else np.asarray(part) for part in text)
    if embeddings.shape != (batch, length, dim) or not jnp.issubdtype(embeddings.dtype, jnp.floating):
        raise ValueError(
            f"the text embeddings must be floating-point numbers of shape ({batch}, {length}, {dim}); "
            f"got {embeddings.dtype} of shape {tuple(embeddings.shape)}."
        )
    return TextCondition(jnp.asarray(embeddings), check_mask("the text mask", mask, (batch, length)))


def check_mask(name: str, mask: Any, shape: tuple[int, int]) -> Bool[Array, "b n"]:
    """Returns a mask as a JAX array. Raises ValueError unless it is bool and has this shape."""
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    if mask.shape != shape or mask.dtype != bool:
        raise ValueError(
            f"{name} must be bool of shape {shape}, True for tokens, False for padding; got {mask.dtype} of shape "
            f"{tuple(mask.shape)}."
        )
    return jnp.asarray(mask)


def check_labels(labels: Any, *, num_classes: int, batch: int) -> Int[Array, " b"] | None:
    """Returns labels as int32, or None. Raises ValueError unless they fit this model and batch.

    Traced labels cannot be checked; `flowgen.nn.class_rows` turns invalid ones into NaN.
    """
    if labels is None:
        return None
    if isinstance(labels, ContextTokens | Padded | TextCondition):
        raise ValueError(
            f"cond is {type(labels).__name__}, which this model does not accept; set its context, or give labels."
        )
    if not isinstance(labels, jax.Array):
        labels = np.asarray(labels)
    if num_classes == 0:
        raise ValueError(
            "cond is given, but the model has no classes (num_classes is 0) and no context; pass cond=None."
        )
    if labels.shape != (batch,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"cond must be an integer array of shape ({batch},), with one label per sample; "
            f"got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    if isinstance(labels, jax.core.Tracer):
        return labels.astype(jnp.int32)
    values = np.asarray(labels).astype(np.int64)
    bad = values[(values < UNCONDITIONAL) | (values >= num_classes)]
    if bad.size:
        raise ValueError(
            f"label {bad[0]} is out of range; use 0 to {num_classes - 1}, or {UNCONDITIONAL} for unconditional."
        )
    return jnp.asarray(values, jnp.int32)
