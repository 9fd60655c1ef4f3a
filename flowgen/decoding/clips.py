"""`Clip` describes clips that begin with given frames or have more frames than the flow models (arXiv 2511.20462)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flowgen.arrays import check_count, check_floating, shown
from flowgen.conditioning import AnyCondition, Condition
from flowgen.decoding.layout import ClipLayout
from flowgen.flows.density import FlowConfig
from flowgen.flows.starflow_v import STARFlowVConfig
from flowgen.nn.layers import master_dtype

MOST_FRAMES = 1 << 20
CONTEXT = 0.75  # default context, as a fraction of the frames that the flow models: 16 of 21, as published


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Clip:
    """The length and the first frames of clips to draw from a `STARFlowV` that models F frames together.

    frames: number of frames per clip; None means F. A clip of more than F frames is continued by restarts, each of
    which takes the latest decoded frames as given and decodes the frames after them.
    given: the clip's first frames, with the training noise added; only the denoising step changes them. None means that
    all frames are decoded.
    context: number of frames that each restart takes as given, from 1 to F - 1; None means 3/4 of F, rounded.
    restart_cond: the condition for restarts, such as the text that training used for continued clips; None means the
    condition of the whole clip, `cond` of `sample`.
    progress: a function that is called on the host as progress(solved, total) whenever the last block, which is decoded
    first and usually takes most of the time, has solved tokens. `solved` is the number of tokens per clip that it has
    solved since the previous call, and `total` is the number of tokens to solve per clip. With a `SlidingWindow`,
    `solved` counts the tokens of the slowest clip, and may be 0. The program does not wait for the call to return.
    Passing a different function causes recompilation.

    Example:
        r = sample(flow, params, jax.random.key(0), 2, texts, clip=Clip(frames=41, given=noisy_first_frames))
    """

    frames: int | None = field(default=None, metadata={"static": True})
    given: Float[Array | np.ndarray, "b given height width c"] | None = None
    context: int | None = field(default=None, metadata={"static": True})
    restart_cond: AnyCondition | None = None
    progress: Callable[[int, int], None] | None = field(default=None, metadata={"static": True})


def checked_clip(clip: Clip | None, config: FlowConfig, cond: Condition | None, batch: int) -> Clip:
    """Checks the clip and returns it with JAX arrays and with the defaults filled in.

    clip: None means a clip of as many frames as the flow models. cond: the condition of the clip.

    Raises ValueError if the clip does not fit the flow or the batch.
    """
    if clip is None:
        clip = Clip()
    elif not isinstance(clip, Clip):
        raise ValueError(f"clip is {shown(clip)}; it must be Clip(frames=...) or None.")
    elif not isinstance(config, STARFlowVConfig):
        raise ValueError("clip is only for a STARFlowV, but this flow generates no clips; leave clip out.")
    if clip.restart_cond is not None and cond is None:
        raise ValueError("clip.restart_cond is given, but cond is None; give both or neither.")
    frames = modelled_frames(config) if clip.frames is None else clip.frames
    check_count("clip.frames", frames)
    if frames > MOST_FRAMES:
        raise ValueError(f"clip.frames is {frames}; it must be at most {MOST_FRAMES}.")
    if clip.context is not None and not isinstance(clip.context, int | np.integer):
        raise ValueError(f"clip.context is {shown(clip.context)}; it must be a whole number of frames.")
    if clip.progress is not None and not callable(clip.progress):
        raise ValueError(f"clip.progress is {shown(clip.progress)}; it must be a function of (solved, total), or None.")
    _check_given(clip, frames, config, batch)
    return replace(
        clip,
        frames=frames,
        given=None if clip.given is None else jnp.asarray(clip.given, master_dtype(config.dtype)),
        context=_checked_context(clip.context, frames, modelled_frames(config)),
        restart_cond=cond if clip.restart_cond is None else config.check_cond(clip.restart_cond, batch),
    )


def clip_layout(clip: Clip, config: FlowConfig) -> ClipLayout:
    """Returns the `ClipLayout` of a checked clip: its division into segments for decoding."""
    assert clip.frames is not None
    return ClipLayout(
        total=clip.frames,
        clip=min(clip.frames, modelled_frames(config)),
        given=0 if clip.given is None else clip.given.shape[1],
        context=clip.context or 0,
        tokens_per_frame=config.tokens_per_image,
    )


def modelled_frames(config: FlowConfig) -> int:
    """Returns the number of frames that a flow models together; 1 for images."""
    return config.num_tokens // config.tokens_per_image


def _check_given(clip: Clip, frames: int, config: FlowConfig, batch: int) -> None:
    given, shape = clip.given, config.event_shape[1:]
    if given is None:
        return
    check_floating("clip.given", given)
    if given.ndim != 5 or given.shape[0] != batch or given.shape[2:] != shape:
        raise ValueError(
            f"clip.given has shape {tuple(given.shape)}; its shape must be ({batch}, frames, "
            f"{', '.join(map(str, shape))})."
        )
    if not 1 <= given.shape[1] < frames:
        raise ValueError(
            f"clip.given has {given.shape[1]} frames, but the clip has {frames}; "
            f"give at least 1 frame and fewer than {frames}."
        )


def _checked_context(context: int | None, frames: int, most: int) -> int:
    """Number of context frames per restart; 0 without restarts, so that `context` does not cause recompilation."""
    if frames > most == 1:
        raise ValueError(
            f"clip.frames is {frames}, but a flow that models single frames cannot continue a clip; set clip.frames "
            "to 1."
        )
    if context is not None and not 1 <= context < most:
        raise ValueError(
            f"clip.context is {context}; it must be from 1 to {most - 1} for a flow that models {most} frames."
        )
    default = max(1, min(round(CONTEXT * most), most - 1))
    return 0 if frames <= most else default if context is None else context
