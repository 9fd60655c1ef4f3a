"""`sample_clips`: clips that begin with given frames, and clips longer than the flow models (arXiv 2511.20462).

Let u be what the deep block, causal over the tokens of F frames, makes of noise; the shallow blocks turn u into frames,
one by one. Given frames enter as their u, a forward pass of the shallow blocks, and fill the deep block's caches in one
pass; decoding goes on behind them. A longer clip is decoded by restarts: the last C frames of u begin a new clip of F
frames, whose positions start at 0 again, and F - C more frames are decoded behind them, until there are enough. So

    p(u) = p(first F frames) Π_r p(the F - C frames of restart r | the C frames before them)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Key

from flowgen.arrays import check_count, check_floating, check_key
from flowgen.conditioning import Condition, TextCondition
from flowgen.decoding.block import DecodingBlock
from flowgen.decoding.guidance import Guidance
from flowgen.decoding.jacobi import Solution
from flowgen.decoding.plan import DecodePlan, Plan
from flowgen.decoding.sampler import Denoiser, Inversion, decode_blocks, denoised, denoising, report, steering
from flowgen.flows.affine import to_noise
from flowgen.flows.block import AutoregressiveBlock, block_parameters
from flowgen.flows.density import check_flow
from flowgen.flows.starflow_v import STARFlowV, STARFlowVConfig
from flowgen.nn.layers import master_dtype

CONTEXT = 0.75  # of the frames of a clip: 16 of 21, as published


class _Schedule(NamedTuple):
    """Which frames are decoded behind which.

    total: frames asked for. clip: those that the deep block sees together. given: those known from the start.
    context: those that a restart begins with.
    """

    total: int
    clip: int
    given: int
    context: int

    @property
    def begun(self) -> int:
        """Frames there are before the first restart."""
        return max(self.clip, self.given)

    @property
    def step(self) -> int:
        """Frames that a restart adds."""
        return self.clip - self.context

    @property
    def restarts(self) -> int:
        return -(-(self.total - self.begun) // self.step) if self.total > self.begun else 0

    @property
    def reached(self) -> int:
        """Frames after the last restart, `total` or more."""
        return self.begun + self.restarts * self.step

    @property
    def places(self) -> np.ndarray:
        """The place of every frame in the clip it is decoded in; given ones beyond the first clip have none, 0."""
        frames = np.arange(self.reached)
        later = self.context + (frames - self.begun) % max(self.step, 1)
        return np.where(frames < self.clip, frames, np.where(frames < self.begun, 0, later))


def sample_clips(
    flow: Any,
    params: Any,
    key: Key[Array, ""],
    num: int,
    cond: Integer[Array | np.ndarray, " b"] | list[int] | TextCondition | None = None,
    *,
    frames: int | None = None,
    given: Float[Array | np.ndarray, "b given height width c"] | None = None,
    context: int | None = None,
    restart_cond: Integer[Array | np.ndarray, " b"] | list[int] | TextCondition | None = None,
    plan: Plan | str = "auto",
    guidance: Guidance | None = None,
    null: TextCondition | None = None,
    denoise: bool | float | Denoiser = True,
    first: int = 0,
    certify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Inversion:
    """Returns `num` clips `b frames height width c` of any length from a `STARFlowV`, behind the frames that are given.

    frames: of a clip; None is as many as the flow models, F. given: the first frames as the flow models them, with
    noise; they come back as they are, before denoising. context: frames that a restart begins with, where there are
    more than F; None is 3/4 of F, rounded. restart_cond: what the frames of restarts are conditioned on instead of
    cond, such as the texts that clips without their first frame had in training.
    denoise: as for `sample`; the score is that of the density by which clips are decoded, with nothing given, and a
    `Denoiser` gets all frames, still noisy.
    plan, guidance, null, first: as for `sample`. The noise of a token depends on key, index of the clip and place of
    the token alone, and that of the first F frames is `sample`'s: before denoising, which looks ahead, a longer clip
    begins with the shorter one.
    progress: called on the host as progress(solved, total) whenever tokens of the deep block are solved, with how many
    and how many there are of a clip in all; the program, compiled for each such function, does not wait for it.
    The reports are those of `Inversion`: sweeps of the deep block clip after clip; the error that of frames not given.
    Raises ValueError as `sample` does, and where frames, given or context do not fit.

    Example:
        r = sample_clips(flow, params, jax.random.key(0), 2, texts, frames=41, given=noisy_first_frames)
    """
    check_flow(flow, params)
    check_key(key)
    check_count("num", num)
    config = flow.config
    if not isinstance(config, STARFlowVConfig):
        raise ValueError(f"flow is a {type(flow).__name__}, no flow of clips; give a STARFlowV, or use sample.")
    schedule = _schedule(config, num, frames, given, context)
    if restart_cond is not None and cond is None:
        raise ValueError("restart_cond is given, and cond is not; give both, or neither.")
    again = config.check_cond(cond if restart_cond is None else restart_cond, num)
    plan, guidance, conds, weights = steering(config, num, cond, plan, guidance, null)
    how, numbers = denoising(denoise, config)
    return _sample_clips(
        flow,
        params,
        key,
        first + jnp.arange(num),
        None if given is None else jnp.asarray(given, master_dtype(config.dtype)),
        conds,
        (again, conds[1]),
        weights,
        numbers,
        schedule=schedule,
        plan=plan,
        guidance=guidance,
        how=how,
        certify=certify,
        progress=progress,
    )


def _schedule(config: STARFlowVConfig, num: int, frames: int | None, given: Any, context: int | None) -> _Schedule:
    most = config.frames
    total = most if frames is None else frames
    check_count("frames", total)
    if given is not None:
        check_floating("given", given)
    if given is not None and (given.ndim != 5 or given.shape[0] != num or given.shape[2:] != config.image_shape):
        shape = ", ".join(map(str, config.image_shape))
        raise ValueError(f"given has shape {tuple(given.shape)}; this call takes ({num}, frames given, {shape}).")
    known = 0 if given is None else given.shape[1]
    if given is not None and not 1 <= known < total:
        raise ValueError(f"given has {known} frames and frames is {total}; give at least 1, and fewer than frames.")
    if total > most == 1:
        raise ValueError(f"frames is {total}; a flow of 1 frame has no room for a context: ask for 1.")
    if context is not None and not 1 <= context < most:
        raise ValueError(f"context is {context}; it must be from 1 to {most - 1}, less than the flow's {most} frames.")
    default = max(1, min(round(CONTEXT * most), most - 1))
    # Without restarts the context says nothing, and one program serves them all.
    return _Schedule(total, min(total, most), known, (default if context is None else context) if total > most else 0)


def _of_frames(flow: Any, frames: int) -> STARFlowV:
    """Returns the flow of the same parameters on clips of another length."""
    return type(flow)(flow.config.of_frames(frames), parent=None)


@partial(jax.jit, static_argnames=("flow", "schedule", "plan", "guidance", "how", "certify", "progress"))
def _sample_clips(
    flow,
    params,
    key,
    indices,
    given,
    conds,
    again,
    weights,
    numbers,
    *,
    schedule,
    plan,
    guidance,
    how,
    certify,
    progress,
) -> Inversion:
    per_frame, index = flow.config.tokens_per_image, len(plan.blocks) - 1
    total = (schedule.reached - schedule.given) * per_frame
    tell = None if progress is None else lambda count: progress(int(count), total)
    # The deep block in the first clip, and in restarts.
    deep = tuple(
        DecodingBlock(_of_frames(flow, schedule.clip), params, index, each, guidance, weights, tell)
        for each in (conds, again)
    )
    noise = _noise(flow, params, key, indices, schedule)
    known = None if given is None else _shallow_tokens(flow, params, given)[0]
    solution = _deep_solution(deep, known, noise, plan.blocks[-1], schedule)
    u = solution.x

    later = _of_frames(flow, schedule.total - schedule.given)
    shallow, guided = DecodePlan(plan.blocks[:-1]), guidance is not None
    decoded = u[:, schedule.given * per_frame : schedule.total * per_frame]
    tokens, solutions, errors = decode_blocks(
        later, params, decoded, conds, weights, shallow, guidance, certify and guided
    )
    x = later.to_images(tokens)
    x = x if given is None else jnp.concatenate([given, x], axis=1)
    if certify:
        seen = u if guided else _shallow_tokens(flow, params, x)[0]  # what is beyond `total` has no frames
        seen = jnp.concatenate([seen, u[:, seen.shape[1] :]], axis=1)
        errors.append(_deep_error(deep, seen, noise, schedule))
    step = partial(_score_step, flow, params, schedule._replace(given=0), again[0])
    return report(denoised(step, x, conds[0], how, numbers), [*solutions, solution], errors)


def _noise(flow, params, key, indices, schedule):
    """Noise tokens of all frames: those of the first F as `sample` draws them, each later frame from its own key."""
    most, per_frame, channels = flow.config.frames, flow.config.tokens_per_image, flow.config.token_dim
    master = master_dtype(flow.config.dtype)
    later = jnp.arange(most, max(schedule.reached, most))

    def of_sample(index):
        key_of_sample = jax.random.fold_in(key, index)  # drawn from as `sample` does, and parent of later frames' keys
        beginning = jax.random.normal(key_of_sample, (most * per_frame, channels), master)
        keys = jax.vmap(partial(jax.random.fold_in, key_of_sample))(later)
        rest = jax.vmap(lambda k: jax.random.normal(k, (per_frame, channels), master))(keys)
        return jnp.concatenate([beginning, rest.reshape(-1, channels)])[: schedule.reached * per_frame]

    variance = flow.apply(params, method="prior_variance").reshape(most, per_frame, channels)[schedule.places]
    return jax.vmap(of_sample)(indices) * jnp.sqrt(variance).reshape(1, -1, channels)


def _shallow_tokens(
    flow: Any, params: Any, x: Float[Array, "b frames height width c"]
) -> tuple[Float[Array, "b n token"], Float[Array, " b"]]:
    """Returns u, what the shallow blocks make of frames, and the logdet of that map, summed, in nats."""
    config = flow.config.of_frames(x.shape[1])
    tokens, logdet = config.to_tokens(x), jnp.zeros(len(x), x.dtype)
    for index, shape in enumerate(config.blocks[:-1]):
        block: Any = AutoregressiveBlock(shape)
        tokens, block_logdet = block.apply(block_parameters(params, index), tokens)
        logdet = logdet + block_logdet
    return tokens, logdet


def _deep_solution(deep, known, noise, plan, schedule):
    """Tokens u of all frames reached, given ones included, and the report over all clips."""
    per_frame = noise.shape[1] // schedule.reached
    first, again = deep
    solutions = []
    u = known
    if schedule.given < schedule.clip:
        z = noise[:, schedule.given * per_frame : schedule.clip * per_frame]
        new, solution = first.decode(z, plan, known)
        u = new if known is None else jnp.concatenate([known, new], axis=1)
        solutions.append(jax.tree.map(lambda part: part[None], solution._replace(x=None)))
    if schedule.restarts:

        def restart(prefix, z):
            new, solution = again.decode(z, plan, prefix)
            return jnp.concatenate([prefix, new], axis=1)[:, -prefix.shape[1] :], (new, solution._replace(x=None))

        prefix = u[:, -schedule.context * per_frame :]
        _, (new, solution) = jax.lax.scan(restart, prefix, _by_restart(noise, schedule))
        u = jnp.concatenate([u, new.swapaxes(0, 1).reshape(len(u), -1, u.shape[2])], axis=1)
        solutions.append(solution)
    sweeps = jnp.concatenate([s.sweeps.reshape(-1) for s in solutions])
    residual = jnp.concatenate([s.residual for s in solutions]).max(axis=0)
    overflows = jnp.concatenate([s.overflows for s in solutions]).sum(axis=0)
    return Solution(u, sweeps, residual, overflows)


def _by_restart(tokens, schedule):
    """The tokens that restarts add, restart by restart."""
    last = tokens[:, schedule.begun * (tokens.shape[1] // schedule.reached) :]
    return last.reshape(len(last), schedule.restarts, -1, last.shape[2]).swapaxes(0, 1)


def _clips(tokens, schedule):
    """The clips that restarts decode, context included, restart by restart."""
    per_frame = tokens.shape[1] // schedule.reached
    begin = (schedule.begun - schedule.context + schedule.step * np.arange(schedule.restarts)) * per_frame
    rows = begin[:, None] + np.arange(schedule.clip * per_frame)
    return tokens[:, rows].swapaxes(0, 1)


def _deep_error(deep, u, noise, schedule):
    """Largest difference per sample between the noise of what was decoded and that of the tokens it became."""
    per_frame = noise.shape[1] // schedule.reached
    first, again = deep
    errors = []
    if schedule.given < schedule.clip:
        clip = slice(0, schedule.clip * per_frame)
        change = jnp.abs(first.encode(u[:, clip]) - noise[:, clip])[:, schedule.given * per_frame :]
        errors.append(change.max(axis=(1, 2)))
    if schedule.restarts:

        def of_restart(inputs):
            clip, z = inputs
            return jnp.abs(again.encode(clip)[:, -z.shape[1] :] - z).max(axis=(1, 2))

        errors.append(jax.lax.map(of_restart, (_clips(u, schedule), _by_restart(noise, schedule))).max(axis=0))
    return jnp.stack(errors).max(axis=0)


def _score_step(flow, params, schedule, again, x, cond, *, strength):
    """x + strength · σ² ∇ log p(x | cond), with the density of a clip as it is decoded where nothing is given.

    again: the condition of restarts.
    """
    gradient = jax.grad(lambda x: _log_prob(flow, params, schedule, x, cond, again).sum())(x)
    return x + strength * flow.config.noise_std**2 * gradient


def _log_prob(
    flow: Any,
    params: Any,
    schedule: _Schedule,
    x: Float[Array, "b frames height width c"],
    cond: Condition | None,
    again: Condition | None,
) -> Float[Array, " b"]:
    """Returns log p(x | cond) in nats of clips of any length, decoded by a schedule that gives no frames."""
    config = flow.config.of_frames(schedule.clip)
    block: Any = AutoregressiveBlock(config.blocks[-1])
    variables = block_parameters(params, len(config.blocks) - 1)
    u, total = _shallow_tokens(flow, params, x)
    per_frame = config.tokens_per_image
    variance = flow.apply(params, method="prior_variance")[: schedule.clip * per_frame]

    def terms(cond, clip):
        """log p of every token of a clip, given those before it."""
        previous = block.apply(variables, clip, method="previous")
        shift, log_scale, _ = block.apply(variables, previous, 0, cond, None, None, method="conditioner")
        z, _ = to_noise(clip, shift, log_scale)
        return (-0.5 * (jnp.square(z) / variance[None] + jnp.log(2 * jnp.pi * variance)[None]) - log_scale).sum(axis=2)

    total = total + terms(cond, u[:, : schedule.clip * per_frame]).sum(axis=1)
    if not schedule.restarts:
        return total
    beyond = (schedule.reached - schedule.total) * per_frame
    padded = jnp.pad(u, ((0, 0), (0, beyond), (0, 0)))
    new = jax.lax.map(partial(terms, again), _clips(padded, schedule))[:, :, schedule.context * per_frame :]
    new = new.swapaxes(0, 1).reshape(len(x), -1)
    return total + new[:, : new.shape[1] - beyond].sum(axis=1)
