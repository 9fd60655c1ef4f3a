"""Prefixes: the tokens before the tokens of a sample, which contain its condition."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from flowgen.conditioning import ContextTokens, TextCondition, Unpadded, masked_text
from flowgen.nn.embeddings import class_one_hot


@dataclass(frozen=True)
class ClassPrefix:
    """A prefix of one token: the label's row in a table whose last row means "unconditional"."""

    num_classes: int
    length = 1

    @property
    def dim(self) -> int:
        return self.num_classes + 1

    def features(self, cond: Unpadded | None, batch: int, dtype: jnp.dtype) -> Float[Array, "b l e"]:
        """Returns the labels as one-hot features of one token."""
        assert not isinstance(cond, tuple)  # a flow checks its condition
        return class_one_hot(cond, self.num_classes, batch, dtype)[:, None]


@dataclass(frozen=True)
class TextPrefix:
    """A prefix of `length` tokens with `dim` features each.

    Padding tokens are zero. As in the released code, they are not masked.
    """

    length: int
    dim: int

    def features(self, cond: Unpadded | None, batch: int, dtype: jnp.dtype) -> Float[Array, "b l e"]:
        """Returns the features of the texts, or zeros if there is no condition."""
        if cond is None:
            return jnp.zeros((batch, self.length, self.dim), dtype)
        assert isinstance(cond, TextCondition)  # a flow checks its condition
        return masked_text(cond).astype(dtype)


@dataclass(frozen=True)
class ContextPrefix:
    """A prefix of up to `length` tokens with `dim` features each; padding is not seen. No condition means no prefix."""

    length: int
    dim: int

    def features(self, cond: Unpadded | None, batch: int, dtype: jnp.dtype) -> Float[Array, "b l e"]:
        """Returns the features of the context, with zeros for padding; all zeros if there is no condition."""
        if cond is None:
            return jnp.zeros((batch, self.length, self.dim), dtype)
        assert isinstance(cond, ContextTokens)  # a flow checks its condition
        return jnp.where(cond.mask[:, :, None], cond.tokens, 0).astype(dtype)


Prefix = ClassPrefix | TextPrefix | ContextPrefix
