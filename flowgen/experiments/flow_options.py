"""Options for drawing samples of flows on images and clips, and for evaluating them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from flowgen.experiments.drawing import DrawOptions, EvaluateOptions, check_compared
from flowgen.settings import config
from flowgen.settings.ranges import Within

NumSamples = Annotated[int, Within(0, 1 << 24)]


@config
class FlowDrawOptions(DrawOptions):
    """Options for drawing images, in addition to those in the experiment's field `sampling`.

    classes: classes to draw in turn, by name (cat,dog) or number (0,1,2); -1 is unconditional, as in --classes=-1,3.
    aspect: aspect ratio, such as 16:9; samples have about the same area as the model's images.
    certify: check the decoding with a forward pass.
    strict: stop with an error if the decoding leaves a window unsolved.
    tune: first measure decoding plans on this device, use the fastest, and save it with the run for --plan tuned. The
    plan is not saved if the model ships with flowgen or the run is in a cloud bucket.
    """

    classes: str = ""
    aspect: str = ""
    certify: bool = False
    strict: bool = False
    tune: bool = False

    @property
    def checks(self) -> dict[str, bool]:
        """The options of `flowgen.decoding.sample` that check the decoding."""
        return {"certify": self.certify, "strict": self.strict}


@config
class FlowEvaluateOptions(EvaluateOptions):
    """Options for evaluating a flow.

    noise: noise to add to the images; "model" is the training noise, and "uniform" is uniform dequantisation.
    samples: number of samples to draw and compare with the data; 0 for none.
    unconditional: evaluate a class-conditional model without labels.
    """

    noise: Literal["model", "uniform"] = "model"
    samples: NumSamples = 0
    unconditional: bool = False

    def __post_init__(self):
        check_compared(self.samples)

    def noise_std(self, flow: Any) -> float:
        """Returns the standard deviation of the noise added to images; 0 means uniform dequantisation."""
        return 0.0 if self.noise == "uniform" else flow.config.noise_std
