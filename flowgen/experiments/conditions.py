"""What a velocity network is conditioned on in an experiment: labels, or contexts from the user's own data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flowgen.contexts import Context
from flowgen.data import Batch, Dataset


def model_context(model: Any) -> Context | None:
    """Returns the description of the context that a model is conditioned on, or None.

    Example:
        context = model_context(experiment.model)
    """
    return getattr(model, "context", None)  # A user's config may lack this field.


def is_conditional(model: Any) -> bool:
    """Returns whether a model is conditioned on classes or on a context.

    Example:
        is_conditional(DiTConfig(image_size=8))  # False
    """
    return model.num_classes > 0 or model_context(model) is not None


def network_condition(model: Any, batch: Batch) -> Any:
    """Returns what a model is conditioned on in a batch: its labels, its context, or None.

    Example:
        cond = network_condition(experiment.model, batch)
    """
    if model_context(model) is not None:
        return batch.context
    return batch.labels if model.num_classes > 0 else None


def conditions_of(model: Any, dataset: Dataset) -> Callable[[np.ndarray], Any] | None:
    """Returns a function from positions in a dataset to the conditions of these samples, or None if there are none.

    Example:
        cond = conditions_of(experiment.model, held_out)(np.arange(4))
    """
    if model_context(model) is not None:
        return lambda positions: dataset[positions].context
    if not model.num_classes:
        return None
    labels = np.asarray(dataset[np.arange(len(dataset))].labels)
    return lambda positions: labels[positions]
