"""`decode`: the one compiled program behind `invert`, `sample` and `sample_clips`.

Let u be the last block's output from noise, segment by segment; the other blocks map u to images, or to frames one by
one. Given frames enter as their u, by a forward pass of those blocks, and fill the last block's caches in one pass;
decoding continues after them. With segments r of new frames after their context, the density is

    p(u) = Π_r p(the new frames of r | their context),     log p(x) = log p(u) + log|det du/dx|
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowgen.backend import check_unmapped, keep_rows
from flowgen.conditioning import Condition
from flowgen.decoding.block import BlockDecoder, block_decoder
from flowgen.decoding.jacobi import Solution
from flowgen.decoding.layout import Segments, scan_segments
from flowgen.decoding.request import DecodeRequest, DecodeResult, SampleKeys, TweedieStep
from flowgen.flows.affine import to_noise
from flowgen.flows.block import AutoregressiveBlock, Variables, block_parameters
from flowgen.flows.density import Flow
from flowgen.gaussian import gaussian_log_density
from flowgen.nn.layers import master_dtype


def decode(request: DecodeRequest) -> DecodeResult:
    """Returns the images or clips of a request and the decoding reports, sharded like their noise.

    Raises ValueError inside `jax.shard_map` with its checks.
    """
    check_unmapped("decoding", request)
    return keep_rows(_with_params, request.params, replace(request, params={}))


def _with_params(params: Variables, request: DecodeRequest) -> DecodeResult:
    return _decode(replace(request, params=params))


@jax.jit
def _decode(request: DecodeRequest) -> DecodeResult:
    layout, given = request.layout, request.given
    noise = _noise(request)
    known = None if given is None else _enter_last_block(request, given)[0]
    u, last = _decode_last_block(request, noise, known)
    later = request.flow.with_num_frames(layout.total - layout.given)
    tokens, solutions, errors = _decode_other_blocks(request, later, layout.frames(u, layout.given, layout.total))
    x = later.to_images(tokens)
    x = x if given is None else jnp.concatenate([given, x], axis=1)
    if request.certify:
        seen = u if request.guidance is not None else _enter_last_block(request, x)[0]
        seen = jnp.concatenate([seen, u[:, seen.shape[1] :]], axis=1)  # Frames beyond `total` are dropped.
        errors.append(_last_block_error(request, seen, noise))
    clean = _denoised(request, x)
    solutions = [*solutions, last]
    width = max(len(solution.sweeps) for solution in solutions)
    return DecodeResult(
        x=clean,
        sweeps=jnp.stack([jnp.pad(s.sweeps, (0, width - len(s.sweeps))) for s in solutions]),
        residual=jnp.stack([s.residual for s in solutions]).max(axis=0),
        overflows=jnp.stack([s.overflows for s in solutions]).sum(axis=0),
        finite=jnp.isfinite(clean).all(axis=tuple(range(1, clean.ndim))),
        error=jnp.stack(errors).max(axis=0) if errors else None,
    )


def _noise(request: DecodeRequest) -> Float[Array, "b n c"]:
    """Noise tokens of all frames: given, or those of the first clip from one key, and each later frame from its own."""
    keys = request.noise
    if not isinstance(keys, SampleKeys):
        return keys
    flow, layout = request.flow, request.layout
    tokens, channels, per_frame = flow.config.num_tokens, flow.config.token_dim, layout.tokens_per_frame
    master = master_dtype(flow.config.dtype)
    frames = tokens // per_frame
    later = jnp.arange(frames, max(layout.reached, frames))

    def of_sample(index):
        key = jax.random.fold_in(keys.key, index)  # Also the parent of the keys of later frames.
        first = jax.random.normal(key, (tokens, channels), master)
        rest = jax.vmap(lambda k: jax.random.normal(k, (per_frame, channels), master))(
            jax.vmap(partial(jax.random.fold_in, key))(later)
        )
        return jnp.concatenate([first, rest.reshape(-1, channels)])[: layout.reached * per_frame]

    variance = flow.apply(request.params, method="prior_variance").reshape(frames, per_frame, channels)
    scale = jnp.sqrt(variance[layout.places]).reshape(1, -1, channels)
    return jax.vmap(of_sample)(keys.indices) * scale


def _enter_last_block(
    request: DecodeRequest, x: Float[Array, "b *event"]
) -> tuple[Float[Array, "b n c"], Float[Array, " b"]]:
    """u of images or frames, and log|det du/dx|."""
    frames = x.shape[1] if x.ndim == 5 else 1
    return request.flow.with_num_frames(frames).apply(request.params, x, request.cond, method="enter_last_block")


def _decoder(
    request: DecodeRequest,
    flow: Flow,
    index: int,
    cond: Condition | None,
    solved: Callable[[Array], None] = lambda count: None,
) -> BlockDecoder:
    guidance = request.guidance
    return block_decoder(
        flow.config.blocks[index],
        block_parameters(request.params, index),
        cond,
        guidance=guidance if guidance is not None and index in (guidance.blocks or ()) else None,
        null=request.null,
        solved=solved,
    )


def _last_decoder(request: DecodeRequest, part: Segments) -> BlockDecoder:
    """The last block's decoder for some segments, under their condition."""
    layout, progress = request.layout, request.progress
    total = (layout.reached - layout.given) * layout.tokens_per_frame

    def solved(count):
        if progress is not None:
            jax.debug.callback(lambda count: progress(int(count), total), count)

    cond = request.restart_cond if part.is_restart else request.cond
    return _decoder(
        request, request.flow.with_num_frames(layout.clip), len(request.plan.blocks) - 1, cond, solved=solved
    )


def _decode_last_block(
    request: DecodeRequest, noise: Float[Array, "b n c"], known: Float[Array, "b m c"] | None
) -> tuple[Float[Array, "b n c"], Solution]:
    """u of all decoded frames, including those known from the start, and the report over all segments."""
    layout, plan = request.layout, request.plan.blocks[-1]
    u, solutions = noise[:, :0] if known is None else known, []
    for part in layout.segments:
        decoder = _last_decoder(request, part)

        def segment(context, z, decoder=decoder):
            new, solution = decoder.decode(z, plan, context)
            if context is not None:
                context = jnp.concatenate([context, new], axis=1)[:, -context.shape[1] :]
            return context, (new, solution[1:])

        context = u[:, -part.context * layout.tokens_per_frame :] if part.context else None
        new, solution = scan_segments(segment, context, layout.new_tokens(noise, part))
        u = jnp.concatenate([u, layout.in_a_row(new)], axis=1)
        sweeps, residual, overflows = solution
        solutions.append((sweeps.reshape(-1), residual, overflows))
    sweeps, residual, overflows = (jnp.concatenate(reports) for reports in zip(*solutions, strict=True))
    return u, Solution(u, sweeps, residual.max(axis=0), overflows.sum(axis=0))


def _decode_other_blocks(
    request: DecodeRequest, flow: Flow, u: Float[Array, "b n c"]
) -> tuple[Float[Array, "b n c"], list[Solution], list[Float[Array, " b"]]]:
    """Tokens of images or frames, each block's report, and its certificate if it may be guided."""
    solutions, errors = [], []
    for index in reversed(range(len(request.plan.blocks) - 1)):
        decoder = _decoder(request, flow, index, request.cond)
        tokens, solution = decoder.decode(u, request.plan.blocks[index])
        if request.certify and request.guidance is not None:
            errors.append(jnp.abs(decoder.encode(tokens) - u).max(axis=(1, 2)))
        solutions.insert(0, solution)
        u = tokens
    return u, solutions, errors


def _last_block_error(
    request: DecodeRequest, u: Float[Array, "b n c"], noise: Float[Array, "b n c"]
) -> Float[Array, " b"]:
    """Largest difference per sample between the decoded noise and the noise of the resulting tokens."""
    layout, errors = request.layout, []
    for part in layout.segments:
        decoder = _last_decoder(request, part)

        def segment(_, inputs, decoder=decoder):
            tokens, z = inputs
            return None, jnp.abs(decoder.encode(tokens)[:, -z.shape[1] :] - z).max(axis=(1, 2))

        inputs = layout.whole_segments(u, part), layout.new_tokens(noise, part)
        errors.append(scan_segments(segment, None, inputs).max(axis=0))
    return jnp.stack(errors).max(axis=0)


def _denoised(request: DecodeRequest, x: Float[Array, "b *event"]) -> Float[Array, "b *event"]:
    step = request.denoise
    if isinstance(step, TweedieStep):
        score = jax.grad(lambda x: _log_prob(request, x).sum())(x)
        return x + step.strength * request.flow.config.noise_std**2 * score
    return x if step is None else step.function(step.variables, x, request.cond)


def _log_prob(request: DecodeRequest, x: Float[Array, "b *event"]) -> Float[Array, " b"]:
    """log p(x | cond) in nats of images or clips decoded by this layout with no frames given."""
    layout, flow = request.layout._replace(given=0), request.flow.with_num_frames(request.layout.clip)
    index = len(request.plan.blocks) - 1
    block, variables = AutoregressiveBlock(flow.config.blocks[index]), block_parameters(request.params, index)
    variance = layout.frames(request.flow.apply(request.params, method="prior_variance")[None], 0, layout.clip)
    u, logdet = _enter_last_block(request, x)
    beyond = (layout.reached - layout.total) * layout.tokens_per_frame
    u = jnp.pad(u, ((0, 0), (0, beyond), (0, 0)))
    parts = []
    for part in layout.segments:
        cond = request.restart_cond if part.is_restart else request.cond

        def segment(_, tokens, cond=cond):
            shift, log_scale = block.apply(variables, tokens, cond, method="parameters")
            z, _ = to_noise(tokens, shift, log_scale)
            return None, gaussian_log_density(z, variance) - log_scale

        density = scan_segments(segment, None, layout.whole_segments(u, part))
        parts.append(layout.in_a_row(density[:, :, part.context * layout.tokens_per_frame :]))
    return logdet + layout.frames(jnp.concatenate(parts, axis=1), 0, layout.total).sum(axis=(1, 2))
