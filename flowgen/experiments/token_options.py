"""Options for drawing samples of flows for vectors, sequences and sets, and for evaluating these flows."""

from __future__ import annotations

from typing import Annotated, Literal

from flowgen.experiments.drawing import DrawOptions, EvaluateOptions
from flowgen.settings import config
from flowgen.settings.ranges import CountOrZero, NonNegative, Samples, Within

LEAST_COMPARED = 10
NumCompared = Annotated[int, Within(0, 1 << 20)]


@config
class TokenSamplingConfig:
    """Options for drawing vectors, sequences or sets: the field `sampling` of a `TokenFlowExperiment`. Training uses
    them for its plots of samples. The commands sample and evaluate use them too, unless they are given other values.

    num: number of samples that training draws for each plot of samples, and that the command sample draws; at least 1.
    plan: how the tokens of a block are decoded: "sequential" decodes them one by one; "jacobi" guesses all tokens and
    corrects them in parallel sweeps; "auto" is "jacobi" for small batches on accelerators and otherwise "sequential".
    guidance: weight w of guidance, which strengthens the effect of the context or the class; 0 for no guidance.
    observation: for a simulator, the index, counted from 0, of the fixed observation that is the context of all
    samples. For an .npz file, the index of the held-out sample (of any sample, if none is held out) whose context and
    padding mask all samples get; ignored if the model has neither contexts nor padding.
    context: for a model with a VectorContext and no padding, the entries of the one context of all samples, such as
    0.1,0.2; empty to use the context that `observation` selects.
    """

    num: Samples = 1000
    plan: Literal["auto", "sequential", "jacobi"] = "auto"
    guidance: NonNegative = 0.0
    observation: CountOrZero = 0
    context: tuple[float, ...] = ()


@config
class TokenDrawOptions(DrawOptions):
    """Options for drawing vectors, sequences or sets, in addition to those in the experiment's field `sampling`.

    classes: classes to draw in turn, by number (0,1,2); -1 is unconditional, as in --classes=-1,3.
    """

    classes: str = ""


@config
class TokenEvaluateOptions(EvaluateOptions):
    """Options for evaluating a flow for vectors, sequences or sets.

    samples: number of samples that are compared with reference samples of the posterior by C2ST, for each fixed
    observation of a simulator; 0 for none. Published values use 10,000.
    calibration: number of held-out samples with which the calibration of a flow for vectors is tested; 0 for none.
    """

    samples: NumCompared = 1000
    calibration: NumCompared = 500

    def __post_init__(self):
        if 0 < self.samples < LEAST_COMPARED:
            raise ValueError(
                f"samples is {self.samples}, but C2ST needs at least {LEAST_COMPARED}; raise it, or set it to 0."
            )
