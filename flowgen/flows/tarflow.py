"""TARFlow: a stack of autoregressive transformer blocks on image patches (arXiv 2412.06329)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from flowgen.attention import CAUSAL_KERNEL_NAMES
from flowgen.conditioning import check_labels
from flowgen.flows.block import AutoregressiveBlock, BlockConfig, Transform
from flowgen.flows.density import bits_per_dim, gaussian_log_prob
from flowgen.nn.layers import ACTIVATIONS, Activation, master_dtype, patchify, unpatchify
from flowgen.nn.transformer import TransformerConfig

PATCH_ORDER = "channel_first"


@dataclass(frozen=True)
class TARFlowConfig:
    """Shape of a TARFlow, in the paper's p-C-K-L-σ notation: patch_size-width-num_blocks-layers_per_block-noise_std.

    image_size: side, or (height, width). head_dim: heads have this many channels; a width below it is one head.
    transform: "affine" (the paper's nvp) or "volume_preserving" (log-determinant 0, tracked prior variance).
    noise_std: σ of the Gaussian noise the density is trained under; 0 means uniform dequantisation.
    dtype: of matrix products and activations; parameters, affine maps and log-determinants stay float32.
    remat: recompute layers in the backward pass instead of storing them; less memory, and on CPUs less time.
    """

    image_size: int | tuple[int, int]
    channels: int = 3
    patch_size: int = 4
    width: int = 256
    num_blocks: int = 4
    layers_per_block: int = 4
    head_dim: int = 64
    expansion: int = 4
    num_classes: int = 0
    transform: Transform = "affine"
    attention: str = "softmax"
    activation: Activation = "gelu"
    noise_std: float = 0.0
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    remat: bool = True

    def __post_init__(self):
        if isinstance(self.image_size, list):
            object.__setattr__(self, "image_size", tuple(self.image_size))
        sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2
        if len(sides) != 2 or not all(type(side) is int for side in sides):
            raise ValueError(f"model.image_size is {self.image_size!r}; give a side in pixels, or (height, width).")
        counts = (
            "channels",
            "patch_size",
            "width",
            "num_blocks",
            "layers_per_block",
            "head_dim",
            "expansion",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1.")
        for side, length in zip(("height", "width"), self.grid_size, strict=True):
            if length < self.patch_size or length % self.patch_size:
                raise ValueError(
                    f"model.image_size has {side} {length}, which patch_size {self.patch_size} does not divide; "
                    f"use a multiple of {self.patch_size} or another patch_size."
                )
        if self.num_tokens < 2:
            raise ValueError(
                f"model.patch_size is {self.patch_size}, which makes the image one token; use a smaller patch_size."
            )
        if self.width > self.head_dim and self.width % self.head_dim:
            raise ValueError(
                f"model.width is {self.width}, not a multiple of head_dim {self.head_dim}; change one of the two."
            )
        if self.num_classes < 0:
            raise ValueError(f"model.num_classes is {self.num_classes}; it must be 0 (no classes) or more.")
        if not 0 <= self.noise_std < float("inf"):
            raise ValueError(f"model.noise_std is {self.noise_std}; it must be 0 (dequantisation) or positive.")
        choices = {
            "transform": ("affine", "volume_preserving"),
            "attention": CAUSAL_KERNEL_NAMES,
            "activation": tuple(ACTIVATIONS),
            "dtype": ("float32", "bfloat16", "float64"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"model.{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}.")

    @property
    def grid_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return (*self.grid_size, self.channels)

    @property
    def num_tokens(self) -> int:
        height, width = self.grid_size
        return (height // self.patch_size) * (width // self.patch_size)

    @property
    def token_dim(self) -> int:
        return self.channels * self.patch_size**2

    @property
    def num_dims(self) -> int:
        """Dimensions of one image, by which nats become nats or bits per dimension."""
        return self.num_tokens * self.token_dim

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        """The blocks from data to noise: raster order first, then alternating."""
        transformer = TransformerConfig(
            width=self.width,
            num_layers=self.layers_per_block,
            num_heads=max(1, self.width // self.head_dim),
            expansion=self.expansion,
            activation=self.activation,
            attention=self.attention,
            dtype=self.dtype,
            remat=self.remat,
        )
        return tuple(
            BlockConfig(
                num_tokens=self.num_tokens,
                token_dim=self.token_dim,
                order="raster" if index % 2 == 0 else "reversed",
                transform=self.transform,
                num_classes=self.num_classes,
                transformer=transformer,
            )
            for index in range(self.num_blocks)
        )


class TARFlow(nn.Module):
    """Exact-likelihood flow between images `b height width c` in [-1, 1] and noise tokens `b n c`.

    `cond` is None, or int32 labels `b` where -1 means unconditional (the mean class), in every method.

    Example:
        flow = TARFlow(TARFlowConfig(image_size=8, channels=1, patch_size=2, num_classes=10))
        z, logdet = flow.apply(params, x, cond, method="forward")
    """

    config: TARFlowConfig

    def setup(self):
        self.blocks = [AutoregressiveBlock(block) for block in self.config.blocks]

    def __call__(self, x, cond=None):
        return self.forward(x, cond)

    def forward(
        self, x: Float[Array, "b height width c"], cond: Int[Array, " b"] | None = None
    ) -> tuple[Float[Array, "b n token"], Float[Array, " b"]]:
        """Returns noise tokens z in raster order and logdet = log|det dz/dx|, summed, in nats.

        Raises ValueError where x is not a batch of this model's images, or cond not labels of its classes.
        """
        states, logdet = self.trajectory(x, cond)
        return states[-1], logdet

    def trajectory(
        self, x: Float[Array, "b height width c"], cond: Int[Array, " b"] | None = None
    ) -> tuple[list[Float[Array, "b n token"]], Float[Array, " b"]]:
        """Returns the tokens after each block, the last being z, and the total logdet."""
        config = self.config
        if x.shape[1:] != config.image_shape:
            shape = ", ".join(map(str, config.image_shape))
            raise ValueError(f"images have shape {tuple(x.shape)}; this model takes (batch, {shape}).")
        cond = check_labels(cond, num_classes=config.num_classes, batch=x.shape[0])
        master = master_dtype(config.dtype)
        tokens = patchify(x, config.patch_size, PATCH_ORDER).astype(master)
        logdet = jnp.zeros(x.shape[0], master)
        states = []
        for block in self.blocks:
            tokens, block_logdet = block(tokens, cond)
            logdet = logdet + block_logdet
            states.append(tokens)
        return states, logdet

    def prior_variance(self) -> Float[Array, "n token"]:
        """Returns the variance of the Gaussian that samples are drawn from: 1, unless tracked or imported."""
        shape = (self.config.num_tokens, self.config.token_dim)
        return self.get_variable("prior", "variance", jnp.ones(shape, master_dtype(self.config.dtype)))

    def log_prob(self, x: Float[Array, "b height width c"], cond: Int[Array, " b"] | None = None) -> Float[Array, " b"]:
        """Returns log p(x | cond) in nats, exact: log N(z; 0, prior variance) + logdet."""
        z, logdet = self.forward(x, cond)
        return gaussian_log_prob(z, self.prior_variance()) + logdet

    def bits_per_dim(
        self, x: Float[Array, "b height width c"], cond: Int[Array, " b"] | None = None
    ) -> Float[Array, " b"]:
        """Returns -log2 p(x | cond) per dimension on the scale of 256 levels over [-1, 1).

        It is the model's bits/dim where x is dequantised (`flowgen.flows.density.dequantise`).
        """
        return bits_per_dim(self.log_prob(x, cond), self.config.num_dims)

    def to_images(self, tokens: Float[Array, "b n token"]) -> Float[Array, "b height width c"]:
        """Returns the images of data-side tokens."""
        config = self.config
        return unpatchify(tokens, config.patch_size, config.grid_size, PATCH_ORDER)


def init(flow: Any, key: Key[Array, ""]) -> Any:
    """Returns freshly initialised variables of a flow; shapes come from its config.

    Blocks of equal shape share one compiled program, whose random numbers are what takes time to compile.

    Example:
        params = init(flow, jax.random.key(0))
    """
    config = flow.config
    if config.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError("model.dtype is 'float64', which jax has switched off; set jax_enable_x64 first.")
    params = {}
    for index, block in enumerate(config.blocks):
        shape = dataclasses.replace(block, order="raster")  # The order of tokens has no parameters.
        params[f"blocks_{index}"] = _init_block(shape, jax.random.fold_in(key, index))
    if config.transform == "affine":
        return {"params": params}
    variance = jnp.ones((config.num_tokens, config.token_dim), master_dtype(config.dtype))
    return {"params": params, "prior": {"variance": variance}}


@partial(jax.jit, static_argnums=0)
def _init_block(config: BlockConfig, key: Key[Array, ""]) -> Any:
    tokens = jnp.zeros((1, config.num_tokens, config.token_dim), master_dtype(config.transformer.dtype))
    return AutoregressiveBlock(config).init(key, tokens)["params"]
