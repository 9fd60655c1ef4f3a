"""The input and the output of the training loop: `Job` and `Result`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flowgen.data.inventory import Inventory
from flowgen.training.options import OptimConfig
from flowgen.training.step import Objective, TrainState

# A function (initial variables) -> (variables with which a new run begins, lines that describe them). The two trees of
# variables have the same structure, shapes and dtypes.
Start = Callable[[Any], tuple[Any, Sequence[str]]]


@dataclass(frozen=True)
class Job:
    """Everything that the training loop needs to train a model.

    init(key): returns the initial variables. objective: the training objective; see `make_step`. batches(start, stop):
    returns an iterator over this process's batches for steps start to stop - 1, where the first step is step 0.
    evaluate(variables): returns metrics by name; None for no evaluation. best_metric: name of the metric that compares
    checkpoints; the checkpoint with the lowest value is kept. sample(variables): returns a grid of samples as a uint8
    image `height width c`; None for no samples. optims: separate optimizers for parts of the parameters, as `others` in
    `make_optimizer`. inventory: a summary of the data, which is logged and saved with the run. tokens(batch): returns
    the number of tokens in a batch, for reports on speed. profile: number of steps to trace for a profiler; 0 for none.
    devices: this process's devices to train on; None for all of them.

    start(variables): given the initial variables of a new run, returns the variables with which training begins, for
    example the weights of another run, and lines of text that describe them. Training shows these lines and saves them
    with the run. A resumed run does not call `start`. warnings: sentences that have already been shown; training saves
    them with the run. fixed: collections that are passed to the objective with its variables, such as those of a second
    network; training neither changes nor saves them.
    """

    init: Callable[[jax.Array], Any]
    objective: Objective
    batches: Callable[[int, int], Iterator[Any]]
    evaluate: Callable[[Any], dict[str, float]] | None = None
    sample: Callable[[Any], np.ndarray] | None = None
    best_metric: str = "bits_per_dim"
    optims: Mapping[str, OptimConfig] = field(default_factory=dict)
    inventory: Inventory | None = None
    tokens: Callable[[Any], int] | None = None
    profile: int = 0
    devices: Sequence[jax.Device] | None = None
    start: Start | None = None
    warnings: Sequence[str] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)


class Result(NamedTuple):
    """The outcome of a run.

    state: the final state as numpy arrays, without a device axis. metrics: results of the last evaluation; {} if there
    was none. samples: path of the last sample grid, or its URL if the run is in a bucket; None if no grid was drawn.
    signal: number of the signal that stopped the run, or 0 if the run finished.
    """

    state: TrainState
    metrics: dict[str, float]
    samples: Path | str | None
    signal: int

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        state = f"<TrainState of step {self.state.step}, {count:,} parameters>"
        return f"Result(state={state}, metrics={self.metrics}, samples={self.samples}, signal={self.signal})"
