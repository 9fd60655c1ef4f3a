"""STARFlow-V: shallow blocks map frames one by one, and one deep block maps the whole clip (arXiv 2511.20462)."""

from __future__ import annotations

import dataclasses

import jax
from flax import linen as nn
from jaxtyping import Array, Key

from flowgen.flows.block import BlockConfig, Variables
from flowgen.flows.flow import AutoregressiveFlow
from flowgen.flows.starflow import STARFlowConfig, block_order
from flowgen.settings import config
from flowgen.settings.ranges import Frames, MaybeLayers, OtherFrames


@config
class STARFlowVConfig(STARFlowConfig):
    """Describes a STARFlow-V, which is a STARFlow for clips of shape `frames height width c` (arXiv 2511.20462).

    The shallow blocks map each frame independently. The deep block is causal over the tokens of all frames: frame by
    frame, and in raster order within a frame. The rotary positions have three axes: the row, the column and the index
    of the frame. A token of the prefix has position 0 on the first two axes; on the third axis, its position is
    proportional to its index in the prefix. See `STARFlowConfig` for the fields that are not listed here.

    order: token order in block 0, which is next to the data: "raster" or "reversed"; the other blocks alternate between
    the two, and the deep block must have "raster".
    conditioned_blocks: must be "deep", because only the deep block can depend on the class, the context or the text.
    frames: number of frames in the latents of a clip.
    denoiser_layers: number of layers of the denoiser, a network that learns the flow's score (the gradient of the
    log-density) and removes noise from samples; 0 for no denoiser. A denoiser supports neither a context nor
    class_conditioning "add".
    denoiser_past_frames: number of earlier frames to which a token attends in each layer of the denoiser.
    denoiser_lookahead_frames: number of later frames to which a token attends in each layer of the denoiser.
    """

    frames: Frames = 21
    denoiser_layers: MaybeLayers = 0
    denoiser_past_frames: OtherFrames = 9
    denoiser_lookahead_frames: OtherFrames = 1

    def __post_init__(self):
        if self.denoiser_layers and self.num_classes and self.class_conditioning == "add":
            raise ValueError("class_conditioning is 'add', which a denoiser does not support; use 'prefix'.")
        super().__post_init__()
        if self.denoiser_layers and self.context is not None:
            raise ValueError("context is set, which a denoiser does not support; set denoiser_layers to 0.")
        if self.conditioned_blocks != "deep":
            raise ValueError(
                f"conditioned_blocks is {self.conditioned_blocks!r}, but blocks that map single frames cannot "
                "have a condition; use 'deep'."
            )
        if block_order(self.order, len(self.layers_per_block) - 1) != "raster":
            raise ValueError(
                f"layers_per_block has {len(self.layers_per_block)} entries and order is {self.order!r}, so "
                "the deep block runs backwards in time; add or remove one entry, which may be 0."
            )

    def build(self) -> AutoregressiveFlow:
        """Returns the flow that this config describes, without parameters."""
        return STARFlowV(self)

    @property
    def event_shape(self) -> tuple[int, int, int, int]:
        """Shape of a clip: (frames, height, width, channels)."""
        return (self.frames, *self.image_shape)

    def with_num_frames(self, frames: int) -> STARFlowVConfig:
        """Returns this config with another number of frames; variables for one of the two configs fit the other."""
        return dataclasses.replace(self, frames=frames)

    @property
    def _third_axis(self) -> bool:
        return True

    def _block(self, index: int, deep: bool) -> BlockConfig:
        block = dataclasses.replace(super()._block(index, deep), num_tokens=self.tokens_per_image)
        if not deep:
            return dataclasses.replace(block, frames=self.frames)
        positions = dataclasses.replace(self._positions, frames=self.frames)
        return dataclasses.replace(block, num_tokens=self.num_tokens, positions=positions)


class STARFlowV(AutoregressiveFlow):
    """Exact-likelihood flow between clips of latents `b frames height width c` and noise tokens `b n c`.

    Tokens are ordered by frame, so the noise and the density of frame t depend only on frames 0..t. `cond` is the same
    as for `STARFlow`.

    Example:
        flow = STARFlowV(STARFlowVConfig(image_size=8, frames=5, width=128, layers_per_block=(2, 2, 2, 6)))
        z, logdet = flow.apply(params, clips, method="forward")
    """

    config: STARFlowVConfig

    @nn.nowrap
    def initial_variables(self, key: Key[Array, ""]) -> Variables:
        """Returns freshly initialised variables, including those of the denoiser if the config has one.

        This method is for `flowgen.init`; call `flowgen.init(flow, key)`.
        """
        from flowgen.flows.denoiser import ClipDenoiser, init_denoiser  # imported here to avoid an import cycle

        variables = super().initial_variables(key)
        if not self.config.denoiser_layers:
            return variables
        own_key = jax.random.fold_in(key, self.config.num_blocks)
        denoiser = init_denoiser(ClipDenoiser(self.config, parent=None), own_key)
        return {**variables, "params": {**variables["params"], "denoiser": denoiser["params"]}}


# The released text-to-video model. Its clips have 81 frames of 480 x 848 pixels; their latents have 21 x 30 x 53 x 48.
STARFLOW_V_480P = STARFlowVConfig(
    image_size=(30, 53),
    channels=48,
    width=3072,
    layers_per_block=(2, 2, 2, 2, 2, 24),
    deep_width=4096,
    text_dim=2048,
    text_length=256,
    rope_base_grid=32.0,
    noise_std=0.5,
    frames=21,
    denoiser_layers=8,
)
