"""A few samples of a run's data: the inputs of a flow, and images or clips to show."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from flowgen.data import Batch, ClipsConfig, DataConfig, Dataset, LatentsConfig
from flowgen.data.dataset import OWN, buckets_of, captions_in
from flowgen.data.latents import kind_of
from flowgen.experiments.autoregressive import AutoregressiveExperiment
from flowgen.experiments.clips import clips_alone, of_whole_clips
from flowgen.experiments.experiment import Experiment
from flowgen.experiments.latents import as_taken
from flowgen.experiments.video_flow import VideoFlowExperiment


@dataclasses.dataclass(frozen=True)
class Few:
    """Some samples of a dataset, at evenly spaced positions. Reads only these samples.

    Example:
        few = Few(dataset, evenly(len(dataset), 16))
    """

    dataset: Dataset
    positions: Int[np.ndarray, " n"]

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.dataset.event_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.dataset.class_names

    @property
    def captions(self) -> tuple[str, ...]:
        captions = captions_in(self.dataset)
        return tuple(captions[position] for position in self.positions) if captions else ()

    @property
    def kind(self) -> str:
        return kind_of(self.dataset)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch:
        return self.dataset[self.positions[indices]]

    def batch(self) -> Batch:
        """Returns all samples as one batch."""
        return self[np.arange(len(self))]


def evenly(size: int, most: int) -> Int[np.ndarray, " n"]:
    """Returns at most `most` evenly spaced positions in a dataset of `size` samples.

    Example:
        evenly(10, 5)  # [0, 2, 4, 6, 8]
    """
    return np.arange(min(size, most)) * size // min(size, most)


def has_pixels(experiment: Experiment) -> bool:
    """Returns whether the images or clips of an experiment can be opened for a report.

    The result is False if the data are numbers, cached latents, or a dataset that was passed to `fit`.

    Example:
        has_pixels(flowgen.load_config("cfm_moons"))  # False
    """
    data = experiment.data
    return isinstance(data, DataConfig | ClipsConfig) and data.name != OWN


def pixels(experiment: Any, *, held_out: bool) -> Dataset:
    """Returns the training or held-out images or clips. If these have several shapes, returns those of the first shape.

    Example:
        dataset = pixels(experiment, held_out=False)
    """
    return buckets_of(experiment.dataset("eval" if held_out else "train"))[0]


def inputs(experiment: AutoregressiveExperiment, most: int) -> Batch:
    """Returns up to `most` held-out samples in the form that a flow is trained on: pixels or latents, with conditions.

    If nothing is held out, the samples are training data. Only these samples are read and encoded.

    Raises OSError or ValueError if the data, the codec or the text encoder cannot be opened.

    Example:
        batch = inputs(experiment, 32)
    """
    held_out = experiment.has_held_out
    if isinstance(experiment.data, LatentsConfig):
        return _latents(experiment, "eval" if held_out else "train", most)
    dataset = pixels(experiment, held_out=held_out)
    few = Few(dataset, evenly(len(dataset), most))
    taken = buckets_of(as_taken(few, experiment.data, experiment.encoding, flip=False))[0]
    return taken[np.arange(len(few))]


def some_of(batch: Batch, most: int) -> Batch:
    """Returns at most `most` evenly spaced samples of a batch.

    Example:
        few = some_of(inputs(experiment, 32), 8)
    """
    chosen = evenly(batch.size, most)
    x, context = jax.tree.map(lambda rows: rows[chosen], (batch.x, batch.context))
    return Batch(x, context)


def split_of(experiment: AutoregressiveExperiment) -> str:
    """Returns the kind of samples that `inputs` reads: "held-out" or "training".

    Example:
        split_of(experiment)
    """
    return "held-out" if experiment.has_held_out else "training"


def _latents(experiment: AutoregressiveExperiment, split: Any, most: int) -> Batch:
    if isinstance(experiment, VideoFlowExperiment):
        whole = dataclasses.replace(experiment, data=of_whole_clips(experiment.data))
        dataset: Dataset = clips_alone(whole.flow_dataset(split))
    else:
        dataset = buckets_of(experiment.flow_dataset(split))[0]
    return dataset[evenly(len(dataset), most)]
