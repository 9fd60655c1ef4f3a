"""Fused kernels for softmax attention: when they can be used, and functions that call them.

These kernels never write the logits to memory. cuDNN provides a kernel for NVIDIA GPUs. JAX provides splash attention,
a Pallas kernel for TPUs. Neither kernel has been timed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flowgen.backend.meshes import divided_axes, explicit_axes, partitioned, varies

Implementation = Literal["auto", "xla", "cudnn", "tpu"]
Kernel = Literal["cudnn", "tpu"]
# The kernel for each platform, and the tile size of each kernel. A kernel processes tokens in whole tiles.
KERNELS: dict[str, Kernel] = {"gpu": "cudnn", "tpu": "tpu"}
BLOCKS: dict[Kernel, int] = {"cudnn": 64, "tpu": 128}
NAMES: dict[Kernel, str] = {"cudnn": "cuDNN's kernel", "tpu": "the TPU kernel"}
DEVICES: dict[Kernel, str] = {"cudnn": "an NVIDIA GPU of compute capability 8.0 or later", "tpu": "a TPU"}
DTYPES: dict[Kernel, tuple[str, ...]] = {"cudnn": ("bfloat16", "float16"), "tpu": ("bfloat16", "float32")}
MIN_CAPABILITY = (8, 0)
# cuDNN accepts wider heads, of up to 256 channels, only on newer GPUs.
MAX_CUDNN_WIDTH = 128
# Larger tiles mean fewer steps. We use the largest of these tile sizes that divides the padded number of tokens.
TPU_BLOCKS = (512, 256, 128)
MASKS = ("none", "keys", "pairs")

_any_derivative = jax.make_user_context(False)


class AttentionPlan(NamedTuple):
    """The implementation that computes softmax attention, and the reason for this choice."""

    implementation: Literal["xla", "cudnn", "tpu"]
    reason: str


@runtime_checkable
class Shaped(Protocol):
    """Anything with a shape and a dtype, such as an array or a `jax.ShapeDtypeStruct`."""

    @property
    def shape(self) -> Any: ...

    @property
    def dtype(self) -> Any: ...


def attention_plan(
    q: Shaped,
    k: Shaped,
    v: Shaped,
    *,
    mask: Literal["none", "keys", "pairs"] = "none",
    is_causal: bool = False,
    implementation: Implementation = "auto",
    platform: str | None = None,
) -> AttentionPlan:
    """Returns which implementation computes softmax attention for q `b n h k`, k `b m g k` and v `b m g d`, and why.

    g is the number of key heads, each of which is shared by h / g query heads.

    Of q, k and v, only shapes and dtypes matter. mask: "none" if there is no mask, "keys" if the mask is the same for
    all queries and heads, and "pairs" for any other mask. platform: "cpu", "gpu" or "tpu"; None means
    `attention_platform()`. implementation: "auto" chooses the platform's fused kernel if it supports the inputs, the
    dtype is not float32, and there are at least as many queries as the kernel processes at a time (64 on GPUs, 128 on
    TPUs); otherwise, it chooses XLA.

    Raises ValueError if the implementation or the kind of mask is unknown, or if an implementation is requested by name
    but cannot run.

    Example:
        q = k = v = jax.ShapeDtypeStruct((8, 1023, 12, 64), jnp.bfloat16)
        attention_plan(q, k, v, is_causal=True, platform="gpu").implementation  # "cudnn"
    """
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation must be one of {', '.join(get_args(Implementation))}, not {implementation!r}."
        )
    if mask not in MASKS:
        raise ValueError(f"mask must be one of {', '.join(MASKS)}, not {mask!r}; give the kind of mask, not an array.")
    platform = attention_platform() if platform is None else platform
    if implementation == "xla":
        return AttentionPlan("xla", "it was requested")
    kernel = KERNELS.get(platform) if implementation == "auto" else implementation
    if kernel is None:
        return AttentionPlan("xla", f"there is no fused kernel for a {platform}")
    problem = _problem(kernel, q, k, v, mask, is_causal, platform)
    if implementation != "auto":
        if problem:
            raise ValueError(f"implementation {implementation!r} cannot run: {problem}; use 'auto' or 'xla'.")
        return AttentionPlan(implementation, "it was requested")
    problem = problem or _cost(kernel, q)
    return AttentionPlan("xla", problem) if problem else AttentionPlan(kernel, f"{NAMES[kernel]} supports these inputs")


def _problem(kernel: Kernel, q: Shaped, k: Shaped, v: Shaped, mask: str, is_causal: bool, platform: str) -> str:
    """Returns a clause that states why the kernel cannot run; the clause is empty if the kernel can run."""
    name, dtypes = NAMES[kernel], [jnp.dtype(x.dtype).name for x in (q, k, v)]
    if KERNELS.get(platform) != kernel:
        return f"{name} needs {DEVICES[kernel]}, but the device is a {platform}"
    if not all(isinstance(size, int) for x in (q, k, v) for size in x.shape):
        return f"{name} requires known sizes, but some are symbolic"
    if any(size == 0 for x in (q, k, v) for size in x.shape):
        return f"{name} does not support empty arrays"
    if not dtypes[0] == dtypes[1] == dtypes[2]:
        return f"{name} requires q, k and v of one dtype, but their dtypes are {', '.join(dtypes)}"
    if dtypes[0] not in DTYPES[kernel]:
        return f"{name} requires {' or '.join(DTYPES[kernel])}, but the dtype is {dtypes[0]}"
    if not q.shape[3] == k.shape[3] == v.shape[3]:
        widths = f"{q.shape[3]}, {k.shape[3]} and {v.shape[3]}"
        return f"{name} requires queries, keys and values of one width, but their widths are {widths}"
    if kernel == "cudnn" and (q.shape[3] % 8 or q.shape[3] > MAX_CUDNN_WIDTH):
        return f"{name} requires head widths in multiples of 8 up to {MAX_CUDNN_WIDTH}, but the width is {q.shape[3]}"
    if mask == "pairs":
        return f"{name} supports only key masks, but the mask differs between queries or heads"
    if kernel == "cudnn" and mask == "keys" and is_causal:
        return f"{name} does not support a key mask in causal attention"
    return ""


def _cost(kernel: Kernel, q: Shaped) -> str:
    """Returns a clause that states why "auto" avoids a kernel that can run; empty if "auto" chooses the kernel."""
    if jnp.dtype(q.dtype) == jnp.float32:
        return f"{NAMES[kernel]} is intended for bfloat16, but the dtype is float32"
    if q.shape[1] < BLOCKS[kernel]:
        return f"{NAMES[kernel]} processes {BLOCKS[kernel]} queries at a time, but there are {q.shape[1]}"
    return ""


def attention_platform() -> str:
    """Returns the platform of JAX's default device, for which attention is planned: usually "cpu", "tpu" or "gpu".

    "gpu" stands for a GPU that cuDNN's kernel supports. For any other GPU, the result is a phrase that describes the
    GPU, such as "GPU without CUDA".
    """
    device = getattr(jax.config, "jax_default_device")  # noqa: B009  (unknown to type checkers)
    if not isinstance(device, jax.Device):
        device = jax.local_devices(backend=device)[0]
    if device.platform != "gpu":
        return device.platform
    if "cuda" not in device.client.platform_version:
        return "GPU without CUDA"
    capability = str(device.compute_capability)
    older = tuple(map(int, capability.split("."))) < MIN_CAPABILITY
    return f"GPU of compute capability {capability}" if older else "gpu"


def program_problem(
    kernel: Kernel, implementation: Implementation, q: Array, k: Array, v: Array, mask: Array | None
) -> str:
    """Returns why `kernel` cannot run in the program that JAX is tracing, as a clause; "" if it can.

    `attention_plan` checks the shapes and dtypes of q, k and v; this function checks how they are sharded and mapped
    over devices, and whether derivatives other than reverse-mode are needed.

    implementation: the implementation that was requested.
    """
    if _any_derivative.value:
        return "fused kernels have no forward-mode derivative, which is needed here"
    if mask is not None and explicit_axes((q, k, v, mask)):
        return "fused kernels do not support a mask on meshes with explicit axes"
    if any({1, 3} & divided_axes(x) for x in (q, k, v)):
        return "fused kernels require whole sequences and heads, but these axes are sharded over devices"
    if kernel == "tpu" and any(varies(x) for x in (q, k, v)):
        return "the TPU kernel does not pass the checks of jax.shard_map, which check_vma=False turns off"
    if kernel == "tpu" and implementation == "auto" and partitioned(q):
        return "the compiler cannot divide the TPU kernel over devices"
    return ""


def any_derivative() -> AbstractContextManager:
    """Returns a context manager inside which softmax attention with `implementation="auto"` is computed by XLA.

    Forward-mode and higher derivatives need this context, because fused kernels support only first derivatives in
    reverse mode. Programs that jax.jit compiles inside the context are not reused outside it, and vice versa.

    Example:
        with any_derivative():
            v, change = jax.jvp(velocity, (x,), (direction,))
    """
    return _any_derivative(True)


def interpret_kernels() -> bool:
    """Returns whether the CPU interprets TPU kernels: always False, except in tests, which replace this function."""
    return False


def cudnn_attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m g k"],
    v: Float[Array, "b m g k"],
    lengths: Int[Array, " b"] | None,
    is_causal: bool,
) -> Float[Array, "b n h k"]:
    """Returns softmax attention, computed by cuDNN.

    lengths: for each sample, the number of leading keys that queries may attend to, at least 1; None means all keys.
    """
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=is_causal, key_value_seq_lengths=lengths, implementation="cudnn"
    )


def tpu_attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m g k"],
    v: Float[Array, "b m g k"],
    keys: Bool[Array, "b m"] | None,
    is_causal: bool,
    interpret: bool,
) -> Float[Array, "b n h k"]:
    """Returns softmax attention, computed by JAX's splash attention. n and m must be multiples of 128.

    keys: True for keys that queries may attend to; None means all keys. interpret: whether to run the kernel in Pallas'
    interpreter, which needs no TPU. The output is finite but arbitrary for a query that may attend to no key.
    """
    # Imported here because it loads the TPU dialects.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    n, m = q.shape[1], k.shape[1]
    of_queries, of_keys = (next(block for block in TPU_BLOCKS if size % block == 0) for size in (n, m))
    attend = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((n, m)) if is_causal else masks.FullMask((n, m))] * q.shape[2]),
        block_sizes=splash.BlockSizes(
            block_q=of_queries,
            block_kv=of_keys,
            block_q_dkv=of_queries,
            block_kv_dkv=of_keys,
            block_q_dq=of_queries,
            block_kv_dq=of_keys,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def one(q, k, v, keys):
        ids = None if keys is None else splash.SegmentIds(jnp.ones(n, jnp.int32), keys.astype(jnp.int32))
        return attend(q, k, v, segment_ids=ids)

    q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    return jax.vmap(one)(q, k, v, keys).swapaxes(1, 2)
