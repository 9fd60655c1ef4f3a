"""`ClipLayout`: how decoding splits the frames of a clip into segments. All frame counts are static.

The last block of a video flow maps F frames together. A longer clip is continued by restarts. A restart treats the last
C frames as the first frames of a new clip of F frames, with positions from 0, and decodes the other F - C frames.
Restarts repeat until there are enough frames. An image is a clip of one frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Segments(NamedTuple):
    """`count` segments of equal length, decoded one after another. Each consists of context frames and new frames.

    begin: index of the first frame of the first segment, including its context.
    context, new: number of context frames and number of new frames in each segment.
    is_restart: whether the segments use the condition for restarts.
    """

    begin: int
    context: int
    new: int
    count: int
    is_restart: bool


class ClipLayout(NamedTuple):
    """How to decode a clip of `total` frames with a flow whose last block maps `clip` frames together.

    given: number of frames known from the start.
    context: number of decoded frames with which each restart begins; 0 if there are no restarts.
    tokens_per_frame: number of tokens in each frame.
    """

    total: int
    clip: int
    given: int
    context: int
    tokens_per_frame: int

    @property
    def reached(self) -> int:
        """Number of frames up to the end of the last segment; at least `total`."""
        last = self.segments[-1]
        return last.begin + last.context + last.count * last.new

    @property
    def segments(self) -> tuple[Segments, ...]:
        """The segments in decoding order: the first clip unless it is fully given, then any restarts."""
        first = [Segments(0, self.given, self.clip - self.given, 1, False)] if self.given < self.clip else []
        begun, step = max(self.clip, self.given), self.clip - self.context
        if self.total <= begun:
            return tuple(first)
        restarts = -(-(self.total - begun) // step)
        return (*first, Segments(begun - self.context, self.context, step, restarts, True))

    @property
    def is_one_segment(self) -> bool:
        """Whether one segment without context makes up the whole clip."""
        return len(self.segments) == 1 and self.segments[0].count == 1 and not self.segments[0].context

    @property
    def places(self) -> Int[np.ndarray, " frames"]:
        """Each frame's position in the segment that decodes it; 0 for given frames after the first clip."""
        places = np.arange(self.reached) * (np.arange(self.reached) < self.clip)
        for part in self.segments:
            begin = part.begin + part.context
            places[begin : begin + part.count * part.new] = part.context + np.tile(np.arange(part.new), part.count)
        return places

    def frames(self, tokens: Float[Array, "b n c"], begin: int, end: int) -> Float[Array, "b m c"]:
        """Returns the tokens of frames begin..end-1."""
        return tokens[:, begin * self.tokens_per_frame : end * self.tokens_per_frame]

    def new_tokens(self, tokens: Float[Array, "b n c"], part: Segments) -> Float[Array, "count b m c"]:
        """Returns the tokens that each segment adds."""
        begin = part.begin + part.context
        new = self.frames(tokens, begin, begin + part.count * part.new)
        return new.reshape(len(new), part.count, -1, new.shape[2]).swapaxes(0, 1)

    def whole_segments(self, tokens: Float[Array, "b n c"], part: Segments) -> Float[Array, "count b m c"]:
        """Returns the tokens of each segment, context included."""
        if part.count == 1:
            return self.frames(tokens, part.begin, part.begin + part.context + part.new)[None]
        begins = (part.begin + part.new * np.arange(part.count)) * self.tokens_per_frame
        rows = begins[:, None] + np.arange((part.context + part.new) * self.tokens_per_frame)
        return tokens[:, rows].swapaxes(0, 1)

    def in_a_row(self, new: Float[Array, "count b m c"]) -> Float[Array, "b n c"]:
        """Returns the segments' new tokens joined in order; the inverse of `new_tokens`."""
        return new.swapaxes(0, 1).reshape(new.shape[1], -1, new.shape[3])


def scan_segments(step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, segments: Any) -> Any:
    """Returns the stacked outputs of `step` over segments, like `lax.scan`. A single segment runs without a loop."""
    if len(jax.tree.leaves(segments)[0]) == 1:
        _, result = step(carry, jax.tree.map(lambda leaf: leaf[0], segments))
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], result)
    return jax.lax.scan(step, carry, segments)[1]
