"""Prefixes: tokens that precede the tokens of a sample and contain its condition."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from flowgen.attention.slices import Start
from flowgen.conditioning import ContextTokens, TextCondition, Unpadded, zero_padding
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

    Padding tokens are zero and, as in the released code, not masked.
    """

    length: int
    dim: int

    def features(self, cond: Unpadded | None, batch: int, dtype: jnp.dtype) -> Float[Array, "b l e"]:
        """Returns the features of the texts, or zeros if there is no condition."""
        if cond is None:
            return jnp.zeros((batch, self.length, self.dim), dtype)
        assert isinstance(cond, TextCondition)  # a flow checks its condition
        return zero_padding(cond.embeddings, cond.mask).astype(dtype)


@dataclass(frozen=True)
class ContextPrefix:
    """A prefix of up to `length` tokens; no token attends to its padding. Without a condition, there is no prefix.

    has_positions: whether blocks add a learned position embedding to each token, as for the patches of an image.
    """

    length: int
    dim: int
    has_positions: bool = False

    def features(self, cond: Unpadded | None, batch: int, dtype: jnp.dtype) -> Float[Array, "b l e"]:
        """Returns the features of the context, with zeros for padding; all zeros if there is no condition."""
        if cond is None:
            return jnp.zeros((batch, self.length, self.dim), dtype)
        assert isinstance(cond, ContextTokens)  # a flow checks its condition
        return zero_padding(cond.tokens, cond.mask).astype(dtype)


Prefix = ClassPrefix | TextPrefix | ContextPrefix


def rotation_after_prefix(
    rotation: tuple[Array, Array] | None, count: Start, length: int
) -> tuple[Float[Array, "b n r"], Float[Array, "b n r"]] | None:
    """Returns the rotation of sequences whose prefix has only `count` of `length` tokens, from that of whole prefixes.

    The prefix has the first `count` angles, and the angles of all other tokens stay the same.
    """
    if rotation is None:
        return None
    slots, count = jnp.arange(rotation[0].shape[1])[None], jnp.reshape(count, (-1, 1))
    slots = jnp.where(slots < count, slots, jnp.minimum(slots - count + length, slots.shape[1] - 1))
    return rotation[0][0][slots], rotation[1][0][slots]
