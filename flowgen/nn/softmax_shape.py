"""The shapes of a model's softmax attention, used to plan its implementation without running the model."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flowgen.attention import AttentionPlan, attention_plan
from flowgen.backend import Implementation


class SoftmaxShape(NamedTuple):
    """The shape of softmax attention over a full sequence, in one or more layers of a model."""

    num_tokens: int
    num_heads: int
    head_dim: int
    dtype: str
    is_causal: bool = False
    num_kv_heads: int | None = None

    def __str__(self) -> str:
        return f"{self.num_tokens} tokens, {self.num_heads} heads of {self.head_dim}, {self.dtype}"

    def plan(self, implementation: Implementation, platform: str) -> AttentionPlan:
        """Returns the plan for attention with this shape on a platform; see `attention_plan`."""
        key_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        q, k = (
            jax.ShapeDtypeStruct((1, self.num_tokens, heads, self.head_dim), jnp.dtype(self.dtype))
            for heads in (self.num_heads, key_heads)
        )
        return attention_plan(q, k, k, is_causal=self.is_causal, implementation=implementation, platform=platform)
