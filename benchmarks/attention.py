"""Times the attention kernels beside softmax attention as the sequence grows, forward and with all gradients.

python benchmarks/attention.py --out benchmarks/results/attention.json

Every kernel of one mask, full or causal, is compared with the faster of `jax.nn.dot_product_attention` and flowgen's
`softmax_attention` of that mask. What would exceed --max-seconds or --max-bytes is left out, and its row says why.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import measure
import numpy as np

from flowgen.attention import (
    elu_plus_one,
    focused_attention,
    gated_delta_rule,
    linear_attention,
    nala_attention,
    retention,
    soft_attention,
    softmax_attention,
)

BATCH, HEADS, WIDTH = 1, 8, 64
MIN_TOKENS, MAX_TOKENS = 64, 65536
DIRECTIONS = ("forward", "forward backward")
# A call under 0.2 s is repeated at least 10 times, a slow one at least 3 times.
SECONDS_PER_RUN, MIN_REPEATS, MAX_REPEATS = 2.0, 3, 30
SLOPE_FROM, SLOPE_GOAL = 4096, 1.05


class Inputs(NamedTuple):
    """What attention reads: the delta rule needs all of it, the others the first three."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    beta: jax.Array
    log_decay: jax.Array


class Method(NamedTuple):
    """A way to attend. num_inputs: how many of `Inputs` it takes, and is differentiated by."""

    attend: Callable[..., jax.Array]
    is_causal: bool
    num_inputs: int = 3


class Program(NamedTuple):
    """A compiled method, ready to be timed."""

    run: measure.Run
    compile_seconds: float
    temporary_bytes: int


def softmax_methods(dtype: jnp.dtype) -> dict[str, Method]:
    """Returns the baselines; cuDNN's fused attention where the device and the type allow it."""
    fused = jax.default_backend() == "gpu" and jnp.finfo(dtype).bits == 16
    implementation = "cudnn" if fused else "xla"
    methods = {}
    for mask, is_causal in (("full", False), ("causal", True)):
        jax_attention = partial(jax.nn.dot_product_attention, is_causal=is_causal, implementation=implementation)
        methods[f"softmax jax.nn {implementation}, {mask}"] = Method(jax_attention, is_causal)
        methods[f"softmax flowgen, {mask}"] = Method(partial(softmax_attention, is_causal=is_causal), is_causal)
    return methods


def kernel_methods() -> dict[str, Method]:
    """Returns what is compared with softmax."""
    methods = {}
    for mask, is_causal in (("full", False), ("causal", True)):
        elu = partial(linear_attention, features=elu_plus_one, is_causal=is_causal)
        methods[f"elu_plus_one, {mask}"] = Method(elu, is_causal)
        methods[f"nala, {mask}"] = Method(partial(nala_attention, is_causal=is_causal), is_causal)
    return methods | {
        "focused, causal": Method(partial(focused_attention, is_causal=True), True),
        "retention, causal": Method(lambda *inputs: retention(*inputs)[0], True),
        "gated delta rule, causal": Method(lambda *inputs: gated_delta_rule(*inputs)[0], True, num_inputs=5),
        "soft 64 landmarks, full": Method(partial(soft_attention, num_landmarks=64), False),
    }


def main() -> None:
    arguments = parse_arguments()
    dtype = jnp.dtype(arguments.dtype)
    kernels = {name: method for name, method in kernel_methods().items() if name.split(",")[0] in arguments.kernels}
    methods = softmax_methods(dtype) | kernels
    threads = measure.environment(0, None)["cores"]
    rows, tokens = [], MIN_TOKENS
    print(HEADER)
    while tokens <= arguments.max_tokens:
        for direction in DIRECTIONS:
            found = measure_methods(methods, tokens, direction, rows, arguments)
            where = measure.environment(threads, None)
            rows += [result | where for result in found]
            for result in found:
                print(line(result), flush=True)
        jax.clear_caches()
        tokens *= 2
    rows += [summary(name, direction, rows) for direction in DIRECTIONS for name in methods]
