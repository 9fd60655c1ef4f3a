"""`tune`, which measures decoding plans on this device and returns the fastest one for each block.

The samples x are encoded, so that every block's noise and tokens are known. Each plan then decodes this noise, and
`tune` counts its passes and measures its largest difference from the known tokens. The time of a pass is measured once
for all blocks of the same shape. The predicted time is the number of passes times the time of a pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flowgen.arrays import check_count, check_floating
from flowgen.attention import causal_kernel
from flowgen.conditioning import AnyCondition
from flowgen.decoding.block import GuidedBlock, block_states, guided_block, in_block_order, inverse
from flowgen.decoding.draft import Draft, begins_with_draft
from flowgen.decoding.jacobi import Solution, ignore
from flowgen.decoding.plan import (
    AUTO_TOLERANCE,
    DecodePlan,
    InitialGuess,
    Jacobi,
    Sequential,
    SlidingWindow,
    SolverPlan,
)
from flowgen.decoding.request import DecodeRequest, decode_request
from flowgen.decoding.weights import decoding_weights
from flowgen.flows.block import BlockConfig, Variables
from flowgen.flows.decoding_form import decoding_config
from flowgen.flows.density import Flow, check_flow
from flowgen.flows.orders import without_padding
from flowgen.guidance import Guidance
from flowgen.nn.layers import master_dtype

# Windows that are tried by default, if they are shorter than the block. All tokens together are tried for blocks of at
# most LONGEST tokens, because a pass over a longer sequence that is repeated many times could take hours.
WINDOWS = (8, 32, 128, 512)
LONGEST = 1024
# A plan may exceed the error of sequential decoding by this many times its tolerance. A token whose last change is
# within the tolerance can be several times as far from its solution.
ERROR_PER_TOLERANCE = 10
# Clocks are not exact. A plan is only chosen over a simpler one if it is faster by more than this fraction.
CLOCK_NOISE = 0.05
# Other initial guesses are tried for parallel plans that would be the fastest with this many times fewer passes.
SAVED_BY_GUESS = 2
REPEATS = 3
SECONDS = 20.0  # no further repeats of the measurements of a block once they have taken this long

Cost = Callable[[int, SolverPlan], float]


class Measurement(NamedTuple):
    """The results of decoding one block by one plan.

    block: the index of the block, counted from 0 on the data side.
    passes: total number of network passes, over all windows.
    error: largest difference between the decoded tokens and the known tokens; infinite if decoded values overflowed.
    seconds: predicted time of decoding: `passes` times the time of a pass, which is measured or given by `cost` of
    `tune`.
    """

    block: int
    plan: SolverPlan
    passes: int
    error: float
    seconds: float


class Tuning(NamedTuple):
    """The fastest plan of each block, and the measurements of all plans.

    Example:
        print("\\n".join(measure_plans(flow, params, x).lines()))
    """

    plan: DecodePlan
    measurements: tuple[Measurement, ...]

    def of_block(self, block: int) -> list[Measurement]:
        """Returns the measurements of a block, sequential decoding first; block 0 is on the data side."""
        return [found for found in self.measurements if found.block == block]

    @property
    def chosen(self) -> list[Measurement]:
        """The measurements of the chosen plan, one per block."""
        return [
            next(found for found in self.of_block(block) if found.plan == plan)
            for block, plan in enumerate(self.plan.blocks)
        ]

    def lines(self) -> list[str]:
        """Returns the lines of a table that compares the chosen plan with sequential decoding."""
        sequential = [self.of_block(block)[0].seconds for block in range(len(self.plan.blocks))]
        lines = [f"{'block':>5}  {'plan':<28} {'passes':>6} {'ms':>9} {'sequential ms':>13}  error"]
        for found, reference in zip(self.chosen, sequential, strict=True):
            lines.append(
                f"{found.block:>5}  {_described(found.plan):<28} {found.passes:>6} {1e3 * found.seconds:>9.2f} "
                f"{1e3 * reference:>13.2f}  {found.error:.1e}"
            )
        passes, total = sum(found.passes for found in self.chosen), sum(found.seconds for found in self.chosen)
        return [*lines, f"{'all':>5}  {'':<28} {passes:>6} {1e3 * total:>9.2f} {1e3 * sum(sequential):>13.2f}"]


def tune(
    flow: Flow,
    params: Variables,
    x: Float[Array | np.ndarray, "b *event"],
    cond: AnyCondition | None = None,
    *,
    guidance: Guidance | None = None,
    draft: Draft | None = None,
    tol: float = AUTO_TOLERANCE,
    windows: Sequence[int | None] | None = None,
    cost: Cost | None = None,
) -> DecodePlan:
    """Returns the fastest accepted plan of each block, measured with batches of the size of x on this device.

    A plan is accepted if its tokens differ from the block's known tokens by at most 10 · tol plus twice the largest
    difference of sequential decoding, which is due to rounding. A simpler plan is preferred if it is at most 5 % slower
    than the fastest accepted plan. Sequential decoding is the simplest, then `Jacobi`, then `SlidingWindow`.

    Most of the time that `tune` takes is spent on compilation, once per plan and block shape. With the default windows,
    up to twelve plans are measured per block, or thirteen with a draft.

    x: images or clips with the training noise, such as undenoised samples of the flow. cond, guidance: the condition of
    x, and the guidance with which the plan will be used.
    draft: a draft with which the best parallel plan is also measured. The time of the draft itself is not counted.
    tol: tolerance of the parallel plans.
    windows: the window sizes to try, in tokens; an entry None means all tokens of the block. By default, these are 8,
    32, 128 and 512 and, in blocks of at most 1024 tokens, all tokens.
    cost: a function (block index, plan) -> seconds per pass, such as the result of `predicted_cost` for another device.
    None means that passes are timed on this device.

    Raises ValueError if x, cond, guidance or draft does not fit the flow, or if a window is not positive.

    Example:
        x = sample(flow, params, key, 8, plan="sequential", denoise=False).x
        plan = tune(flow, params, x)
        r = sample(flow, params, key, 8, plan=plan)
    """
    tuning = measure_plans(flow, params, x, cond, guidance=guidance, draft=draft, tol=tol, windows=windows, cost=cost)
    return tuning.plan


def measure_plans(
    flow: Flow,
    params: Variables,
    x: Float[Array | np.ndarray, "b *event"],
    cond: AnyCondition | None = None,
    *,
    guidance: Guidance | None = None,
    draft: Draft | None = None,
    tol: float = AUTO_TOLERANCE,
    windows: Sequence[int | None] | None = None,
    cost: Cost | None = None,
) -> Tuning:
    """Returns the plan that `tune` returns for the same arguments, and all measurements.

    Example:
        tuning = measure_plans(flow, params, x, windows=(8, 16, None))
    """
    check_flow(flow, params)
    check_floating("x", x)
    flow.config.check_samples(x)
    if not len(x):
        raise ValueError("x is empty; give at least one sample.")
    for window in windows or ():
        if window is not None:
            check_count("windows", window)
    params = jax.tree.map(jnp.asarray, params)
    tokens = flow.config.to_tokens(jnp.asarray(x, master_dtype(flow.config.dtype)))
    request = decode_request(flow, params, tokens, cond, "sequential", guidance, draft=draft)
    blocks = _known_blocks(request, without_padding(tokens, request.cond))
    grids = [_grid(block.config, block.n, tol, windows) for block in blocks]
    seconds = _measured_cost(blocks, grids) if cost is None else cost
    found = []
    for block, grid in zip(blocks, grids, strict=True):
        measured = [_measured(block, plan, seconds(block.index, plan)) for plan in grid]
        for plan in _other_guesses(measured, block, tol):
            measured.append(_measured(block, plan, seconds(block.index, replace(plan, init="noise"))))
        found.append(measured)
    plan = DecodePlan(tuple(_fastest(measured, tol).plan for measured in found))
    return Tuning(plan, tuple(one for measured in found for one in measured))


@dataclass(frozen=True)
class _KnownBlock:
    """A block whose noise and tokens are known. draft, layers: see `flowgen.decoding.block.inverse`."""

    index: int
    config: BlockConfig
    guided: GuidedBlock
    noise: Float[Array, "b n c"]
    tokens: Float[Array, "b n c"]
    draft: Float[Array, "b n c"] | None
    layers: int

    @property
    def n(self) -> int:
        """Number of tokens to decode one after another."""
        return self.config.num_tokens - self.guided.block.num_passthrough

    @property
    def shape(self) -> tuple[BlockConfig, bool]:
        """A key that is equal for blocks that share compiled programs."""
        return self.guided.block.config, self.guided.guidance is not None

    def decoded(self, plan: SolverPlan) -> Solution:
        """Returns the solution for the block's noise, once the device has computed it."""
        guided, order = in_block_order(self.config, self.guided)
        draft = self.draft if begins_with_draft(plan) else None
        own = guided, self.noise, order, None, None, draft
        return jax.block_until_ready(inverse(*own, plan=plan, layers=self.layers, solved=ignore))


def _known_blocks(request: DecodeRequest, tokens: Float[Array, "b n c"]) -> list[_KnownBlock]:
    """Returns the flow's blocks, data side first, with the tokens and noise that encoding these tokens yields."""
    config, blocks = request.flow.config, []
    weights = decoding_weights(config, request.params)
    states = block_states(request, tokens)
    for index, of_block in enumerate(config.blocks):
        guided = guided_block(request, decoding_config(of_block), index, weights[index])
        noise, layers = states[index + 1], of_block.transformer.num_layers
        draft = None if request.draft is None else request.draft.of_block(index, noise, guided.cond)
        blocks.append(_KnownBlock(index, of_block, guided, noise, states[index], draft, layers))
    return blocks


def _grid(config: BlockConfig, n: int, tol: float, windows: Sequence[int | None] | None) -> list[SolverPlan]:
    """The plans to measure for a block of n tokens, simplest first, with the noise as initial guess."""
    asked = [*WINDOWS, *[None] * (n <= LONGEST)] if windows is None else windows
    shorter = sorted({window for window in asked if window is not None and window < n})
    whole = [None] * any(window is None or (windows is not None and window >= n) for window in asked)
    slides = causal_kernel(config.transformer.attention).can_slide
    sliding = [SlidingWindow(window=window, tol=tol) for window in shorter] if slides else []
    return [Sequential(), *(Jacobi(window=window, tol=tol) for window in [*shorter, *whole]), *sliding]


def _measured_cost(blocks: Sequence[_KnownBlock], grids: Sequence[Sequence[SolverPlan]]) -> Cost:
    """Returns the function (block number, plan) -> measured seconds per pass.

    The plans run in turn, and each plan's shortest time is used, because other work on the machine can only slow a run.
    """
    shortest: dict[tuple, float] = {}
    for block, grid in zip(blocks, grids, strict=True):
        if (block.shape, grid[0]) in shortest:
            continue
        passes = {plan: int(block.decoded(plan).sweeps.sum()) for plan in grid}  # also compiles the programs
        began = time.perf_counter()
        for repeat in range(REPEATS):
            if repeat and time.perf_counter() - began > SECONDS:
                break
            for plan in grid:
                start = time.perf_counter()
                block.decoded(plan)
                seconds = (time.perf_counter() - start) / max(passes[plan], 1)
                shortest[block.shape, plan] = min(seconds, shortest.get((block.shape, plan), seconds))
    shapes = [block.shape for block in blocks]
    return lambda index, plan: shortest[shapes[index], plan]


def _measured(block: _KnownBlock, plan: SolverPlan, seconds: float) -> Measurement:
    solution = block.decoded(plan)
    error = float(jnp.abs(solution.x - block.tokens).max())
    passes = int(solution.sweeps.sum())
    return Measurement(block.index, plan, passes, error if error == error else float("inf"), passes * seconds)


def _other_guesses(measured: Sequence[Measurement], block: _KnownBlock, tol: float) -> list[Jacobi | SlidingWindow]:
    """The best parallel plans with other initial guesses, unless sequential decoding is much faster.

    The previous frame is not tried for one window over all tokens, which has no previous frame.
    """
    most = SAVED_BY_GUESS * measured[0].seconds
    fast = sorted((found for found in _accepted(measured, tol) if found.seconds <= most), key=lambda one: one.seconds)
    parallel = [found.plan for found in fast if not isinstance(found.plan, Sequential)]
    positions = block.config.positions
    has_frames = positions is not None and positions.frames > 1
    windows = [plan for plan in parallel if plan.window is not None and has_frames]
    guesses: list[InitialGuess] = ["zeros"] if block.draft is None else ["zeros", "draft"]
    others = [replace(plan, init=guess) for plan in parallel[:1] for guess in guesses]
    return others + [replace(plan, init="previous_frame") for plan in windows[:1]]


def _accepted(measured: Sequence[Measurement], tol: float) -> list[Measurement]:
    """The measurements whose error is small enough, and always that of sequential decoding, which comes first."""
    sequential, *others = measured
    most = 2 * sequential.error + ERROR_PER_TOLERANCE * tol  # Sequential decoding is exact, except for rounding.
    return [sequential, *(found for found in others if found.error <= most)]


def _fastest(measured: Sequence[Measurement], tol: float) -> Measurement:
    accepted = _accepted(measured, tol)
    least = min(found.seconds for found in accepted)
    return next(found for found in accepted if found.seconds <= (1 + CLOCK_NOISE) * least)


def _described(plan: SolverPlan) -> str:
    """A plan in a few words, such as "jacobi 8, from zeros"."""
    if isinstance(plan, Sequential):
        return "sequential"
    name = "jacobi" if isinstance(plan, Jacobi) else "sliding"
    guess = "" if plan.init == "noise" else f", from {plan.init.replace('_', ' ')}"
    return f"{name} {'all' if plan.window is None else plan.window}{guess}"
