"""Layers: linear maps with PyTorch's initialisation, LayerNorm, RMSNorm and MLP; also `patchify` and its inverse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from flowgen.backend import Shared, flat_dot, gelu
from flowgen.nn.int8 import Int8Kernel, int8_product

Activation = Literal["gelu", "gelu_tanh", "silu", "relu_squared", "geglu"]
Norm = Literal["layer_norm", "rms_norm"]
PatchOrder = Literal["channel_first", "channel_last"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}
# Maps the name of each gated MLP to the activation of its gate. Gated MLPs compute down(activation(gate(x)) · up(x)).
GATED_ACTIVATIONS = {"geglu": "gelu_tanh"}
TORCH_LAYER_NORM_EPS = 1e-5
RMS_NORM_EPS = 1e-6
FLAT_DOTS: dict[Shared, Callable[..., Array]] = {
    "": flat_dot,
    "inputs": partial(flat_dot, shared="inputs"),
    "outputs": partial(flat_dot, shared="outputs"),
}


def master_dtype(dtype: str) -> jnp.dtype:
    """Returns the dtype of parameters, affine maps and log-determinants for a given compute dtype; at least float32.

    Example:
        master_dtype("bfloat16")  # float32
    """
    return jnp.promote_types(jnp.dtype(dtype), jnp.float32)


def uniform_bias(fan_in: int) -> nn.initializers.Initializer:
    """Returns PyTorch's default initialiser for a bias, U(-1/√fan_in, 1/√fan_in)."""
    bound = 1 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Dense(nn.Module):
    """x @ kernel + bias, computed in `dtype`; when the layer is applied, its kernel may also be an `Int8Kernel`.

    dot_general: the function that computes the product, with the signature of `jax.lax.dot_general`.

    Example:
        y = linear(256, fan_in=128, dtype="float32").apply(params, x)
    """

    features: int
    use_bias: bool
    dtype: str
    kernel_init: Callable[..., Array]
    bias_init: Callable[..., Array]
    dot_general: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        master, x = master_dtype(self.dtype), x.astype(self.dtype)
        kernel = self.get_variable("params", "kernel")
        if isinstance(kernel, Int8Kernel):
            y = int8_product(x, kernel, self.dot_general)
        else:
            kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), master)
            y = self.dot_general(x, jnp.asarray(kernel, self.dtype), (((x.ndim - 1,), (0,)), ((), ())))
        if not self.use_bias:
            return y
        bias = jnp.asarray(self.param("bias", self.bias_init, (self.features,), master), self.dtype)
        return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def linear(
    features: int,
    fan_in: int,
    dtype: str,
    *,
    zero_kernel: bool = False,
    zero_bias: bool = False,
    use_bias: bool = True,
    shared: Shared = "",
    name: str | None = None,
) -> Dense:
    """Returns a Dense layer initialised like PyTorch's Linear: kernel and bias from U(-1/√fan_in, 1/√fan_in).

    zero_kernel: whether to initialise the kernel to zero instead. zero_bias: whether to initialise the bias to zero
    instead. In the output layers of TARFlow and STARFlow, only the kernel is initialised to zero.
    shared: the axis of the kernel, "inputs" or "outputs", that the mesh axis "tensor" divides in sharded training; ""
    means neither.

    Example:
        proj = linear(256, fan_in=128, dtype="float32")
    """
    kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return Dense(
        features,
        use_bias,
        dtype,
        kernel_init=nn.initializers.zeros if zero_kernel else kernel_init,
        bias_init=nn.initializers.zeros if zero_bias else uniform_bias(fan_in),
        dot_general=FLAT_DOTS[shared],
        name=name,
    )


def cast_linear(params: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns the parameters of modules, with the kernels and biases of their Dense layers cast to `dtype`.

    A Dense layer would cast these to its dtype whenever it is applied, so its results do not change. The parameters of
    norms are not cast, because norms compute with them at full precision.

    Example:
        params = cast_linear(params, "bfloat16")
    """
    if "kernel" in params:
        return {name: leaf.astype(dtype) for name, leaf in params.items()}
    return {name: cast_linear(part, dtype) if isinstance(part, Mapping) else part for name, part in params.items()}


def layer_norm(dtype: str) -> nn.LayerNorm:
    """Returns a LayerNorm with PyTorch's epsilon, 1e-5; statistics are computed in two passes, in at least float32.

    Example:
        norm = layer_norm("bfloat16")
    """
    return nn.LayerNorm(
        epsilon=TORCH_LAYER_NORM_EPS,
        dtype=jnp.dtype(dtype),
        param_dtype=master_dtype(dtype),
        use_fast_variance=False,
    )


class RMSNorm(nn.Module):
    """x / √(mean x² + epsilon) · (offset + weight), with the mean over the last axis.

    The computation uses at least float32, and the result has the dtype `dtype`.

    offset: 1, as in Gemma and STARFlow, whose stored weights are near 0; or 0, as in T5. The weight is initialised so
    that offset + weight is 1.

    Example:
        y = RMSNorm("float32").apply(params, x)
    """

    dtype: str
    epsilon: float = RMS_NORM_EPS
    offset: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        master = master_dtype(self.dtype)
        weight = self.param("weight", nn.initializers.constant(1 - self.offset), (x.shape[-1],), master)
        x = x.astype(master)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.epsilon)
        # With offset 1, stored weights are near 0; weights near 1 would lose precision in bfloat16.
        weight = self.offset + jnp.asarray(weight, master)
        return jnp.multiply(x, weight.reshape((1,) * (x.ndim - 1) + (-1,))).astype(self.dtype)


NORMS: dict[str, Callable[[str], nn.Module]] = {"layer_norm": layer_norm, "rms_norm": RMSNorm}


class MLP(nn.Module):
    """down(activation(up(x))) or, for a gated activation, down(activation(gate(x)) · up(x)).

    The input has `width` channels, and the hidden layer has `expansion` times as many. activation: "gelu", "gelu_tanh",
    "silu", "relu_squared" or, gated, "geglu".

    Example:
        y = MLP(width=256, expansion=4, activation="gelu", dtype="float32").apply(params, x)
    """

    width: int
    expansion: int
    activation: str
    dtype: str
    use_bias: bool = True

    def setup(self):
        hidden = self.expansion * self.width
        self.up = linear(hidden, self.width, self.dtype, use_bias=self.use_bias, shared="outputs")
        if self.activation in GATED_ACTIVATIONS:
            self.gate = linear(hidden, self.width, self.dtype, use_bias=self.use_bias, shared="outputs")
        self.down = linear(self.width, hidden, self.dtype, use_bias=self.use_bias, shared="inputs")

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        if self.activation not in GATED_ACTIVATIONS:
            return self.down(ACTIVATIONS[self.activation](self.up(x)))
        gate = ACTIVATIONS[GATED_ACTIVATIONS[self.activation]](self.gate(x))
        return self.down(gate * self.up(x))


_PATCH_PATTERNS = {
    "channel_first": ("b (i p) (j q) c", "b (i j) (c p q)"),
    "channel_last": ("b (i p) (j q) c", "b (i j) (p q c)"),
}


def patchify(x: Float[Array, "b height width c"], patch_size: int, order: PatchOrder) -> Float[Array, "b n token"]:
    """Returns the patches of images as tokens, row by row; a patch has patch_size × patch_size pixels.

    order: the order of a patch's values in its token: (c, row, column) with "channel_first", as in TARFlow, and (row,
    column, c) with "channel_last", as in STARFlow.

    Example:
        tokens = patchify(images, 4, "channel_first")  # b, (height/4)*(width/4), c*16
    """
    image, tokens = _PATCH_PATTERNS[order]
    return rearrange(x, f"{image} -> {tokens}", p=patch_size, q=patch_size)


def unpatchify(
    tokens: Float[Array, "b n token"], patch_size: int, image_size: tuple[int, int], order: PatchOrder
) -> Float[Array, "b height width c"]:
    """Returns the images of size (height, width) that `patchify` maps to `tokens`, given the same patch_size and order.

    Example:
        images = unpatchify(tokens, 4, (32, 48), "channel_first")
    """
    image, pattern = _PATCH_PATTERNS[order]
    rows = image_size[0] // patch_size
    return rearrange(tokens, f"{pattern} -> {image}", p=patch_size, q=patch_size, i=rows)
