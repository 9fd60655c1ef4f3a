"""Softmax attention with fused kernels: pads arrays to whole blocks, and supports key masks and sharded arrays."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flowgen import backend
from flowgen.attention.checks import errors_of_kernel, repeat_key_heads
from flowgen.backend import Implementation, attention_plan, map_axes, varying
from flowgen.backend.attention import BLOCKS, Kernel


def chosen_implementation(
    q: Array, k: Array, v: Array, mask: Bool[Array, "#b #h #n #m"] | None, is_causal: bool, asked: Implementation
) -> Literal["xla", "cudnn", "tpu"]:
    """Returns the implementation to use for these arrays in the program that is being traced.

    Raises ValueError if the requested implementation cannot run.
    """
    kind = "none" if mask is None else "keys" if mask.shape[1:3] == (1, 1) else "pairs"
    platform = backend.attention_platform()
    plan = attention_plan(q, k, v, mask=kind, is_causal=is_causal, implementation=asked, platform=platform)
    if plan.implementation == "xla":
        return "xla"
    problem = backend.program_problem(plan.implementation, asked, q, k, v, mask)
    if problem and asked != "auto":
        raise ValueError(f"implementation {asked!r} cannot run: {problem}; use 'auto' or 'xla'.")
    return "xla" if problem else plan.implementation


def fused_attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m g k"],
    v: Float[Array, "b m g k"],
    mask: Bool[Array, "#b 1 1 #m"] | None,
    is_causal: bool,
    kernel: Kernel,
) -> Float[Array, "b n h k"]:
    """Returns the result of `softmax_attention`, computed by a fused kernel. k and v must be 0 at masked positions.

    Forward-mode differentiation raises TypeError.
    """
    keys = None if mask is None else jnp.broadcast_to(mask[:, 0, 0], k.shape[:2])
    with errors_of_kernel("the fused kernel of softmax attention"):
        return _per_device(q, k, v, keys, is_causal, kernel, backend.interpret_kernels())


@partial(jax.jit, static_argnames=("is_causal", "kernel", "interpret"))
def _per_device(q, k, v, keys, is_causal, kernel, interpret):
    """Runs the kernel; on a mesh with explicit axes, each device runs it on its own samples and heads."""
    run = partial(_cudnn, is_causal=is_causal) if kernel == "cudnn" else partial(_tpu, is_causal, interpret)
    if not backend.explicit_axes((q, k, v)):
        return run(q, k, v, keys)

    # If heads are sharded over devices, each query head must be on the same device as its keys.
    k, v = repeat_key_heads(q, k, v)
    alone = partial(run, keys=None)
    return map_axes(alone, varying((q, k, v), (q, k, v)), "b n h k", divided="bh", out="b n h k")


def _cudnn(q, k, v, keys, *, is_causal: bool):
    n, m = q.shape[1], k.shape[1]
    lengths = None
    if keys is not None:  # Attention is not causal here, so keys may be reordered: those to keep come first.
        order = jnp.argsort(~keys, axis=1, stable=True)[:, :, None, None]
        k, v = (jnp.take_along_axis(x, order, axis=1) for x in (k, v))
        # A sample whose keys are all masked sees one key, whose value is 0.
        lengths = jnp.maximum(keys.sum(axis=1, dtype=jnp.int32), 1)
    elif m % BLOCKS["cudnn"] and not is_causal:  # In causal order, no query sees the padding at the end.
        lengths = jnp.full(len(q), m, jnp.int32)
    q, k, v = (_whole_blocks(x, BLOCKS["cudnn"]) for x in (q, k, v))
    return backend.cudnn_attention(q, k, v, lengths, is_causal)[:, :n]


def _tpu(is_causal: bool, interpret: bool, q, k, v, keys):
    n, m = q.shape[1], k.shape[1]
    seen = keys
    if keys is None and m % BLOCKS["tpu"] and not is_causal:
        seen = jnp.ones(k.shape[:2], bool)
    seen = None if seen is None else _whole_blocks(seen, BLOCKS["tpu"])
    q, k, v = (_whole_blocks(x, BLOCKS["tpu"]) for x in (q, k, v))
    out = backend.tpu_attention(q, k, v, seen, is_causal, interpret)[:, :n]
    if keys is None or not is_causal:  # If all keys of a sample are masked, its values are 0, and so is the output.
        return out
    return jnp.where((jnp.cumsum(keys, axis=1) > 0)[:, :, None, None], out, 0)


def _whole_blocks(x: Array, block: int) -> Array:
    """Returns x `b n ...` padded at the end with zeros, so that n is a multiple of `block`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), *((0, 0),) * (x.ndim - 2)))
