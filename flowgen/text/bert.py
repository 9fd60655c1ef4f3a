"""The encoder of BERT (Devlin et al., arXiv 1810.04805); MiniLM is a small BERT.

    h <- norm(h + W attention(h)),    h <- norm(h + down(gelu(up(h))))

The input of the first layer is the normalized sum of the word, position and segment embeddings. Only the first segment
type is used.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from flowgen.attention import softmax_attention
from flowgen.backend import OnMeshes
from flowgen.nn.layers import ACTIVATIONS
from flowgen.settings import config
from flowgen.settings.ranges import Heads, Hidden, Layers, Vocabulary, Width

NORM_EPS = 1e-12


@config
class BertConfig:
    """The architecture of a BERT encoder; the defaults match all-MiniLM-L6-v2.

    vocab_size: number of tokens in the vocabulary.
    width: number of features per token; must be a multiple of num_heads.
    num_layers: number of transformer layers.
    num_heads: number of attention heads per layer.
    hidden: number of hidden units in each feed-forward network.
    max_length: maximum number of tokens in a text, including start and end tokens.
    num_segments: number of learned segment embeddings; every token gets the first.
    dtype: dtype of the linear layers; norms, softmax and the sums of residual connections stay float32.
    """

    vocab_size: Vocabulary = 30522
    width: Width = 384
    num_layers: Layers = 6
    num_heads: Heads = 12
    hidden: Hidden = 1536
    max_length: Vocabulary = 512
    num_segments: Vocabulary = 2
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}, which does not divide width {self.width}; change one of them."
            )

    @property
    def inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The inputs with which `flowgen.init` initialises the encoder: token ids and mask of a text of two tokens."""
        return tuple(jax.ShapeDtypeStruct((1, 2), dtype) for dtype in (jnp.int32, bool))


class BertEncoder(OnMeshes, nn.Module):
    """Maps token ids `b n` and a mask `b n` to features `b n d`.

    The mask is False for padding, whose features are 0. The features of other tokens do not depend on padding.

    Raises ValueError if texts have more than `config.max_length` tokens, padding included.

    Example:
        features = BertEncoder(BertConfig()).apply(params, ids, mask)
    """

    config: BertConfig

    @nn.compact
    def __call__(self, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
        config, length = self.config, ids.shape[1]
        if length > config.max_length:
            raise ValueError(
                f"texts have {length} tokens, but this encoder accepts at most {config.max_length}; shorten them."
            )
        positions = nn.Embed(config.max_length, config.width, name="positions")(jnp.arange(length))
        segment = nn.Embed(config.num_segments, config.width, name="segments")(jnp.zeros((1, 1), jnp.int32))
        h = nn.Embed(config.vocab_size, config.width, name="embed")(ids) + positions[None] + segment
        h = _norm(config, "norm_in")(h)
        layers = nn.scan(
            _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.num_layers,
            in_axes=nn.broadcast,
        )
        h, _ = layers(config, name="layers")(h, mask)
        return jnp.where(mask[:, :, None], h, 0)


class _Layer(nn.Module):
    """One layer, in the form that `nn.scan` expects: (carry, shared argument) -> (carry, None)."""

    config: BertConfig

    @nn.compact
    def __call__(self, h: Float[Array, "b n d"], mask: Bool[Array, "b n"]) -> tuple[Float[Array, "b n d"], None]:
        config = self.config

        def dense(features, name):
            return nn.Dense(features, dtype=jnp.dtype(config.dtype), name=name)

        q, k, v = (
            rearrange(dense(config.width, name)(h), "b n (h k) -> b n h k", h=config.num_heads)
            for name in ("query", "key", "value")
        )
        y = softmax_attention(q, k, v, mask=mask[:, None, None, :])
        y = rearrange(y, "b n h k -> b n (h k)")
        h = _norm(config, "attention_norm")(h + dense(config.width, "proj")(y))
        y = ACTIVATIONS["gelu"](dense(config.hidden, "up")(h))
        return _norm(config, "mlp_norm")(h + dense(config.width, "down")(y)), None


def _norm(config: BertConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=NORM_EPS, use_fast_variance=False, name=name)
