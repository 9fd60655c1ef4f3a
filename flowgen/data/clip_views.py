"""Views that a video flow trains on beside whole clips: images, and clips without their first frame."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int

from flowgen.data.clips import ClipDataset
from flowgen.data.dataset import Batch, Dataset

# Prefix of the captions of clips without their first frame, as published (arXiv 2511.20462).
CONTINUED = "(extend) "


@dataclasses.dataclass(frozen=True)
class _View:
    """Another dataset's samples, in the same order, with different frames."""

    dataset: Dataset

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.dataset.image_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.dataset.class_names

    @property
    def captions(self) -> tuple[str, ...]:
        return self.dataset.captions

    def __len__(self) -> int:
        return len(self.dataset)


@dataclasses.dataclass(frozen=True)
class StillClips(_View):
    """Images as clips of one frame.

    Example:
        dataset = StillClips(load(DataConfig(), image_size=(16, 16), channels=1, split="train"))
    """

    frames = 1

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch:
        batch = self.dataset[indices]
        return {**batch, "image": batch["image"][:, None]}


@dataclasses.dataclass(frozen=True)
class ContinuedClips(_View):
    """Clips without their first frame, as the restarts of a long clip see them; captions say so.

    Their latents are those of the whole `dataset` without the first, which codecs treat differently.

    Example:
        dataset = ContinuedClips(load_clips(config, frames=8, image_size=(16, 16), channels=1, split="train"))
    """

    dataset: ClipDataset

    @property
    def frames(self) -> int:
        return self.dataset.frames - 1

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(CONTINUED + caption for caption in self.dataset.captions)

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch:
        batch = self.dataset[indices]
        return {**batch, "image": batch["image"][:, 1:]}
