"""Options of causal linear attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flowgen.attention.prefix import CHUNK_SIZE


@dataclass(frozen=True)
class Causal:
    """Options of causal linear attention, passed as `is_causal` in place of True.

    block_size: number of tokens in a block; each token attends to its whole block and to all earlier blocks. 1 means
    that each token attends to itself and to all earlier tokens.
    chunk_size: number of tokens that are processed in parallel; it affects speed, memory and rounding.
    implementation: "xla", or "pallas" for the TPU kernel in `flowgen.attention.pallas`. "pallas" requires block_size 1
    and a chunk_size that is a power of two and at least 16, and does not support segment_ids.
    """

    block_size: int = 1
    chunk_size: int = CHUNK_SIZE
    implementation: Literal["xla", "pallas"] = "xla"

    def __post_init__(self):
        if self.implementation not in ("xla", "pallas"):
            raise ValueError(f"implementation must be 'xla' or 'pallas', not {self.implementation!r}.")
        for name in ("block_size", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")


def as_causal(is_causal: bool | Causal) -> Causal | None:
    """Returns the options of causal attention, or None if attention is not causal."""
    if isinstance(is_causal, Causal):
        return is_causal
    return Causal() if is_causal else None
