"""`invert` and `sample`: from noise to images in one compiled program per call signature."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Key

from flowgen.arrays import check_count, check_floating, check_key
from flowgen.conditioning import TextCondition
from flowgen.decoding.core import decode
from flowgen.decoding.plan import Plan
from flowgen.decoding.request import DecodeResult, Denoiser, SampleKeys, decode_request, resolve_denoise
from flowgen.flows.block import Variables
from flowgen.flows.density import Flow, check_flow
from flowgen.guidance import Guidance
from flowgen.nn.layers import master_dtype


def invert(
    flow: Flow,
    params: Variables,
    z: Float[Array | np.ndarray, "b n c"],
    cond: Integer[Array | np.ndarray, " b"] | list[int] | TextCondition | None = None,
    *,
    plan: Plan | str = "sequential",
    guidance: Guidance | None = None,
    null: TextCondition | None = None,
    certify: bool = False,
) -> DecodeResult:
    """Returns the images whose `forward` is z, decoded by `plan` under `guidance`.

    z: noise tokens in raster order, as `forward` returns them. null: the text of guidance's unconditional branch, one
    or `b`, for text flows. certify: run one forward pass on the result and report the reconstruction error, guidance
    included. Raises ValueError if z, cond, plan or guidance does not fit the flow. The scale and temperature of
    guidance can change without recompiling.

    Example:
        r = invert(flow, params, z, cond, plan=Jacobi(window=32))
    """
    check_flow(flow, params)
    check_floating("z", z)
    config = flow.config
    expected = (config.num_tokens, config.token_dim)
    if z.ndim != 3 or z.shape[1:] != expected:
        raise ValueError(f"z has shape {tuple(z.shape)}; this flow takes (batch, {expected[0]}, {expected[1]}).")
    z = jnp.asarray(z, master_dtype(config.dtype))
    return decode(replace(decode_request(flow, params, z, cond, plan, guidance, null), certify=certify))


def sample(
    flow: Flow,
    params: Variables,
    key: Key[Array, ""],
    num: int,
    cond: Integer[Array | np.ndarray, " b"] | list[int] | TextCondition | None = None,
    *,
    plan: Plan | str = "auto",
    guidance: Guidance | None = None,
    null: TextCondition | None = None,
    denoise: bool | float | Denoiser = True,
    first: int = 0,
    certify: bool = False,
) -> DecodeResult:
    """Returns `num` images drawn from the flow, with the training noise removed.

    null: as for `invert`. denoise: one Tweedie step x + strength · σ² ∇ log p(x | cond), σ from the flow's config; a
    number is the strength; or a learned `Denoiser`.
    first: index of the first image. Image i depends only on (key, i), so a job can be split into any batches.
    Raises ValueError as `invert` does, and if `num` is not positive.

    Example:
        r = sample(flow, params, jax.random.key(0), 16, labels, guidance=Guidance(scale=1.5))
    """
    check_flow(flow, params)
    check_key(key)
    check_count("num", num)
    noise = SampleKeys(key, first + jnp.arange(num))
    request = decode_request(flow, params, noise, cond, plan, guidance, null)
    return decode(replace(request, denoise=resolve_denoise(denoise, flow.config.noise_std), certify=certify))
