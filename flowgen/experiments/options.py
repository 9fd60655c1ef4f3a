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
    """Options for training a flow on images or clips by maximum likelihood: the field `likelihood` of its experiment.
    `model` and `optim` are fields of the same experiment.

    norm_penalty: weight of a penalty that is added to the loss: the sum over blocks of the mean square of the tokens
    that enter a block. The published STARFlow uses 1e-4; 0 for no penalty.
    jacobi: penalty that trains the flow to need fewer sweeps in parallel decoding, usually in a short fine-tuning of a
    trained flow; None for no penalty.
    noise_weight: whether to multiply the loss, except its penalties, by σ / 0.3, where σ is `model.noise_std`. The
    published code of STARFlow does this if the texts state the noise level.
    denoiser: optimizer of a video flow's denoiser; None for the same options as `optim`. ema_decay, ema_warmup and
    max_skips cannot be set here, because `optim` sets them for all parameters.
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
        """Returns the factor by which the loss, except its penalties, is multiplied: noise_std / 0.3 or, without
        `noise_weight`, 1.
        """
        return noise_std / REFERENCE_NOISE if self.noise_weight else 1.0


@config
class SamplingConfig:
    """Options for drawing samples of a flow on images or clips: the field `sampling` of its experiment. Training uses
    them for its sample grids. The commands sample and evaluate use them too, unless they are given other values.

    num: number of samples that training draws for a sample grid, and that the command sample draws; at least 1.
    plan: how the tokens of a block are decoded: "sequential" decodes them one by one; "jacobi" and "sliding" guess a
    window of tokens and correct all of them in parallel sweeps; "auto" is "jacobi" for small batches on accelerators
    and otherwise "sequential". "tuned", which only the commands sample and evaluate accept, is the plan that `sample.py
    --tune` has saved with the run. A tuple has one plan per block, starting with the block at the data side. See
    docs/concepts/plans.md in the repository.
    window: number of tokens in the window of the plans "jacobi" and "sliding", at least 1; None for all tokens.
    tol: tolerance of the plans "jacobi" and "sliding": tokens count as solved once a sweep changes none of their
    entries by more than this value; 0 for exact solutions.
    init: the tokens from which the plans "jacobi" and "sliding" start: the block's noise, zeros, or the tokens of the
    previous frame of a clip.
    guidance: weight w of guidance, which strengthens the effect of the class, the context or the text; 0 for no
    guidance.
    rule: how guidance combines the predictions with and without the condition: by TARFlow's linear rule or STARFlow's
    product rule; see `flowgen.guidance`.
    parts: which outputs of a block the linear rule changes: the shift, the log_scale or both; must be "both" for the
    product rule.
    anneal: whether the guidance weight increases along the tokens of each block, from 0 at the first token to w at the
    last.
    temperature: number by which the attention logits are divided when guidance predicts without the condition;
    positive, 1 for no change.
    blocks: indices of the blocks in which guidance is applied, counted from 0 at the data side; None for all blocks.
    denoise: strength of the step that removes the training noise from samples: 1 for the full step, 0 for none; a
    learned denoiser accepts no other strengths.
    prompts: prompts for a model with texts; the samples use them in turn. If there are none, sample grids in training
    use captions of the data, and the command sample raises an error.
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
        """Returns the guidance that the fields from `guidance` to `blocks` describe."""
        return Guidance(
            scale=self.guidance,
            blocks=self.blocks,
            rule=self.rule,
            parts=self.parts,
            anneal=self.anneal,
            temperature=self.temperature,
        )

    def to_plan(self) -> Plan | str:
        """Returns the plan that `plan`, `window`, `tol` and `init` describe; "auto" and "sequential" are returned as
        they are.

        Raises ValueError if `plan` is "tuned", which only the commands sample and evaluate replace by a saved plan.
        """
        if self.plan == "tuned":
            raise ValueError(
                "sampling.plan is 'tuned', which only sample and evaluate accept; set it to 'auto' or to a plan."
            )
        if isinstance(self.plan, tuple):
            return DecodePlan(self.plan)
        if self.plan == "jacobi":
            return Jacobi(window=self.window, tol=self.tol, init=self.init)
        return SlidingWindow(window=self.window, tol=self.tol, init=self.init) if self.plan == "sliding" else self.plan
