"""DiT: a transformer on image patches, modulated by time and class (Peebles and Xie, arXiv 2212.09748).

Let c be the embedding of (t, interval, condition). A layer computes shifts a, scales b and gates g from c, and updates
the tokens h:

    (a, b, g, a', b', g') = W silu(c)                     (W is initialised to 0, so every layer starts as the identity)
    h <- h + g · Attention(norm(h) (1 + b) + a),   h <- h + g' · MLP(norm(h) (1 + b') + a')

If the context consists of tokens, a layer also computes (a", b", g") from c. Between attention and MLP, it attends to
the embedded tokens e:

    h <- h + g" · CrossAttention(norm(h) (1 + b") + a", e)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from flowgen.attention import KERNELS, FeatureMap, Kernel, make_attention_fn, softmax_attention
from flowgen.backend import Implementation, OnMeshes, Shared, keep_heads_apart, keep_rows_apart
from flowgen.contexts import Context, ImageContext, TokenContext, VectorContext, check_condition, check_one_condition
from flowgen.matching.contexts import (
    ContextEmbedding,
    Given,
    TokenEmbedding,
    as_channels,
    given_context,
    same_size,
    shrunk_context,
)
from flowgen.matching.velocity import check_inputs
from flowgen.nn.checks import check_heads, check_implementation, check_patches, image_sides
from flowgen.nn.embeddings import EMBEDDING_STDDEV, TIME_SCALE, ConditionEmbedding, grid_positions, normal_dense
from flowgen.nn.layers import ACTIVATIONS, FLAT_DOTS, master_dtype, patchify, unpatchify
from flowgen.nn.softmax_shape import SoftmaxShape
from flowgen.settings import config
from flowgen.settings.ranges import Channels, Classes, Expansion, HeadDim, Layers, OneOf, Own, Positive, Side, Width

ATTENTIONS = ("softmax", "soft", *(name for name in KERNELS if name != "retention"))  # retention is always causal
OwnAttention = Annotated[Kernel | FeatureMap, Own("a FeatureMap or a Kernel")]
PATCH_ORDER = "channel_last"
DIT_LAYER_NORM_EPS = 1e-6
MAX_POSITIONS = 1 << 28  # largest number of entries in the position table, which every trace contains as a constant


@config
class DiTConfig:
    """Architecture of a DiT (diffusion transformer), a velocity network for images or latents.

    The sizes S, B, L and XL in the paper (arXiv 2212.09748) have (width, num_layers, head_dim) = (384, 12, 64), (768,
    12, 64), (1024, 24, 64) and (1152, 28, 72).

    image_size: side of square images or latents in pixels, or (height, width).
    channels: number of channels of the images or latents.
    patch_size: side, in pixels, of the square patches, each of which becomes one token; must divide the height and the
    width of the image.
    width: number of channels of a token; a multiple of head_dim and of 4.
    num_layers: number of transformer layers.
    head_dim: number of channels per attention head.
    expansion: hidden width of the feed-forward layers, as a multiple of width.
    num_classes: number of classes that the velocity is conditioned on; 0 for none.
    attention: attention kernel of the layers: a name, such as "softmax", or your own kernel or feature map; see
    docs/attention.md in the repository.
    attention_implementation: implementation of softmax attention: "xla" for all devices, "cudnn" for NVIDIA GPUs, "tpu"
    for TPUs; "auto" chooses one by device, dtype and shape. See docs/attention.md in the repository.
    intervals: whether the network also predicts average velocities over time intervals; required by the loss MeanFlow.
    time_scale: factor by which times in [0, 1] are multiplied before the sinusoidal embedding, which expects values up
    to 1,000. The loss MeanFlow contains a derivative with respect to t, so it needs a small factor, such as 1.0.
    dtype: dtype of matrix products and activations; parameters, norms and the modulation are at least float32.
    remat: whether to recompute the activations of each layer in the backward pass instead of storing them.
    context: the context that the velocity is conditioned on; None for no context. The embedding of a vector is added to
    the embedding of the time. The layers attend to tokens by softmax cross-attention, whatever `attention` is; the
    order of the tokens has no effect. An image of the same size as the network's images is concatenated to them as
    channels. An image of another size becomes tokens, one per patch, with position embeddings.
    """

    image_size: Side | tuple[Side, Side]
    channels: Channels = 3
    patch_size: Side = 2
    width: Width = 384
    num_layers: Layers = 12
    head_dim: HeadDim = 64
    expansion: Expansion = 4
    num_classes: Classes = 0
    attention: Annotated[str, OneOf(ATTENTIONS)] | OwnAttention = "softmax"
    attention_implementation: Implementation = "auto"
    intervals: bool = False
    time_scale: Positive = TIME_SCALE
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    remat: bool = True
    context: Context | None = None

    def __post_init__(self):
        check_patches(self.image_size, self.patch_size)
        check_one_condition(self.num_classes, self.context)
        check_implementation(self.attention_implementation, self.attention)
        if (numbers := math.prod(self.token_hw) * self.width) > MAX_POSITIONS:
            raise ValueError(
                f"image_size {self.image_size}, patch_size {self.patch_size} and width {self.width} give a position "
                f"table of {numbers} numbers, above the limit of {MAX_POSITIONS}; use a larger patch_size."
            )
        check_heads(self.width, self.head_dim)
        if self.width % 4:
            raise ValueError(f"width is {self.width}; it must be a multiple of 4 for the position table.")

    def build(self) -> DiT:
        """Returns the network that this config describes, without parameters."""
        return DiT(self)

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return image_sides(self.image_size)

    @property
    def event_shape(self) -> tuple[int, int, int]:
        """Shape of one sample: (height, width, channels)."""
        return (*self.image_hw, self.channels)

    def shrunk(self) -> DiTConfig:
        """Returns a small version of this config, of at most 8 x 8 pixels, for tests and `--debug` runs."""
        height, width = self.image_hw
        patch = min(self.patch_size, 2)
        side = patch * max(1, min(4, height // self.patch_size))
        other = patch * max(1, min(4, width // self.patch_size))
        return dataclasses.replace(
            self,
            image_size=(side, other),
            patch_size=patch,
            width=32,
            num_layers=2,
            head_dim=16,
            num_classes=10 if self.num_classes else 0,
            context=shrunk_context(self.context, self.image_hw, (side, other)),
        )

    @property
    def token_hw(self) -> tuple[int, int]:
        """Number of patches along the height and along the width of an image."""
        height, width = self.image_hw
        return height // self.patch_size, width // self.patch_size

    @property
    def attends_context(self) -> bool:
        """Whether the layers attend to the context: true for tokens, and for an image whose size differs from
        `image_size`.
        """
        return isinstance(self.context, TokenContext | ImageContext) and not same_size(self.context, self.image_hw)

    @property
    def softmax_shapes(self) -> tuple[SoftmaxShape, ...]:
        """The shape of the layers' self-attention, as a tuple of one item; empty unless `attention` is "softmax"."""
        if not (isinstance(self.attention, str) and self.attention == "softmax"):
            return ()
        heads = self.width // self.head_dim
        return (SoftmaxShape(math.prod(self.token_hw), heads, self.head_dim, self.dtype),)


class DiT(OnMeshes, nn.Module):
    """A velocity network for images or latents of shape `b height width c`.

    Example:
        v = DiT(DiTConfig(image_size=8, channels=1)).apply(params, t, x, cond)
    """

    config: DiTConfig

    @nn.compact
    def __call__(
        self,
        t: Float[Array, " b"],
        x: Float[Array, "b height width c"],
        cond: Any = None,
        interval: Float[Array, " b"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b height width c"]:
        """Returns the velocity at x and time t, averaged over `interval` if it is given and the config sets
        `intervals`.

        cond: labels, the context that the config describes, or None.
        train: ignored.

        Raises ValueError if x, t or cond does not match the config.
        """
        config = self.config
        check_inputs(config, t, x)
        c, x, context = self._conditioned(t, x, check_condition(config, cond, len(x)), interval)
        tokens = patchify(x, config.patch_size, PATCH_ORDER)
        h = _dense(config.width, config.dtype, name="proj_in")(tokens)
        h = h + jnp.asarray(grid_positions(config.token_hw, config.width), h.dtype)[None]
        layer = nn.remat(DiTLayer, prevent_cse=False) if config.remat else DiTLayer
        h, _ = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.num_layers,
        )(config, name="layers")(h, c, context)
        shift, scale = jnp.split(_modulation(2 * config.width)(c), 2, axis=1)
        h = _modulated(h, shift, scale).astype(config.dtype)
        features = config.channels * config.patch_size**2
        out = _dense(features, config.dtype, zero=True, name="proj_out")(h).astype(master_dtype(config.dtype))
        return unpatchify(out, config.patch_size, config.image_hw, PATCH_ORDER)

    def _conditioned(self, t: Array, x: Array, cond: Any, interval: Array | None) -> tuple[Array, Array, Given | None]:
        """Returns silu(c), the images with an image context as added channels, and the tokens that the layers attend
        to.
        """
        config, context = self.config, self.config.context
        embed = ConditionEmbedding(
            config.width, config.num_classes, config.intervals, time_scale=config.time_scale, name="condition"
        )
        if context is None:
            return jax.nn.silu(embed(t, cond, interval)), x, None
        c, given = embed(t, None, interval), given_context(context, cond, len(x), x.dtype)
        if isinstance(context, VectorContext):
            c = c + ContextEmbedding(config.width, normal_dense, EMBEDDING_STDDEV, name="context")(given)
            return jax.nn.silu(c), x, None
        if not config.attends_context:
            assert isinstance(context, ImageContext)
            return jax.nn.silu(c), jnp.concatenate([x, as_channels(context, given)], axis=-1), None
        tokens = TokenEmbedding(config.width, normal_dense, name="context")(given.tokens)
        if isinstance(context, ImageContext):
            tokens = tokens + jnp.asarray(grid_positions(context.token_hw, config.width), tokens.dtype)[None]
        return jax.nn.silu(c), x, Given(tokens.astype(config.dtype), given.mask)


class DiTLayer(nn.Module):
    """A layer of a DiT: modulated attention and a modulated MLP, with gates that are initialised to 0."""

    config: DiTConfig

    @nn.compact
    def __call__(self, h: Float[Array, "b n d"], c: Float[Array, "b d"], context: Given | None):
        config = self.config
        h = keep_rows_apart(h)
        parts = 6 if context is None else 9
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *cross = jnp.split(
            _modulation(parts * config.width)(c), parts, axis=1
        )
        y = _modulated(h, shift, scale).astype(config.dtype)
        qkv = _dense(3 * config.width, config.dtype, shared="outputs", name="qkv")(y)
        q, k, v = keep_heads_apart(*_heads(qkv, 3, config.head_dim))
        attend = make_attention_fn(config.attention, implementation=config.attention_implementation)
        y = attend(q, k, v).reshape(h.shape).astype(config.dtype)
        h = h + gate[:, None].astype(h.dtype) * _dense(config.width, config.dtype, shared="inputs", name="proj")(y)
        if context is not None:
            shift, scale, gate = cross
            h = h + gate[:, None].astype(h.dtype) * self._cross(_modulated(h, shift, scale), context)
        y = _modulated(h, mlp_shift, mlp_scale).astype(config.dtype)
        up = _dense(config.expansion * config.width, config.dtype, shared="outputs", name="up")
        down = _dense(config.width, config.dtype, shared="inputs", name="down")
        return h + mlp_gate[:, None].astype(h.dtype) * down(ACTIVATIONS["gelu_tanh"](up(y))), None

    def _cross(self, y: Float[Array, "b n d"], context: Given) -> Float[Array, "b n d"]:
        """Returns the attention of y to the context. For samples without a context, this is the bias of the output
        layer.
        """
        config = self.config
        q = _dense(config.width, config.dtype, shared="outputs", name="context_query")(y.astype(config.dtype))
        kv = _dense(2 * config.width, config.dtype, shared="outputs", name="context_key_value")(context.tokens)
        q, k, v = keep_heads_apart(*_heads(q, 1, config.head_dim), *_heads(kv, 2, config.head_dim))
        mask = context.mask[:, None, None]
        out = softmax_attention(q, k, v, mask=mask, implementation=config.attention_implementation)
        proj = _dense(config.width, config.dtype, shared="inputs", name="context_proj")
        return proj(out.reshape(y.shape).astype(config.dtype))


def _heads(x: Float[Array, "b n d"], parts: int, head_dim: int) -> list[Float[Array, "b n h k"]]:
    return [z.reshape(*z.shape[:2], -1, head_dim) for z in jnp.split(x, parts, axis=-1)]


def _modulated(h: Array, shift: Array, scale: Array) -> Array:
    """Returns LayerNorm(h) (1 + scale) + shift in at least float32, with one scale and shift per sample."""
    master = jnp.promote_types(h.dtype, jnp.float32)
    x = h.astype(master)
    x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + DIT_LAYER_NORM_EPS)
    return x * (1 + scale[:, None]) + shift[:, None]


def _modulation(features: int) -> nn.Dense:
    return nn.Dense(features, kernel_init=nn.initializers.zeros, name="modulation")


def _dense(features: int, dtype: str, *, zero: bool = False, shared: Shared = "", name: str) -> nn.Dense:
    init = nn.initializers.zeros if zero else nn.initializers.xavier_uniform()
    return nn.Dense(
        features,
        dtype=jnp.dtype(dtype),
        param_dtype=master_dtype(dtype),
        kernel_init=init,
        dot_general=FLAT_DOTS[shared],
        name=name,
    )
