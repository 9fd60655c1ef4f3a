"""The causal denoiser for clips, which learns the score of a flow (flow-score matching; STARFlow-V, arXiv 2511.20462).

A flow trained on noisy clips x̃ = x + σ ε has the score ∇ log p(x̃), and one step x̃ + σ² ∇ log p(x̃) removes the
noise. This score is not smooth, and the score of a frame depends on all later frames. Therefore, a network s(x̃) learns
to predict t = -σ ∇ log p(x̃), which has values of order one. The denoising step becomes x̃ - σ s(x̃). In each layer, a
frame attends only to the prefix, to itself, to the `denoiser_past_frames` frames before it and to the
`denoiser_lookahead_frames` frames after it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Key

from flowgen.attention import FrameWindow
from flowgen.backend import OnMeshes
from flowgen.conditioning import Condition, Padded, TextCondition
from flowgen.flows.block import Variables
from flowgen.flows.starflow_v import STARFlowVConfig
from flowgen.nn.layers import RMSNorm, linear, master_dtype
from flowgen.nn.transformer import TransformerConfig, transformer_stack


class ClipDenoiser(OnMeshes, nn.Module):
    """The denoiser of a STARFlow-V: a network s(x̃, cond) of noisy clips x̃ = x + σ ε, `b frames height width c`.

    It learns -σ ∇ log p(x̃ | cond), so that x̃ - σ s(x̃, cond) is the denoised clip. The kernel of its output layer is
    initialised to zero. The variables of a flow contain the denoiser's parameters under "denoiser", next to the
    parameters of the flow's blocks; see `denoiser_variables`.

    config: the flow's config. The denoiser is a transformer with `config.denoiser_layers` layers of width
    `config.width`. Its condition and all its other settings are those of the flow's deep block.

    Example:
        denoiser = ClipDenoiser(flow.config)
        variables = denoiser.init(jax.random.key(0), clips, texts)
    """

    config: STARFlowVConfig

    @property
    def transformer(self) -> TransformerConfig:
        """The config of the transformer, whose sequence is the prefix and then the tokens of all frames."""
        clip, deep = self.config, self.config.blocks[-1]
        return dataclasses.replace(
            deep.transformer,
            width=clip.width,
            num_heads=clip.width // clip.head_dim,
            num_layers=clip.denoiser_layers,
            window=FrameWindow(
                deep.prefix_length, clip.tokens_per_image, clip.denoiser_past_frames, clip.denoiser_lookahead_frames
            ),
        )

    def setup(self):
        clip, transformer = self.config, self.transformer
        if not clip.denoiser_layers:
            raise ValueError("model.denoiser_layers is 0, so there is no denoiser; set it to 1 or more.")
        width, dtype, prefix = transformer.width, transformer.dtype, clip.blocks[-1].prefix
        self.proj_in = linear(width, clip.token_dim, dtype)
        if prefix is not None:
            self.proj_prefix = linear(width, prefix.dim, dtype)
        self.layers = transformer_stack(transformer)
        self.final_norm = RMSNorm(dtype)
        self.proj_out = linear(clip.token_dim, width, dtype, zero_kernel=True)

    def __call__(
        self, x: Float[Array, "b frames height width c"], cond: Condition | None = None
    ) -> Float[Array, "b frames height width c"]:
        """Returns s, which approximates -σ ∇ log p(x). Raises ValueError if x or cond does not fit the model."""
        clip, dtype = self.config, self.transformer.dtype
        deep, master = clip.blocks[-1], master_dtype(dtype)
        clip.check_samples(x)
        cond = clip.check_cond(cond, len(x))
        assert not isinstance(cond, Padded)  # clips have no padding
        h = self.proj_in(clip.to_tokens(x))
        if deep.prefix is not None:
            h = jnp.concatenate([self.proj_prefix(deep.prefix.features(cond, len(x), jnp.dtype(dtype))), h], axis=1)
        assert deep.positions is not None  # a STARFlow has rotary positions
        rotation = tuple(jnp.asarray(table, master) for table in deep.positions.rotary(deep.prefix_length))
        h, _ = self.layers(h, None, 0, None, rotation)
        out = self.proj_out(self.final_norm(h[:, deep.prefix_length :]))
        return clip.to_images(out.astype(master))


def init_denoiser(denoiser: ClipDenoiser, key: Key[Array, ""]) -> Variables:
    """Returns freshly initialised variables for a denoiser.

    Example:
        variables = init_denoiser(ClipDenoiser(flow.config), jax.random.key(0))
    """
    one = ClipDenoiser(denoiser.config.with_num_frames(1), parent=None)  # The length does not affect the parameters.
    clip = jnp.zeros((1, *one.config.event_shape), master_dtype(one.config.dtype))
    return jax.jit(lambda key: one.init(key, clip, _some_condition(one.config)))(key)


def _some_condition(config: STARFlowVConfig) -> Condition | None:
    if not config.text_dim:
        return None
    features = jnp.zeros((1, config.text_length, config.text_dim))
    return TextCondition(features, jnp.zeros(features.shape[:2], bool))


def denoiser_variables(variables: Variables) -> Variables:
    """Returns the part of a flow's variables that `ClipDenoiser(flow.config).apply` requires."""
    return {"params": variables["params"]["denoiser"]}


@dataclass(frozen=True)
class DenoiserStep:
    """The denoising step x - σ s(x, cond) for noisy clips x of any length; pass it to `flowgen.decoding.Denoiser`.

    denoiser: the network s.
    noise_std: the standard deviation σ of the noise.
    chunk: number of frames that the network processes at once; None means all. Chunks overlap: besides the frames that
    it outputs, a chunk contains the `denoiser_past_frames` frames before them and the `denoiser_lookahead_frames`
    frames after them, if the clip has such frames; `denoiser.config` contains both numbers. These additional frames are
    noisy, as in training. If `chunk` is too small for them, each chunk begins one frame after the previous one.

    Raises ValueError if chunk is below 1.

    Example:
        step = DenoiserStep(denoiser, noise_std=0.5, chunk=21)
        r = sample(flow, params, key, 4, texts, denoise=Denoiser(step, denoiser_variables))
    """

    denoiser: ClipDenoiser
    noise_std: float
    chunk: int | None = None

    def __post_init__(self):
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}; it must be at least 1, or None for all frames.")

    def __call__(
        self, variables: Variables, x: Float[Array, "b frames height width c"], cond: Condition | None = None
    ) -> Float[Array, "b frames height width c"]:
        config, frames = self.denoiser.config, x.shape[1]
        size = frames if self.chunk is None else min(self.chunk, frames)
        network = ClipDenoiser(config.with_num_frames(size), parent=None)
        lookahead = min(config.denoiser_lookahead_frames, size - 1)
        step = size - lookahead - min(config.denoiser_past_frames, size - 1 - lookahead)
        # All chunks have the same size, and the last chunk ends where the clip ends. A frame is taken from the first
        # chunk in which it is not one of the last `lookahead` frames. The clip's last frames come from the last chunk.
        count = -(-(frames - size) // step) + 1
        begins = np.minimum(np.arange(count) * step, frames - size)
        answering = np.searchsorted(begins[:-1] + size - lookahead, np.arange(frames), side="right")

        def clean(begin):
            noisy = jax.lax.dynamic_slice_in_dim(x, begin, size, axis=1)
            answer: Any = network.apply(variables, noisy, cond)
            return noisy - self.noise_std * answer

        chunks = jax.lax.map(clean, begins).swapaxes(0, 1)
        return chunks[:, answering, np.arange(frames) - begins[answering]]
