"""The conditions of models in experiments: labels, encoded texts, or contexts from the user's own data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from flowgen.conditioning import TextCondition
from flowgen.contexts import Context, ImageContext
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
    """Returns the condition that a batch contains for a model: labels, a context, or None.

    Example:
        cond = network_condition(experiment.model, batch)
    """
    if model_context(model) is not None:
        return batch.context
    return batch.labels if model.num_classes > 0 else None


def conditions_of(model: Any, dataset: Dataset) -> Callable[[np.ndarray], Any] | None:
    """Returns a function from positions in a dataset to conditions; None for an unconditional model.

    Example:
        cond = conditions_of(experiment.model, held_out)(np.arange(4))
    """
    if model_context(model) is not None:
        return lambda positions: dataset[positions].context
    if not model.num_classes:
        return None
    labels = np.asarray(dataset[np.arange(len(dataset))].labels)
    return lambda positions: labels[positions]


def check_not_flipped(model: Any, data: Any) -> None:
    """Raises ValueError if data are flipped for a model with image contexts, because contexts are not flipped.

    Example:
        check_not_flipped(experiment.model, experiment.data)
    """
    if isinstance(model_context(model), ImageContext) and getattr(data, "flip", False):
        raise ValueError("data.flip is true, but the context is an image, which is not flipped; set it to false.")


def check_needs_no_context(model: Any, data: Any) -> None:
    """Raises ValueError if a model needs contexts, because the data that a config selects have none.

    Example:
        check_needs_no_context(experiment.model, experiment.data)
    """
    if model_context(model) is not None:
        where = f"data.name {data.name!r}" if hasattr(data, "name") else f"data.path {data.path!r}"
        raise ValueError(
            f"model.context is {model_context(model)}, and {where} has no contexts; call "
            "flowgen.fit(experiment, workdir, dataset=...) in Python, with data that return Batch(images, context)."
        )


def check_command_needs_no_context(model: Any) -> None:
    """Raises ValueError if a model needs contexts, because commands cannot provide them.

    Example:
        check_command_needs_no_context(experiment.model)
    """
    if model_context(model) is not None:
        raise ValueError(
            f"model.context is {model_context(model)}, which commands cannot give; sample in Python, by "
            "experiment.draw_batch(model, variables, key, numbers, cond)."
        )


def chosen_texts(texts: TextCondition, numbers: Int[np.ndarray, " b"]) -> TextCondition:
    """Returns one encoded text per sample number, cycling through `texts`.

    Example:
        chosen_texts(texts, np.arange(3))
    """
    return TextCondition(*(part[numbers % len(texts.mask)] for part in texts))


def captions_condition(dataset: Dataset, positions: Int[np.ndarray, " b"]) -> TextCondition:
    """Returns the encoded captions of the latents at these positions of a dataset.

    Example:
        cond = captions_condition(latents, np.arange(4))
    """
    texts = dataset[positions].context
    assert isinstance(texts, TextCondition)  # These latents have texts.
    return TextCondition(jnp.asarray(texts.embeddings, jnp.float32), jnp.asarray(texts.mask))
