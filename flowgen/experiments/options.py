"""Options for autoregressive flows: the groups `likelihood` and `sampling` of their experiments."""

from __future__ import annotations

from typing import Literal

from flowgen.decoding import DecodePlan, Guidance, Jacobi, SlidingWindow
from flowgen.decoding.draft import begins_with_draft
from flowgen.decoding.plan import BlockPlan, Plan
from flowgen.flows.jacobi_error import JacobiPenalty
from flowgen.guidance import Parts, Rule
from flowgen.settings import config
from flowgen.settings.ranges import NonNegative, Positive, Samples, Tokens
from flowgen.training import OptimConfig

# Noise std of the published model; `noise_weight` scales the loss relative to it.
REFERENCE_NOISE = 0.3
# Optimizer fields that only `optim` sets, for all parameters.
_OF_ALL_PARAMETERS = ("ema_decay", "ema_warmup", "max_skips")


@config
class LikelihoodConfig:
    """Options of the maximum-likelihood training of a flow.

    norm_penalty: weight of the penalty on the mean square of each block's input; 1e-4 as published, 0 for none.
    jacobi: penalty that speeds up parallel decoding, usually in a short fine-tuning with --init-from; None for none.
    noise_weight: multiply the loss by σ / 0.3, where σ is the training noise level. The published training does this if
    prompts state σ.
    denoiser: optimizer options for a video flow's denoiser; None uses the same values as `optim`. ema_decay,
    ema_warmup and max_skips cannot be set here, because `optim` sets them for all parameters.
    """

    norm_penalty: NonNegative = 0.0
    jacobi: JacobiPenalty | None = None
    noise_weight: bool = False
    denoiser: OptimConfig | None = None

    def __post_init__(self):
        for name in _OF_ALL_PARAMETERS if self.denoiser is not None else ():
            if (value := getattr(self.denoiser, name)) != getattr(OptimConfig, name):
                raise ValueError(
                    f"denoiser.{name} is {value}, but optim.{name} sets it for all parameters; leave it out."
                )

    def loss_scale(self, noise_std: float) -> float:
        """Returns the factor by which the loss of a flow with this noise std is multiplied."""
        return noise_std / REFERENCE_NOISE if self.noise_weight else 1.0


@config
class SamplingConfig:
    """Options for drawing samples, in training and, unless overridden, in the commands sample and evaluate.

    num: number of samples to draw; at least 1.
    plan: how tokens are decoded; "auto" is sequential, except on accelerators where parallel decoding is faster.
    "tuned", which only sample and evaluate accept, is the plan that sample --tune saved. A tuple has one plan per
    block, data side first.
    window: number of tokens that "jacobi" and "sliding" solve at once, at least 1; None for all.
    tol: largest change in a sweep at which "jacobi" and "sliding" accept a token as solved; 0 is exact.
    init: initial guess for the sweeps of "jacobi" and "sliding": the noise, zeros, or the previous frame.
    guidance: guidance weight w towards the class or text; 0 for none.
    rule: how to combine the conditional and unconditional branches: TARFlow's linear rule or STARFlow's product rule.
    parts: whether the linear rule changes shift, log_scale or both.
    anneal: increase the weight from 0 at the first token of a block to w at its last token.
    temperature: attention temperature of the unconditional branch; positive, 1 for no change.
    blocks: numbers of the blocks to guide, counted from the data side; None for all.
    denoise: strength of the step that removes the training noise; 0 for none.
    prompts: prompts for a text model, used in turn.
    """

    num: Samples = 64
    plan: Literal["sequential", "jacobi", "sliding", "auto", "tuned"] | tuple[BlockPlan, ...] = "auto"
    window: Tokens | None = None
    tol: NonNegative = 1e-4
    init: Literal["noise", "zeros", "previous_frame"] = "noise"
    guidance: NonNegative = 0.0
    rule: Rule = "linear"
    parts: Parts = "both"
    anneal: bool = False
    temperature: Positive = 1.0
    blocks: tuple[int, ...] | None = None
    denoise: NonNegative = 1.0
    prompts: tuple[str, ...] = ()

    def __post_init__(self):
        self.to_guidance()
        if isinstance(self.plan, tuple) and any(map(begins_with_draft, self.plan)):
            raise ValueError(
                'sampling.plan has init="draft", but a config cannot contain a draft; choose "noise", "zeros" or '
                '"previous_frame".'
            )

    def to_guidance(self) -> Guidance:
        """Returns the guidance that these fields describe."""
        return Guidance(
            scale=self.guidance,
            blocks=self.blocks,
            rule=self.rule,
            parts=self.parts,
            anneal=self.anneal,
            temperature=self.temperature,
        )

    def to_plan(self) -> Plan | str:
        """Returns the plan that these fields describe. Raises ValueError for "tuned", which only commands can use."""
        if self.plan == "tuned":
            raise ValueError(
                "sampling.plan is 'tuned', which only sample and evaluate accept; set it to 'auto' or to a plan."
            )
        if isinstance(self.plan, tuple):
            return DecodePlan(self.plan)
        if self.plan == "jacobi":
            return Jacobi(window=self.window, tol=self.tol, init=self.init)
        return SlidingWindow(window=self.window, tol=self.tol, init=self.init) if self.plan == "sliding" else self.plan
