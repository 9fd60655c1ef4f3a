"""flowgen: transformer normalizing flows, flow matching and linear attention in JAX.

Names resolve on first use, so `import flowgen.attention` loads jax, flax and einops alone.
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
    "init": "flowgen.models",
    "load": "flowgen.checkpoint",
    "fit": "flowgen.training",
    "Experiment": "flowgen.config",
}
_PACKAGES = (
    "attention",
    "checkpoint",
    "conditioning",
    "config",
    "convert",
    "data",
    "decoding",
    "evaluation",
    "flows",
    "matching",
    "models",
    "nn",
    "runs",
    "tasks",
    "training",
)

if TYPE_CHECKING:
    from flowgen.checkpoint import load as load
    from flowgen.config import Experiment as Experiment
    from flowgen.flows import STARFlow as STARFlow
    from flowgen.flows import STARFlowConfig as STARFlowConfig
    from flowgen.flows import STARFlowV as STARFlowV
    from flowgen.flows import STARFlowVConfig as STARFlowVConfig
    from flowgen.flows import TARFlow as TARFlow
    from flowgen.flows import TARFlowConfig as TARFlowConfig
    from flowgen.models import init as init
    from flowgen.training import fit as fit


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"flowgen.{name}")
    raise AttributeError(f"module 'flowgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES, *_PACKAGES])
