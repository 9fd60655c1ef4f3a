"""Contexts inside velocity networks, and layers that embed a context as one vector or as channels.

Masked tokens, which are padding or belong to a sample without a context, have no effect, even if their values are NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from flowgen.conditioning import ContextTokens, zero_padding
from flowgen.contexts import Context, ContextConfig, ImageContext
from flowgen.nn.checks import image_sides
from flowgen.nn.layers import unpatchify


class Given(NamedTuple):
    """A context inside a network: tokens that are 0 where the mask is False."""

    tokens: Float[Array, "b m e"]
    mask: Bool[Array, "b m"]


def given_context(context: ContextConfig, cond: ContextTokens | None, batch: int, dtype: Any) -> Given:
    """Returns a context with padding set to 0; None becomes a context that is all padding.

    Example:
        tokens, mask = given_context(config.context, None, batch=8, dtype=jnp.float32)
    """
    if cond is None:
        shape = (batch, context.length, context.dim)
        return Given(jnp.zeros(shape, dtype), jnp.zeros(shape[:2], bool))
    return Given(zero_padding(jnp.asarray(cond.tokens, dtype), cond.mask), jnp.asarray(cond.mask))


def same_size(context: Context | None, image_hw: tuple[int, int]) -> bool:
    """Returns whether a context is an image of the same size as the network's images.

    Only such a context can be added to the images as channels.

    Example:
        same_size(ImageContext(image_size=32), (32, 32))  # True
    """
    return isinstance(context, ImageContext) and image_sides(context.image_size) == image_hw


def shrunk_context(context: Context | None, image_hw: tuple[int, int], small_hw: tuple[int, int]) -> Context | None:
    """Returns the context of a network whose images shrink from `image_hw` to `small_hw`.

    An image context of size `image_hw` shrinks too; other contexts do not change.

    Example:
        context = shrunk_context(config.context, (32, 32), (8, 8))
    """
    if not (isinstance(context, ImageContext) and same_size(context, image_hw)):
        return context
    return dataclasses.replace(context, image_size=small_hw, patch_size=1)


def as_channels(context: ImageContext, given: Given) -> Float[Array, "b height width c_and_one"]:
    """Returns the channels of an image context, and one more channel that is 1 at known pixels and 0 in masked patches.

    Example:
        x = jnp.concatenate([x, as_channels(config.context, given)], axis=-1)
    """
    known = jnp.repeat(given.mask[:, :, None].astype(given.tokens.dtype), context.patch_size**2, axis=2)
    image_hw = image_sides(context.image_size)
    parts = [unpatchify(z, context.patch_size, image_hw, "channel_last") for z in (given.tokens, known)]
    return jnp.concatenate(parts, axis=-1)


def masked_mean(tokens: Float[Array, "b m d"], given: Given) -> Float[Array, "b d"]:
    """Returns the mean over each sample's tokens, padding excluded, or 0 for a sample that is all padding.

    All tokens must be finite, padding included.

    Example:
        e = masked_mean(layer(given.tokens), given)
    """
    weight = given.mask[:, :, None].astype(tokens.dtype)
    return (tokens * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1)


class TokenEmbedding(nn.Module):
    """Embeds each token of a context as down(silu(up(token))), with linear layers `up` and `down`.

    dense: a function of (features, fan_in, name) that returns a layer.

    Example:
        e = TokenEmbedding(width=256, dense=normal_dense).apply(params, given.tokens)
    """

    width: int
    dense: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, tokens: Float[Array, "b m e"]) -> Float[Array, "b m d"]:
        up = self.dense(self.width, tokens.shape[-1], name="up")(tokens)
        return self.dense(self.width, self.width, name="down")(jax.nn.silu(up))


class ContextEmbedding(nn.Module):
    """Embeds a context as one vector per sample: the mean of the sample's embedded tokens, or a learned vector if the
    sample has no tokens.

    dense: see `TokenEmbedding`.
    none_std: standard deviation of the learned vector at initialisation.

    Example:
        e = ContextEmbedding(width=256, dense=normal_dense, none_std=0.02).apply(params, given)
    """

    width: int
    dense: Callable[..., nn.Module]
    none_std: float

    @nn.compact
    def __call__(self, given: Given) -> Float[Array, "b d"]:
        mean = masked_mean(TokenEmbedding(self.width, self.dense, name="tokens")(given.tokens), given)
        none = self.param("none", nn.initializers.normal(self.none_std), (self.width,), jnp.float32)
        return jnp.where(given.mask.any(axis=1)[:, None], mean, jnp.asarray(none, mean.dtype)[None])
