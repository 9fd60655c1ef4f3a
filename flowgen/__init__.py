"""flowgen: transformer normalizing flows, flow matching and linear attention in JAX.

Subpackages are imported on first use, so `import flowgen.attention` loads only jax, flax, einops and jaxtyping.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "TARFlow": "flowgen.flows",
    "TARFlowConfig": "flowgen.flows",
    "STARFlow": "flowgen.flows",
    "STARFlowConfig": "flowgen.flows",
    "STARFlowV": "flowgen.flows",
    "STARFlowVConfig": "flowgen.flows",
    "TokenFlow": "flowgen.flows",
    "TokenFlowConfig": "flowgen.flows",
    "init": "flowgen.nn",
    "load": "flowgen.checkpoint",
    "export": "flowgen.exports",
    "from_pretrained": "flowgen.hub",
    "push_to_hub": "flowgen.hub",
    "fit": "flowgen.experiments",
    "load_config": "flowgen.experiments",
    "Experiment": "flowgen.experiments",
    "FlowExperiment": "flowgen.experiments",
    "VideoFlowExperiment": "flowgen.experiments",
    "TokenFlowExperiment": "flowgen.experiments",
    "MatchingExperiment": "flowgen.experiments",
    "AutoencoderExperiment": "flowgen.experiments",
}
_PACKAGES = (
    "attention",
    "backend",
    "checkpoint",
    "codecs",
    "conditioning",
    "convert",
    "data",
    "decoding",
    "evaluation",
    "experiments",
    "flows",
    "inference",
    "matching",
    "nn",
    "nnx",
    "runs",
    "simulators",
    "text",
    "training",
    "transforms",
)

if TYPE_CHECKING:
    from flowgen.checkpoint import load as load
    from flowgen.experiments import AutoencoderExperiment as AutoencoderExperiment
    from flowgen.experiments import Experiment as Experiment
    from flowgen.experiments import FlowExperiment as FlowExperiment
    from flowgen.experiments import MatchingExperiment as MatchingExperiment
    from flowgen.experiments import TokenFlowExperiment as TokenFlowExperiment
    from flowgen.experiments import VideoFlowExperiment as VideoFlowExperiment
    from flowgen.experiments import fit as fit
    from flowgen.experiments import load_config as load_config
    from flowgen.exports import export as export
    from flowgen.flows import STARFlow as STARFlow
    from flowgen.flows import STARFlowConfig as STARFlowConfig
    from flowgen.flows import STARFlowV as STARFlowV
    from flowgen.flows import STARFlowVConfig as STARFlowVConfig
    from flowgen.flows import TARFlow as TARFlow
    from flowgen.flows import TARFlowConfig as TARFlowConfig
    from flowgen.flows import TokenFlow as TokenFlow
    from flowgen.flows import TokenFlowConfig as TokenFlowConfig
    from flowgen.hub import from_pretrained as from_pretrained
    from flowgen.hub import push_to_hub as push_to_hub
    from flowgen.nn import init as init


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"flowgen.{name}")
    raise AttributeError(f"module 'flowgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES, *_PACKAGES])
