"""The transformer stack of a flow block, with causal pre-norm layers.

For training, the parameters of all layers are stacked; for decoding, each layer has separate parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, PyTree

from flowgen.attention import CAUSAL_KERNEL_NAMES, CausalKernel, FeatureMap, FrameWindow, Kernel, causal_kernel
from flowgen.attention.kernels import State
from flowgen.attention.rotary import turn
from flowgen.attention.slices import Start
from flowgen.backend import Implementation, Remat, keep_heads_apart, keep_rows_apart, layer_form
from flowgen.nn.layers import MLP, NORMS, RMSNorm, cast_linear, linear
from flowgen.settings.ranges import OneOf, Own

Scale = Float[Array, " b"] | None
# The attention in the layers of a stack: the name of a kernel, or a user-defined kernel.
OwnAttention = Annotated[Kernel | FeatureMap | CausalKernel, Own("a FeatureMap, a Kernel or a CausalKernel")]
Attention = Annotated[str, OneOf(CAUSAL_KERNEL_NAMES)] | OwnAttention
Angles = Float[Array, "n r"] | Float[Array, "#b n r"]
Rotation = tuple[Angles, Angles] | None


@dataclass(frozen=True)
class TransformerConfig:
    """The config of a stack of identical transformer layers, which are causal unless `window` is given.

    num_kv_heads: number of heads of keys and values, each shared by num_heads / num_kv_heads query heads; None means
    num_heads.
    norm: the norm before attention and before the MLP, "layer_norm" or "rms_norm".
    qk_norm: whether to apply an RMSNorm over the channels of each query and key head, before the rotary rotation.
    post_norm: whether to apply an RMSNorm to the outputs of attention and MLP.
    remat: whether the backward pass recomputes the activations of each layer; see `flowgen.backend.layer_form` for
    "auto". This choice affects results only through rounding, and does not affect the parameters.
    scan: whether the parameters of all layers are stacked along a leading axis, as in training. For decoding, set it to
    False: inside a loop over tokens, a scan over layers would copy every layer's weights and cache out of the stack for
    each token.
    window: the pattern of attention to nearby frames that replaces causal attention, without support for caches; None
    means causal attention.
    attention_implementation: the implementation of softmax attention over whole sequences; see `softmax_attention`.
    """

    width: int
    num_layers: int
    num_heads: int
    expansion: int = 4
    activation: str = "gelu"
    attention: Attention = "softmax"
    dtype: str = "float32"
    remat: Remat = False
    scan: bool = True
    num_kv_heads: int | None = None
    norm: str = "layer_norm"
    qk_norm: bool = False
    post_norm: bool = False
    use_bias: bool = True
    window: FrameWindow | None = None
    attention_implementation: Implementation = "auto"

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def key_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


class SelfAttention(nn.Module):
    """Multi-head self-attention between a fused qkv projection and an output projection.

    Attention is causal, or limited to a window of frames.
    """

    config: TransformerConfig

    def setup(self):
        config = self.config
        features = (config.num_heads + 2 * config.key_heads) * config.head_dim
        self.qkv = linear(features, config.width, config.dtype, use_bias=config.use_bias, shared="outputs")
        self.proj = linear(config.width, config.width, config.dtype, use_bias=config.use_bias, shared="inputs")
        if config.qk_norm:
            self.query_norm = RMSNorm(config.dtype)
            self.key_norm = RMSNorm(config.dtype)

    def __call__(
        self, x: Float[Array, "b n d"], cache: State, start: Start, inverse_temperature: Scale, rotation: Rotation
    ) -> tuple[Float[Array, "b n d"], State]:
        config = self.config
        kernel = causal_kernel(config.attention, config.attention_implementation)
        heads, key_heads = config.num_heads, config.key_heads
        qkv = self.qkv(x).reshape(*x.shape[:2], heads + 2 * key_heads, config.head_dim)
        q, k, v = keep_heads_apart(*jnp.split(qkv, (heads, heads + key_heads), axis=2))
        if config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if rotation is not None:
            q, k = turn(q, *rotation), turn(k, *rotation)
        if inverse_temperature is not None:
            q = q * inverse_temperature[:, None, None, None].astype(q.dtype)
        if config.window is not None:
            out = config.window.attend(q, k, v)
        elif cache is None:
            out = kernel.attend(q, k, v)
        else:
            out, cache = kernel.attend_window(q, k, v, cache, start)
        return self.proj(out.reshape(x.shape)), cache


class TransformerLayer(nn.Module):
    """h + Attention(Norm(h)), then h + MLP(Norm(h)); with `post_norm`, each update is also normalised."""

    config: TransformerConfig

    def setup(self):
        config = self.config
        self.attention_norm = NORMS[config.norm](config.dtype)
        self.attention = SelfAttention(config)
        self.mlp_norm = NORMS[config.norm](config.dtype)
        self.mlp = MLP(config.width, config.expansion, config.activation, config.dtype, config.use_bias)
        if config.post_norm:
            self.attention_post_norm = RMSNorm(config.dtype)
            self.mlp_post_norm = RMSNorm(config.dtype)

    def __call__(
        self, h: Float[Array, "b n d"], cache: State, start: Start, inverse_temperature: Scale, rotation: Rotation
    ) -> tuple[Float[Array, "b n d"], State]:
        h = keep_rows_apart(h)
        update, cache = self.attention(self.attention_norm(h), cache, start, inverse_temperature, rotation)
        h = h + (self.attention_post_norm(update) if self.config.post_norm else update)
        update = self.mlp(self.mlp_norm(h))
        return h + (self.mlp_post_norm(update) if self.config.post_norm else update), cache


class LayerStack(nn.Module):
    """Applies layers whose parameters are stacked along a leading axis; see `transformer_stack`."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, h: Float[Array, "b n d"], caches: None, start: Start, inverse_temperature: Scale, rotation: Rotation
    ) -> tuple[Float[Array, "b n d"], None]:
        config = self.config
        stored = config.num_layers * activation_bytes(config, *h.shape[:2])
        form = layer_form(config.remat, config.num_layers, stored)
        layers = nn.scan(
            nn.remat(TransformerLayer, prevent_cse=False) if form.recompute else TransformerLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast,) * 4,
            length=config.num_layers,
            unroll=config.num_layers if form.one_by_one else 1,
        )(config)
        nn.share_scope(self, layers)
        return layers(h, caches, start, inverse_temperature, rotation)


class LayerLoop(nn.Module):
    """Applies layers one by one, each with its own parameters and cache; see `transformer_stack`."""

    config: TransformerConfig

    def setup(self):
        self.layer = [TransformerLayer(self.config) for _ in range(self.config.num_layers)]

    def __call__(
        self,
        h: Float[Array, "b n d"],
        caches: tuple | None,
        start: Start,
        inverse_temperature: Scale,
        rotation: Rotation,
    ) -> tuple[Float[Array, "b n d"], tuple]:
        updated = []
        for layer, cache in zip(self.layer, caches or (None,) * len(self.layer), strict=True):
            h, cache = layer(h, cache, start, inverse_temperature, rotation)
            updated.append(cache)
        return h, tuple(updated)


def transformer_stack(config: TransformerConfig) -> nn.Module:
    """Returns a module that applies all layers: (h, caches, start, inverse_temperature, rotation) -> (h, caches).

    caches: None if h is a whole sequence; otherwise, one cache per layer, made by the config's attention kernel, which
    requires `scan=False`. In the latter case, the returned caches contain, for each layer, what the kernel's `accept`
    needs to add the tokens of h to the layer's cache.
    start: the index of the cache slot of h[:, 0], one for the whole batch or one per sample.
    inverse_temperature: factors `b` for the attention logits, one per sample; None means 1.
    rotation: (cos, sin) of the angles by which the queries and keys of h are rotated, each `n r` or `b n r` for r
    angles per token; None means no rotation. Keys are cached after the rotation.

    Example:
        h, caches = stack(h, None, 0, None, None)
    """
    return LayerStack(config) if config.scan else LayerLoop(config)


def activation_bytes(config: TransformerConfig, batch: int, n: int) -> int:
    """Returns an estimate of how many bytes of float32 activations one layer stores for the backward pass.

    For each token, the layer stores 8 vectors outside the MLP, 5 vectors in the hidden layer of the MLP, and the
    attention logits twice. For the two shapes that were checked, this estimate is within 5 % of XLA's memory plan on a
    CPU.
    """
    return 4 * batch * n * ((8 + 5 * config.expansion) * config.width + 2 * config.num_heads * n)


def unstack_layers(
    stacked: PyTree, num_layers: int, dtype: str | None = None, cast: Callable[..., PyTree] = cast_linear
) -> PyTree:
    """Returns the parameters of a scanned stack in the form that the same stack expects with `scan=False`.

    dtype: the dtype to which the parameters of linear maps are cast, usually the stack's compute dtype; None means that
    they keep their dtype.
    cast: a function (parameters of a layer, dtype) -> cast parameters.

    Example:
        params = unstack_layers(block["layers"], config.num_layers)
    """
    return {f"layer_{i}": _layer(stacked, jnp.asarray(i), dtype, cast) for i in range(num_layers)}


@partial(jax.jit, static_argnames=("dtype", "cast"))
def _layer(stacked: PyTree, index: Int[Array, ""], dtype: str | None, cast: Callable[..., PyTree]) -> PyTree:
    layer = jax.tree.map(lambda leaf: leaf[index], stacked)
    return layer if dtype is None else cast(layer, dtype)
