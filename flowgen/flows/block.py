"""One autoregressive block: an invertible map of tokens, and the conditioner that decoders use to invert it.

Let u be the tokens in the block's order. TARFlow (arXiv 2412.06329) and STARFlow (arXiv 2506.06276) map them to z by

    h_t = W_in p_t + b_in + (position) + (class),   h = transformer([prefix; h]) causally
    o_t = W_out norm(h_t) + b_out
    (log_scale_{t+f}, shift_{t+f}) = o_t,    z_t = (u_t - shift_t) · exp(-log_scale_t)

With shift "output" (TARFlow), p_t = u_t and f = 1: the network predicts the parameters of the next token. Token 0
passes through unchanged, and the last token is never fed to the network. With shift "input" (STARFlow), f = 0, p_0 is a
learned start token in data space, and p_t = u_{t-1} for t > 0, so every token is transformed.

Positions are encoded either by a learned table or by rotary angles. The table has one row per position in raster order,
unless `slot_positions` is set. The angles depend only on the place in the sequence, so they are the same for every
order. The condition is either a class embedding, which is added to every token, or a prefix of tokens, to which all
other tokens attend. If the prefix is an image, its patches have a learned table of their own. With rotary angles, all
prefix tokens have angles. Otherwise, the tokens of other prefixes have no positions: their order affects only the
causal attention of a block's later layers.

Padding is moved to the end of the sequence, so that no other token attends to it. The sequence then begins with the
prefix and the tokens, both without padding, and ends with the padding of both. Padding tokens pass through unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from flowgen.attention import causal_kernel
from flowgen.attention.slices import Start, positions
from flowgen.conditioning import Condition, ContextTokens, Padded, Unpadded, split_padded
from flowgen.flows.affine import (
    Mapped,
    ScaleParameterisation,
    TokenMaps,
    affine_maps,
    num_outputs,
    soft_clip,
)
from flowgen.flows.orders import SampleOrder, TokenOrder, order_without_padding, to_order, to_raster
from flowgen.flows.positions import GridPositions
from flowgen.flows.prefixes import ContextPrefix, Prefix, rotation_after_prefix
from flowgen.nn.embeddings import class_embedding
from flowgen.nn.layers import RMSNorm, linear, master_dtype
from flowgen.nn.softmax_shape import SoftmaxShape
from flowgen.nn.transformer import TransformerConfig, transformer_stack
from flowgen.transforms.elementwise import ElementwiseMap

Shift = Literal["output", "input"]
EMBEDDING_STDDEV = 0.01
# A Flax module's dict of "params" and other collections.
Variables = Mapping[str, Any]


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


class BlockState(NamedTuple):
    """The state of a block before a window of tokens.

    start: number of rows before the window, one number for all samples or one for each.
    caches: the caches of all layers, which contain the prefix and the earlier rows; None if the window is a whole
    sequence.
    inverse_temperature: factor of each sample's attention logits; None means 1.
    """

    start: Start = 0
    caches: tuple | None = None
    inverse_temperature: Float[Array, " b"] | None = None


NOTHING_BEFORE = BlockState()


class AutoregressiveBlock(nn.Module):
    """One block of a flow: an invertible map of tokens `b n c`, whose parameters a causal transformer predicts.

    The input and output tokens are in raster order.

    Example:
        z, logdet = AutoregressiveBlock(config).apply(params, tokens, labels)
    """

    config: BlockConfig

    if TYPE_CHECKING:  # Flax's return type includes updated variables, but no method here updates any.

        def apply(self, variables: Variables, *args: Any, method: str = "__call__") -> Any: ...

    @property
    def num_passthrough(self) -> int:
        """Number of leading tokens, in the block's order, that the map leaves unchanged: 0 or 1."""
        return 1 if self.config.shift == "output" else 0

    def setup(self):
        config, transformer = self.config, self.config.transformer
        width, dtype = transformer.width, transformer.dtype
        embedding = nn.initializers.normal(EMBEDDING_STDDEV)
        master = master_dtype(dtype)
        self.proj_in = linear(width, config.token_dim, dtype)
        if config.shift == "input":
            self.start_token = self.param("start_token", nn.initializers.normal(1.0), (config.token_dim,), master)
        if config.positions is None:
            self.pos_embed = self.param("pos_embed", embedding, (config.num_tokens, width), master)
        if config.num_classes:
            self.class_embed = self.param("class_embed", embedding, (config.num_classes, width), master)
        if config.prefix is not None:
            self.proj_prefix = linear(width, config.prefix.dim, dtype)
        if isinstance(config.prefix, ContextPrefix) and config.prefix.has_positions:
            self.prefix_pos_embed = self.param("prefix_pos_embed", embedding, (config.prefix_length, width), master)
        self.layers = transformer_stack(transformer)
        if config.final_norm:
            self.final_norm = RMSNorm(dtype)
        self.proj_out = linear(config.num_outputs, width, dtype, zero_kernel=True)

    def __call__(
        self, x: Float[Array, "b n c"], cond: Condition | None = None
    ) -> tuple[Float[Array, "b n c"], Float[Array, " b"]]:
        """Returns z in raster order and the summed logdet `b` in nats."""
        z, log_derivative = self.parameters(x, cond).to_noise(x)
        return z, log_derivative.sum(axis=(1, 2))

    def parameters(self, x: Float[Array, "b n c"], cond: Condition | None = None) -> TokenMaps:
        """Returns the parameters of the maps of all tokens in x, in raster order.

        They are an `Affine`, a tuple (shift, log_scale), or, if the config has an elementwise map, a `Mapped`. The maps
        of padding and of the first `num_passthrough` tokens in the block's order are the identity.
        """
        config = self.config
        cond = config.condition(cond)  # Blocks that map single frames ignore the condition.
        order = config.order_of(cond)
        u = to_order(each_frame(x, config.frames), order)
        maps, _ = self.conditioner(self.previous(u), cond)
        passthrough = ((0, 0), (self.num_passthrough, 0), (0, 0))

        def in_raster(part: Array) -> Array:
            return to_raster(jnp.pad(part, passthrough), order).reshape(*x.shape[:2], part.shape[2])

        return jax.tree.map(in_raster, maps)

    def conditioner(
        self, previous: Float[Array, "b w c"], cond: Condition | None, state: BlockState = NOTHING_BEFORE
    ) -> tuple[TokenMaps, tuple | None]:
        """Returns (maps, window) for w consecutive tokens in the block's order, given the token before each of them.

        previous: rows start..start+w-1 of the array that `previous` returns. With p = num_passthrough, the results are
        for tokens start+p..start+p+w-1.
        state: the state before these tokens: `start`, and caches from `prefill` or `accept`. By default, `previous`
        contains the whole sequence.

        maps: the parameters of the maps, as `parameters` returns them, but in the block's order. window: the argument
        with which `accept` adds these tokens to the caches; None if `state` contains no caches.
        """
        config, transformer = self.config, self.config.transformer
        batch, window = previous.shape[:2]
        start, caches, inverse_temperature = state
        mask, cond = split_padded(cond)
        h = self.proj_in(previous)
        if config.positions is None:
            rows = jnp.minimum(positions(start, window), config.num_tokens - 1)
            h = h + to_order(jnp.asarray(self.pos_embed), config.table_order)[rows].astype(transformer.dtype)
        if config.num_classes:
            assert not isinstance(cond, tuple)  # a flow checks its condition
            h = h + class_embedding(self.class_embed, cond, batch)[:, None].astype(h.dtype)
        if caches is None:
            h = self._whole_sequence(h, cond, start, inverse_temperature)
        else:
            rotation = self.rotation(start + config.prefix_length, window)
            h, caches = self.layers(h, caches, start + self.prefix_count(cond), inverse_temperature, rotation)
        out = self.proj_out(self.final_norm(h) if config.final_norm else h).astype(master_dtype(transformer.dtype))
        raw = soft_clip(out, config.soft_clip)
        if config.elementwise is None:
            maps = affine_maps(raw, config.scale_parameterisation)
        else:
            maps = Mapped(config.elementwise, raw)
        if mask is not None:
            places = positions(start, window) + self.num_passthrough
            maps = maps.where((places < mask.sum(axis=1, keepdims=True))[:, :, None])
        return maps, caches

    def _whole_sequence(
        self,
        h: Float[Array, "b w d"],
        cond: Unpadded | None,
        start: Start,
        inverse_temperature: Float[Array, " b"] | None,
    ) -> Float[Array, "b w d"]:
        """Returns the layers' outputs for a sequence without caches, excluding its prefix."""
        config, (batch, window) = self.config, h.shape[:2]
        prefix = self.prefix_tokens(cond, batch)
        if prefix is None:
            rotation = self.rotation(start + config.prefix_length, window)
            return self.layers(h, None, start, inverse_temperature, rotation)[0]
        h, rotation = jnp.concatenate([prefix, h], axis=1), self.rotation(start, config.prefix_length + window)
        if not isinstance(cond, ContextTokens):
            return self.layers(h, None, start, inverse_temperature, rotation)[0][:, config.prefix_length :]
        # The padding of the prefix comes last, where no token sees it.
        exists = jnp.pad(cond.mask, ((0, 0), (0, window)), constant_values=True)
        count, order = self.prefix_count(cond), order_without_padding("raster", exists)
        rotation = rotation_after_prefix(rotation, count, config.prefix_length)
        h = self.layers(to_order(h, order), None, start, inverse_temperature, rotation)[0]
        return jnp.take_along_axis(h, positions(count, window)[:, :, None], axis=1)

    def previous(self, tokens: Float[Array, "b n c"]) -> Float[Array, "b w c"]:
        """Returns the network's inputs for tokens in the block's order.

        Row t is the token before token t + num_passthrough; for token 0, it is the learned start token.
        """
        return jnp.concatenate([self.first_previous(tokens), tokens[:, self.num_passthrough : -1]], axis=1)

    def first_previous(self, z: Float[Array, "b n c"]) -> Float[Array, "b 1 c"]:
        """Returns row 0 of `previous(z)`: token 0 if shift is "output", the learned start token if it is "input"."""
        if self.config.shift == "output":
            return z[:, :1]
        return jnp.broadcast_to(self.start_token[None, None].astype(z.dtype), (len(z), 1, z.shape[2]))

    def prefix_tokens(self, cond: Unpadded | None, batch: int) -> Float[Array, "b l d"] | None:
        """Returns each sample's embedded prefix; None if the block has no prefix, or if its context is not given."""
        prefix = self.config.prefix
        has_none = cond is None and isinstance(prefix, ContextPrefix) and not self.is_initializing()
        if prefix is None or has_none:
            return None
        tokens = self.proj_prefix(prefix.features(cond, batch, jnp.dtype(self.config.transformer.dtype)))
        if isinstance(prefix, ContextPrefix) and prefix.has_positions:
            tokens = tokens + jnp.asarray(self.prefix_pos_embed)[None].astype(tokens.dtype)
        return tokens

    def prefix_count(self, cond: Unpadded | None) -> Start:
        """Returns the number of prefix tokens: one number for all samples or, for `ContextTokens`, one per sample.

        The padding of a `ContextTokens` does not count; the padding of a `TextCondition` does.
        """
        if isinstance(self.config.prefix, ContextPrefix):
            return jnp.asarray(cond.mask).sum(axis=1) if isinstance(cond, ContextTokens) else 0
        return self.config.prefix_length

    def rotation(self, slot: Start, length: int) -> tuple[Array, Array] | None:
        """Returns (cos, sin) of the rotary angles of slots slot..slot+length-1; None for learned positions.

        Slot 0 is the first token of the prefix or, without a prefix, of the sample.
        """
        config = self.config
        if config.positions is None:
            return None
        slots = jnp.minimum(positions(slot, length), config.prefix_length + config.num_tokens - 1)
        cos, sin = config.positions.rotary(config.prefix_length)
        master = master_dtype(config.transformer.dtype)
        return jnp.asarray(cos, master)[slots], jnp.asarray(sin, master)[slots]

    def prefill(
        self, batch: int, length: int, cond: Condition | None, inverse_temperature: Float[Array, " b"] | None = None
    ) -> tuple:
        """Returns the layers' caches for decoding `length` tokens of each sample; they contain the prefix, if any."""
        _, cond = split_padded(cond)
        caches, tokens = self.init_caches(batch, length), self.prefix_tokens(cond, batch)
        if tokens is None:
            return caches
        rotation, count = self.rotation(0, self.config.prefix_length), None
        if isinstance(cond, ContextTokens):
            order, count = order_without_padding("raster", cond.mask), jnp.asarray(cond.mask).sum(axis=1)
            tokens = to_order(tokens, order)
        return self.accept(caches, self.layers(tokens, caches, 0, inverse_temperature, rotation)[1], count)

    def init_caches(self, batch: int, length: int) -> tuple:
        """Returns empty caches for all layers, with room for the prefix and `length` tokens."""
        config = self.config.transformer
        init_cache = causal_kernel(config.attention).init_cache
        dtype, slots = jnp.dtype(config.dtype), self.config.prefix_length + length
        return tuple(
            init_cache(batch, slots, config.key_heads, config.head_dim, dtype) for _ in range(config.num_layers)
        )

    def accept(self, before: tuple, window: Any, count: Int[Array, " b"] | None = None) -> tuple:
        """Returns the caches `before` with the first `count` rows of each sample's window added.

        window: the second result of `conditioner`. count: None adds all rows of the window.
        """
        accept = causal_kernel(self.config.transformer.attention).accept
        if accept is None:
            return window
        return tuple(accept(*cache, count) for cache in zip(before, window, strict=True))

    def rewind(self, before: tuple, after: tuple) -> tuple:
        """Returns caches with which `conditioner` can process a window again.

        before: the caches before the window. after: the second result of `conditioner` for the window.
        """
        return causal_kernel(self.config.transformer.attention).rewind(before, after)

    @property
    def has_growing_caches(self) -> bool:
        """Whether `grow_caches` can extend caches. If not, caches need room for all tokens from the start."""
        return causal_kernel(self.config.transformer.attention).grow is not None

    def grow_caches(self, caches: tuple, length: int) -> tuple:
        """Returns the caches with room for the prefix and `length` tokens, or unchanged if they cannot grow."""
        grow = causal_kernel(self.config.transformer.attention).grow
        return caches if grow is None else tuple(grow(cache, self.config.prefix_length + length) for cache in caches)


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


def each_frame(x: Float[Array, "b n c"], frames: int) -> Float[Array, "b_and_frames tokens c"]:
    """Returns the tokens of every frame as separate samples."""
    return x.reshape(len(x) * frames, x.shape[1] // frames, x.shape[2])


def block_parameters(variables: Variables, index: int) -> Variables:
    """Returns the part of a flow's variables that `AutoregressiveBlock(flow.config.blocks[index]).apply` requires.

    index: the index of the block; block 0 is next to the data.
    """
    return {"params": variables["params"][f"blocks_{index}"]}
