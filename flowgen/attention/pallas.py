"""Causal linear attention as a Pallas kernel for TPUs.

The kernel processes the chunks of each head in order and keeps the state in the chip's scratch memory. The gradients
are always computed by `prefix_product`. The kernel has not been timed on a TPU yet, so it runs only on request:
`Causal(implementation="pallas")`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from flowgen import backend
from flowgen.attention.checks import repeat_key_heads
from flowgen.attention.prefix import Features, prefix_product
from flowgen.backend import map_axes, varying

CHUNK_SIZE = 128  # the width of a TPU's matrix unit


def causal_product(
    q: Float[Array, "b n h p"], k: Float[Array, "b n g p"], v: Float[Array, "b n g d"], chunk_size: int = CHUNK_SIZE
) -> tuple[Float[Array, "b n h d"], Float[Array, "b n h"]]:
    """Returns Σ_{s≤t} (q_t·k_s) v_s and Σ_{s≤t} q_t·k_s in float32, like `prefix_product` without decay or segments.

    On TPUs, the kernel runs on chunks of at least 128 tokens. On other platforms, the function calls `prefix_product`.
    Raises ValueError unless chunk_size is a power of two and at least 16.
    """
    if chunk_size < 16 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size is {chunk_size}, but the Pallas kernel needs a power of two that is at least 16.")
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    if 0 in q.shape[:2]:  # Pallas does not allow empty blocks.
        return jnp.zeros((*q.shape[:3], v.shape[3])), jnp.zeros(q.shape[:3])
    return _per_device(q, k, v, chunk_size, backend.interpret_kernels())


@partial(jax.jit, static_argnames=("chunk_size", "interpret"))
def _per_device(q, k, v, chunk_size, interpret):
    """Runs the kernel; on a mesh with explicit axes, each device runs it on its own samples and heads."""

    k, v = repeat_key_heads(q, k, v)
    run = partial(_causal_product, chunk_size=chunk_size, interpret=interpret)
    return map_axes(run, varying((q, k, v), (q, k, v)), "b n h p", divided="bh", out=("b n h d", "b n h"))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _causal_product(q, k, v, chunk_size, interpret):
    kernel = partial(_tpu, chunk_size=max(chunk_size, CHUNK_SIZE), interpret=interpret)
    if interpret:
        return kernel(q, k, v)
    return jax.lax.platform_dependent(q, k, v, tpu=kernel, default=partial(_scan, chunk_size=chunk_size))


def _forward(q, k, v, chunk_size, interpret):
    return _causal_product(q, k, v, chunk_size, interpret), (q, k, v)


def _backward(chunk_size, interpret, inputs, cotangents):
    _, pull = jax.vjp(partial(_scan, chunk_size=chunk_size), *inputs)
    return pull(cotangents)


_causal_product.defvjp(_forward, _backward)


def _scan(q, k, v, *, chunk_size: int):
    """Returns the results of `_causal_product`, computed without Pallas."""
    return prefix_product(Features(q, k), v, chunk_size=chunk_size)[:2]


def _chunk(q, k, v, kv, norm):
    """Returns outputs `c d`, totals `1 c` and the next state of one chunk; a state is kv `p d` and norm `1 p`."""
    dot = partial(jnp.dot, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    size = q.shape[0]
    rows = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    columns = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    scores = jnp.where(rows >= columns, dot(q, k.T), 0.0)
    total = scores.sum(axis=1) + (q * norm).sum(axis=1)
    return dot(scores, v) + dot(q, kv), total[None, :], kv + dot(k.T, v), norm + k.sum(axis=0)[None, :]


def _tpu(q, k, v, *, chunk_size: int, interpret: bool):
    tokens = q.shape[1]
    padding = ((0, 0), (0, 0), (0, -tokens % chunk_size), (0, 0))
    q, k, v = (jnp.pad(x.swapaxes(1, 2), padding) for x in (q, k, v))
    batch, num_heads, n, feature_dim = q.shape
    value_dim = v.shape[-1]

    def kernel(q_ref, k_ref, v_ref, out_ref, total_ref, kv_ref, norm_ref):
        @pl.when(pl.program_id(2) == 0)
        def _start():
            kv_ref[...] = jnp.zeros_like(kv_ref)
            norm_ref[...] = jnp.zeros_like(norm_ref)

        result = _chunk(q_ref[0, 0], k_ref[0, 0], v_ref[0, 0], kv_ref[...], norm_ref[...])
        out_ref[0, 0], total_ref[0, 0], kv_ref[...], norm_ref[...] = result

    def chunks(width):
        return pl.BlockSpec((1, 1, chunk_size, width), lambda b, h, i: (b, h, i, 0))

    axes = jax.typeof(q).manual_axis_type  # In a mapped program, the results vary over the same axes as q.
    shapes = (batch, num_heads, n, value_dim), (batch, num_heads, 1, n)
    out, total = pl.pallas_call(
        kernel,
        grid=(batch, num_heads, n // chunk_size),
        in_specs=[chunks(feature_dim), chunks(feature_dim), chunks(value_dim)],
        out_specs=[chunks(value_dim), pl.BlockSpec((1, 1, 1, chunk_size), lambda b, h, i: (b, h, 0, i))],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=axes) for shape in shapes],
        scratch_shapes=[pltpu.VMEM((feature_dim, value_dim), jnp.float32), pltpu.VMEM((1, feature_dim), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(q, k, v)
    return out[:, :, :tokens].swapaxes(1, 2), total[:, :, 0, :tokens].swapaxes(1, 2)
