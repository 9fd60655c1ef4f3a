"""Sends the metrics and sample grids of a run to an experiment tracker, W&B or trackio."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8

from flowgen.data.media import as_pillow

NONE = "none"
PROJECT = "flowgen"


class Tracker:
    """Sends metrics and images to an experiment tracker until it fails. A failure does not stop training.

    tracker: the name of the module, "wandb" or "trackio"; "none" for no tracker. identity: a text by which the tracker
    recognises a resumed run. warn: called with a sentence about the first failure.

    The project is "flowgen", unless the environment sets WANDB_PROJECT or TRACKIO_PROJECT.

    Example:
        tracker = Tracker("wandb", name="digits", identity="1f0c", config={}, warn=print)
        tracker.write(50, {"loss": 1.0})
        tracker.close()
    """

    def __init__(self, tracker: str, *, name: str, identity: str, config: dict[str, Any], warn: Callable[[str], None]):
        self._name, self._warn, self._module = tracker, warn, None
        if tracker != NONE:
            self._attempt(lambda: self._start(name, identity, config))

    def _start(self, name: str, identity: str, config: dict[str, Any]) -> None:
        module: Any = importlib.import_module(self._name)
        # trackio has no ids: it knows runs by their names, which must therefore be unique.
        own = {"name": name, "id": identity} if self._name == "wandb" else {"name": f"{name}-{identity}"}
        project = os.environ.get(f"{self._name.upper()}_PROJECT", PROJECT)
        module.init(project=project, config=config, resume="allow", **own)
        self._module = module

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Sends the metrics of a step."""
        if (module := self._module) is not None:
            self._attempt(lambda: module.log(dict(metrics), step=step))

    def draw(self, step: int, image: UInt8[np.ndarray, "height width c"]) -> None:
        """Sends the sample grid of a step, which must have 1 or 3 channels."""
        if (module := self._module) is not None:
            self._attempt(lambda: module.log({"samples": module.Image(as_pillow(image))}, step=step))

    def close(self) -> None:
        """Ends the tracker's run."""
        if (module := self._module) is not None:
            self._attempt(module.finish)
        self._module = None

    def _attempt(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:  # Foreign code, which can raise anything, must not end training.
            self._module = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(".")
            self._warn(
                f"log.tracker {self._name} failed ({reason}), so nothing more is sent to it; metrics.jsonl still gets "
                "all metrics."
            )
