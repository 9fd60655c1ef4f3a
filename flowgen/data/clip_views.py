"""Datasets on which video flows train in addition to whole clips: images, and clips without their first frame."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from flowgen.batch import Batch
from flowgen.data.dataset import Dataset, captions_in
from flowgen.data.latents import Kind

# The published caption prefix for clips without their first frame (arXiv 2511.20462).
CONTINUED = "(extend) "


@dataclasses.dataclass(frozen=True)
class _View:
    """A view of another dataset: the same samples in the same order, but with different frames."""

    dataset: Dataset

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.dataset.class_names

    @property
    def captions(self) -> tuple[str, ...]:
        return captions_in(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)


@dataclasses.dataclass(frozen=True)
class StillClips(_View):
    """A dataset that returns images as clips of one frame.

    Example:
        dataset = StillClips(load(DataConfig(), image_size=(16, 16), channels=1, split="train"))
    """

    kind: ClassVar[Kind] = "still"

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (1, *self.dataset.event_shape)

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch:
        batch = self.dataset[indices]
        return batch._replace(x=batch.pixels[:, None])


@dataclasses.dataclass(frozen=True)
class ContinuedClips(_View):
    """Clips without their first frame, for training a model to continue long clips.

    Their captions begin with "(extend) ". Codecs encode the first frame differently from later frames, so the latents
    are obtained by encoding the whole clips and dropping the first latent frame.

    Example:
        dataset = ContinuedClips(load_clips(config, frames=8, image_size=(16, 16), channels=1, split="train"))
    """

    kind: ClassVar[Kind] = "continued"

    @property
    def event_shape(self) -> tuple[int, ...]:
        frames, *image_shape = self.dataset.event_shape
        return (frames - 1, *image_shape)

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(CONTINUED + caption for caption in captions_in(self.dataset))

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch:
        batch = self.dataset[indices]
        return batch._replace(x=batch.pixels[:, 1:])
