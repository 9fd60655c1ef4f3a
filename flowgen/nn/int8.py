"""Matrix products with 8-bit weights, one scale per output and floating-point weights for a few inputs (arXiv
2208.07339).

Let W be a kernel `inputs outputs` and O the set of its outliers, which are a few inputs with unusually large weights:

    x W ≈ (x Q) · s + x_O W_O,      Q_ij = round(W_ij / s_j), and 0 for i in O,      s_j = max_{i∉O} |W_ij| / 127

A large weight increases the scale of its output, and thereby the rounding errors of all other weights of that output.
Therefore, each weight is compared with the root mean square weight of its output, and the inputs with the largest
ratios are the outliers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from flowgen.backend import convert_at_use

LARGEST = 127
INPUTS_PER_OUTLIER = 64  # The outliers take 4 / 64 of the bytes of the other weights if they are float32.


class Int8Kernel(NamedTuple):
    """A rounded kernel, in the notation of the module docstring.

    values: Q.
    scale: s.
    outliers: the indices of the inputs in O.
    exact: W_O.
    """

    values: Int8[Array, "i o"]
    scale: Float[Array, " o"]
    outliers: Int[Array, " k"]
    exact: Float[Array, "k o"]


def to_int8(kernel: Float[Array, "i o"], dtype: str, num_outliers: int | None = None) -> Int8Kernel:
    """Returns the kernel with weights of 8 bits, each within half a scale step of the original.

    dtype: dtype of the weights of the outliers.
    num_outliers: the number of outliers; None means one per 64 inputs, but at least one.

    Example:
        small = to_int8(kernel, "float32")
    """
    inputs = len(kernel)
    count = max(1, inputs // INPUTS_PER_OUTLIER) if num_outliers is None else num_outliers
    mean_square = jnp.maximum(jnp.square(kernel).mean(axis=0), jnp.finfo(kernel.dtype).tiny)
    largest = (jnp.square(kernel) / mean_square[None]).max(axis=1)
    outliers = jnp.sort(jax.lax.top_k(largest, count)[1])
    others = kernel.at[outliers].set(0)
    scale = jnp.abs(others).max(axis=0) / LARGEST
    steps = others / jnp.where(scale > 0, scale, 1)[None]
    values = jnp.clip(jnp.round(steps), -LARGEST, LARGEST).astype(jnp.int8)
    return Int8Kernel(values, scale, outliers, kernel[outliers].astype(dtype))


def int8_product(
    x: Float[Array, "*b i"], kernel: Int8Kernel, product: Callable[..., Array] = jax.lax.dot_general
) -> Float[Array, "*b o"]:
    """Returns x times the rounded kernel, in the dtype of x.

    product: a function with the signature of `jax.lax.dot_general`.

    Example:
        y = int8_product(x, to_int8(kernel, "float32"))
    """
    numbers = (((x.ndim - 1,), (0,)), ((), ()))
    values, x = convert_at_use(kernel.values, x)
    y = product(x, values, numbers) * kernel.scale.reshape((1,) * (x.ndim - 1) + (-1,))
    return y.astype(x.dtype) + product(x[..., kernel.outliers], kernel.exact.astype(x.dtype), numbers)


def round_linear(params: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns the parameters of modules, with the kernels of their Dense layers rounded to 8 bits.

    dtype: the dtype of the other parameters of Dense layers; see `flowgen.nn.layers.cast_linear`.

    Example:
        params = round_linear(params, "float32")
    """
    if "kernel" in params:
        others = {name: leaf.astype(dtype) for name, leaf in params.items() if name != "kernel"}
        return {"kernel": to_int8(params["kernel"], dtype), **others}
    return {name: round_linear(part, dtype) if isinstance(part, Mapping) else part for name, part in params.items()}
