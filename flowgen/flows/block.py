"""One autoregressive block: an invertible map of tokens, and the conditioner that decoders invert it with.

In the block's token order, with u the tokens and P the positions in the same order (TARFlow, arXiv 2412.06329):

    h_t = W_in u_t + b_in + P_t + e(class),    h = transformer(h) causally,    o_t = W_out h_t + b_out
    (log_scale_0, shift_0) = 0,                (log_scale_{t+1}, shift_{t+1}) = o_t
    z_t = (u_t - shift_t) · exp(-log_scale_t)

The output is shifted by one token, so token 0 passes unchanged and the last token is never fed to the network.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from flowgen.attention import causal_kernel
from flowgen.conditioning import class_embedding
from flowgen.flows.affine import TokenOrder, reorder, to_noise
from flowgen.nn.layers import linear, master_dtype
from flowgen.nn.transformer import TransformerConfig, transformer_stack, unstack_layers

Transform = Literal["affine", "volume_preserving"]
EMBEDDING_STDDEV = 0.01


@dataclass(frozen=True)
class BlockConfig:
    """Shape of one block: its tokens, their order, the affine form and the transformer inside."""

    num_tokens: int
    token_dim: int
    order: TokenOrder
    transform: Transform
    num_classes: int
    transformer: TransformerConfig


class AutoregressiveBlock(nn.Module):
    """An invertible map of tokens `b n c`, raster order in and out.

    Example:
        z, logdet = AutoregressiveBlock(config).apply(params, tokens, labels)
    """

    config: BlockConfig

    # Leading tokens, in the block's order, that the map leaves unchanged.
    num_free = 1

    def setup(self):
        config, transformer = self.config, self.config.transformer
        width, dtype = transformer.width, transformer.dtype
        embedding = nn.initializers.normal(EMBEDDING_STDDEV)
        master = master_dtype(dtype)
        outputs = 2 if config.transform == "affine" else 1
        self.proj_in = linear(width, config.token_dim, dtype)
        self.pos_embed = self.param("pos_embed", embedding, (config.num_tokens, width), master)
        if config.num_classes:
            self.class_embed = self.param("class_embed", embedding, (config.num_classes, width), master)
        self.layers = transformer_stack(transformer)
        self.proj_out = linear(outputs * config.token_dim, width, dtype, zero_kernel=True)

    def __call__(
        self, x: Float[Array, "b n c"], labels: Int[Array, " b"] | None = None
    ) -> tuple[Float[Array, "b n c"], Float[Array, " b"]]:
        """Returns z in raster order and logdet `b` (summed, nats)."""
        u = reorder(x, self.config.order)
        shift, log_scale, _ = self.conditioner(u[:, :-1], 0, labels, None, None)
        free = ((0, 0), (self.num_free, 0), (0, 0))
        z, logdet = to_noise(u, jnp.pad(shift, free), jnp.pad(log_scale, free))
        return reorder(z, self.config.order), logdet

    def conditioner(
        self,
        previous: Float[Array, "b w c"],
        start: Int[Array, ""] | int,
        labels: Int[Array, " b"] | None,
        caches: tuple | None,
        inverse_temperature: Float[Array, " b"] | None,
    ) -> tuple[Float[Array, "b w c"], Float[Array, "b w c"], tuple | None]:
        """Returns (shift, log_scale) of a window of tokens from the tokens just before them, and the caches.

        previous: tokens start..start+w-1 in the block's order; the answer is for tokens start+1..start+w.
        caches: hold what tokens 0..start-1 left behind; None when start is 0 and nothing follows.
        """
        config, transformer = self.config, self.config.transformer
        positions = jnp.minimum(start + jnp.arange(previous.shape[1]), config.num_tokens - 1)
        position = reorder(jnp.asarray(self.pos_embed), config.order)[positions]
        h = self.proj_in(previous) + position[None].astype(transformer.dtype)
        if config.num_classes:
            embedded = class_embedding(self.class_embed, labels, previous.shape[0])
            h = h + embedded[:, None].astype(h.dtype)
        h, caches = self.layers(h, caches, start, inverse_temperature)
        out = self.proj_out(h).astype(master_dtype(transformer.dtype))
        if config.transform == "volume_preserving":
            return out, jnp.zeros_like(out), caches
        log_scale, shift = jnp.split(out, 2, axis=-1)
        return shift, log_scale, caches

    def first_previous(self, z: Float[Array, "b n c"]) -> Float[Array, "b 1 c"]:
        """Returns what stands before the first token that the block transforms: its free token."""
        return z[:, :1]

    def init_caches(self, batch: int, length: int) -> tuple:
        """Returns the empty caches of all layers for decoding `length` tokens."""
        config = self.config.transformer
        init_cache = causal_kernel(config.attention).init_cache
        dtype = jnp.dtype(config.dtype)
        return tuple(
            init_cache(batch, length, config.num_heads, config.head_dim, dtype) for _ in range(config.num_layers)
        )

    def rewind(self, before: tuple, after: tuple) -> tuple:
        """Returns the caches from which a window that turned `before` into `after` can be run again."""
        return causal_kernel(self.config.transformer.attention).rewind(before, after)


def block_parameters(variables: Any, index: int) -> Any:
    """Returns the variables of block `index` alone, for `AutoregressiveBlock(config).apply`.

    Example:
        z, logdet = AutoregressiveBlock(flow.config.blocks[0]).apply(block_parameters(params, 0), tokens)
    """
    return {"params": variables["params"][f"blocks_{index}"]}


def decoding_block(config: BlockConfig, variables: Any) -> tuple[AutoregressiveBlock, Any]:
    """Returns a block in the form that takes caches, its layers one by one, and its variables in that form.

    Example:
        block, variables = decoding_block(flow.config.blocks[0], block_parameters(params, 0))
    """
    transformer = replace(config.transformer, scan=False)
    params = variables["params"]
    layers = unstack_layers(params["layers"], transformer.num_layers)
    return AutoregressiveBlock(replace(config, transformer=transformer)), {"params": {**params, "layers": layers}}
