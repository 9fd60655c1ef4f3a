"""STARFlow: a flow of latents with shallow autoregressive blocks and one deep block (arXiv 2506.06276)."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal

from flowgen.arrays import shown
from flowgen.backend import Implementation, Remat
from flowgen.conditioning import Condition, check_text
from flowgen.contexts import Context, check_condition
from flowgen.flows.affine import OwnScale
from flowgen.flows.block_config import BlockConfig, softmax_shapes
from flowgen.flows.contexts import check_one_context, context_prefix
from flowgen.flows.flow import AutoregressiveFlow, ImageTokens
from flowgen.flows.orders import RasterOrder
from flowgen.flows.positions import GridPositions, rotary_pairs
from flowgen.flows.prefixes import ClassPrefix, Prefix, TextPrefix
from flowgen.nn.checks import check_heads, check_implementation
from flowgen.nn.layers import Activation, Norm
from flowgen.nn.softmax_shape import SoftmaxShape
from flowgen.nn.transformer import Attention, TransformerConfig
from flowgen.settings import config
from flowgen.settings.ranges import (
    MAX_BLOCKS,
    Channels,
    Classes,
    Entries,
    Expansion,
    HeadDim,
    Heads,
    MaybeLayers,
    NonNegative,
    Positive,
    Side,
    TextDim,
    TextLength,
    Width,
)

MAX_ROTATIONS = 1 << 25  # limit on the entries of a position table; every trace contains such a table


def block_order(first: RasterOrder, index: int) -> RasterOrder:
    """Returns the token order of block `index`: `first` if the index is even, and the other order if it is odd."""
    return first if index % 2 == 0 else "reversed" if first == "raster" else "raster"


@config
class STARFlowConfig(ImageTokens):
    """Describes a STARFlow, a flow on the latents of images with shallow blocks and one deep block (arXiv 2506.06276).

    Most defaults match the released text-to-image model, which is the preset "t2i_3b" in `STARFLOW_PRESETS`.

    image_size: side of a square grid of latents, or (height, width) of any grid; for a flow on pixels, the grid is the
    image.
    channels: number of channels of the latents or, for a flow on pixels, of the images.
    patch_size: side, in cells of the grid, of the square patches, each of which becomes one token; must divide the
    height and the width of the grid.
    width: number of channels of a token inside the shallow blocks (all blocks but the last); a multiple of head_dim.
    layers_per_block: number of transformer layers in each block, from the data side to the deep block at the end; 0
    leaves out a shallow block.
    deep_width: number of channels of a token inside the deep block, a multiple of head_dim; None for the value of
    `width`.
    order: token order in block 0, which is next to the data: "raster" or "reversed"; the other blocks alternate between
    the two. The published code calls "reversed" "L2R".
    head_dim: number of channels per attention head; a multiple of 4, and at least 20 if the flow models clips or has
    texts, a context or a class prefix.
    num_kv_heads: number of key-value heads, each shared by equally many query heads; None for one per query head. It
    must be None unless `attention` is "softmax".
    expansion: hidden width of the feed-forward layers, as a multiple of the block's width.
    norm: norm before the attention and before the feed-forward part of each layer.
    qk_norm: whether to apply an RMSNorm to queries and keys.
    post_norm: whether to apply an RMSNorm also to the outputs of the attention and of the feed-forward part of each
    layer.
    activation: activation of the feed-forward layers.
    use_bias: whether the linear layers have biases.
    scale_parameterisation: how the scale σ of a block's map x = shift + σ z, from noise to data, depends on the
    network's output raw: σ = softplus(raw + 0.5413) for "softplus", or your own function (shift, raw) -> (shift,
    log_scale) with log_scale = log σ.
    soft_clip: bound c on the raw scale and on the shift: each output r of the network is replaced by c · tanh(r / c); 0
    for no bound.
    num_classes: number of classes that the density is conditioned on; 0 for none.
    class_conditioning: "prefix" adds a token for the label, which precedes the tokens of the sample, as in the paper;
    "add" adds the label's embedding to every token. Without a label, "add" uses the mean of all class embeddings.
    context: describes the context, such as an observation, that the density is conditioned on; None for no context. It
    must be None if the model has classes or texts.
    text_dim: number of features per text token, as the text encoder returns them; 0 for a model without texts.
    text_length: number of tokens per text, padding included; 0 for a model without texts.
    conditioned_blocks: blocks that depend on the class, the context or the text: "deep" for the last block alone, "all"
    for every block.
    rope_base_grid: side, in tokens, of the square grid with which the model was first trained; on grids of other sizes,
    rotary positions are scaled to the same range. None leaves neighbouring tokens 1 apart.
    attention: attention kernel of the layers: a name, or your own kernel; see docs/attention.md in the repository.
    attention_implementation: implementation of softmax attention: "xla" for all devices, "cudnn" for NVIDIA GPUs, "tpu"
    for TPUs; "auto" chooses one by device, dtype and shape. See docs/attention.md in the repository.
    noise_std: standard deviation σ of the Gaussian noise that is added to the samples in training. For latents, and in
    an experiment with texts, it must be above 0; otherwise, 0 means uniform dequantisation instead.
    dtype: dtype of matrix products and activations; parameters, affine maps and log-determinants are at least float32.
    remat: whether to save memory by recomputing activations in the backward pass instead of storing them; "auto" stores
    them only in blocks of at most 4 layers on a CPU with huge pages, because storing is faster there.
    """

    image_size: Side | tuple[Side, Side]
    channels: Channels = 4
    patch_size: Side = 1
    width: Width = 512
    layers_per_block: Annotated[tuple[MaybeLayers, ...], Entries(1, MAX_BLOCKS)] = (2, 2, 2, 2, 2, 24)
    deep_width: Width | None = None
    order: RasterOrder = "reversed"
    head_dim: HeadDim = 64
    num_kv_heads: Heads | None = None
    expansion: Expansion = 4
    norm: Norm = "layer_norm"
    qk_norm: bool = False
    post_norm: bool = False
    activation: Activation = "gelu"
    use_bias: bool = True
    scale_parameterisation: Literal["softplus"] | OwnScale = "softplus"
    soft_clip: NonNegative = 4.0
    num_classes: Classes = 0
    class_conditioning: Literal["prefix", "add"] = "prefix"
    context: Context | None = None
    text_dim: TextDim = 0
    text_length: TextLength = 0
    conditioned_blocks: Literal["deep", "all"] = "deep"
    rope_base_grid: Positive | None = None
    attention: Attention = "softmax"
    attention_implementation: Implementation = "auto"
    noise_std: NonNegative = 0.3
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    remat: Remat = "auto"

    def __post_init__(self):
        self.check_images()
        check_implementation(self.attention_implementation, self.attention)
        if (numbers := self.num_tokens * self.head_dim) > MAX_ROTATIONS:
            raise ValueError(
                f"image_size {self.image_size}, patch_size {self.patch_size} and head_dim {self.head_dim} give a "
                f"position table of {numbers} numbers, above the limit of {MAX_ROTATIONS}; use a larger patch_size."
            )
        if self.layers_per_block[-1] < 1:
            raise ValueError(f"layers_per_block is {self.layers_per_block}; its last entry must be at least 1.")
        for name, width in (("width", self.width), ("deep_width", self._deep_width)):
            check_heads(width, self.head_dim, name)
            if self.num_kv_heads is not None and self.num_kv_heads > (heads := width // self.head_dim):
                raise ValueError(
                    f"num_kv_heads is {self.num_kv_heads}, but {name} {width} gives only {heads} heads; "
                    "use a divisor of that number."
                )
            if self.num_kv_heads is not None and width // self.head_dim % self.num_kv_heads:
                raise ValueError(
                    f"num_kv_heads is {self.num_kv_heads}, which does not divide the {width // self.head_dim} "
                    f"heads of {name} {width}; use a divisor."
                )
        if self.num_kv_heads is not None and self.attention != "softmax":
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}, but {self.attention!r} attention cannot share "
                "key-value heads; set num_kv_heads to None."
            )
        if (self.text_dim > 0) != (self.text_length > 0):
            raise ValueError(
                f"text_dim is {self.text_dim} and text_length is {self.text_length}; set both, or leave both at 0."
            )
        if self.num_classes and self.text_dim:
            raise ValueError(
                f"num_classes is {self.num_classes} and text_dim is {self.text_dim}; set one of them to 0."
            )
        if self.context is not None and self.text_dim:
            raise ValueError(
                f"context is {shown(self.context)} and text_dim is {self.text_dim}; set context to none, or text_dim "
                "to 0."
            )
        check_one_context(self.num_classes, self.context, self.attention)
        rotary_pairs(self.head_dim, third_axis=self._third_axis)

    def build(self) -> AutoregressiveFlow:
        """Returns the flow that this config describes, without parameters."""
        return STARFlow(self)

    @property
    def patch_order(self) -> Literal["channel_last"]:
        """The order of a patch's values within its token: "channel_last" means row, column, channel."""
        return "channel_last"

    @property
    def num_blocks(self) -> int:
        """Number of blocks, not counting blocks with 0 layers."""
        return sum(count > 0 for count in self.layers_per_block)

    @property
    def _deep_width(self) -> int:
        return self.width if self.deep_width is None else self.deep_width

    @property
    def _prefix(self) -> Prefix | None:
        if self.context is not None:
            return context_prefix(self.context)
        if self.text_dim:
            return TextPrefix(self.text_length, self.text_dim)
        return ClassPrefix(self.num_classes) if self.num_classes and self.class_conditioning == "prefix" else None

    def with_image_size(self, height: int, width: int) -> STARFlowConfig:
        """Returns this config with image_size=(height, width); variables for one of the two configs fit the other.

        If this config's `rope_base_grid` is None, the new one is the side of this config's grid of tokens, so that both
        sizes have the same range of rotary positions.
        """
        return dataclasses.replace(self, image_size=(height, width), rope_base_grid=self._side)

    @property
    def _side(self) -> float:
        height, width = self.image_hw
        side = math.sqrt(height * width) / self.patch_size
        return side if self.rope_base_grid is None else self.rope_base_grid

    @property
    def _positions(self) -> GridPositions:
        rows, columns = self.token_hw
        return GridPositions(rows, columns, self._side, rotary_pairs(self.head_dim, third_axis=self._third_axis))

    @property
    def _third_axis(self) -> bool:
        """Whether tokens have a third coordinate, which distinguishes the prefix from the image."""
        return self._prefix is not None

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        """The configs of the blocks from data to noise.

        Blocks of 0 layers are left out, but count when token orders alternate: the order depends on a block's index in
        `layers_per_block`.
        """
        last = len(self.layers_per_block) - 1
        return tuple(self._block(index, index == last) for index, count in enumerate(self.layers_per_block) if count)

    def _block(self, index: int, deep: bool) -> BlockConfig:
        conditional = deep or self.conditioned_blocks == "all"
        width = self._deep_width if deep else self.width
        return BlockConfig(
            num_tokens=self.num_tokens,
            token_dim=self.token_dim,
            order=block_order(self.order, index),
            scale_parameterisation=self.scale_parameterisation,
            num_classes=self.num_classes if conditional and self.class_conditioning == "add" else 0,
            transformer=TransformerConfig(
                width=width,
                num_layers=self.layers_per_block[index],
                num_heads=width // self.head_dim,
                expansion=self.expansion,
                activation=self.activation,
                attention=self.attention,
                attention_implementation=self.attention_implementation,
                dtype=self.dtype,
                remat=self.remat,
                num_kv_heads=self.num_kv_heads,
                norm=self.norm,
                qk_norm=self.qk_norm,
                post_norm=self.post_norm,
                use_bias=self.use_bias,
            ),
            shift="input",
            soft_clip=self.soft_clip,
            final_norm=True,
            positions=self._positions,
            prefix=self._prefix if conditional else None,
        )

    @property
    def softmax_shapes(self) -> tuple[SoftmaxShape, ...]:
        """The distinct shapes of the blocks' softmax attention; empty if `attention` is another kernel."""
        return softmax_shapes(self.blocks)

    def check_cond(self, cond: Any, batch: int) -> Condition | None:
        """Returns `cond` as the blocks accept it: int32 labels, a `TextCondition`, `ContextTokens` or None.

        Raises ValueError if cond does not fit the model, or does not have `batch` rows.
        """
        if self.text_dim:
            return check_text(cond, length=self.text_length, dim=self.text_dim, batch=batch)
        return check_condition(self, cond, batch)


class STARFlow(AutoregressiveFlow):
    """Exact-likelihood flow between latents `b height width c` and noise tokens `b n c`.

    In every method, `cond` is a `TextCondition` if the model is conditioned on texts. Otherwise it is None, int32
    labels `b`, or the context that `config.context` describes. None and the label -1 mean unconditional. A flow with
    classes has a learned embedding for this case; if its `class_conditioning` is "add", it uses the mean of all class
    embeddings instead.

    Example:
        flow = STARFlow(STARFlowConfig(image_size=8, width=128, layers_per_block=(2, 2, 6), num_classes=10))
        z, logdet = flow.apply(params, x, cond, method="forward")
    """

    config: STARFlowConfig


def _imagenet(width: int, layers_per_block: tuple[int, ...], patch_size: int = 1) -> STARFlowConfig:
    return STARFlowConfig(
        image_size=32,
        patch_size=patch_size,
        width=width,
        layers_per_block=layers_per_block,
        num_classes=1000,
        rope_base_grid=32 / patch_size,
    )


# Published shapes for 256 x 256 images, whose latents are 32 x 32 x 4. "t2i_3b" is the released text-to-image model.
# The others are the published class-conditional presets, under their published names; the paper's 1.4 B model is
# "xlv2_1".
STARFLOW_PRESETS: dict[str, STARFlowConfig] = {
    "t2i_3b": STARFlowConfig(image_size=32, width=3072, text_dim=2048, text_length=128, rope_base_grid=32.0),
    "xl_1": _imagenet(2048, (2, 2, 2, 2, 10, 10)),
    "xlv2_1": _imagenet(2048, (2, 2, 2, 2, 2, 18)),
    "xl_2": _imagenet(2048, (2, 2, 2, 2, 10, 10), patch_size=2),
    "xxl_1": _imagenet(3072, (2, 2, 2, 2, 13, 13)),
    "xxlv2_1": _imagenet(3072, (2, 2, 2, 2, 2, 24)),
}
