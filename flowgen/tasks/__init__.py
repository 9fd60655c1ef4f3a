"""What is done with an experiment, trained, sampled, evaluated: for flows of pictures and of clips, for
velocity networks, for autoencoders.

All have the same functions: check, shrink, job, evaluate, pictures, and those that draw samples: draw.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from flowgen.flows import STARFlowVConfig
from flowgen.models import CodecConfig, FlowConfig
from flowgen.tasks import autoencoding, clips, likelihood, matching
from flowgen.tasks.autoencoding import AutoencodingConfig
from flowgen.tasks.flow_options import LikelihoodConfig, SamplingConfig
from flowgen.tasks.matching import SolverConfig

__all__ = ["AutoencodingConfig", "LikelihoodConfig", "SamplingConfig", "SolverConfig", "task_of"]


def task_of(model: Any) -> ModuleType:
    """Returns the functions for a model's config, one of the modules of this package.

    Example:
        job = task_of(experiment.model).job(experiment)
    """
    if isinstance(model, CodecConfig):
        return autoencoding
    if isinstance(model, STARFlowVConfig):
        return clips
    return likelihood if isinstance(model, FlowConfig) else matching
