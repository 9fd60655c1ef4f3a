"""`invert`, `sample` and `sample_and_log_prob`, which turn noise into images or clips.

These functions are compiled once per combination of shapes and static options. For every plan, results can be
differentiated in forward and reverse mode with respect to parameters, noise and continuous conditions; see
`flowgen.decoding.implicit`.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Integer, Key

from flowgen.arrays import check_count, check_floating, check_key, shown
from flowgen.conditioning import AnyCondition
from flowgen.decoding.clips import Clip
from flowgen.decoding.core import run
from flowgen.decoding.draft import Draft
from flowgen.decoding.plan import Plan
from flowgen.decoding.request import (
    DecodeRequest,
    DecodeResult,
    Denoiser,
    SampleKeys,
    decode_request,
    resolve_denoise,
    unsolved_problem,
)
from flowgen.flows.block import Variables
from flowgen.flows.density import Flow, check_flow, log_prob
from flowgen.guidance import Guidance
from flowgen.nn.layers import master_dtype

MOST_SAMPLES = 2**31 - 1


def invert(
    flow: Flow,
    params: Variables,
    z: Float[Array | np.ndarray, "b n c"],
    cond: AnyCondition | None = None,
    *,
    plan: Plan | str = "sequential",
    guidance: Guidance | None = None,
    draft: Draft | None = None,
    certify: bool = False,
    strict: bool = False,
) -> DecodeResult:
    """Returns the images or clips that the flow's `forward` maps to z, decoded by `plan`.

    With `guidance`, the guided blocks are inverted instead, and `forward` does not map the result to z. The scale,
    temperature and null text of the guidance can change without recompilation.

    z: noise tokens in raster order, as `forward` returns them.
    draft: proposes the initial guesses of plans with init="draft".
    certify: whether to compute the result's `error`, by a forward pass of each block with the same guidance, and its
    `error_estimate`, by a few more passes.
    strict: whether to wait for the result and to raise an error if a window of tokens is unsolved. By default, the call
    returns without waiting, and the result's `unsolved` reports unsolved windows. Inside jit, `strict` must be False,
    because a compiled program cannot raise an error.

    Raises ValueError if z, cond, plan, guidance or draft does not fit the flow, and FloatingPointError if
    `strict` is True and a window is unsolved.

    Example:
        r = invert(flow, params, z, cond, plan=Jacobi(window=32))
    """
    check_flow(flow, params)
    check_floating("z", z)
    config = flow.config
    expected = (config.num_tokens, config.token_dim)
    if z.ndim != 3 or z.shape[1:] != expected:
        raise ValueError(f"z has shape {tuple(z.shape)}; its shape must be (batch, {expected[0]}, {expected[1]}).")
    z = jnp.asarray(z, master_dtype(config.dtype))
    request = decode_request(flow, params, z, cond, plan, guidance, draft=draft)
    return _run(replace(request, certify=certify), strict)


def sample(
    flow: Flow,
    params: Variables,
    key: Key[Array, ""],
    num: int | range | Integer[Array | np.ndarray, " b"],
    cond: AnyCondition | None = None,
    *,
    plan: Plan | str = "auto",
    guidance: Guidance | None = None,
    denoise: bool | float | Array | np.ndarray | Denoiser = True,
    certify: bool = False,
    clip: Clip | None = None,
    draft: Draft | None = None,
    strict: bool = False,
) -> DecodeResult:
    """Returns images or clips drawn from the flow; by default, a denoising step removes the training noise from them.

    num: the number of samples to draw, or the sample numbers themselves, such as range(16, 32). The noise of sample
    number i depends only on (key, i), so a job can be split into batches of any size. If the sample numbers are an
    array that is sharded over devices, each device draws the samples of its own shard, and x and the per-sample reports
    are sharded in the same way. Sample numbers may be traced; their range, 0 to 2³¹ - 1, is then not checked.
    denoise: whether to apply one Tweedie step x + strength · σ² ∇ log p(x | cond), where σ is the flow's `noise_std`
    and p is the flow's own density, without guidance and as if no frames were given. A number, which may be traced, is
    the strength; True means 1, and False means no step. A `Denoiser` is applied instead of this step, to all frames of
    a clip, including the given ones.
    certify: as for `invert`; for a clip, `error` and `error_estimate` cover only the frames that were not given.
    clip: describes clips that begin with given frames, or that have more or fewer frames than the flow models; None
    means samples of the flow's own size. A token's noise depends only on the key, the sample's number and the token's
    position. Before denoising, a longer clip therefore begins with the same frames as a shorter one; the denoised
    frames can differ, because denoising uses later frames. If the clip is continued by restarts, the last block's
    entries in `sweeps` are those of the first part of the clip, then those of each restart.
    draft, strict: as for `invert`. A draft cannot be combined with a clip.

    Raises ValueError if cond, plan, guidance, clip or draft does not fit the flow, or if `num` or `denoise` is invalid,
    and FloatingPointError if `strict` is True and a window is unsolved.

    Example:
        r = sample(flow, params, jax.random.key(0), 16, labels, guidance=Guidance(scale=1.5))
    """
    check_flow(flow, params)
    check_key(key)
    noise = SampleKeys(key, _numbers(num))
    request = decode_request(flow, params, noise, cond, plan, guidance, clip, draft)
    request = replace(request, denoise=resolve_denoise(denoise, flow.config.noise_std), certify=certify)
    return _run(request, strict)


def sample_and_log_prob(
    flow: Flow,
    params: Variables,
    key: Key[Array, ""],
    num: int | range | Integer[Array | np.ndarray, " b"],
    cond: AnyCondition | None = None,
    *,
    plan: Plan | str = "auto",
    guidance: Guidance | None = None,
    denoise: bool = False,
    draft: Draft | None = None,
) -> tuple[DecodeResult, Float[Array, " b"]]:
    """Returns the samples of `sample(..., denoise=False)` and log p(x | cond) of each, in nats.

    A forward pass computes the density of the returned samples. The density is therefore exact, even if the plan solves
    for the tokens only within a tolerance. Samples and densities can be differentiated with respect to parameters and
    continuous conditions.

    guidance: None, or a guidance that changes no block. denoise: False. Guided or denoised samples have no known
    density. num, plan, draft: as for `sample`.

    Raises ValueError if cond, plan or draft does not fit the flow, if `num` is invalid, or if samples would be guided
    or denoised.

    Example:
        r, log_prob = sample_and_log_prob(flow, params, jax.random.key(0), 16, labels)
    """
    check_flow(flow, params)
    check_key(key)
    request = decode_request(flow, params, SampleKeys(key, _numbers(num)), cond, plan, guidance, draft=draft)
    if request.guidance is not None or denoise:
        what, word = ("guidance", "guided") if request.guidance is not None else ("denoise", "denoised")
        raise ValueError(
            f"{what} is set, but {word} samples have no density that is known exactly; leave it out, or use `sample`."
        )
    result = run(request)
    return result, log_prob(flow, params, result.x, request.cond)


def _run(request: DecodeRequest, strict: bool) -> DecodeResult:
    """The result of a request. With `strict`, raises FloatingPointError if a window is unsolved."""
    result = run(request)
    if strict and isinstance(result.unsolved, Tracer):
        raise ValueError("strict is True, but nothing can be raised inside jit; check the result's `unsolved` outside.")
    if strict and (problem := unsolved_problem(result)):
        raise FloatingPointError(problem)
    return result


def _numbers(num: int | range | Integer[Array | np.ndarray, " b"]) -> Int[Array, " b"]:
    if isinstance(num, Tracer):
        if num.ndim != 1 or not num.size or not jnp.issubdtype(num.dtype, jnp.integer):
            raise ValueError(
                f"num is a traced {shown(num)}; inside jit, give a 1-D integer array of sample numbers, or a number of "
                "samples that is not traced."
            )
        return num.astype(jnp.int32)
    numbers = np.asarray(num)
    if numbers.ndim == 0:
        check_count("num", num)
        numbers = np.arange(int(numbers))
    if not numbers.size:
        raise ValueError("num is empty; give at least one sample number, or the number of samples to draw.")
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise ValueError(f"num is {shown(num)}; it must be the number of samples, or a 1-D array of sample numbers.")
    if numbers.min() < 0 or numbers.max() > MOST_SAMPLES:
        raise ValueError(
            f"num contains sample numbers from {numbers.min()} to {numbers.max()}; they must be from 0 to "
            f"{MOST_SAMPLES}."
        )
    return jnp.asarray(num if isinstance(num, jax.Array) and num.ndim else numbers, jnp.int32)
