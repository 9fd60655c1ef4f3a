"""The encoder of BERT (Devlin et al., arXiv 1810.04805), which MiniLM is a small one of.

    h <- norm(h + W attention(h)),    h <- norm(h + down(gelu(up(h))))

after word, position and segment embeddings, and a norm. Of segments only the first is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from flowgen.attention import softmax_attention
from flowgen.nn.layers import ACTIVATIONS
from flowgen.ranges import Heads, Hidden, Layers, Vocabulary, Width, check_ranges
from flowgen.sharding import OnMeshes

NORM_EPS = 1e-12


@dataclass(frozen=True)
class BertConfig:
    """Shape of a BERT encoder; the defaults are those of all-MiniLM-L6-v2. max_length: positions there are."""

    vocab_size: Vocabulary = 30522
    width: Width = 384
    num_layers: Layers = 6
    num_heads: Heads = 12
    hidden: Hidden = 1536
    max_length: Vocabulary = 512
    num_segments: Vocabulary = 2
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check_ranges(self, "model")
        if self.width % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}, which does not divide width {self.width}; change one.")


class BertEncoder(OnMeshes, nn.Module):
    """Features `b l d` of token numbers `b l`, zero where the mask is False.

    Raises ValueError where there are more tokens than positions.

    Example:
        features = BertEncoder(BertConfig()).apply(params, ids, mask)
    """

    config: BertConfig

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> Float[Array, "b l d"]:
        config, length = self.config, ids.shape[1]
        if length > config.max_length:
            raise ValueError(f"texts have {length} tokens; this encoder takes at most {config.max_length}.")
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
    """One layer, in the form that `nn.scan` wants: (carry, argument of all) -> (carry, nothing)."""

    config: BertConfig

    @nn.compact
    def __call__(self, h: Float[Array, "b l d"], mask: Bool[Array, "b l"]) -> tuple[Float[Array, "b l d"], None]:
        config = self.config

        def dense(features, name):
            return nn.Dense(features, dtype=jnp.dtype(config.dtype), name=name)

        q, k, v = (
            rearrange(dense(config.width, name)(h), "b l (h k) -> b l h k", h=config.num_heads)
            for name in ("query", "key", "value")
        )
        y = softmax_attention(q, k, v, mask=mask[:, None, None, :])
        y = rearrange(y, "b l h k -> b l (h k)")
        h = _norm(config, "attention_norm")(h + dense(config.width, "proj")(y))
        y = ACTIVATIONS["gelu"](dense(config.hidden, "up")(h))
        return _norm(config, "mlp_norm")(h + dense(config.width, "down")(y)), None


def _norm(config: BertConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=NORM_EPS, use_fast_variance=False, name=name)
