"""The causal transformer stack of a flow block: pre-norm layers, scanned over depth or, for decoding, one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from flowgen.attention import causal_kernel
from flowgen.nn.layers import MLP, layer_norm, linear


@dataclass(frozen=True)
class TransformerConfig:
    """Shape and precision of a stack of equal causal layers.

    scan: one compiled layer and parameters with a leading axis of `num_layers`, for training. Without, layers
    have parameters and caches of their own, for decoding: inside a loop over tokens, a scan over layers would
    copy the weights and the cache of every layer out of the stack for each token.
    """

    width: int
    num_layers: int
    num_heads: int
    expansion: int = 4
    activation: str = "gelu"
    attention: str = "softmax"
    dtype: str = "float32"
    remat: bool = False
    scan: bool = True

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


class SelfAttention(nn.Module):
    """Causal multi-head self-attention: fused qkv projection, any kernel of `flowgen.attention`, projection."""

    config: TransformerConfig

    def setup(self):
        width, dtype = self.config.width, self.config.dtype
        self.qkv = linear(3 * width, width, dtype)
        self.proj = linear(width, width, dtype)

    def __call__(self, x: Float[Array, "b n d"], cache: Any, start, inverse_temperature):
        config, kernel = self.config, causal_kernel(self.config.attention)
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, config.num_heads, config.head_dim)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if inverse_temperature is not None:
            q = q * inverse_temperature[:, None, None, None].astype(q.dtype)
        if cache is None:
            out = kernel.attend(q, k, v)
        else:
            out, cache = kernel.attend_window(q, k, v, cache, start)
        return self.proj(out.reshape(x.shape)), cache


class TransformerLayer(nn.Module):
    """h + Attention(LayerNorm(h)), then h + MLP(LayerNorm(h))."""

    config: TransformerConfig

    def setup(self):
        config = self.config
        self.attention_norm = layer_norm(config.dtype)
        self.attention = SelfAttention(config)
        self.mlp_norm = layer_norm(config.dtype)
        self.mlp = MLP(config.width, config.expansion, config.activation, config.dtype)

    def __call__(self, h: Float[Array, "b n d"], cache: Any, start, inverse_temperature):
        update, cache = self.attention(self.attention_norm(h), cache, start, inverse_temperature)
        h = h + update
        return h + self.mlp(self.mlp_norm(h)), cache


class LayerLoop(nn.Module):
    """Layers one by one, each with parameters and a cache of its own; see `transformer_stack`."""

    config: TransformerConfig

    def setup(self):
        self.layer = [TransformerLayer(self.config) for _ in range(self.config.num_layers)]

    def __call__(self, h: Float[Array, "b n d"], caches: tuple | None, start, inverse_temperature):
        updated = []
        for layer, cache in zip(self.layer, caches or (None,) * len(self.layer), strict=True):
            h, cache = layer(h, cache, start, inverse_temperature)
            updated.append(cache)
        return h, tuple(updated)


def transformer_stack(config: TransformerConfig) -> nn.Module:
    """Returns a module that maps h through all layers; see the example for its call.

    caches: None for a whole sequence from position 0, else one cache of the kernel per layer (`scan` off);
    start: position of h[:, 0]. inverse_temperature: None, or `b` factors on the attention logits.

    Example:
        h, caches = stack(h, None, 0, None)
    """
    if not config.scan:
        return LayerLoop(config)
    layer = nn.remat(TransformerLayer, prevent_cse=False) if config.remat else TransformerLayer
    scanned = nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
        length=config.num_layers,
    )
    return scanned(config)


def unstack_layers(stacked: Any, num_layers: int) -> Any:
    """Returns the parameters of a scanned stack as those of the same stack with `scan` off.

    Example:
        params = unstack_layers(block["layers"], config.num_layers)
    """
    return {f"layer_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(num_layers)}
