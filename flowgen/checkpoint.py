"""Reads and writes models: `load` returns the model of a run, and `write_run` creates a run from weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowgen.arrays import shown
from flowgen.data.media import nearest_place
from flowgen.experiments import Experiment, from_json
from flowgen.nn import init
from flowgen.places import check_local
from flowgen.runs import CHECKPOINTS, CheckpointReader, CheckpointStore, RunReader, flatten, located, write_config
from flowgen.runs.arrays import check_finite


def load(
    run_dir: str | Path, step: int | str | None = None, ema: bool = True, *, model: Any = None
) -> tuple[Any, Any, Experiment]:
    """Returns a saved model, its variables as JAX arrays, and the `Experiment` that contains its config.

    run_dir: the directory of a training run; the URL of a run in a bucket, such as gs://bucket/run; the folder that
    `flowgen.export` wrote; the name of a model that ships with flowgen, such as "digits"; or hf://org/name, a model on
    the Hugging Face Hub.
    step: the number of the training step whose checkpoint to load; None for the latest checkpoint; "best" for the
    evaluated checkpoint with the lowest value of the experiment's `best_metric`, such as bits/dim.
    ema: whether to load the moving average of the parameters if the checkpoint contains one. If False, or if there is
    no average, the parameters at this step are loaded.
    model: your own model, if you passed one to `flowgen.fit`; None builds the model from the experiment.

    Raises:
        FileNotFoundError: `run_dir` does not exist or contains no flowgen model, or it has no checkpoint for `step`.
        ValueError: the checkpoint is damaged, does not fit the model, or has parameters that are not finite; or `ema`
            is False for an exported model, but its parameters are averaged.

    Example:
        flow, params, experiment = load("digits")
    """
    flow, variables, experiment = load_on_host(run_dir, step, ema, model=model)
    return flow, jax.tree.map(jnp.asarray, variables), experiment


def load_on_host(
    run_dir: str | Path, step: int | str | None = None, ema: bool = True, *, model: Any = None
) -> tuple[Any, Any, Experiment]:
    """Returns the same as `load`, but the variables are numpy arrays, which use no memory on devices.

    Example:
        flow, variables, experiment = load_on_host("runs/digits")
        variables = divided_over_heads(variables)  # flowgen.training.fsdp, for a model that fits on no single device
    """
    opened = open_run(run_dir, step)
    return *opened.load(ema=ema, model=model), opened.experiment


@dataclass(frozen=True)
class OpenRun:
    """A run or an exported model at one step, whose weights have not been read yet.

    run: the reader of the run's files.

    Example:
        opened = open_run("runs/digits", "best")
        flow, variables = opened.load()
    """

    run: RunReader
    step: int
    experiment: Experiment

    def load(self, *, ema: bool = True, model: Any = None) -> tuple[Any, Any]:
        """Returns the model and its variables as numpy arrays. For the arguments and errors, see `flowgen.load`."""
        with self.run.named():
            flow = self.experiment.build() if model is None else model
            expected = jax.eval_shape(lambda: init(flow, jax.random.key(0)))
            variables = self.run.checkpoints.variables(self.step, expected["params"], ema=ema)
        self.run.free()
        return flow, variables

    def was_trained(self) -> bool:
        """Returns True if training wrote the latest checkpoint, and False if the weights were imported."""
        with self.run.named():
            return self.run.checkpoints.was_trained()


def open_run(run_dir: str | Path | RunReader, step: int | str | None = None) -> OpenRun:
    """Returns a run at one step without reading its weights. For the arguments and errors, see `load`.

    run_dir: also accepts the `RunReader` of an open run.

    Example:
        step = open_run("runs/digits", "best").step
    """
    if not isinstance(run_dir, str | os.PathLike | RunReader):
        raise ValueError(f"run_dir must be the path of a run's directory, not {shown(run_dir)}.")
    run, name = (run_dir, run_dir.shown) if isinstance(run_dir, RunReader) else (RunReader(located(run_dir)), run_dir)
    with run.named():
        experiment, reader = from_json(run.config()), run.checkpoints
        step = choose_step(reader, name, step, experiment.best_metric)
        try:
            experiment.check_resumable(reader.manifest(step)["config"])
        except ValueError as error:
            raise ValueError(f"Checkpoint {step} of {name} does not fit config.json: {error}") from error
    return OpenRun(run, step, experiment)


def write_run(run_dir: str | Path, experiment: Experiment, variables: Any) -> None:
    """Writes a run directory that contains the given weights as step 0, so that `load` and `sample.py` can use them.

    Raises FileExistsError if the directory exists and is not empty, or FloatingPointError if the weights are not
    finite.

    Example:
        write_run("runs/imported", experiment, variables)
    """
    check_new(run_dir)
    params, collections = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    state = jax.tree.map(np.asarray, {"params": params, "collections": collections})
    check_finite(0, flatten(state))
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    config = experiment.to_json()
    write_config(run_dir, config)
    with CheckpointStore(run_dir / CHECKPOINTS) as store:
        store.save(0, state, config=config)


def check_new(run_dir: str | os.PathLike[str]) -> None:
    """Raises FileExistsError if `run_dir` exists and is not empty, or another OSError if it cannot be created.

    Does not create the directory. Raises ValueError for a URL, because new directories must be on this machine.

    Example:
        check_new("runs/imported")
    """
    check_local("the new directory", run_dir)
    path = Path(run_dir)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{run_dir} already exists; give another directory, or remove it first.")
    nearest = nearest_place(path)
    if not nearest.is_dir():
        raise NotADirectoryError(f"{run_dir} cannot be created because {nearest} is a file; give another directory.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"You have no permission to write to {run_dir}; give another directory.")


def choose_step(reader: CheckpointReader, run_dir: str | Path, step: int | str | None, best_metric: str) -> int:
    """Returns the number of the checkpoint that `load` reads. Raises FileNotFoundError if there is none.

    Example:
        step = choose_step(run.checkpoints, "runs/digits", "best", experiment.best_metric)
    """
    steps = reader.steps()
    if not steps:
        reader.check_not_broken()
        raise FileNotFoundError(f"{run_dir} has no checkpoint yet; train the run first, or give another run.")
    if step is None:
        return steps[-1]
    if step == "best":
        scores = {at: reader.meta(at)["metrics"].get(best_metric) for at in steps}
        known = {at: score for at, score in scores.items() if score is not None}
        if not known:
            raise FileNotFoundError(f"{run_dir} has no evaluated checkpoint; leave out the step to load the latest.")
        return min(sorted(known, reverse=True), key=known.__getitem__)  # in case of a tie, the latest step
    if step not in steps:
        raise FileNotFoundError(f"{run_dir} has no checkpoint {step}; choose one of {', '.join(map(str, steps))}.")
    return int(step)
