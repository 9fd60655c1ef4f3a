"""Standardisation: the maps between numbers in their own units and the numbers that a flow is trained on.

The mean and the scale of the training data form a collection of the model's variables. This collection is not trained.
It is saved with every checkpoint, so a run can be used without its data. Let s(x) be the transform of a sample. The
density p in the units of the data follows from the flow's density p_flow:

    log p(x | context) = log p_flow(s(x) | standardised context) + log|det ds/dx|
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flowgen.batch import Batch
from flowgen.conditioning import ContextTokens, Padded, split_padded, zero_padding
from flowgen.contexts import ImageContext
from flowgen.data.bounds import bounds_of
from flowgen.data.numbers import NumbersConfig, NumbersDataset, SimulatedConfig
from flowgen.flows.batches import flow_condition
from flowgen.transforms import Box, Chain, Standardise, Transform

UNITS = "units"  # the name of the collection


def measured_units(dataset: NumbersDataset, box: Box | None) -> dict[str, Any]:
    """Returns the collection for a training set: the mean and scale of each channel of its samples and contexts.

    A channel is an entry of a vector or, in other arrays, an index of the last axis. Padding is left out. If there is a
    box, the mean and scale of samples are those of the unbounded numbers to which it maps them. If the context consists
    of padding alone, its means are 0 and its scales 1.

    Raises ValueError if a channel of the samples is constant, or if the samples consist of padding alone. The scale of
    a constant channel of the context is 1.

    Example:
        variables = {**flowgen.init(flow, key), **measured_units(dataset, box=None)}
    """
    mask, context = split_padded(dataset.context)
    if mask is not None and not np.any(mask):
        raise ValueError(
            "mask is False everywhere in the training samples, so they have no rows to learn from; set it to True for "
            "the rows that exist."
        )
    x = dataset.x if mask is None else dataset.x[np.asarray(mask)]
    units = {"x": _moments(x if box is None else np.asarray(box.forward(jnp.asarray(x))[0]))}
    if (constant := np.flatnonzero(units["x"]["scale"] == 0)).size:
        raise ValueError(
            f"channel {constant[0]} of the training samples has the same value everywhere, so it has no density; leave "
            "it out."
        )
    values = context.tokens[np.asarray(context.mask)] if isinstance(context, ContextTokens) else context
    if _is_float(values):
        moments = _moments(values)
        units["context"] = {**moments, "scale": np.where(moments["scale"] == 0, 1, moments["scale"])}
    return {UNITS: units}


def blank_units(model: Any) -> dict[str, Any]:
    """Returns a collection with means 0 and scales 1, which leaves numbers unchanged. model: the config of a flow.

    Example:
        shapes = jax.eval_shape(lambda: blank_units(flow.config))
    """
    described = model.context
    channels = {"x": model.shape[-1]}
    if described is not None:
        channels["context"] = described.channels if isinstance(described, ImageContext) else described.dim
    return {UNITS: {part: {"mean": jnp.zeros(size), "scale": jnp.ones(size)} for part, size in channels.items()}}


def to_flow(
    variables: Any, x: Float[Array | np.ndarray, "b *event"], context: Any, box: Box | None
) -> tuple[Float[Array, "b *event"], Any, Float[Array, " b"]]:
    """Returns the samples and contexts that a flow is trained on, and log|det ds/dx| in nats; padding does not count.

    Example:
        u, cond, logdet = to_flow(variables, x, observations, box=None)
    """
    mask, _ = split_padded(context)
    x = jnp.asarray(x)
    if mask is not None and box is not None:  # Padding may be outside the bounds.
        x = _with_inner_values(mask[:, :, None], x, box)
    u, logdet = _transform(variables, box).forward(x)
    if logdet.ndim == 2:  # rows of a sequence
        logdet = (logdet if mask is None else jnp.where(mask, logdet, 0)).sum(axis=1)
    return u, context_to_flow(variables, context), logdet


def context_to_flow(variables: Any, context: Any) -> Any:
    """Returns a standardised context; labels and None are returned unchanged.

    Example:
        cond = context_to_flow(variables, observations)
    """
    if isinstance(context, Padded):
        return context._replace(cond=context_to_flow(variables, context.cond))
    if isinstance(context, ContextTokens):
        return context._replace(tokens=_standardise(variables, "context").forward(jnp.asarray(context.tokens))[0])
    return _standardise(variables, "context").forward(jnp.asarray(context))[0] if _is_float(context) else context


def to_data(
    variables: Any, u: Float[Array | np.ndarray, "b *event"], context: Any, box: Box | None
) -> Float[Array, "b *event"]:
    """Returns a flow's samples in the units of the data; padding is 0.

    Example:
        x = to_data(variables, result.x, observations, box=None)
    """
    mask, _ = split_padded(context)
    x, _ = _transform(variables, box).inverse(jnp.asarray(u))
    return x if mask is None else zero_padding(x, mask)


def log_prob_in_data(
    variables: Any, x: Float[Array, "b *event"], context: Any, *, flow: Any, data: SimulatedConfig | NumbersConfig
) -> Float[Array, " b"]:
    """Returns log p(x | context) in nats, a density in the units of the data; -inf outside the bounds of x.

    Example:
        log_prob = log_prob_in_data(variables, x, context, flow=flow, data=experiment.data)
    """
    box, inside, mask = box_of(data, flow.config), None, split_padded(context)[0]
    if box is not None:
        low, high = (jnp.asarray(bound).reshape((1,) * (x.ndim - 1) + (-1,)) for bound in (box.low, box.high))
        inside = (x > low) & (x < high)
        # A value outside would make the gradients of its sample NaN, although its density is known to be 0.
        x = _with_inner_values(inside, x, box)
        inside = inside if mask is None else inside | ~jnp.asarray(mask)[:, :, None]
    u, context, logdet = to_flow(variables, x, context, box)
    log_prob = flow.apply(variables, u, flow_condition(flow, Batch(u, context)), method="log_prob") + logdet
    if inside is None:
        return log_prob
    return jnp.where(inside.reshape(len(x), -1).all(axis=1), log_prob, -jnp.inf)


def box_of(data: SimulatedConfig | NumbersConfig, model: Any) -> Box | None:
    """Returns the transform from bounded samples to unbounded numbers; None if the samples have no bounds.

    model: the config of a flow.

    Raises ValueError if a tuple of bounds does not have one entry per channel of the samples.

    Example:
        box = box_of(NumbersConfig(path="simulations.npz", low=0.0), TokenFlowConfig(shape=(2,)))
    """
    if isinstance(data, SimulatedConfig):
        return Box(np.array(data.simulator.low), np.array(data.simulator.high))
    if data.low is None and data.high is None:
        return None
    return Box(*bounds_of(data.low, data.high, model.shape[-1]))


def _with_inner_values(known: Any, x: Array, box: Box) -> Array:
    """Returns x with a value inside the bounds wherever `known` is False."""
    return jnp.where(known, x, box.inverse(jnp.zeros_like(x))[0])


def _transform(variables: Any, box: Box | None) -> Transform:
    standardise = _standardise(variables, "x")
    return standardise if box is None else Chain((box, standardise))


def _standardise(variables: Any, part: str) -> Standardise:
    return Standardise(variables[UNITS][part]["mean"], variables[UNITS][part]["scale"])


def _moments(values: np.ndarray) -> dict[str, np.ndarray]:
    """The mean and standard deviation of each channel, computed in float64; 0 and 1 if there are no values."""
    rows = np.asarray(values, np.float64).reshape(-1, values.shape[-1])
    if not len(rows):
        return {"mean": np.zeros(rows.shape[1], np.float32), "scale": np.ones(rows.shape[1], np.float32)}
    return {"mean": rows.mean(axis=0).astype(np.float32), "scale": rows.std(axis=0).astype(np.float32)}


def _is_float(values: Any) -> bool:
    return values is not None and jnp.issubdtype(values.dtype, jnp.floating)
