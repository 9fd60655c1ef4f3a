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
class _View:
    """Another source's samples, in the same order, with other frames."""

    source: Source

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.source.image_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def captions(self) -> tuple[str, ...]:
        return self.source.captions

    def __len__(self) -> int:
        return len(self.source)


@dataclasses.dataclass(frozen=True)
class StillClips(_View):
    """Pictures as clips of one frame.

    Example:
        source = StillClips(load(DataConfig(), image_size=(16, 16), channels=1, split="train"))
    """

    frames = 1

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch:
        batch = self.source[indices]
        return {**batch, "image": batch["image"][:, None]}


@dataclasses.dataclass(frozen=True)
class ContinuedClips(_View):
    """Clips without their first frame, as the restarts of a long clip see them; captions say so.

    Latents of such clips are those of the whole `source` without the first, which codecs treat unlike the others.

    Example:
        source = ContinuedClips(load_clips(config, frames=8, image_size=(16, 16), channels=1, split="train"))
    """

    source: ClipSource

    @property
    def frames(self) -> int:
        return self.source.frames - 1

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(CONTINUED + caption for caption in self.source.captions)

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch:
        batch = self.source[indices]
        return {**batch, "image": batch["image"][:, 1:]}
