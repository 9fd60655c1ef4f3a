"""Checks samples and contexts in the units of the data, before they are standardised."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowgen.arrays import check_finite, shown
from flowgen.conditioning import ContextTokens, Padded, TextCondition, check_labels, split_padded
from flowgen.contexts import ImageContext, TokenContext
from flowgen.nn.checks import image_sides


def check_finite_samples(x: Any, context: Any) -> None:
    """Raises ValueError if the samples contain a value outside padding that is not finite.

    Example:
        check_finite_samples(x, context)
    """
    mask, _ = split_padded(context)
    values = np.asarray(x)
    check_finite(x=values if mask is None else np.where(np.asarray(mask)[:, :, None], values, 0))


def batch_context(model: Any, context: Any, rows: int, *, unconditional: bool = False) -> Any:
    """Returns the context of a batch in the units of the data, with one row per sample.

    model: the config of a flow. context: an array, `ContextTokens`, labels or `Padded`, as the model requires. A
    context with one row, or without a batch axis, applies to all samples. unconditional: whether None is allowed
    although the model has a context or classes.

    Raises ValueError unless the context has the kind and shape that the model requires, and contains only finite
    numbers.

    Example:
        context = batch_context(flow.config, observation, len(x))  # `k` or `1 k` becomes `b k`
    """
    if not model.padded:
        if isinstance(context, Padded):
            raise ValueError("context is Padded, but this model's samples have no padding; give its cond.")
        return _context(model, context, rows, "context", unconditional)
    shape = (model.shape[0],)
    if not isinstance(context, Padded):
        raise ValueError(
            f"context is {shown(context)}; this model's samples are padded, so give Padded(mask), or Padded(mask, "
            f"cond), with booleans of shape {(rows, *shape)} as the mask."
        )
    mask = _rows("context.mask", context.mask, shape, rows, "b", "this model needs booleans")
    return Padded(mask, _context(model, context.cond, rows, "context.cond", unconditional))


def _context(model: Any, context: Any, rows: int, name: str, unconditional: bool) -> Any:
    described = model.context
    if context is None and (unconditional or (described is None and not model.num_classes)):
        return None
    if described is None and not model.num_classes:
        raise ValueError(f"{name} is {shown(context)}, but this model has no context and no classes; leave it out.")
    if described is None:
        labels = np.asarray(context) if isinstance(context, list | int) else context
        labels = _rows(name, labels, (), rows, "iu", "this model needs one label per sample, as integers")
        check_labels(labels, num_classes=model.num_classes, batch=rows)
        return labels
    if isinstance(described, TokenContext) and isinstance(context, ContextTokens | TextCondition):
        tokens, mask = context
        shape = (described.length, described.dim)
        tokens = _rows(f"{name}.tokens", tokens, shape, rows, "f", "this model needs floats", mask)
        return ContextTokens(tokens, _rows(f"{name}.mask", mask, shape[:1], rows, "b", "this model needs booleans"))
    if isinstance(described, TokenContext):
        needs, shape = "this model needs ContextTokens, or floats", (described.length, described.dim)
    elif isinstance(described, ImageContext):
        shape = (*image_sides(described.image_size), described.channels)
        needs = "this model needs one image per sample, as floats"
    else:
        needs, shape = "this model needs one vector per sample, as floats", (described.dim,)
    return _rows(name, context, shape, rows, "f", needs)


def _rows(
    name: str, array: Any, shape: tuple[int, ...], rows: int, kinds: str, needs: str, mask: Any = None
) -> jax.Array | np.ndarray:
    """Returns an array with one row of this shape per sample. kinds: allowed dtype kinds. mask: where tokens exist."""
    found = getattr(array, "shape", None)
    if found not in (shape, (1, *shape), (rows, *shape)) or not _is_of(kinds, array.dtype):
        one = f", or of shape {shape} for all samples" if shape else ", or one integer for all samples"
        raise ValueError(f"{name} is {shown(array)}; {needs} of shape {(rows, *shape)}{one}.")
    if kinds == "f":
        exists = None if mask is None or np.shape(mask) != found[:-1] else np.asarray(mask)[..., None]
        check_finite(**{name: array if exists is None else np.where(exists, array, 0)})
    if found == (rows, *shape):
        return array
    return np.broadcast_to(np.asarray(array).reshape(1, *shape), (rows, *shape))


def _is_of(kinds: str, dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) if kinds == "f" else getattr(dtype, "kind", "-") in kinds
