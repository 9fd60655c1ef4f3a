"""`sample_clips`: clips that begin with given frames, and clips longer than the flow models (arXiv 2511.20462)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Key

from flowgen.arrays import check_count, check_floating, check_key
from flowgen.conditioning import TextCondition
from flowgen.decoding.core import decode
from flowgen.decoding.layout import ClipLayout
from flowgen.decoding.plan import Plan
from flowgen.decoding.request import DecodeResult, Denoiser, SampleKeys, decode_request, resolve_denoise
from flowgen.flows.block import Variables
from flowgen.flows.density import Flow, check_flow
from flowgen.flows.starflow_v import STARFlowVConfig
from flowgen.guidance import Guidance
from flowgen.nn.layers import master_dtype

CONTEXT = 0.75  # of the frames of a clip: 16 of 21, as published


def sample_clips(
    flow: Flow,
    params: Variables,
    key: Key[Array, ""],
    num: int,
    cond: Integer[Array | np.ndarray, " b"] | list[int] | TextCondition | None = None,
    *,
    frames: int | None = None,
    given: Float[Array | np.ndarray, "b given height width c"] | None = None,
    context: int | None = None,
    restart_cond: Integer[Array | np.ndarray, " b"] | list[int] | TextCondition | None = None,
    plan: Plan | str = "auto",
    guidance: Guidance | None = None,
    null: TextCondition | None = None,
    denoise: bool | float | Denoiser = True,
    first: int = 0,
    certify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> DecodeResult:
    """Returns `num` clips `b frames height width c` of any length from a `STARFlowV`, behind the frames that are given.

    frames: of a clip; None is as many as the flow models, F. given: the first frames as the flow models them, with
    noise; they come back as they are, before denoising. context: frames that a restart begins with, where there are
    more than F; None is 3/4 of F, rounded. restart_cond: what the frames of restarts are conditioned on instead of
    cond, such as the texts that clips without their first frame had in training.
    denoise: as for `sample`; the score is that of the density by which clips are decoded, with nothing given, and a
    `Denoiser` gets all frames, still noisy.
    plan, guidance, null, first: as for `sample`. The noise of a token depends on key, index of the clip and place of
    the token alone, and that of the first F frames is `sample`'s: before denoising, which looks ahead, a longer clip
    begins with the shorter one.
    progress: called on the host as progress(solved, total) whenever tokens of the deep block are solved, with how many
    and how many there are of a clip in all; the program, compiled for each such function, does not wait for it.
    The reports are those of `DecodeResult`: sweeps of the deep block clip after clip, the error of frames not given.
    Raises ValueError as `sample` does, and where frames, given or context do not fit.

    Example:
        r = sample_clips(flow, params, jax.random.key(0), 2, texts, frames=41, given=noisy_first_frames)
    """
    check_flow(flow, params)
    check_key(key)
    check_count("num", num)
    config = flow.config
    if not isinstance(config, STARFlowVConfig):
        raise ValueError(f"flow is a {type(flow).__name__}, no flow of clips; give a STARFlowV, or use sample.")
    if restart_cond is not None and cond is None:
        raise ValueError("restart_cond is given, and cond is not; give both, or neither.")
    layout = _layout(config, num, frames, given, context)
    noise = SampleKeys(key, first + jnp.arange(num))
    request = decode_request(flow, params, noise, cond, plan, guidance, null)
    return decode(
        replace(
            request,
            layout=layout,
            restart_cond=request.cond if restart_cond is None else config.check_cond(restart_cond, num),
            given=None if given is None else jnp.asarray(given, master_dtype(config.dtype)),
            denoise=resolve_denoise(denoise, config.noise_std),
            certify=certify,
            progress=progress,
        )
    )


def _layout(config: STARFlowVConfig, num: int, frames: int | None, given: Any, context: int | None) -> ClipLayout:
    most = config.frames
    total = most if frames is None else frames
    check_count("frames", total)
    if given is not None:
        check_floating("given", given)
    if given is not None and (given.ndim != 5 or given.shape[0] != num or given.shape[2:] != config.image_shape):
        shape = ", ".join(map(str, config.image_shape))
        raise ValueError(f"given has shape {tuple(given.shape)}; this call takes ({num}, frames given, {shape}).")
    known = 0 if given is None else given.shape[1]
    if given is not None and not 1 <= known < total:
        raise ValueError(f"given has {known} frames and frames is {total}; give at least 1, and fewer than frames.")
    if total > most == 1:
        raise ValueError(f"frames is {total}; a flow of 1 frame has no room for a context: ask for 1.")
    if context is not None and not 1 <= context < most:
        raise ValueError(f"context is {context}; it must be from 1 to {most - 1}, less than the flow's {most} frames.")
    default = max(1, min(round(CONTEXT * most), most - 1))
    return ClipLayout(
        total=total,
        clip=min(total, most),
        given=known,
        # Without restarts the context says nothing, and one program serves them all.
        context=(default if context is None else context) if total > most else 0,
        tokens_per_frame=config.tokens_per_image,
    )
