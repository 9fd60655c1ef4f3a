"""Checks users' datasets before training, and each batch from them during training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from flowgen.arrays import shown
from flowgen.conditioning import UNCONDITIONAL
from flowgen.contexts import Context, check_context
from flowgen.data import Batch, Dataset, check_classes
from flowgen.data.dataset import captions_in
from flowgen.data.inventory import name_list
from flowgen.data.loader import checked_batch
from flowgen.settings import type_name


@dataclass(frozen=True)
class OwnDataset:
    """Wraps a user's dataset, and checks each batch as it is read.

    name: the name of the argument, for error messages. event_shape: the shape of the images or clips. num_classes: the
    number of the model's classes; 0 if the model accepts no labels.

    Indexing raises ValueError unless the batch is a `Batch` of bytes in this shape, with labels or contexts that the
    model accepts.

    Example:
        dataset = OwnDataset(mine, "dataset", (32, 32, 3), num_classes=10)
    """

    dataset: Dataset
    name: str
    event_shape: tuple[int, ...]
    num_classes: int
    context: Context | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.dataset.class_names)

    @property
    def captions(self) -> tuple[str, ...]:
        return captions_in(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch:
        batch = self.dataset[indices]
        if isinstance(batch, Batch) and isinstance(batch.context, list):
            batch = batch._replace(context=np.asarray(batch.context))
        batch = checked_batch(batch)
        expected = (len(indices), *self.event_shape)
        if batch.pixels.shape != expected:
            raise ValueError(f"{self.name} returned x of shape {batch.pixels.shape}; the shape must be {expected}.")
        if self.context is not None:
            return self._with_context(batch, self.context)
        return batch if self.num_classes == 0 else batch._replace(context=self._labels(batch, indices))

    def _with_context(self, batch: Batch, context: Context) -> Batch:
        """Returns the batch. Raises ValueError unless its context has the shape that the model accepts."""
        given = jax.tree.map(np.asarray, batch.context)
        try:
            if given is None:
                raise ValueError(f"cond is None; give the context that the model's {type_name(context)} describes.")
            jax.eval_shape(lambda cond: check_context(cond, context, batch.size), given)
        except ValueError as error:
            raise ValueError(f"{self.name} returned a context that does not fit the model: {error}") from None
        return batch._replace(context=given)

    def _labels(self, batch: Batch, indices: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
        other = batch.context is None or isinstance(batch.context, tuple)  # texts and other contexts are tuples
        labels = np.asarray(batch.labels if other else batch.context)
        if other or labels.shape != indices.shape or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{self.name} returned the context {shown(batch.context)}; give one integer label per sample."
            )
        labels = labels.astype(np.int64)
        wrong = (labels < UNCONDITIONAL) | (labels >= self.num_classes)
        if wrong.any():
            first = int(wrong.argmax())
            raise ValueError(
                f"{self.name} has the label {labels[first]} at position {indices[first]}; labels must be "
                f"from 0 to {self.num_classes - 1}, or {UNCONDITIONAL} for none."
            )
        return labels.astype(np.int32)


def check_protocol(name: str, dataset: Any) -> None:
    """Raises ValueError if an object is not a dataset or is empty. name: the argument's name in the error message.

    Example:
        check_protocol("dataset", mine)
    """
    if isinstance(dataset, type) or not isinstance(dataset, Dataset):
        what = f"the class {dataset.__name__}" if isinstance(dataset, type) else shown(dataset)
        raise ValueError(
            f"{name} is {what}; give an object with len(), [positions], event_shape and class_names, as "
            "flowgen.data.Dataset describes."
        )
    if not len(dataset):
        raise ValueError(f"{name} is empty; give at least one image or clip.")


def own_data(
    dataset: Dataset,
    held_out: Dataset | None,
    event_shape: tuple[int, ...],
    num_classes: int,
    context: Context | None = None,
) -> tuple[OwnDataset, OwnDataset | None]:
    """Returns a user's datasets, each wrapped in an `OwnDataset`. event_shape: shape of the model's images or clips.

    context: the description of the context that the model accepts; None if it accepts none.

    Reads the first sample of each dataset. Raises ValueError if the datasets do not fit the model or each other.

    Example:
        dataset, held_out = own_data(dataset, None, (32, 32, 3), num_classes=10)
    """
    found = []
    for name, given in (("dataset", dataset), ("held_out", held_out)):
        if given is None:
            continue
        if tuple(given.event_shape) != event_shape:
            raise ValueError(
                f"{name} has event_shape {tuple(given.event_shape)}; the model requires data of shape {event_shape}."
            )
        if num_classes and not given.class_names:
            raise ValueError(f"{name} has no class_names; give the names of its classes, in the order of their labels.")
        if tuple(given.class_names) != tuple(dataset.class_names):
            raise ValueError(
                f"held_out has the classes {name_list(given.class_names)}, but dataset has "
                f"{name_list(dataset.class_names)}; give both the same classes in the same order."
            )
        check_classes(given, num_classes)
        found.append(OwnDataset(given, name, event_shape, num_classes, context))
        found[-1][np.arange(1)]
    return found[0], found[1] if len(found) > 1 else None
