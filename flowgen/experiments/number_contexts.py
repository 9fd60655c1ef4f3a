"""The contexts of samples of numbers: placeholders, contexts with given labels, and arrays to save in a file."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from flowgen.conditioning import ContextTokens, Padded
from flowgen.contexts import ImageContext, VectorContext
from flowgen.experiments.estimates import some_condition
from flowgen.flows.token_flow import TokenFlowConfig
from flowgen.nn.checks import image_sides


def blank_context(model: TokenFlowConfig, rows: int) -> Any:
    """Returns a placeholder with the shapes and dtypes of the contexts in a dataset.

    Example:
        context = blank_context(experiment.model, rows=8)
    """
    if model.padded:
        inner = blank_context(dataclasses.replace(model, padded=False), rows)
        return Padded(jnp.ones((rows, model.shape[0]), bool), inner)
    described = model.context
    if isinstance(described, ImageContext):
        return jnp.zeros((rows, *image_sides(described.image_size), described.channels))
    if isinstance(described, VectorContext):
        return jnp.zeros((rows, described.dim))
    return some_condition(model, rows)


def with_labels(context: Any, labels: Int[np.ndarray, " b"] | None) -> Any:
    """Returns the contexts with the given labels in place of their own; if labels is None, the contexts are unchanged.

    Example:
        context = with_labels(Padded(mask), np.array([0, 2]))
    """
    if labels is None:
        return context
    return context._replace(cond=labels) if isinstance(context, Padded) else labels


def named_arrays(context: Any) -> dict[str, np.ndarray]:
    """Returns the arrays of a context under the names that they have in the file of a `NumbersConfig`.

    Example:
        named_arrays(Padded(mask, labels))  # {"mask": ..., "labels": ...}
    """
    named, rest = {}, context
    if isinstance(context, Padded):
        named, rest = {"mask": np.asarray(context.mask)}, context.cond
    if isinstance(rest, ContextTokens):
        return {**named, "context": np.asarray(rest.tokens), "context_mask": np.asarray(rest.mask)}
    if rest is None:
        return named
    rest = np.asarray(rest)
    return {**named, "labels" if rest.dtype.kind in "iu" else "context": rest}
