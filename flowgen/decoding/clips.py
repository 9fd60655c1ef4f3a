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

CONTEXT = 0.75  # share of a clip's frames: 16 of 21, as published


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
    """Returns `num` clips `b frames height width c` of any length from a `STARFlowV`, after any given frames.

    frames: frames per clip; None is the number that the flow models, F. given: the first frames, with the noise that
    the flow models; they are returned unchanged, before denoising. context: frames that a restart begins with, if there
    are more than F; None is 3/4 of F, rounded. restart_cond: the condition of restarts instead of cond, such as the
    texts that clips without their first frame had in training.
    denoise: as for `sample`; the score is that of the density that decoding follows if no frames are given, and a
    `Denoiser` receives all frames, still noisy.
    plan, guidance, null, first: as for `sample`. A token's noise depends only on the key, the clip's index and the
    token's position, and the first F frames have `sample`'s noise: before denoising, which looks ahead, a longer clip
    begins with the shorter one.
    progress: called on the host as progress(solved, total) whenever the deep block solves tokens, with their number and
    the total of a clip; the program, compiled for each such function, does not wait for it.
    Reports are as in `DecodeResult`: the deep block's sweeps clip after clip, the error of the generated frames.
    Raises ValueError as `sample` does, and if frames, given or context do not fit.

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
        # Without restarts the context has no effect, so that one program serves all its values.
        context=(default if context is None else context) if total > most else 0,
        tokens_per_frame=config.tokens_per_image,
    )
