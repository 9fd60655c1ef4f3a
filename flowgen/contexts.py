"""Continuous contexts that a flow or a velocity network can be conditioned on: a vector, masked tokens or an image.

A model's field `context` describes its context. Users pass the context itself as `cond`; it has one row per sample. The
model converts it to `ContextTokens`, the form that its layers accept. A sample is unconditional if its mask is False
everywhere, or if `cond` is None.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flowgen.arrays import shown
from flowgen.backend import keep_rows
from flowgen.conditioning import ContextTokens, TextCondition, check_labels, check_mask
from flowgen.nn.checks import check_patches, image_sides
from flowgen.nn.layers import patchify
from flowgen.settings import config
from flowgen.settings.ranges import MAX_TOKENS, Channels, Side, Tokens


@runtime_checkable
class ContextConfig(Protocol):
    """The interface between models and descriptions of contexts."""

    @property
    def length(self) -> int:
        """Number of tokens."""
        ...

    @property
    def dim(self) -> int:
        """Number of features per token."""
        ...

    def tokens(self, cond: Any, batch: int) -> ContextTokens:
        """Returns a context as tokens. Raises ValueError unless it has this description's shape."""
        ...


@config
class VectorContext:
    """Describes a context of one vector per sample.

    dim: number of entries of the vector.

    Example:
        config = TokenFlowConfig(shape=(2,), context=VectorContext(dim=8))
        log_prob = flow.apply(params, x, observations, method="log_prob")  # observations: b 8
    """

    dim: Channels

    @property
    def length(self) -> int:
        """Number of tokens."""
        return 1

    def tokens(self, cond: Any, batch: int) -> ContextTokens:
        """Returns vectors `b dim` as one token per sample. Raises ValueError for other shapes."""
        vectors = _floats(cond, (batch, self.dim), "one vector per sample")
        return ContextTokens(vectors[:, None], jnp.ones((batch, 1), bool))


@config
class TokenContext:
    """Describes a context of up to `length` tokens per sample, such as the output of your own embedding network.

    In a STARFlow, the tokens have rotary positions. In a TARFlow or a TokenFlow, they have no positions, so their order
    has no effect in blocks with one layer. With more layers, it has an effect because each token attends to earlier
    tokens, but not to later ones. If the order is meaningful, add position embeddings in your network. In velocity
    networks, the order has no effect.

    length: largest number of tokens per sample.
    dim: number of features per token.

    Example:
        config = TokenFlowConfig(shape=(2,), context=TokenContext(length=16, dim=64))
        cond = ContextTokens(network.apply(variables, points), mask)
        log_prob = flow.apply(params, x, cond, method="log_prob")
    """

    length: Tokens
    dim: Channels

    def tokens(self, cond: Any, batch: int) -> ContextTokens:
        """Returns a context as `ContextTokens`.

        cond: `ContextTokens`, a `TextCondition`, or an array `b length dim` without padding.

        Raises ValueError for other types and shapes.
        """
        values, mask = cond if isinstance(cond, ContextTokens | TextCondition) else (cond, None)
        return context_tokens(values, mask, length=self.length, dim=self.dim, batch=batch)


@config
class ImageContext:
    """Describes a context of one image per sample.

    Flows add a learned position embedding to each patch.

    image_size: side of the square context images in pixels, or (height, width).
    channels: number of channels of the context images.
    patch_size: side, in pixels, of the square patches; each patch becomes one token of the context.

    Example:
        config = TARFlowConfig(image_size=32, context=ImageContext(image_size=32, channels=3, patch_size=4))
        log_prob = flow.apply(params, x, earlier_images, method="log_prob")
    """

    image_size: Side | tuple[Side, Side]
    channels: Channels = 3
    patch_size: Side = 4

    def __post_init__(self):
        check_patches(self.image_size, self.patch_size)
        if self.length > MAX_TOKENS:
            raise ValueError(
                f"image_size {self.image_size} and patch_size {self.patch_size} give {self.length} tokens, above the "
                f"limit of {MAX_TOKENS}; use a larger patch_size."
            )

    @property
    def token_hw(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        height, width = image_sides(self.image_size)
        return height // self.patch_size, width // self.patch_size

    @property
    def length(self) -> int:
        """Number of tokens, one per patch."""
        rows, columns = self.token_hw
        return rows * columns

    @property
    def dim(self) -> int:
        """Number of features per token."""
        return self.channels * self.patch_size**2

    def tokens(self, cond: Any, batch: int) -> ContextTokens:
        """Returns images `b height width channels` as patches, row by row. Raises ValueError for other shapes."""
        shape = (batch, *image_sides(self.image_size), self.channels)
        images = _floats(cond, shape, "one image per sample")
        patches = keep_rows(lambda _, images: patchify(images, self.patch_size, "channel_last"), None, images)
        return ContextTokens(patches, jnp.ones((batch, self.length), bool))


Context = VectorContext | TokenContext | ImageContext


def check_one_condition(num_classes: int, context: Context | None) -> None:
    """Raises ValueError if a model has both classes and a context."""
    if num_classes and context is not None:
        raise ValueError(
            f"num_classes is {num_classes} and context is {shown(context)}; a model has one condition, so set "
            "num_classes to 0 or context to none. A TokenContext can contain an embedding of the class."
        )


def check_condition(config: Any, cond: Any, batch: int) -> Any:
    """Returns a model's condition as int32 labels, `ContextTokens` or None.

    config: the model's config. A config without a field `context` accepts labels or None.

    Raises ValueError if cond does not fit the model and batch.

    Example:
        cond = check_condition(network.config, observations, len(x))
    """
    context = getattr(config, "context", None)
    if context is not None:
        return check_context(cond, context, batch)
    return check_labels(cond, num_classes=config.num_classes, batch=batch)


def check_context(cond: Any, context: ContextConfig, batch: int) -> ContextTokens | None:
    """Returns a context as tokens, or None. Raises ValueError unless it has the shape that the model expects."""
    if cond is None:
        return None
    if isinstance(cond, ContextTokens):
        return context_tokens(*cond, length=context.length, dim=context.dim, batch=batch)
    return context.tokens(cond, batch)


def context_tokens(tokens: Any, mask: Any, *, length: int, dim: int, batch: int) -> ContextTokens:
    """Returns tokens with their mask; a mask of None means no padding. Raises ValueError for other shapes."""
    tokens = _floats(tokens, (batch, length, dim), "the tokens of each sample")
    if mask is None:
        return ContextTokens(tokens, jnp.ones((batch, length), bool))
    return ContextTokens(tokens, check_mask("the context's mask", mask, (batch, length)))


def _floats(cond: Any, shape: tuple[int, ...], what: str) -> Float[Array, "..."]:
    """The context as a JAX array. Raises ValueError unless it is an array of floating-point numbers of this shape."""
    array = cond if isinstance(cond, jax.Array | np.ndarray) else None
    if array is None or array.shape != shape or not jnp.issubdtype(array.dtype, jnp.floating):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"cond is {shown(cond)}; this model needs {what}, as floats of shape ({wanted}).")
    return jnp.asarray(array)
