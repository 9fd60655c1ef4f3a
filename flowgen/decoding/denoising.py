"""Denoising of decoded samples, with the score of the flow's density or with a learned denoiser.

Let u be the last block's tokens. They are decoded in segments r, each of context frames followed by new frames. The
density is

    p(u) = Π_r p(the new frames of r | their context),     log p(x) = log p(u) + log|det du/dx|
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowgen.decoding.layout import scan_segments
from flowgen.decoding.request import DecodeRequest, TweedieStep
from flowgen.flows.block import AutoregressiveBlock, block_parameters
from flowgen.flows.orders import without_padding
from flowgen.gaussian import gaussian_log_density


def denoised(request: DecodeRequest, x: Float[Array, "b *event"]) -> Float[Array, "b *event"]:
    """Applies the request's denoising step to decoded samples; without a step, returns them unchanged."""
    step = request.denoise
    if isinstance(step, TweedieStep):
        score = jax.grad(lambda x: _log_prob(request, x).sum())(x)
        return x + jnp.asarray(step.strength, x.dtype) * request.flow.config.noise_std**2 * score
    return x if step is None else step.function(step.variables, x, request.cond)


def enter_last_block(
    request: DecodeRequest, x: Float[Array, "b *event"]
) -> tuple[Float[Array, "b n c"], Float[Array, " b"]]:
    """Returns the last block's tokens u for images or clips x, and log|det du/dx|."""
    frames = x.shape[1] if x.ndim == 5 else 1
    return request.flow.with_num_frames(frames).apply(request.params, x, request.cond, method="enter_last_block")


def _log_prob(request: DecodeRequest, x: Float[Array, "b *event"]) -> Float[Array, " b"]:
    """log p(x | cond), in nats, for images or clips in the request's layout, as if no frames had been given."""
    layout, flow = request.layout._replace(given=0), request.flow.with_num_frames(request.layout.clip)
    index = flow.config.num_blocks - 1
    block, variables = AutoregressiveBlock(flow.config.blocks[index]), block_parameters(request.params, index)
    variance = layout.frames(request.flow.apply(request.params, method="prior_variance")[None], 0, layout.clip)
    u, logdet = enter_last_block(request, x)
    beyond = (layout.reached - layout.total) * layout.tokens_per_frame
    u = jnp.pad(u, ((0, 0), (0, beyond), (0, 0)))
    parts = []
    for part in layout.segments:
        cond = request.condition_of(part)

        def segment(_, tokens, cond=cond):
            z, log_derivative = block.apply(variables, tokens, cond, method="parameters").to_noise(tokens)
            return None, without_padding(gaussian_log_density(z, variance), cond) + log_derivative

        density = scan_segments(segment, None, layout.whole_segments(u, part))
        parts.append(layout.in_a_row(density[:, :, part.context * layout.tokens_per_frame :]))
    return logdet + layout.frames(jnp.concatenate(parts, axis=1), 0, layout.total).sum(axis=(1, 2))
