"""The base class of autoregressive flows, and the division of images into tokens."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from flowgen.arrays import check_floating
from flowgen.backend import OnMeshes
from flowgen.conditioning import AnyCondition
from flowgen.flows.block import AutoregressiveBlock, BlockConfig, Variables
from flowgen.flows.density import bits_per_dim
from flowgen.flows.orders import without_padding
from flowgen.gaussian import gaussian_log_density
from flowgen.nn.checks import check_patches, image_sides
from flowgen.nn.layers import PatchOrder, master_dtype, patchify, unpatchify
from flowgen.settings.ranges import MAX_TOKENS


@dataclass(frozen=True)
class ImageTokens:
    """The part of a config that defines the size of a flow's images and their division into tokens."""

    image_size: int | tuple[int, int]
    channels: int
    patch_size: int

    def check_images(self) -> None:
        """Raises ValueError if the patches do not tile the images, or if there are too few or too many tokens."""
        check_patches(self.image_size, self.patch_size)
        if self.num_tokens > MAX_TOKENS:
            raise ValueError(
                f"image_size {self.image_size} and patch_size {self.patch_size} give {self.num_tokens} tokens, "
                f"above the limit of {MAX_TOKENS}; use a larger patch_size."
            )
        if self.num_tokens < 2:
            raise ValueError(
                f"patch_size is {self.patch_size}, which makes the whole image one token; use a smaller patch_size."
            )

    @property
    def patch_order(self) -> PatchOrder:
        """The order of a patch's values within its token."""
        raise NotImplementedError

    @property
    def image_hw(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return image_sides(self.image_size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return (*self.image_hw, self.channels)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample: an image, or a clip if the flow models clips."""
        return self.image_shape

    @property
    def token_hw(self) -> tuple[int, int]:
        """(rows, columns) of one image's grid of tokens."""
        height, width = self.image_hw
        return height // self.patch_size, width // self.patch_size

    @property
    def tokens_per_image(self) -> int:
        """Number of patches in one image."""
        return math.prod(self.token_hw)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in one sample."""
        return math.prod(self.event_shape[:-3]) * self.tokens_per_image

    @property
    def token_dim(self) -> int:
        return self.channels * self.patch_size**2

    @property
    def num_dims(self) -> int:
        """Number of values in one sample, over which nats or bits per dimension are averaged."""
        return self.num_tokens * self.token_dim

    def check_samples(self, x: Array) -> None:
        """Raises ValueError unless x is a floating-point batch of this model's samples."""
        check_floating("x", x)
        if x.shape[1:] != self.event_shape:
            shape = ", ".join(map(str, self.event_shape))
            raise ValueError(f"x has shape {tuple(x.shape)}; its shape must be (batch, {shape}).")

    def to_tokens(self, x: Float[Array, "b *event"]) -> Float[Array, "b n token"]:
        """Returns the patches of samples as tokens, image by image, with each image in raster order."""
        patches = patchify(x.reshape(-1, *self.image_shape), self.patch_size, self.patch_order)
        return patches.reshape(len(x), self.num_tokens, self.token_dim)

    def to_images(self, tokens: Float[Array, "b n token"]) -> Float[Array, "b *event"]:
        """Returns the samples with these tokens, which are in raster order; the inverse of `to_tokens`."""
        patches = tokens.reshape(-1, self.tokens_per_image, self.token_dim)
        images = unpatchify(patches, self.patch_size, self.image_hw, self.patch_order)
        return images.reshape(len(tokens), *self.event_shape)


class AutoregressiveFlow(OnMeshes, nn.Module):
    """The base class of exact-likelihood flows, which map samples `b *event` to Gaussian noise tokens `b n c`.

    The config describes the flow's blocks, and divides samples, such as images, into tokens.

    Example:
        class MyFlow(AutoregressiveFlow):
            config: MyConfig  # an ImageTokens with blocks, dtype and check_cond
    """

    config: Any

    def setup(self):
        self.blocks = [AutoregressiveBlock(block) for block in self.config.blocks]

    def __call__(self, x, cond=None):
        return self.forward(x, cond)

    def forward(
        self, x: Float[Array, "b *event"], cond: AnyCondition | None = None
    ) -> tuple[Float[Array, "b n token"], Float[Array, " b"]]:
        """Returns the noise tokens z, in raster order, and log|det dz/dx| of each sample, in nats.

        Raises ValueError if x is not a batch of this model's samples, or if cond does not fit the model.
        """
        states, logdet = self.trajectory(x, cond)
        return states[-1], logdet

    def trajectory(
        self, x: Float[Array, "b *event"], cond: AnyCondition | None = None
    ) -> tuple[list[Float[Array, "b n token"]], Float[Array, " b"]]:
        """Returns a list of the tokens after each block, in raster order, and log|det dz/dx| of each sample, in nats.

        The last entry of the list contains the noise tokens z.
        """
        states, logdet = self._through(self.blocks, x, cond)
        return states[1:], logdet

    def enter_last_block(
        self, x: Float[Array, "b *event"], cond: AnyCondition | None = None
    ) -> tuple[Float[Array, "b n token"], Float[Array, " b"]]:
        """Returns the input tokens u of the last block, in raster order, and log|det du/dx| of each sample, in nats."""
        states, logdet = self._through(self.blocks[:-1], x, cond)
        return states[-1], logdet

    def _through(self, blocks, x, cond):
        """Returns the tokens before the first of these blocks and after each block, and the total logdet."""
        config = self.config
        config.check_samples(x)
        cond = config.check_cond(cond, x.shape[0])
        master = master_dtype(config.dtype)
        states = [without_padding(config.to_tokens(x).astype(master), cond)]
        logdet = jnp.zeros(x.shape[0], master)
        for block in blocks:
            tokens, block_logdet = block(states[-1], cond)
            logdet = logdet + block_logdet
            states.append(tokens)
        return states, logdet

    @nn.nowrap
    def with_image_size(self, height: int, width: int) -> AutoregressiveFlow:
        """Returns a flow for samples of another height and width, which accepts the same variables as this flow.

        height, width: in the units of the config's `image_size`: pixels, or cells of the grid of latents.

        Raises ValueError if the size differs from that in the config of a flow with learned positions, such as a
        TARFlow, or if the patches do not tile images of the new size.
        """
        if (height, width) == self.config.image_hw:
            return self
        if not hasattr(self.config, "with_image_size"):
            raise ValueError(
                f"images are {height} x {width}; this model accepts only {self.config.image_hw}, because its "
                "parameters fit only that size."
            )
        return type(self)(self.config.with_image_size(height, width), parent=None)

    @nn.nowrap
    def with_num_frames(self, frames: int) -> AutoregressiveFlow:
        """Returns a flow for clips of `frames` frames, which accepts the same variables as this flow.

        Raises ValueError if the flow models images and `frames` is not 1.
        """
        if frames == self.config.num_tokens // self.config.tokens_per_image:
            return self
        if not hasattr(self.config, "with_num_frames"):
            raise ValueError(f"frames is {frames}; this model generates single images, so frames must be 1.")
        return type(self)(self.config.with_num_frames(frames), parent=None)

    def prior_variance(self) -> Float[Array, "n token"]:
        """Returns the variance of each value of z under the Gaussian prior.

        It is 1, unless the variables contain a collection "prior", as those of a volume-preserving flow do.
        """
        shape = (self.config.num_tokens, self.config.token_dim)
        return self.get_variable("prior", "variance", jnp.ones(shape, master_dtype(self.config.dtype)))

    def log_prob(self, x: Float[Array, "b *event"], cond: AnyCondition | None = None) -> Float[Array, " b"]:
        """Returns the exact log p(x | cond) in nats: log N(z; 0, prior variance) + log|det dz/dx|.

        x: images or clips with values in [-1, 1], latents, or vectors or sequences for a `TokenFlow`. The values are
        not checked, because a check would make the host wait for the device. Images in 0..255 get a meaningless
        density; convert them with x / 127.5 - 1.

        If samples are padded, the result is the density of the rows that are not padding, given the number of these
        rows.

        Raises ValueError if x is not a batch of this model's samples, or if cond does not fit the model.
        """
        z, logdet = self.forward(x, cond)
        density = gaussian_log_density(z, self.prior_variance()[None])
        return without_padding(density, cond).sum(axis=(1, 2)) + logdet

    def token_log_prob(
        self, x: Float[Array, "b *event"], cond: AnyCondition | None = None
    ) -> tuple[Float[Array, "b n"], Float[Array, "b n token"]]:
        """Returns each token's term of log p(x | cond), in nats, and the noise tokens z.

        Both are in raster order. The term of token i is log N(z_i; 0, prior variance) plus, for each block, the
        log-determinant of the block's map of token i. The sum of a sample's terms is its `log_prob`. A term is not the
        log-density of a single token, because z_i depends on many tokens of x.
        """
        config = self.config
        config.check_samples(x)
        cond = config.check_cond(cond, x.shape[0])
        z = without_padding(config.to_tokens(x).astype(master_dtype(config.dtype)), cond)
        terms = jnp.zeros(z.shape[:2], z.dtype)
        for block in self.blocks:
            z, log_derivative = block.parameters(z, cond).to_noise(z)
            terms = terms + log_derivative.sum(axis=2)
        density = without_padding(gaussian_log_density(z, self.prior_variance()[None]), cond)
        return terms + density.sum(axis=2), z

    def bits_per_dim(self, x: Float[Array, "b *event"], cond: AnyCondition | None = None) -> Float[Array, " b"]:
        """Returns bits/dim of images with 256 levels over [-1, 1): 7 - log2 p(x | cond) / config.num_dims.

        For bits/dim that are comparable between models, convert 8-bit images to x with
        `flowgen.flows.batches.dequantise`.
        """
        return bits_per_dim(self.log_prob(x, cond), self.config.num_dims)

    def to_images(self, tokens: Float[Array, "b n token"]) -> Float[Array, "b *event"]:
        """Returns the samples, such as images, that consist of the given tokens, which must be in raster order."""
        return self.config.to_images(tokens)

    @nn.nowrap
    def initial_variables(self, key: Key[Array, ""]) -> Variables:
        """Returns freshly initialised variables. This method is for `flowgen.init`; call `flowgen.init(flow, key)`."""
        config = self.config
        if config.dtype == "float64" and not jax.config.read("jax_enable_x64"):
            raise ValueError("model.dtype is 'float64', but JAX has 64-bit numbers disabled; set jax_enable_x64 first.")
        params = {}
        for index, block in enumerate(config.blocks):
            shape = dataclasses.replace(block, order="raster", frames=1)  # The parameters do not depend on these.
            params[f"blocks_{index}"] = _init_block(shape, jax.random.fold_in(key, index))
        if config.scale_parameterisation != "volume_preserving":
            return {"params": params}
        variance = jnp.ones((config.num_tokens, config.token_dim), master_dtype(config.dtype))
        return {"params": params, "prior": {"variance": variance}}


@partial(jax.jit, static_argnums=0)
def _init_block(config: BlockConfig, key: Key[Array, ""]) -> Any:
    """Returns the parameters of a block.

    Blocks with equal configs share the compiled program, because random-number generation is slow to compile.
    """
    tokens = jnp.zeros((1, config.num_tokens, config.token_dim), master_dtype(config.transformer.dtype))
    return AutoregressiveBlock(config).init(key, tokens)["params"]
