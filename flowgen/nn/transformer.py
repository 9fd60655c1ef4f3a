"""The causal transformer stack of a flow block: pre-norm layers, scanned over depth, with a cache threaded in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from flowgen.attention import causal_kernel
from flowgen.nn.layers import MLP, layer_norm, linear


@dataclass(frozen=True)
class TransformerConfig:
    """Shape and precision of a stack of equal causal layers."""

    width: int
    num_layers: int
    num_heads: int
    expansion: int = 4
    activation: str = "gelu"
    attention: str = "softmax"
    dtype: str = "float32"
    remat: bool = False

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

    def __call__(self, x: Float[Array, "b n d"], cache: Any, layer, start, inverse_temperature):
        config, kernel = self.config, causal_kernel(self.config.attention)
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, config.num_heads, config.head_dim)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if inverse_temperature is not None:
            q = q * inverse_temperature[:, None, None, None].astype(q.dtype)
        if cache is None:
            out = kernel.attend(q, k, v)
        else:
            out, cache = kernel.attend_window(q, k, v, cache, layer, start)
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

    def __call__(self, carry, layer, start, inverse_temperature):
        h, cache = carry
        update, cache = self.attention(self.attention_norm(h), cache, layer, start, inverse_temperature)
        h = h + update
        h = h + self.mlp(self.mlp_norm(h))
        return (h, cache), None


def transformer_stack(config: TransformerConfig) -> nn.Module:
    """Returns a module that maps (h, cache) through all layers, scanned over depth; see the example for its call.

    Its parameters are those of one `TransformerLayer` with a leading axis of `num_layers`, so tracing and
    compilation cost the same for any depth.
    cache: None for a whole sequence from position 0, else a cache of the kernel; `start`: position of h[:, 0].
    inverse_temperature: None, or `b` factors on the attention logits (the inverse attention temperature).

    Example:
        (h, cache), _ = stack((h, cache), jnp.arange(config.num_layers), 0, None)
    """
    layer = nn.remat(TransformerLayer, prevent_cse=False) if config.remat else TransformerLayer
    scanned = nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=config.num_layers,
    )
    return scanned(config)


def layer_indices(config: TransformerConfig) -> Array:
    """Returns the indices that `transformer_stack` scans over.

    Example:
        layer_indices(config)  # 0, 1, ..., num_layers - 1
    """
    return jnp.arange(config.num_layers)
