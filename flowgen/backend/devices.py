"""Matrix products, linear algebra, memory limits and host callbacks that depend on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.experimental.buffer_callback import buffer_callback
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Shaped

from flowgen.backend.shards import Shared, gather_kernel

# Precision of matrix products whose errors accumulate, for example in running states. At lower precision, accelerators
# round the factors.
HIGHEST = lax.Precision.HIGHEST

# Largest number of attention logits in memory at once: 1 GiB in float32. If there are more, queries are processed in
# chunks.
MAX_LOGITS = 1 << 28
# Causal attention splits the queries into at most this many slices, each of which is compared only with the keys that
# its queries may see. More slices would save little and would take longer to compile.
MAX_CAUSAL_SLICES = 4
MIN_CAUSAL_SLICE = 64

# A cache grows in at most six stages of about 96 tokens or more. With k stages, decoding reads (k+1)/2k of the slots
# that it reads with one stage: 67 % with three stages and 58 % with six. Each stage compiles the loop over tokens once
# more, which takes about 0.4 s on a CPU.
TOKENS_PER_STAGE = 96
MAX_CACHE_STAGES = 6
# Largest total number of layers in the token loops of a program, for example six stages of 8 layers, or two of 24.
MAX_LOOP_LAYERS = 48

# An autoencoder processes 32 images of 256 x 256 pixels at once; the published autoencoders need 3 GiB to encode them
# and 7 GiB to decode them.
PIXELS_AT_ONCE = 32 * 256**2
IMAGES_AT_ONCE = 256
TEXTS_AT_ONCE = 64


# Products and activations


def platform() -> str:
    """Returns the platform that programs run on by default: "cpu", "gpu" or "tpu"."""
    return jax.default_backend()


def gelu(x: Float[Array, "*d"]) -> Float[Array, "*d"]:
    """Returns x Φ(x), computed with erf. `jax.nn.gelu` uses erfc, which takes twice as long as erf on CPUs."""
    return 0.5 * x * (1 + _erf(x * math.sqrt(0.5)))


@jax.custom_jvp
def _erf(x: Array) -> Array:
    return lax.erf(x)


@_erf.defjvp
def _erf_slope(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """Differentiates erf, whose derivative at x is 2/√π exp(-x²).

    This rule replaces JAX's own, which does not pass the checks of `jax.shard_map` (jax 0.12.0).
    """
    (x,), (change,) = primals, tangents
    return _erf(x), 2 / math.sqrt(math.pi) * (change * jnp.exp(-jnp.square(x)))


def flat_dot(
    x: Array,
    kernel: Array,
    dimension_numbers: object,
    precision: lax.PrecisionLike = None,
    *,
    shared: Shared = "",
    **options: Any,
) -> Array:
    """Returns x @ kernel, computed with all leading axes of x flattened into one.

    shared: the axis of the kernel `inputs outputs` that the mesh axis "tensor" divides in sharded training: "inputs",
    "outputs" or, if it divides neither, "". dimension_numbers is ignored; options are passed on to `lax.dot_general`.

    Flax's Dense accepts this function as its `dot_general`. Because of the flattening, the gradient with respect to the
    kernel is one plain matrix product, which XLA computes without copies on CPUs.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = lax.dot_general(rows, gather_kernel(kernel, shared), (((1,), (0,)), ((), ())), precision=precision, **options)
    return out.reshape(*x.shape[:-1], kernel.shape[-1])


def convert_at_use(kernel: Array, x: Array) -> tuple[Array, Array]:
    """Returns (kernel converted to the dtype of x, x), so that XLA cannot move the conversion out of a loop.

    Otherwise, XLA would convert the kernel once before a token loop, and each pass would read the converted kernel,
    which is larger than the original in int8. The conversion therefore waits for x, which changes in each pass.
    """
    kernel, x = lax.optimization_barrier((kernel, x))
    return kernel.astype(x.dtype), x


def nan_if(condition: Array, dtype: DTypeLike) -> Array:
    """Returns NaN where the condition is True and 0 elsewhere; add the result to an array to make these entries NaN.

    On CPUs, `where(condition, nan, x)` is not reliable, because XLA compiles exp of this expression to a finite number.
    If the result of this function is added to x instead, the NaN remains.
    """
    return jnp.log(jnp.where(condition, -1, 1).astype(dtype))


# Linear algebra


def cholesky(a: Float[Array, "*stack l l"]) -> Float[Array, "*stack l l"]:
    """Returns the lower triangular C with C Cᵀ = a, for symmetric positive definite a.

    On CPUs, C is computed column by column without LAPACK: on few cores, two concurrent LAPACK calls can wait forever
    for each other's threads (jaxlib 0.10). Other devices use `jnp.linalg.cholesky`.
    """
    return lax.platform_dependent(a, cpu=_cholesky_by_columns, default=jnp.linalg.cholesky)


def _cholesky_by_columns(a: Array) -> Array:
    rows = jnp.arange(a.shape[-1])[:, None]

    def column(k, carry):
        rest, factor = carry
        below = lax.dynamic_slice_in_dim(rest, k, 1, axis=-1)
        pivot = lax.dynamic_slice_in_dim(below, k, 1, axis=-2)
        below = jnp.where(jnp.broadcast_to(rows >= k, below.shape), below, 0) * lax.rsqrt(pivot)
        factor = lax.dynamic_update_slice_in_dim(factor, below, k, axis=-1)
        return rest - below * below.swapaxes(-1, -2), factor

    return lax.fori_loop(0, a.shape[-1], column, (a, jnp.zeros_like(a)))[1]


def unit_lower_inverse(lower: Float[Array, "*stack n n"]) -> Float[Array, "*stack n n"]:
    """Returns (I + lower)⁻¹; `lower` must be strictly lower triangular.

    CPUs use matrix products, because triangular solves call LAPACK (see `cholesky`). Other devices use a triangular
    solve.
    """
    return lax.platform_dependent(lower, cpu=_unit_lower_inverse_by_blocks, default=_unit_lower_inverse_by_solve)


def _unit_lower_inverse_by_solve(lower: Array) -> Array:
    eye = jnp.broadcast_to(jnp.eye(lower.shape[-1], dtype=lower.dtype), lower.shape)
    return lax.linalg.triangular_solve(lower + eye, eye, left_side=True, lower=True, unit_diagonal=True)


def _unit_lower_inverse_by_blocks(lower: Array) -> Array:
    """Inverts larger and larger diagonal blocks: the inverse of [[A, 0], [B, D]] is [[A⁻¹, 0], [-D⁻¹ B A⁻¹, D⁻¹]]."""
    matmul, size = partial(jnp.matmul, precision=HIGHEST), lower.shape[-1]
    token = jnp.arange(size)
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    for width in (2**level for level in range((size - 1).bit_length())):
        block = token // width
        joined = (block[:, None] // 2 == block[None, :] // 2) & (block[:, None] != block[None, :])
        below = jnp.where(jnp.broadcast_to(joined, lower.shape), lower, 0)
        inverse = inverse - (matmul(matmul(inverse, below), inverse) if width > 1 else below)
    return inverse


# Attention and memory


def queries_at_once(batch: object, heads: object, keys: object, max_logits: int | None) -> int | None:
    """Returns how many queries attention should process at a time to keep at most `max_logits` logits in memory.

    Each query has batch · heads · keys logits, so the result is `max_logits` divided by this number, but at least 1.
    The result is None, which means all queries, if `max_logits` is None or if one of these sizes is symbolic, as in an
    exported program.
    """
    known = [size for size in (batch, heads, keys) if isinstance(size, int)]
    if max_logits is None or len(known) < 3:
        return None
    return max(1, max_logits // max(1, math.prod(known)))


def causal_slice(n: int) -> int:
    """Returns the number of queries per slice if causal attention splits n queries into slices.

    Each slice is compared only with the keys that its queries may see. There are at most 4 slices, and each except the
    last has at least 64 queries.
    """
    return max(MIN_CAUSAL_SLICE, -(-n // MAX_CAUSAL_SLICES))


def causal_share(n: int) -> float:
    """Returns the fraction of the n² query-key pairs whose logits causal attention computes with `causal_slice`."""
    size = causal_slice(n)
    return sum((min(start + size, n) - start) * min(start + size, n) for start in range(0, n, size)) / n**2


def cache_stages(tokens: int, layers: int) -> int:
    """Returns in how many stages, from 1 to 6, a key-value cache grows while `tokens` tokens are decoded.

    With more stages, decoding reads fewer empty slots of the cache, but the token loop is compiled once per stage.

    layers: number of layers in this loop. With two or more stages, the loops have at most 48 layers in total.
    """
    return max(1, min(round(tokens / TOKENS_PER_STAGE), MAX_CACHE_STAGES, MAX_LOOP_LAYERS // max(layers, 1)))


def samples_at_once(pixels: int) -> int:
    """Returns how many samples of `pixels` pixels an autoencoder processes at a time: from 1 to 256."""
    return max(1, min(IMAGES_AT_ONCE, PIXELS_AT_ONCE // pixels))


def in_parts(
    run: Callable[..., tuple[ArrayLike, ...]], most: int, *inputs: Shaped[np.ndarray, "b ..."]
) -> tuple[Shaped[np.ndarray, "b ..."], ...]:
    """Calls `run` on parts of the inputs, and returns its results joined along the first axis.

    All parts have the same number of rows, which is a power of two no larger than `most`, so that a compiled `run` is
    compiled for few sizes. The last part is padded by repeating its last row, and the results of the padding are
    dropped.

    Raises ValueError if the inputs have no rows.
    """
    count = len(inputs[0])
    if not count:
        raise ValueError("the batch is empty; pass at least one sample.")
    size = 1
    while size < count and 2 * size <= most:
        size *= 2
    parts = []
    for start in range(0, count, size):
        chosen = np.minimum(np.arange(start, start + size), count - 1)
        parts.append([np.asarray(out)[: count - start] for out in run(*(x[chosen] for x in inputs))])
    return tuple(np.concatenate(outs) for outs in zip(*parts, strict=True))


# Devices and the host


def must_wait(devices: Sequence[jax.Device]) -> bool:
    """Returns whether a program on these devices must end before the next one is started.

    This is True for several CPU devices, where queued programs can deadlock.
    """
    return len(devices) > 1 and devices[0].platform == "cpu"


def settled(tree: Any) -> Any:
    """Returns the tree, after waiting for all its arrays if one of them is on devices for which `must_wait` is True.

    Call this function on the results of a program before starting another, because queued programs can deadlock on such
    devices.
    """
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and not isinstance(x, Tracer)]
    return jax.block_until_ready(tree) if any(must_wait(list(x.devices())) for x in arrays) else tree


def call_host(fn: Callable[..., np.ndarray], out: jax.ShapeDtypeStruct, *arrays: Array) -> Array:
    """Returns fn(*arrays) inside a compiled program; fn is called on the host, under vmap once per sample.

    out: shape and dtype of the NumPy array that fn returns.

    On CPUs, the arguments of fn are buffers, which `np.asarray` reads in place; on other devices, they are arrays. An
    ordinary callback would ask the program's own threads for a copy and, on one core, could wait for this copy forever.
    """

    def in_place(context, result, *buffers):
        np.asarray(result)[...] = fn(*buffers)

    return lax.platform_dependent(
        *arrays,
        cpu=buffer_callback(in_place, out, vmap_method="sequential"),
        default=lambda *arrays: jax.pure_callback(fn, out, *arrays, vmap_method="sequential"),
    )
