"""Descriptions of the blocks of flows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from flowgen.conditioning import Condition, Padded
from flowgen.flows.affine import ScaleParameterisation, num_outputs
from flowgen.flows.orders import SampleOrder, TokenOrder, order_without_padding
from flowgen.flows.positions import GridPositions
from flowgen.flows.prefixes import Prefix
from flowgen.nn.softmax_shape import SoftmaxShape
from flowgen.nn.transformer import TransformerConfig
from flowgen.transforms.elementwise import ElementwiseMap

Shift = Literal["output", "input"]


@dataclass(frozen=True)
class BlockConfig:
    """Describes one block of a flow: its tokens and their order, the map of the tokens, the condition and the network.

    num_classes: number of classes whose embeddings are added to the tokens; 0 for none.
    shift: "output" if the block leaves its first token unchanged; "input" if it transforms every token, because a
    learned start token precedes the first one. In both cases, the map of a token depends only on the tokens before it.
    soft_clip: bound c on the network's raw outputs: each output r is replaced by c · tanh(r / c); 0 for no bound.
    final_norm: whether to apply an RMSNorm before the network's output layer.
    positions: rotary positions of the tokens; None for a learned table of position embeddings.
    prefix: describes the tokens that contain a sample's condition and precede its other tokens in the network; None for
    no prefix.
    frames: number of groups of num_tokens tokens, such as the frames of a clip, that the block maps independently of
    each other.
    slot_positions: whether row i of the learned table of positions belongs to the i-th token in the block's order; if
    False, the row belongs to the i-th token in raster order.
    elementwise: an invertible map of single values that replaces the affine map and requires shift="input"; None for
    the affine map.
    """

    num_tokens: int
    token_dim: int
    order: TokenOrder
    scale_parameterisation: ScaleParameterisation
    num_classes: int
    transformer: TransformerConfig
    shift: Shift = "output"
    soft_clip: float = 0.0
    final_norm: bool = False
    positions: GridPositions | None = None
    prefix: Prefix | None = None
    frames: int = 1
    slot_positions: bool = False
    elementwise: ElementwiseMap | None = None

    @property
    def num_outputs(self) -> int:
        """Number of the network's outputs per token."""
        if self.elementwise is not None:
            return self.elementwise.num_outputs(self.token_dim)
        return num_outputs(self.scale_parameterisation) * self.token_dim

    @property
    def prefix_length(self) -> int:
        return 0 if self.prefix is None else self.prefix.length

    @property
    def softmax_shape(self) -> SoftmaxShape | None:
        """Shape of each layer's softmax attention over a whole sequence with its prefix; None for other kernels."""
        layers = self.transformer
        if not (isinstance(layers.attention, str) and layers.attention == "softmax"):
            return None
        rows = self.num_tokens - (self.shift == "output") + self.prefix_length
        return SoftmaxShape(rows, layers.num_heads, layers.head_dim, layers.dtype, True, layers.num_kv_heads)

    @property
    def is_conditional(self) -> bool:
        """Whether the block's map depends on labels, texts or a context; the mask of padded samples does not count."""
        return self.num_classes > 0 or self.prefix is not None

    @property
    def table_order(self) -> TokenOrder:
        """With this order, `flowgen.flows.orders.to_order` puts the learned position table in the block's order."""
        return "raster" if self.slot_positions else self.order

    def condition(self, cond: Condition | None) -> Condition | None:
        """Returns the part of `cond` on which the block's map depends: all, a `Padded` with only a mask, or None."""
        if self.is_conditional:
            return cond
        return Padded(cond.mask) if isinstance(cond, Padded) else None

    def order_of(self, cond: Condition | None) -> SampleOrder:
        """Returns the block's token order; if `cond` is a `Padded`, one permutation per sample, with padding last."""
        return order_without_padding(self.order, cond.mask) if isinstance(cond, Padded) else self.order


def equal_layers(config: Any) -> TransformerConfig:
    """Returns the config of a block's layers, for flows whose blocks differ only in their token order.

    config: a `TARFlowConfig` or a `TokenFlowConfig`.
    """
    return TransformerConfig(
        width=config.width,
        num_layers=config.layers_per_block,
        num_heads=max(1, config.width // config.head_dim),
        expansion=config.expansion,
        activation=config.activation,
        attention=config.attention,
        attention_implementation=config.attention_implementation,
        dtype=config.dtype,
        remat=config.remat,
    )


def softmax_shapes(blocks: tuple[BlockConfig, ...]) -> tuple[SoftmaxShape, ...]:
    """Returns the distinct shapes of the blocks' softmax attention, in the order of the blocks."""
    return tuple(dict.fromkeys(shape for block in blocks if (shape := block.softmax_shape) is not None))
