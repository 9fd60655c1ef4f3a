"""TARFlow: a stack of autoregressive transformer blocks on image patches (arXiv 2412.06329)."""

from __future__ import annotations

from typing import Any, Literal

from flowgen.backend import Implementation, Remat
from flowgen.conditioning import Condition
from flowgen.contexts import Context, check_condition
from flowgen.flows.affine import OwnScale
from flowgen.flows.block import BlockConfig, equal_layers, softmax_shapes
from flowgen.flows.contexts import check_one_context, context_prefix
from flowgen.flows.flow import AutoregressiveFlow, ImageTokens
from flowgen.nn.checks import check_heads, check_implementation
from flowgen.nn.layers import Activation
from flowgen.nn.softmax_shape import SoftmaxShape
from flowgen.nn.transformer import Attention
from flowgen.settings import config
from flowgen.settings.ranges import (
    Blocks,
    Channels,
    Classes,
    Expansion,
    HeadDim,
    Layers,
    NonNegative,
    Side,
    Width,
)

Scale = Literal["exponential", "volume_preserving"]


@config
class TARFlowConfig(ImageTokens):
    """Describes a TARFlow, a flow on images whose blocks are autoregressive transformers (arXiv 2412.06329).

    The paper's notation p-C-K-L-σ means patch_size-width-num_blocks-layers_per_block-noise_std.

    image_size: side of square images, or (height, width), in pixels.
    channels: number of channels of the images; only images with 1 or 3 channels can be displayed.
    patch_size: side, in pixels, of the square patches, each of which becomes one token; must divide the height and the
    width.
    width: number of channels of a token inside a block: a multiple of head_dim, or any number below head_dim.
    num_blocks: number of autoregressive blocks; block 0, next to the data, processes the tokens in raster order, block
    1 in reversed order, and so on.
    layers_per_block: number of transformer layers per block.
    head_dim: number of channels per attention head; if `width` is smaller, each layer has one head of `width` channels.
    expansion: hidden width of the feed-forward layers, as a multiple of the block's width.
    num_classes: number of classes that the density is conditioned on; 0 for none.
    context: describes the context, such as an observation, that the density is conditioned on; None for no context. It
    must be None if the model has classes.
    scale_parameterisation: how the scale σ of a block's map x = shift + σ z, from noise to data, depends on the
    network's output raw: σ = exp(raw) for "exponential" (called "nvp" in the published code); σ = 1 for
    "volume_preserving", for which training estimates the variance of z; or your own function (shift, raw) -> (shift,
    log_scale) with log_scale = log σ.
    attention: attention kernel of the layers: a name, or your own kernel; see docs/attention.md in the repository.
    attention_implementation: implementation of softmax attention: "xla" for all devices, "cudnn" for NVIDIA GPUs, "tpu"
    for TPUs; "auto" chooses one by device, dtype and shape. See docs/attention.md in the repository.
    activation: activation of the feed-forward layers.
    noise_std: standard deviation σ of the Gaussian noise that is added to training images, whose values are in [-1, 1];
    0 means uniform dequantisation instead.
    dtype: dtype of matrix products and activations; parameters, affine maps and log-determinants are at least float32.
    remat: whether to save memory by recomputing activations in the backward pass instead of storing them; "auto" stores
    them only in blocks of at most 4 layers on a CPU with huge pages, because storing is faster there.
    """

    image_size: Side | tuple[Side, Side]
    channels: Channels = 3
    patch_size: Side = 4
    width: Width = 256
    num_blocks: Blocks = 4
    layers_per_block: Layers = 4
    head_dim: HeadDim = 64
    expansion: Expansion = 4
    num_classes: Classes = 0
    context: Context | None = None
    scale_parameterisation: Scale | OwnScale = "exponential"
    attention: Attention = "softmax"
    attention_implementation: Implementation = "auto"
    activation: Activation = "gelu"
    noise_std: NonNegative = 0.0
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    remat: Remat = "auto"

    def __post_init__(self):
        self.check_images()
        check_one_context(self.num_classes, self.context, self.attention)
        check_implementation(self.attention_implementation, self.attention)
        if self.width > self.head_dim:  # narrower blocks have one head
            check_heads(self.width, self.head_dim)

    def build(self) -> TARFlow:
        """Returns the flow that this config describes, without parameters."""
        return TARFlow(self)

    @property
    def text_dim(self) -> int:
        """Number of features per text token: always 0, because a TARFlow does not accept texts."""
        return 0

    @property
    def patch_order(self) -> Literal["channel_first"]:
        """The order of a patch's values within its token: "channel_first" means channel, row, column."""
        return "channel_first"

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        """The configs of the blocks from data to noise; their token orders alternate, starting with raster order."""
        transformer = equal_layers(self)
        return tuple(
            BlockConfig(
                num_tokens=self.num_tokens,
                token_dim=self.token_dim,
                order="raster" if index % 2 == 0 else "reversed",
                scale_parameterisation=self.scale_parameterisation,
                num_classes=self.num_classes,
                transformer=transformer,
                prefix=context_prefix(self.context),
            )
            for index in range(self.num_blocks)
        )

    @property
    def softmax_shapes(self) -> tuple[SoftmaxShape, ...]:
        """The distinct shapes of the blocks' softmax attention; empty if `attention` is another kernel."""
        return softmax_shapes(self.blocks)

    def check_cond(self, cond: Any, batch: int) -> Condition | None:
        """Returns `cond` as the blocks accept it: int32 labels, `ContextTokens` or None.

        Raises ValueError if cond does not fit the model, or does not have `batch` rows.
        """
        return check_condition(self, cond, batch)


class TARFlow(AutoregressiveFlow):
    """Exact-likelihood flow between images `b height width c` in [-1, 1] and noise tokens `b n c`.

    In every method, `cond` is None, int32 labels `b`, or the context that `config.context` describes. None and the
    label -1 mean unconditional; in a flow with classes, the mean of all class embeddings then replaces the label's
    embedding.

    Example:
        flow = TARFlow(TARFlowConfig(image_size=8, channels=1, patch_size=2, num_classes=10))
        z, logdet = flow.apply(params, x, cond, method="forward")
    """

    config: TARFlowConfig
