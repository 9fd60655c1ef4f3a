"""`DecodeRequest` states what to decode and how. It is checked once and then passed to the compiled programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from flowgen.arrays import is_number, shown
from flowgen.attention import causal_kernel
from flowgen.backend import rows_on_device
from flowgen.conditioning import AnyCondition, Condition, TextCondition, split_padded
from flowgen.decoding.clips import Clip, checked_clip, clip_layout
from flowgen.decoding.draft import Draft, check_draft
from flowgen.decoding.layout import ClipLayout, Segments
from flowgen.decoding.plan import DecodePlan, Plan, SlidingWindow, resolve_plan, rounded_dtypes, solver_plans
from flowgen.flows.block import Variables
from flowgen.flows.density import Flow, FlowConfig
from flowgen.guidance import Guidance


class DecodeResult(NamedTuple):
    """Decoded images or clips, and reports on the decoding.

    x: images `b height width c` or clips `b frames height width c`, whose values are not limited to a range.
    sweeps: number of network passes until the slowest sample was solved, for each block (data side first) and window; 0
    for windows that a block does not have. A block decoded by `SlidingWindow` has a single entry, for all its passes.
    For a block decoded by `LowPrecision`, the entries for `polish` follow those for `plan`.
    residual: for each sample, the largest change of a token (max norm) in the last sweep over any window of any block;
    0 if there were enough sweeps to make x exact.
    overflows: for each sample, the number of values in all sweeps that were not finite or exceeded 1e6 in magnitude.
    unsolved: for each block and window, as in `sweeps`, whether a sample was left without a solution, because
    `max_sweeps` was reached or its tokens overflowed.
    finite: for each sample, whether all values of x are finite.
    error: with `certify`, the largest |forward(x) - z| over the tokens of each sample, with x before denoising;
    otherwise None. With guidance, there is no forward pass through all blocks, so the error is the largest such
    difference in any single block.
    error_estimate: with `certify`, a first-order estimate, for each sample, of the largest difference between x before
    denoising and the exact solution, in data units; otherwise None. It is infinite if no estimate was found, for
    example because a block amplifies errors too much from token to token; see `flowgen.decoding.certificate`.
    """

    x: Float[Array, "b *event"]
    sweeps: Int[Array, "blocks windows"]
    residual: Float[Array, " b"]
    overflows: Int[Array, " b"]
    unsolved: Bool[Array, "blocks windows"]
    finite: Bool[Array, " b"]
    error: Float[Array, " b"] | None
    error_estimate: Float[Array, " b"] | None


def unsolved_problem(result: DecodeResult) -> str:
    """Returns a sentence about the first unsolved window of a result; empty if all windows are solved."""
    unsolved = np.asarray(result.unsolved)
    if not unsolved.any():
        return ""
    blocks, windows = np.nonzero(unsolved)
    block = int(blocks.max())  # The last block is decoded first.
    window = int(windows[blocks == block].min())
    sweeps = int(np.asarray(result.sweeps)[block, window])
    overflowed = not np.isfinite(np.asarray(result.residual)).all()
    return (
        f"Decoding left window {window} of block {block} unsolved after {sweeps} sweep{'s' * (sweeps != 1)}, and "
        f"{unsolved.sum() - 1} other windows (blocks and windows count from 0, blocks from the data side): "
        + ("values overflowed; lower the guidance." if overflowed else "raise the plan's max_sweeps or its tol.")
    )


class SampleKeys(NamedTuple):
    """The key and the sample indices from which noise is drawn. Sample i uses fold_in(key, i)."""

    key: Key[Array, ""]
    indices: Int[Array, " b"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TweedieStep:
    """The step x + strength · σ² ∇ log p(x | cond), with the flow's own score."""

    strength: Float[Array, ""] | float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Denoiser:
    """A learned denoiser for `sample(denoise=...)`, which replaces the Tweedie step.

    The denoised images or clips are function(variables, noisy, cond), for a whole batch.

    Example:
        r = sample(flow, params, key, 16, labels, denoise=Denoiser(network.apply, network_variables))
    """

    function: Callable[..., Float[Array, "b *event"]] = field(metadata={"static": True})
    variables: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeRequest:
    """A checked description of what to decode and how. Only changes to static fields cause recompilation.

    noise: noise tokens in raster order, or the keys from which to draw them.
    cond: the condition of all samples.
    plan: one plan per block.
    clip: length, first frames and restarts of the clips; an image is a clip of one frame.
    guidance: None if guidance changes no block; otherwise, its `blocks` lists the blocks that it changes.
    certify: whether to measure and estimate the error.
    denoise: the step that removes the training noise from the result.
    draft: proposes the tokens of blocks whose plan has init="draft".
    """

    flow: Flow = field(metadata={"static": True})
    params: Variables
    noise: Float[Array, "b n c"] | SampleKeys
    cond: Condition | None
    plan: DecodePlan = field(metadata={"static": True})
    clip: Clip
    guidance: Guidance | None = None
    denoise: TweedieStep | Denoiser | None = None
    certify: bool = field(default=False, metadata={"static": True})
    draft: Draft | None = None

    def with_params(self, params: Variables) -> DecodeRequest:
        """Returns the request with parameters and without a plan, for programs that do not solve for tokens."""
        return replace(self, params=params, plan=DecodePlan(()))

    @property
    def layout(self) -> ClipLayout:
        """How the frames are split into segments."""
        return clip_layout(self.clip, self.flow.config)

    @property
    def rows(self) -> Array:
        """The samples' indices, or their noise if it was given."""
        return self.noise.indices if isinstance(self.noise, SampleKeys) else self.noise

    @property
    def by_sample(self) -> tuple[Any, ...]:
        """Pytrees of the arrays that have one row per sample."""
        null = None if self.guidance is None else self.guidance.null
        return self.rows, self.cond, self.clip, null if null is not None and len(null.mask) > 1 else None

    def condition_of(self, part: Segments) -> Condition | None:
        """Returns the condition for decoding these segments."""
        restart_cond = self.clip.restart_cond
        assert not isinstance(restart_cond, list | np.ndarray)  # a checked clip has arrays
        return restart_cond if part.is_restart else self.cond


def decode_request(
    flow: Flow,
    params: Variables,
    noise: Float[Array, "b n c"] | SampleKeys,
    cond: AnyCondition | None,
    plan: Plan | str,
    guidance: Guidance | None = None,
    clip: Clip | None = None,
    draft: Draft | None = None,
) -> DecodeRequest:
    """Returns a checked request to decode noise. `certify` and `denoise` have their default values.

    clip: None means samples of the size that the flow models.

    Raises ValueError if cond, plan, guidance, clip or draft does not fit the flow.
    """
    config = flow.config
    rows = noise.indices if isinstance(noise, SampleKeys) else noise
    batch = len(rows)
    cond = config.check_cond(cond, batch)
    guidance = _active(guidance, cond, config)
    if guidance is not None:
        guidance = replace(guidance, null=_checked_null(guidance.null, config, batch))
    resolved = _resolve(plan, guidance, config, rows_on_device(rows))
    check_draft(draft, resolved, config, clip)
    return DecodeRequest(
        flow=flow,
        params=params,
        noise=noise,
        cond=cond,
        plan=resolved,
        clip=checked_clip(clip, config, cond, batch),
        guidance=guidance,
        draft=draft,
    )


def resolve_denoise(
    denoise: bool | float | Array | np.ndarray | Denoiser, noise_std: float
) -> TweedieStep | Denoiser | None:
    """Returns the denoising step for noise of this standard deviation; None if the strength or the noise is 0."""
    if isinstance(denoise, Denoiser):
        return denoise
    traced = isinstance(denoise, Tracer)
    if not is_number(denoise) or not (traced or 0 <= denoise < float("inf")):
        raise ValueError(
            f"denoise is {shown(denoise)}; it must be True, False, a strength of at least 0, or a Denoiser."
        )
    if noise_std == 0 or not (traced or denoise):
        return None
    return TweedieStep(denoise if traced else float(denoise))


def _active(guidance: Guidance | None, cond: Condition | None, config: FlowConfig) -> Guidance | None:
    """The guidance, with `blocks` set to the blocks that it changes; None if it changes no block."""
    if guidance is not None and not isinstance(guidance, Guidance):
        raise ValueError(f"guidance is {shown(guidance)}; it must be Guidance(scale=...) or None.")
    if guidance is None or _is(guidance.scale, 0):
        return None
    same_temperature = _is(guidance.temperature, 1)
    if same_temperature and split_padded(cond)[1] is None:
        return None
    blocks = tuple(range(config.num_blocks)) if guidance.blocks is None else guidance.blocks
    outside = [index for index in blocks if not 0 <= index < config.num_blocks]
    if outside:
        raise ValueError(
            f"guidance.blocks contains {outside[0]}, but this flow has blocks 0 to {config.num_blocks - 1}."
        )
    if same_temperature:  # both branches of an unconditional block are then the same
        blocks = tuple(index for index in blocks if config.blocks[index].is_conditional)
    if not blocks:
        return None
    if any(config.blocks[index].elementwise is not None for index in blocks):
        raise ValueError("guidance is set, but it combines affine maps, and this flow has another map; leave it out.")
    attention = config.blocks[0].transformer.attention
    if not same_temperature and not causal_kernel(attention).has_temperature:
        traced = isinstance(guidance.temperature, Tracer)
        raise ValueError(
            f"guidance.temperature must be 1, not {'a traced number' if traced else guidance.temperature}, because "
            f"{attention!r} attention has no temperature."
            + " Build the Guidance inside your jit, without a temperature."
            * traced
        )
    return replace(guidance, blocks=blocks)


def _is(value: float | Array, number: int) -> bool:
    """Whether a value equals a number; False for a value that is traced inside jit."""
    return not isinstance(value, Tracer) and bool(value == number)


def _checked_null(null: TextCondition | None, config: FlowConfig, batch: int) -> TextCondition | None:
    """The text for the unconditional branch, after checks; None if the flow is not conditioned on texts."""
    if not config.text_dim:
        if null is not None:
            raise ValueError("guidance.null is only for flows conditioned on text; leave it out.")
        return None
    if null is None:
        raise ValueError(
            "guidance.null is missing; this flow is conditioned on text, so set it to the encoded empty text."
        )
    checked = config.check_cond(null, 1 if len(null.mask) == 1 else batch)
    assert isinstance(checked, TextCondition)
    return checked


def _resolve(plan: Plan | str, guidance: Guidance | None, config: FlowConfig, batch: int) -> DecodePlan:
    guided = () if guidance is None or guidance.blocks is None else guidance.blocks
    rows = [batch * block.frames * (2 if index in guided else 1) for index, block in enumerate(config.blocks)]
    resolved = resolve_plan(plan, rows=rows)
    attention = config.blocks[0].transformer.attention
    slides = any(isinstance(part, SlidingWindow) for block in resolved.blocks for part in solver_plans(block))
    if slides and not causal_kernel(attention).can_slide:
        raise ValueError(
            f"plan contains a SlidingWindow, but {attention!r} attention has no `accept`, which adds a part of a "
            "window to the cache; define it, or use Jacobi or Sequential."
        )
    if config.dtype in rounded_dtypes(resolved):
        raise ValueError(
            f'plan.dtype is {config.dtype!r}, in which this flow computes anyway; use the inner plan, or "int8".'
        )
    return resolved
