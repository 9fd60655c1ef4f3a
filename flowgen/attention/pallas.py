"""Causal linear attention as one Pallas kernel, which keeps the state on the chip and streams chunks of tokens.

The function that processes one chunk is lowered in two ways. On TPUs, the grid visits the chunks of a head in order
and keeps the state in scratch memory. On GPUs (Triton), each program handles a head and a slice of the value channels:
it loops over the chunks and keeps the state in registers. Elsewhere, the kernel runs in interpret mode, which is for
tests. Gradients come from `prefix_product`. The kernel has not been measured on an accelerator yet, so it runs
only on request: `Causal(implementation="pallas")`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from flowgen.attention.prefix import Features, prefix_product
from flowgen.backend import keep_axes, map_axes, varies, varying

CHUNK_SIZE = 128  # the width of a TPU's matrix unit
VALUE_SLICE = 64  # value channels of one GPU program


def causal_product(
    q: Float[Array, "b n h p"], k: Float[Array, "b n g p"], v: Float[Array, "b n g d"], chunk_size: int = CHUNK_SIZE
) -> tuple[Float[Array, "b n h d"], Float[Array, "b n h"]]:
    """Returns Σ_{s≤t} (q_t·k_s) v_s and Σ_{s≤t} q_t·k_s in float32, like `prefix_product` without decay or segments.

    Raises ValueError unless chunk_size is a power of two, at least 16.
    """
    if chunk_size < 16 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size is {chunk_size}, but the Pallas kernel needs a power of two, at least 16.")
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    if 0 in q.shape[:2]:  # Pallas does not allow empty blocks.
        return jnp.zeros((*q.shape[:3], v.shape[3])), jnp.zeros(q.shape[:3])
    return _per_device(q, k, v, chunk_size)


@partial(jax.jit, static_argnames="chunk_size")
def _per_device(q, k, v, chunk_size):
    """Runs the kernel; on a mesh with explicit axes, each device runs it on its own samples and heads."""

    def repeated(k, v):
        return tuple(jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))

    k, v = keep_axes(repeated, k, v, named=[(q, "b n h p")], out=("b m h p", "b m h d"))
    run = partial(_causal_product, chunk_size=chunk_size)
    return map_axes(run, varying((q, k, v), (q, k, v)), "b n h p", divided="bh", out=("b n h d", "b n h"))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _causal_product(q, k, v, chunk_size):
    n = q.shape[1]
    padding = ((0, 0), (0, 0), (0, -n % chunk_size), (0, 0))
    heads = [jnp.pad(x.swapaxes(1, 2), padding) for x in (q, k, v)]
    calls = {"cpu": _scan if varies(q) else partial(_tpu, interpret=True), "tpu": _tpu, "cuda": _gpu, "rocm": _gpu}
    out, total = jax.lax.platform_dependent(
        *heads, **{name: partial(call, chunk_size=chunk_size) for name, call in calls.items()}
    )
    return out[:, :, :n].swapaxes(1, 2), total[:, :, 0, :n].swapaxes(1, 2)


def _forward(q, k, v, chunk_size):
    return _causal_product(q, k, v, chunk_size), (q, k, v)


def _backward(chunk_size, inputs, cotangents):
    _, pull = jax.vjp(lambda q, k, v: prefix_product(Features(q, k), v, chunk_size=chunk_size)[:2], *inputs)
    return pull(cotangents)


_causal_product.defvjp(_forward, _backward)


def _scan(q, k, v, *, chunk_size: int):
    """Returns the results without Pallas, for programs mapped over devices: JAX cannot interpret a kernel there."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    out, total, _ = prefix_product(Features(q, k), v, chunk_size=chunk_size)
    return out.swapaxes(1, 2), total.swapaxes(1, 2)[:, :, None]


def _chunk(q, k, v, kv, norm):
    """Returns outputs `c d`, totals `1 c` and the next state of one chunk; the state is kv `p d` and norm `1 p`."""
    dot = partial(jnp.dot, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    size = q.shape[0]
    rows = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    columns = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    scores = jnp.where(rows >= columns, dot(q, k.T), 0.0)
    total = scores.sum(axis=1) + (q * norm).sum(axis=1)
    return dot(scores, v) + dot(q, kv), total[None, :], kv + dot(k.T, v), norm + k.sum(axis=0)[None, :]


def _tpu(q, k, v, *, chunk_size: int, interpret: bool = False):
    batch, num_heads, n, feature_dim = q.shape
    value_dim = v.shape[-1]

    def kernel(q_ref, k_ref, v_ref, out_ref, total_ref, kv_ref, norm_ref):
        @pl.when(pl.program_id(2) == 0)
        def _start():
            kv_ref[...] = jnp.zeros_like(kv_ref)
            norm_ref[...] = jnp.zeros_like(norm_ref)

        result = _chunk(q_ref[0, 0], k_ref[0, 0], v_ref[0, 0], kv_ref[...], norm_ref[...])
        out_ref[0, 0], total_ref[0, 0], kv_ref[...], norm_ref[...] = result

    def tokens(width):
        return pl.BlockSpec((1, 1, chunk_size, width), lambda b, h, i: (b, h, i, 0))

    return pl.pallas_call(
        kernel,
        grid=(batch, num_heads, n // chunk_size),
        in_specs=[tokens(feature_dim), tokens(feature_dim), tokens(value_dim)],
        out_specs=[tokens(value_dim), pl.BlockSpec((1, 1, 1, chunk_size), lambda b, h, i: (b, h, 0, i))],
        out_shape=_out_shapes(q, value_dim),
        scratch_shapes=[pltpu.VMEM((feature_dim, value_dim), jnp.float32), pltpu.VMEM((1, feature_dim), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(q, k, v)


def _gpu(q, k, v, *, chunk_size: int, interpret: bool = False):
    batch, num_heads, n, feature_dim = q.shape
    value_dim = v.shape[-1]
    # Sides of Triton's blocks are powers of two, at least 16.
    features, width = (max(16, pl.next_power_of_2(size)) for size in (feature_dim, min(value_dim, VALUE_SLICE)))
    slices = -(-value_dim // width)
    q, k = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - feature_dim))) for x in (q, k))
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, slices * width - value_dim)))

    def kernel(q_ref, k_ref, v_ref, out_ref, total_ref):
        def step(i, state):
            window = pl.ds(pl.multiple_of(i * chunk_size, chunk_size), chunk_size)
            q, k, v = q_ref[0, 0, window, :], k_ref[0, 0, window, :], v_ref[0, 0, window, :]
            out_ref[0, 0, window, :], total, kv, norm = _chunk(q, k, v, *state)
            # Every slice of channels writes the same totals.
            total_ref[0, 0, 0, window] = total[0]
            return kv, norm

        zeros = jnp.zeros((features, width), jnp.float32), jnp.zeros((1, features), jnp.float32)
        jax.lax.fori_loop(0, n // chunk_size, step, zeros)

    def tokens(size, slice_index):
        return pl.BlockSpec((1, 1, n, size), lambda b, h, s: (b, h, 0, s if slice_index else 0))

    out, total = pl.pallas_call(
        kernel,
        grid=(batch, num_heads, slices),
        in_specs=[tokens(features, False), tokens(features, False), tokens(width, True)],
        out_specs=[tokens(width, True), pl.BlockSpec((1, 1, 1, n), lambda b, h, s: (b, h, 0, 0))],
        out_shape=_out_shapes(q, slices * width),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(q, k, v)
    return out[..., :value_dim], total


def _out_shapes(q: Array, value_dim: int) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes of outputs and totals; in a mapped program, they vary over the same axes as q."""
    batch, num_heads, n, _ = q.shape
    axes = jax.typeof(q).manual_axis_type
    shapes = (batch, num_heads, n, value_dim), (batch, num_heads, 1, n)
    return [jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=axes) for shape in shapes]
