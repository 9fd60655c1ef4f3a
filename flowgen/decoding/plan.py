"""Decoding plans: which tokens are solved together, and when a solution is good enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from flowgen import backend
from flowgen.settings import config
from flowgen.settings.ranges import Count, NonNegative

InitialGuess = Literal["noise", "zeros", "previous_frame", "draft"]
StopRule = Literal["max_change", "relative_mse"]
RoundedDtype = Literal["int8", "bfloat16"]

# On an accelerator, a pass over up to this many rows (batch x branches x window) takes about as long as a pass over one
# row. The exact limit is the peak bf16 FLOP/s divided by the memory bandwidth in bytes/s. It is between 206 (H200) and
# 295 (H100) for GPUs, and between 166 (v5p) and 560 (v6e) for TPUs.
FREE_ROWS = 256
MIN_PARALLEL_WINDOW = 8
AUTO_TOLERANCE = 1e-4


@config
class Sequential:
    """Decodes one token after another with a cache. The result is exact up to rounding; each token takes one pass.

    Example:
        r = invert(flow, params, z, cond, plan=Sequential())
    """


@config
class Jacobi:
    """Decodes windows of tokens in order, each by fixed-point sweeps, with a cache for the earlier windows.

    In each window, decoding repeats the sweep x <- shift(x) + exp(log_scale(x)) · z. By default, a sample is frozen
    once a sweep changes none of its tokens in the window by more than `tol` (max norm, in the units of the block's
    tokens). After k sweeps, the first k tokens of a window are exact.

    window: number of tokens solved together; None means one window over all tokens, and 1 means sequential decoding.
    tol: a sample counts as solved after a sweep in which its tokens changed by at most this much; with 0, it is exact.
    max_sweeps: largest number of sweeps per window; None allows one per token of the window, which is always enough.
    init: initial guess for a window. "noise" is the noise itself, "zeros" is all zeros, "previous_frame" is the tokens
    of the previous frame, and "draft" is the tokens that a `Draft` proposes. If there is no previous frame,
    "previous_frame" falls back to the noise; if a block has no draft, so does "draft".
    stop: the rule that decides when a window is solved. "max_change" freezes each sample by itself, as described above.
    "relative_mse" is the rule of STARFlow and STARFlow-V (arXiv 2511.20462): all samples stop together once mean((new -
    old)²) / mean(new²) is at most `tol`, where old and new are the tokens before and after a sweep, and the means are
    over the batch and the window. This rule is meant for comparison with these papers. It can stop far from the
    solution, because a mean hides a few tokens that still change, and it makes each sample depend on its batch.

    Example:
        r = invert(flow, params, z, cond, plan=Jacobi(window=32, tol=1e-4))
    """

    window: Count | None = None
    tol: NonNegative = 1e-4
    max_sweeps: Count | None = None
    init: InitialGuess = "noise"
    stop: StopRule = "max_change"


@config
class SlidingWindow:
    """Decodes each sample by sweeps over a window of tokens, which advances past one or more solved tokens per sweep.

    In each sample, a sweep accepts the window's leading tokens that changed by at most `tol`, plus the next token (Song
    et al. 2021, arXiv 2002.03629). With `tol=0`, the solution is exact. Otherwise, each returned token is within `tol`
    of the value implied by the tokens before it. A sample takes at most one sweep per token. A sample does not depend
    on the other samples in its batch.

    window: number of tokens in the window; None means all tokens.
    tol: a token counts as solved if a sweep changes it by at most this much; with 0, the result is exact.
    init: initial guess for tokens that enter the window; the values are those of `init` of `Jacobi`.

    Example:
        r = invert(flow, params, z, cond, plan=SlidingWindow(window=32, tol=1e-4))
    """

    window: Count | None = 32
    tol: NonNegative = 1e-4
    init: InitialGuess = "noise"


SolverPlan = Sequential | Jacobi | SlidingWindow


@config
class LowPrecision:
    """Decodes a block with rounded weights, then repairs the tokens with the unrounded weights.

    `plan` decodes the block as if the rounded weights were its weights. `polish` then starts from the result of `plan`
    and solves with the unrounded weights, so the error depends on the tolerance of `polish`, and not on the rounding.

    dtype: "int8" stores the weights of the layers' linear maps in 8 bits, with one scale per output; the weights of a
    few inputs keep full precision (LLM.int8, arXiv 2208.07339). Products keep the flow's dtype. "bfloat16" uses
    bfloat16 for all weights of linear maps, for matrix products and for caches.
    plan: how to decode with the rounded weights.
    polish: how to repair the tokens. None returns them as they are; `sweeps`, `residual` and `unsolved` of the result
    then describe the block with rounded weights, but `error` (with `certify=True`) is measured with the unrounded
    weights.

    Example:
        r = invert(flow, params, z, cond, plan=LowPrecision(dtype="int8"))
    """

    dtype: RoundedDtype = "int8"
    plan: SolverPlan = Sequential()
    polish: Jacobi | SlidingWindow | None = Jacobi()

    def __post_init__(self):
        if self.polish is not None and self.polish.init != "noise":
            raise ValueError(
                f"polish.init is {self.polish.init!r}, but a polish starts from the decoded tokens; leave it out."
            )


BlockPlan = SolverPlan | LowPrecision


@config
class DecodePlan:
    """One plan per block, data side first, for flows whose blocks converge at different rates.

    Example:
        plan = DecodePlan((Jacobi(), Jacobi(), Sequential()))
    """

    blocks: tuple[BlockPlan, ...]


Plan = BlockPlan | DecodePlan


def resolve_plan(plan: Plan | str, *, rows: Sequence[int]) -> DecodePlan:
    """Returns a `DecodePlan` with one plan for each block of a flow.

    plan: a plan, "auto", or "sequential", "jacobi" or "sliding" for `Sequential()`, `Jacobi()` or `SlidingWindow()`. On
    a CPU, where the cost of a pass grows with the number of rows, "auto" is sequential. On accelerators, "auto" gives
    each block `Jacobi` with a window of 256 / rows tokens, for which a pass still takes about as long as a pass over
    one token; if this window is shorter than 8 tokens, the block is decoded sequentially. With "auto", the batch size
    therefore has a small effect on the result, which the tolerance of 1e-4 limits. No other plan depends on the batch
    size.

    rows: number of rows per token in each block, data side first: the batch size, times 2 if the block is guided, times
    the number of frames that the block maps independently.

    Raises ValueError if `plan` is neither a plan nor the name of one, or is a `DecodePlan` for another number of
    blocks.

    Example:
        plan = resolve_plan("auto", rows=(16, 16, 16, 32))
    """
    num_blocks = len(rows)
    if isinstance(plan, str):
        plan = DecodePlan(tuple(_named_plan(plan, of_block) for of_block in rows))
    if isinstance(plan, DecodePlan):
        if len(plan.blocks) != num_blocks:
            raise ValueError(f"plan has {len(plan.blocks)} blocks, but the flow has {num_blocks}; give one per block.")
        return plan
    if not isinstance(plan, BlockPlan):
        raise ValueError(
            f"plan is {plan!r}; it must be Sequential(), Jacobi(...), SlidingWindow(...), LowPrecision(...), "
            "DecodePlan(...) or a name."
        )
    return DecodePlan((plan,) * num_blocks)


def solver_plans(plan: BlockPlan) -> tuple[SolverPlan, ...]:
    """Returns the plans that solve a block, in the order in which they run."""
    if not isinstance(plan, LowPrecision):
        return (plan,)
    return (plan.plan,) if plan.polish is None else (plan.plan, plan.polish)


def rounded_dtypes(plan: DecodePlan) -> tuple[RoundedDtype | None, ...]:
    """Returns the dtype of each block's rounded weights; None for blocks without rounded weights."""
    return tuple(block.dtype if isinstance(block, LowPrecision) else None for block in plan.blocks)


def _named_plan(name: str, rows: int) -> BlockPlan:
    window = FREE_ROWS // max(rows, 1)
    parallel = backend.platform() != "cpu" and window >= MIN_PARALLEL_WINDOW
    plans: dict[str, Any] = {
        "sequential": Sequential(),
        "jacobi": Jacobi(),
        "sliding": SlidingWindow(),
        "auto": Jacobi(window=window, tol=AUTO_TOLERANCE) if parallel else Sequential(),
    }
    if name not in plans:
        raise ValueError(f"plan is {name!r}; choose one of {', '.join(plans)}.")
    return plans[name]
