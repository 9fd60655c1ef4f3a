"""Reads the parameters from which another run starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flowgen.experiments.experiment import Experiment
from flowgen.experiments.files import from_json
from flowgen.runs import RunReader, located

PARAMS, COLLECTIONS = "params/", "collections/"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Origin:
    """The run that provides the parameters: its experiment, its latest step, and the arrays saved at this step."""

    path: str
    experiment: Experiment
    run: RunReader
    step: int
    saved: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, path: str) -> Origin:
        """Returns the run or exported model at a path.

        Raises FileNotFoundError if there is none, or ValueError if it is damaged.
        """
        try:
            run = RunReader(located(path))
            with run.named():
                experiment = from_json(run.config())
        except (FileNotFoundError, ValueError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"init.path: {error}") from error
        with run.named():
            return cls._of(path, run, experiment)

    @classmethod
    def _of(cls, path: str, run: RunReader, experiment: Experiment) -> Origin:
        reader = run.checkpoints
        step = reader.latest_step()
        if step is None:
            reader.check_not_broken()
            raise FileNotFoundError(f"init.path '{path}' has no checkpoint yet; train it first, or give another run.")
        manifest = reader.manifest(step)
        try:
            experiment.check_resumable(manifest["config"])
        except ValueError as error:
            raise ValueError(f"Checkpoint {step} of init.path '{path}' does not fit config.json: {error}") from error
        return cls(path, experiment, run, step, manifest["arrays"])

    @property
    def is_averaged(self) -> bool:
        return any(name.startswith("ema/") for name in self.saved)

    @property
    def about(self) -> str:
        return "averaged parameters" if self.is_averaged else "parameters"

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of the arrays, by name, such as "params/blocks_0/proj_in/kernel"."""
        groups = {"ema/" if self.is_averaged else PARAMS: PARAMS, COLLECTIONS: ""}
        return {
            new + name.removeprefix(old): tuple(shape)
            for name, (shape, _) in self.saved.items()
            for old, new in groups.items()
            if name.startswith(old)
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays by their names in `shapes`, and checks that they match their digests and are finite."""
        with self.run.named():
            read = self.run.checkpoints.weights(self.step)
        self.run.free()
        return {name.removeprefix(COLLECTIONS): array for name, array in read.items()}
