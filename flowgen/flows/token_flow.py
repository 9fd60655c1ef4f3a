"""Autoregressive transformer flows of vectors, sequences and sets, with or without a context.

A vector of d numbers or a sequence of n rows with c channels is divided into tokens of `group` consecutive numbers or
rows. Every token is transformed, including the first one (shift "input", as in STARFlow, arXiv 2506.06276), so flows of
a single number work too. Sets are padded sequences: `Padded` marks the rows that exist. The density is that of these
rows given their number. As in every autoregressive model, the density depends on the order of the rows. If the order
has no meaning, shuffle the rows in training.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from flax import linen as nn
from jaxtyping import Array, Float

from flowgen.arrays import check_floating, shown
from flowgen.backend import Implementation, Remat
from flowgen.conditioning import AnyCondition, Condition, Padded, check_mask
from flowgen.contexts import Context, check_condition
from flowgen.flows.affine import OwnScale
from flowgen.flows.block_config import BlockConfig, equal_layers, softmax_shapes
from flowgen.flows.contexts import check_one_context, context_prefix
from flowgen.flows.flow import AutoregressiveFlow
from flowgen.flows.orders import TokenOrder, check_permutation
from flowgen.nn.checks import check_heads, check_implementation
from flowgen.nn.layers import Activation
from flowgen.nn.softmax_shape import SoftmaxShape
from flowgen.nn.transformer import Attention
from flowgen.settings import config
from flowgen.settings.ranges import (
    MAX_BLOCKS,
    MAX_TOKENS,
    Blocks,
    Channels,
    Classes,
    CountOrZero,
    Entries,
    Expansion,
    HeadDim,
    Layers,
    NonNegative,
    Tokens,
    Width,
)
from flowgen.transforms import MixtureMap

Permutation = Annotated[tuple[CountOrZero, ...], Entries(1, MAX_TOKENS)]


@config
class TokenFlowConfig:
    """Describes a flow for vectors of shape (d,), or for sequences or sets of shape (n, c).

    shape: shape of one sample: (d,) for vectors, or (n, c) for n rows with c channels.
    group: number of consecutive entries of a vector, or rows of a sequence, that form one token; must divide d or n.
    Given the earlier tokens, a block maps the numbers in a token independently of each other.
    width: number of channels of a token inside a block: a multiple of head_dim, or any number below head_dim.
    num_blocks: number of autoregressive blocks.
    layers_per_block: number of transformer layers per block.
    head_dim: number of channels per attention head; if `width` is smaller, each layer has one head of `width` channels.
    expansion: hidden width of the feed-forward layers, as a multiple of the block's width.
    orders: order in which each block processes the tokens: "raster" keeps the order of the sample in all blocks;
    "alternating" reverses it in blocks 1, 3 and so on, where block 0 is next to the data; a tuple contains one
    permutation per block, which lists the indices 0..tokens-1 of the tokens in the block's order.
    padded: whether sequences are padded; the condition must then be a `flowgen.conditioning.Padded`, whose mask is True
    for rows that are not padding. Needs group 1.
    num_classes: number of classes that the density is conditioned on; 0 for none.
    context: describes the context, such as an observation, that the density is conditioned on; None for no context. It
    must be None if the model has classes.
    scale_parameterisation: how the scale σ of a block's map x = shift + σ z, from noise to data, depends on the
    network's output raw: σ = exp(raw) for "exponential", σ = softplus(raw + 0.5413) for "softplus", or your own
    function (shift, raw) -> (shift, log_scale) with log_scale = log σ. With a mixture, it is not used and must be
    "exponential".
    mixture: map of each number by the CDF of a mixture, so that one block can model several modes; None for the affine
    map x = shift + σ z. Guidance works only with the affine map.
    soft_clip: bound c on the outputs of each block's network, such as shift and raw: an output r is replaced by
    c · tanh(r / c); 0 for no bound. With a bound, data should not extend far beyond ±c; a `TokenFlowExperiment`
    standardises them.
    attention: attention kernel of the layers: a name, or your own kernel; see docs/attention.md in the repository.
    attention_implementation: implementation of softmax attention: "xla" for all devices, "cudnn" for NVIDIA GPUs, "tpu"
    for TPUs; "auto" chooses one by device, dtype and shape. See docs/attention.md in the repository.
    activation: activation of the feed-forward layers.
    noise_std: standard deviation of the Gaussian noise that is added to the samples in training; 0 for no noise.
    dtype: dtype of matrix products and activations; parameters, affine maps and log-determinants are at least float32.
    remat: whether to save memory by recomputing activations in the backward pass instead of storing them; "auto" stores
    them only in blocks of at most 4 layers on a CPU with huge pages, because storing is faster there.

    Example:
        config = TokenFlowConfig(shape=(5,), width=64, num_blocks=4, context=VectorContext(dim=8))
    """

    shape: tuple[Tokens] | tuple[Tokens, Channels]
    group: Tokens = 1
    width: Width = 64
    num_blocks: Blocks = 4
    layers_per_block: Layers = 2
    head_dim: HeadDim = 64
    expansion: Expansion = 4
    orders: Literal["alternating", "raster"] | Annotated[tuple[Permutation, ...], Entries(1, MAX_BLOCKS)] = (
        "alternating"
    )
    padded: bool = False
    num_classes: Classes = 0
    context: Context | None = None
    scale_parameterisation: Literal["exponential", "softplus"] | OwnScale = "exponential"
    mixture: MixtureMap | None = None
    soft_clip: NonNegative = 4.0
    attention: Attention = "softmax"
    attention_implementation: Implementation = "auto"
    activation: Activation = "gelu"
    noise_std: NonNegative = 0.0
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    remat: Remat = "auto"

    def __post_init__(self):
        check_implementation(self.attention_implementation, self.attention)
        if self.width > self.head_dim:  # narrower blocks have one head
            check_heads(self.width, self.head_dim)
        if self.shape[0] % self.group:
            raise ValueError(f"group is {self.group}, which does not divide shape[0] {self.shape[0]}; use a divisor.")
        if self.padded and (len(self.shape) == 1 or self.group > 1):
            raise ValueError(
                f"padded is True, which needs sequences whose rows are tokens, but shape is {self.shape} and group is "
                f"{self.group}; set shape to (rows, channels) and group to 1."
            )
        if self.mixture is not None and self.scale_parameterisation != "exponential":
            raise ValueError(
                f"mixture is {shown(self.mixture)}, which has scales of its own, but scale_parameterisation is "
                f"{self.scale_parameterisation!r:.80}; leave it at 'exponential'."
            )
        check_one_context(self.num_classes, self.context, self.attention)
        if isinstance(self.orders, tuple):
            if len(self.orders) != self.num_blocks:
                raise ValueError(
                    f"orders has {len(self.orders)} permutations, but num_blocks is {self.num_blocks}; give one per "
                    "block."
                )
            for index, order in enumerate(self.orders):
                check_permutation(order, self.num_tokens, f"orders[{index}]")

    def build(self) -> TokenFlow:
        """Returns the flow that this config describes, without parameters."""
        return TokenFlow(self)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.shape

    @property
    def num_tokens(self) -> int:
        """Number of tokens in one sample, padding included."""
        return self.shape[0] // self.group

    @property
    def tokens_per_image(self) -> int:
        """The same as `num_tokens`: a sample counts as one image in functions that also accept flows on clips."""
        return self.num_tokens

    @property
    def token_dim(self) -> int:
        return self.group * math.prod(self.shape[1:])

    @property
    def num_dims(self) -> int:
        """Number of values in one sample, padding included."""
        return math.prod(self.shape)

    @property
    def text_dim(self) -> int:
        """Number of features per text token: always 0, because a `TokenContext` describes texts for this flow."""
        return 0

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        """The configs of the blocks from data to noise."""
        transformer = equal_layers(self)
        return tuple(
            BlockConfig(
                num_tokens=self.num_tokens,
                token_dim=self.token_dim,
                order=self._order(index),
                scale_parameterisation=self.scale_parameterisation,
                num_classes=self.num_classes,
                transformer=transformer,
                shift="input",
                soft_clip=self.soft_clip,
                final_norm=True,
                prefix=context_prefix(self.context),
                slot_positions=True,
                elementwise=self.mixture,
            )
            for index in range(self.num_blocks)
        )

    def _order(self, index: int) -> TokenOrder:
        if isinstance(self.orders, tuple):
            return self.orders[index]
        return "reversed" if self.orders == "alternating" and index % 2 else "raster"

    @property
    def softmax_shapes(self) -> tuple[SoftmaxShape, ...]:
        """The distinct shapes of the blocks' softmax attention; empty if `attention` is another kernel."""
        return softmax_shapes(self.blocks)

    def check_samples(self, x: Any) -> None:
        """Raises ValueError unless x is a floating-point batch of this model's samples."""
        check_floating("x", x)
        if x.shape[1:] != self.shape:
            shape = ", ".join(map(str, self.shape))
            raise ValueError(f"x has shape {tuple(x.shape)}; its shape must be (batch, {shape}).")

    def to_tokens(self, x: Float[Array, "b *event"]) -> Float[Array, "b n token"]:
        """Returns the tokens of the samples x; a token consists of `group` consecutive entries or rows of a sample."""
        return x.reshape(len(x), self.num_tokens, self.token_dim)

    def to_images(self, tokens: Float[Array, "b n token"]) -> Float[Array, "b *event"]:
        """Returns the samples that consist of the given tokens; this is the inverse of `to_tokens`."""
        return tokens.reshape(len(tokens), *self.shape)

    def check_cond(self, cond: Any, batch: int) -> Condition | None:
        """Returns `cond` as the blocks accept it: int32 labels, `ContextTokens`, a `Padded` or None.

        Raises ValueError if cond does not fit the model, or does not have `batch` rows.
        """
        if not self.padded:
            if isinstance(cond, Padded):
                raise ValueError(
                    "cond is Padded, but this model's samples have no padding; set padded, or pass its cond."
                )
            return check_condition(self, cond, batch)
        if not isinstance(cond, Padded):
            raise ValueError(f"cond is {shown(cond)}; this model's samples are padded, so give Padded(mask, cond).")
        mask = check_mask("cond.mask", cond.mask, (batch, self.num_tokens))
        return Padded(mask, check_condition(self, cond.cond, batch))


class TokenFlow(AutoregressiveFlow):
    """Exact-likelihood flow between vectors `b d` or sequences `b n c` and noise tokens `b tokens channels`.

    In every method, `cond` is None, int32 labels `b` (-1 means unconditional), or the context that `config.context`
    describes. If samples are padded, `cond` is a `flowgen.conditioning.Padded`, which contains the mask of the rows and
    one of these conditions. The flow ignores the values at padding; the noise tokens of padding are 0.

    Example:
        flow = TokenFlow(TokenFlowConfig(shape=(5,), context=VectorContext(dim=8)))
        log_prob = flow.apply(params, theta, observations, method="log_prob")
    """

    config: TokenFlowConfig

    def bits_per_dim(self, x: Float[Array, "b *event"], cond: AnyCondition | None = None) -> Float[Array, " b"]:
        """Always raises ValueError, because bits/dim is defined only for data with 256 levels."""
        raise ValueError(
            "bits/dim needs data with 256 levels, but this flow models numbers; use nats per dimension, "
            "-log_prob / config.num_dims."
        )

    @nn.nowrap
    def with_image_size(self, height: int, width: int) -> TokenFlow:
        """Always raises ValueError, because the samples are not images."""
        raise ValueError(f"this flow models samples of shape {self.config.shape}, which have no height and width.")

    @nn.nowrap
    def with_num_frames(self, frames: int) -> TokenFlow:
        """Returns this flow if `frames` is 1; otherwise raises ValueError, because the samples are not clips."""
        if frames != 1:
            raise ValueError(f"frames is {frames}; this flow models single samples, so frames must be 1.")
        return self
