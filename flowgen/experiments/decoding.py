"""Decodes a batch of samples on all devices of this host, and describes the result in a line."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from flowgen import backend
from flowgen.decoding import Clip, DecodeResult, Denoiser, sample
from flowgen.decoding.request import unsolved_problem


def decoded_by_all(
    flow: Any,
    variables: Any,
    key: jax.Array,
    numbers: Int[np.ndarray, " b"],
    cond: Any,
    clip: Clip | None,
    denoise: Callable[[Any], float | Denoiser],
    **options: Any,
) -> DecodeResult:
    """Returns the result of `flowgen.decoding.sample`, computed on all devices of this host, as NumPy arrays.

    Issues a UserWarning if a window is unsolved.

    denoise: a function from the variables to the argument `denoise` of `sample`. options: other arguments of `sample`.

    Example:
        decoded_by_all(flow, params, key, np.arange(16), labels, None, lambda variables: 1.0, plan="auto")
    """
    mesh = backend.sharing(len(numbers), variables)
    copied = backend.copies(variables, mesh)
    rows, conds, clips = backend.share_rows((numbers, cond, clip), mesh)
    result = jax.device_get(sample(flow, copied, key, rows, conds, clip=clips, denoise=denoise(copied), **options))
    if problem := unsolved_problem(result):
        warnings.warn(problem, stacklevel=2)
    return result._replace(x=result.x[: len(numbers)])


def decoding_line(result: DecodeResult) -> str:
    """Returns a line with the passes of each block, the residual and, if decoding was certified, the error.

    Example:
        print(decoding_line(sample(flow, params, key, 4)))
    """
    passes = ", ".join(str(int(block.sum())) for block in result.sweeps)
    line = f"passes per block (data side first) {passes}; residual {float(result.residual.max()):.1e}"
    if result.error is None or result.error_estimate is None:
        return line
    estimate = float(result.error_estimate.max())
    in_data = f"estimated at {estimate:.1e}" if math.isfinite(estimate) else "not bounded"
    return f"{line}; certified to {float(result.error.max()):.1e} in noise; error in data {in_data}"
