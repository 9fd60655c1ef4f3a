"""The causal denoiser of clips, which learns a flow's own score (flow-score matching, STARFlow-V, arXiv 2511.20462).

A flow of noisy clips x̃ = x + σ ε has the score ∇ log p(x̃), and one step x̃ + σ² ∇ log p(x̃) removes the noise. That
score is rough, and the score of a frame depends on all later frames. A network s(x̃) that sees a window of frames
learns t = -σ ∇ log p(x̃), of order one, and x̃ - σ s(x̃) takes the step. In each layer a frame sees the `ahead` next ones,
without which the direction of time, and with it that of the noise, cannot be told.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from flowgen.attention import FrameWindow
from flowgen.conditioning import Condition
from flowgen.flows.density import Flow, score
from flowgen.flows.starflow_v import STARFlowVConfig
from flowgen.nn.layers import RMSNorm, linear, master_dtype
from flowgen.nn.transformer import TransformerConfig, transformer_stack


@dataclass(frozen=True)
class ClipDenoiserConfig:
    """Shape of a denoiser of the clips of a flow, whose width, heads, condition, positions and precision it takes.

    num_layers: of its own. back, ahead: frames before and after its own that a token sees in each layer.
    """

    clip: STARFlowVConfig
    num_layers: int = 8
    back: int = 9
    ahead: int = 1

    def __post_init__(self):
        for name, least in (("num_layers", 1), ("back", 0), ("ahead", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"denoiser.{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.clip.num_classes and self.clip.class_conditioning == "add":
            raise ValueError("model.class_conditioning is 'add', which a denoiser has no part for; use 'prefix'.")

    @property
    def transformer(self) -> TransformerConfig:
        """The stack of layers over the prefix and all frames."""
        clip, deep = self.clip, self.clip.blocks[-1]
        return dataclasses.replace(
            deep.transformer,
            width=clip.width,
            num_heads=clip.width // clip.head_dim,
            num_layers=self.num_layers,
            window=FrameWindow(deep.prefix_length, clip.tokens_per_image, self.back, self.ahead),
        )


class ClipDenoiser(nn.Module):
    """s(x̃, cond) of clips `b frames height width c`; the kernel of its head starts at 0.

    Example:
        denoiser = ClipDenoiser(ClipDenoiserConfig(flow.config))
        variables = denoiser.init(jax.random.key(0), clips, texts)
    """

    config: ClipDenoiserConfig

    def setup(self):
        clip, transformer = self.config.clip, self.config.transformer
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
        """Returns s, trained to be -σ ∇ log p(x). Raises ValueError where the clip or the condition does not fit."""
        clip, dtype = self.config.clip, self.config.transformer.dtype
        deep, master = clip.blocks[-1], master_dtype(dtype)
        clip.check_samples(x)
        cond = clip.check_cond(cond, len(x))
        h = self.proj_in(clip.to_tokens(x))
        if deep.prefix is not None:
            h = jnp.concatenate([self.proj_prefix(deep.prefix.features(cond, len(x), jnp.dtype(dtype))), h], axis=1)
        assert deep.positions is not None  # a STARFlow's are rotary
        rotation = tuple(jnp.asarray(table, master) for table in deep.positions.rotary(deep.prefix_length))
        h, _ = self.layers(h, None, 0, None, rotation)
        out = self.proj_out(self.final_norm(h[:, deep.prefix_length :]))
        return clip.to_images(out.astype(master))


def score_target(
    flow: Flow, variables: Any, x: Float[Array, "b *event"], cond: Condition | None = None
) -> Float[Array, "b *event"]:
    """Returns t = -σ ∇ log p(x | cond), what a denoiser of noisy samples x is to answer; σ from the flow's config.

    Example:
        t = score_target(flow, params, noisy, cond)
    """
    return -flow.config.noise_std * jax.lax.stop_gradient(score(flow, variables, x, cond))


def score_matching_loss(
    denoiser: nn.Module,
    variables: Any,
    x: Float[Array, "b *event"],
    target: Float[Array, "b *event"],
    cond: Condition | None = None,
) -> Float[Array, ""]:
    """Returns mean |s(x, cond) - t|², the loss of flow-score matching.

    Example:
        loss = score_matching_loss(denoiser, variables, noisy, score_target(flow, params, noisy, cond), cond)
    """
    answer: Any = denoiser.apply(variables, x, cond)
    return jnp.square(answer - target).mean()


@dataclass(frozen=True)
class ClipDenoising:
    """x - σ s(x, cond) for clips of any number of frames: the function of a `flowgen.decoding.Denoiser`.

    noise_std: σ. chunk: frames that go through the network together, None for all. Each further chunk begins with the
    `back` frames before those it answers for, still noisy, as in training; the last `ahead` frames of a chunk are
    answered for by the next, which has what comes after them. Raises ValueError where a chunk has no frames to answer
    for.

    Example:
        step = ClipDenoising(denoiser, noise_std=0.5, chunk=21)
        r = sample(flow, params, key, 4, texts, denoise=Denoiser(step, denoiser_variables))
    """

    denoiser: ClipDenoiser
    noise_std: float
    chunk: int | None = None

    def __post_init__(self):
        config = self.denoiser.config
        if self.chunk is not None and self.chunk <= config.back + config.ahead:
            raise ValueError(
                f"chunk is {self.chunk}; it must be above back + ahead = {config.back + config.ahead} of the denoiser."
            )

    def __call__(
        self, variables: Any, x: Float[Array, "b frames height width c"], cond: Condition | None = None
    ) -> Float[Array, "b frames height width c"]:
        config, frames = self.denoiser.config, x.shape[1]
        size = frames if self.chunk is None else min(self.chunk, frames)
        network = ClipDenoiser(dataclasses.replace(config, clip=config.clip.of_frames(size)), parent=None)
        # Chunks of one size, the last at the end; each answers up to its last `ahead` frames, and the last for all.
        count = -(-(frames - size) // max(size - config.back - config.ahead, 1)) + 1
        begins = np.minimum(np.arange(count) * (size - config.back - config.ahead), frames - size)
        answering = np.searchsorted(begins[:-1] + size - config.ahead, np.arange(frames), side="right")

        def clean(begin):
            noisy = jax.lax.dynamic_slice_in_dim(x, begin, size, axis=1)
            answer: Any = network.apply(variables, noisy, cond)
            return noisy - self.noise_std * answer

        chunks = jax.lax.map(clean, begins).swapaxes(0, 1)
        return chunks[:, answering, np.arange(frames) - begins[answering]]
