"""Attention of frames to nearby frames: a query attends to a prefix and to a window of frames around its own frame."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowgen import backend
from flowgen.attention.checks import check_heads
from flowgen.attention.softmax import attend_in_parts
from flowgen.backend import keep_axes


@dataclass(frozen=True)
class FrameWindow:
    """The attention pattern of a video: a prefix of `prefix` tokens, followed by frames of `tokens` tokens each.

    A token of frame f, counted from 0, attends to the whole prefix and to those of the frames f - past_frames to
    f + lookahead_frames that exist. A token of the prefix attends to the whole prefix and to frames 0 to
    lookahead_frames. The denoiser of STARFlow-V (arXiv 2511.20462) uses this pattern.

    Example:
        out = FrameWindow(prefix=256, tokens=1590, past_frames=9, lookahead_frames=1).attend(q, k, v)
    """

    prefix: int
    tokens: int
    past_frames: int
    lookahead_frames: int

    def __post_init__(self):
        for name, least in (("prefix", 0), ("tokens", 1), ("past_frames", 0), ("lookahead_frames", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {least}.")

    def attend(
        self, q: Float[Array, "b n h k"], k: Float[Array, "b n g k"], v: Float[Array, "b n g d"]
    ) -> Float[Array, "b n h d"]:
        """Returns softmax attention in which each query attends only to the prefix and to the frames near its own.

        The class docstring states which frames. Attention is computed frame by frame, without an n x n mask.

        Raises ValueError unless the tokens after the prefix form one or more complete frames, and q, k and v match.
        """
        check_heads(q, k, v)
        if k.shape[1] != q.shape[1]:
            raise ValueError(
                f"q has shape {q.shape} and k has shape {k.shape}, but a frame window needs as many keys as queries."
            )
        frames, rest = divmod(q.shape[1] - self.prefix, self.tokens)
        if rest or frames < 1:
            raise ValueError(
                f"q has {q.shape[1]} tokens, but the tokens after the prefix of {self.prefix} must form frames of "
                f"{self.tokens} tokens each."
            )
        return _attend(q, k, v, self, backend.MAX_LOGITS)


@partial(jax.jit, static_argnames=("window", "max_logits"))
def _attend(q, k, v, window: FrameWindow, max_logits: int):
    def run(q, k, v):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        cut, tokens = window.prefix, window.tokens
        frames = (q.shape[2] - cut) // tokens
        seen = cut + min(1 + window.lookahead_frames, frames) * tokens
        front = attend_in_parts(q[:, :, :cut], k[:, :, :seen], v[:, :, :seen])
        behind = _attend_by_frame(q, k, v, window, frames, max_logits)
        return jnp.concatenate([front, behind], axis=2).swapaxes(1, 2)

    named = [(q, "b n h k"), (k, "b n g k"), (v, "b n g d")]
    return keep_axes(run, q, k, v, named=named, out="b n h d")


def _attend_by_frame(q, k, v, window: FrameWindow, frames: int, max_logits: int):
    """Returns the attention of the tokens after the prefix; in all arrays, the heads come before the tokens."""
    cut, tokens = window.prefix, window.tokens
    width = window.past_frames + 1 + window.lookahead_frames
    margins = ((0, 0), (0, 0), (window.past_frames * tokens, window.lookahead_frames * tokens), (0, 0))
    padded = [jnp.pad(x[:, :, cut:], margins) for x in (k, v)]
    queries = q[:, :, cut:].reshape(*q.shape[:2], frames, tokens, q.shape[-1])

    def one_frame(frame_and_queries):
        frame, queries = frame_and_queries
        start, length = frame * tokens, width * tokens
        near = [jax.lax.dynamic_slice_in_dim(x, start, length, axis=2) for x in padded]
        keys, values = (jnp.concatenate([x[:, :, :cut], y], axis=2) for x, y in zip((k, v), near, strict=True))
        neighbour = frame - window.past_frames + jnp.arange(width)
        real = jnp.repeat((neighbour >= 0) & (neighbour < frames), tokens, total_repeat_length=length)
        mask = jnp.concatenate([jnp.ones(cut, bool), real])[None, None, None]
        return attend_in_parts(queries, keys, values, mask)

    logits = q.shape[0] * q.shape[1] * q.shape[2] * width * tokens
    body = one_frame if logits <= max_logits else jax.checkpoint(one_frame)
    out = jax.lax.map(body, (jnp.arange(frames), jnp.moveaxis(queries, 2, 0)))
    return jnp.moveaxis(out, 0, 2).reshape(*q.shape[:2], frames * tokens, v.shape[-1])
