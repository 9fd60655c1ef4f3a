"""Reports which implementation of softmax attention a model uses, and warns if its dtype rules out a faster one."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from flowgen.backend import attention_platform
from flowgen.backend.attention import KERNELS
from flowgen.experiments.experiment import Experiment
from flowgen.nn.softmax_shape import SoftmaxShape


def attention_lines(model: Any) -> list[str]:
    """Returns lines that state and explain a model's attention implementation on this machine, GPUs and TPUs.

    The list is empty for models without softmax attention.
    """
    shapes: tuple[SoftmaxShape, ...] = getattr(model, "softmax_shapes", ())
    asked = getattr(model, "attention_implementation", "auto")
    fused = [platform for platform, name in KERNELS.items() if asked in ("auto", name)]
    lines = []
    for platform in dict.fromkeys((attention_platform(), *fused)):
        told: dict[str, list[str]] = {}
        for shape in shapes:
            told.setdefault(_told(shape, asked, platform), []).append(str(shape))
        lines += [f"attention on {platform}: {answer} [{'; '.join(of)}]" for answer, of in told.items()]
    return lines


def on_any_device(experiment: Experiment) -> Experiment:
    """Returns the experiment with `attention_implementation` "auto", which runs on any device."""
    if getattr(experiment.model, "attention_implementation", "auto") == "auto":
        return experiment
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, attention_implementation="auto"))


def _told(shape: SoftmaxShape, asked: Any, platform: str) -> str:
    try:
        plan = shape.plan(asked, platform)
    except ValueError as error:
        return str(error)
    return f"{plan.implementation} ({plan.reason})"


def warn_of_dtype(model: Any, platform: str | None = None) -> None:
    """Issues a UserWarning if only the model's dtype prevents attention from using the GPU's fused kernel.

    platform: see `attention_plan`.
    """
    platform = attention_platform() if platform is None else platform
    if platform != "gpu" or getattr(model, "attention_implementation", "xla") != "auto":
        return
    shapes: tuple[SoftmaxShape, ...] = getattr(model, "softmax_shapes", ())
    slow = [shape for shape in shapes if shape.plan("auto", platform).implementation == "xla"]
    if any(shape._replace(dtype="bfloat16").plan("auto", platform).implementation != "xla" for shape in slow):
        warnings.warn(
            f"model.dtype is {model.dtype!r}, so attention runs in XLA, which writes all logits to memory; "
            "use --model.dtype bfloat16 for cuDNN's fused kernel, or --model.attention_implementation xla to silence "
            "this warning.",
            stacklevel=2,
        )
