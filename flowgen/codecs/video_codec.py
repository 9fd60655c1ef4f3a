"""Codecs of clips: what makes latents of clips and clips of latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float

from flowgen.codecs.codec import Codec

Clips = Float[Array | np.ndarray, "b frames height width c"]


@runtime_checkable
class ClipCodec(Protocol):
    @property
    def factor(self) -> int: ...

    @property
    def stride(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def pixel_channels(self) -> int: ...

    def moments(self, x: Clips) -> tuple[Clips, Clips]: ...

    def decode(self, latents: Clips) -> Clips: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class FrameCodec:
    """A codec of pictures, applied to every frame."""

    codec: Codec

    stride = 1

    @property
    def factor(self) -> int:
        return self.codec.factor

    @property
    def channels(self) -> int:
        return self.codec.channels

    @property
    def pixel_channels(self) -> int:
        return self.codec.pixel_channels

    def moments(self, x: Clips) -> tuple[Clips, Clips]:
        mean, std = self.codec.moments(_frames(x))
        return tuple(np.asarray(part).reshape(*x.shape[:2], *part.shape[1:]) for part in (mean, std))

    def decode(self, latents: Clips) -> Clips:
        pictures = np.asarray(self.codec.decode(_frames(latents)))
        return pictures.reshape(*latents.shape[:2], *pictures.shape[1:])


def _frames(x: Any) -> Any:
    return x.reshape(-1, *x.shape[2:])
