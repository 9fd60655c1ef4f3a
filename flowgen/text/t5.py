"""The encoder of T5 v1.1 and Flan-T5 (Raffel et al., arXiv 1910.10683; Shazeer, arXiv 2002.05202).

    h <- h + W attention(norm(h)),   h <- h + down(gelu(gate(norm(h))) · up(norm(h))),   norm(x) = w x / √(mean x² + ε)

The attention scores q · k are not scaled. Relative positions are grouped into buckets. Each head has a learned bias for
every bucket and adds it to the score. All layers share these biases.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from flowgen.backend import OnMeshes
from flowgen.nn.layers import RMSNorm
from flowgen.settings import config
from flowgen.settings.ranges import HeadDim, Heads, Hidden, Layers, Vocabulary, Width, Within


@config
class T5Config:
    """The architecture of a T5 encoder with gated MLPs; the defaults match google/flan-t5-xl.

    vocab_size: number of tokens in the vocabulary.
    width: number of features per token.
    num_layers: number of transformer layers.
    num_heads: number of attention heads per layer.
    head_dim: number of channels per attention head.
    hidden: number of hidden units in each gated MLP.
    num_buckets: number of buckets into which relative positions are grouped; the positions in a bucket share a learned
    bias. Half of the buckets are for later positions.
    max_distance: distance, in tokens, beyond which all relative positions in one direction share the last bucket.
    dtype: dtype of the linear layers; norms, softmax and the sums of residual connections stay float32.
    """

    vocab_size: Vocabulary = 32128
    width: Width = 2048
    num_layers: Layers = 24
    num_heads: Heads = 32
    head_dim: HeadDim = 64
    hidden: Hidden = 5120
    num_buckets: Annotated[int, Within(4, 1 << 12)] = 32
    max_distance: Annotated[int, Within(2, 1 << 20)] = 128
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"max_distance is {self.max_distance}; it must be above num_buckets / 4, which is "
                f"{self.num_buckets // 4}."
            )

    @property
    def inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The inputs with which `flowgen.init` initialises the encoder: token ids and mask of a text of two tokens."""
        return tuple(jax.ShapeDtypeStruct((1, 2), dtype) for dtype in (jnp.int32, bool))


class T5Encoder(OnMeshes, nn.Module):
    """Maps token ids `b n` and a mask `b n` to features `b n d`.

    The mask is False for padding, whose features are 0. The features of other tokens do not depend on padding.

    Example:
        features = T5Encoder(T5Config()).apply(params, ids, mask)
    """

    config: T5Config

    @nn.compact
    def __call__(self, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
        config = self.config
        h = nn.Embed(config.vocab_size, config.width, name="embed")(ids)
        table = self.param("position_bias", nn.initializers.normal(0.1), (config.num_buckets, config.num_heads))
        buckets = relative_buckets(ids.shape[1], config.num_buckets, config.max_distance)
        bias = rearrange(jnp.take(table, buckets, axis=0), "n m h -> 1 h n m")
        bias = jnp.where(mask[:, None, None, :], bias, jnp.finfo(jnp.float32).min)
        layers = nn.scan(
            _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.num_layers,
            in_axes=nn.broadcast,
        )
        h, _ = layers(config, name="layers")(h, bias)
        return jnp.where(mask[:, :, None], _norm("norm_out")(h), 0)


class _Layer(nn.Module):
    """One layer, in the form that `nn.scan` expects: (carry, shared argument) -> (carry, None)."""

    config: T5Config

    @nn.compact
    def __call__(self, h: Float[Array, "b n d"], bias: Float[Array, "b h n m"]) -> tuple[Float[Array, "b n d"], None]:
        config = self.config
        dense = partial(nn.Dense, use_bias=False, dtype=jnp.dtype(config.dtype))
        inner = config.num_heads * config.head_dim
        x = _norm("attention_norm")(h)
        q, k, v = (
            rearrange(dense(inner, name=name)(x), "b n (h k) -> b n h k", h=config.num_heads)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bnhk,bmhk->bhnm", q, k, preferred_element_type=jnp.float32) + bias
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        y = jnp.einsum("bhnm,bmhk->bnhk", weights, v)
        h = h + dense(config.width, name="proj")(rearrange(y, "b n h k -> b n (h k)"))
        x = _norm("mlp_norm")(h)
        gate = jax.nn.gelu(dense(config.hidden, name="gate")(x), approximate=True)
        return h + dense(config.width, name="down")(gate * dense(config.hidden, name="up")(x)), None


def _norm(name: str) -> RMSNorm:
    return RMSNorm("float32", offset=0.0, name=name)


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, "n m"]:
    """Returns the bucket of every (query, key) pair.

    Half of the buckets are for earlier keys, and half are for later keys. In each half, every small distance has a
    separate bucket. Larger distances share buckets whose width grows in proportion to the distance.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    away = np.abs(distance)
    # As in the published code, the logarithm is computed in float32, because rounding decides where a bucket ends.
    ratio = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    wide = exact + (ratio * np.float32(half - exact)).astype(np.int64)
    return half * (distance > 0) + np.where(away < exact, away, np.minimum(wide, half - 1))
