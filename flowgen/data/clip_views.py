"""What a flow of clips is trained on beside whole clips: pictures, and clips without their beginning."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int

from flowgen.data.clips import ClipSource
from flowgen.data.sources import Batch, Source

# What captions of clips without their beginning are told apart by, as published (arXiv 2511.20462).
CONTINUED = "(extend) "


@dataclasses.dataclass(frozen=True)
class StillClips:
    """Pictures as clips of one frame.

    Example:
        source = StillClips(load(DataConfig(), image_size=(16, 16), channels=1, split="train"))
    """

    pictures: Source
    frames = 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.pictures.image_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.pictures.class_names

    @property
    def captions(self) -> tuple[str, ...]:
        return self.pictures.captions

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch:
        batch = self.pictures[indices]
        return {**batch, "image": batch["image"][:, None]}


@dataclasses.dataclass(frozen=True)
class ContinuedClips:
    """Clips without their first frame, as the restarts of a long clip see them; captions say so.

    Latents of such clips are those of the whole `clips` without the first, which codecs treat unlike the others.

    Example:
        source = ContinuedClips(load_clips(config, frames=8, image_size=(16, 16), channels=1, split="train"))
    """

    clips: ClipSource

    @property
    def frames(self) -> int:
        return self.clips.frames - 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.clips.image_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.clips.class_names

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(CONTINUED + caption for caption in self.clips.captions)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch:
        batch = self.clips[indices]
        return {**batch, "image": batch["image"][:, 1:]}
