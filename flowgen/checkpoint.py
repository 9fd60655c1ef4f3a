"""Run directories from outside: `load` gives the model of a run, `write_run` makes a run of given weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from flowgen.config import from_json, to_json
from flowgen.training.store import CONFIG_FILE, CheckpointStore, open_run, read_config, write_config


def load(run_dir: str | Path, step: int | str | None = None, ema: bool = True) -> tuple[Any, Any, Any]:
    """Returns (model, variables, experiment) of a run.

    step: a number, "best", or None for the latest. ema: take the averaged parameters where the run has them.
    Raises FileNotFoundError where the run or the step is not there, ValueError where it is damaged or foreign.

    Example:
        flow, params, experiment = load("runs/digits")
    """
    experiment = from_json(read_config(run_dir))
    store = open_run(run_dir)
    try:
        if step == "best":
            step = store.best_step()
            if step is None:
                raise FileNotFoundError(f"{run_dir} has no evaluated checkpoint; leave the step out for the latest.")
        items = store.restore(store.latest_step() if step is None else int(step), ("variables", "ema"))
    finally:
        store.close()
    variables = items["variables"]
    if ema and "ema" in items:
        variables = {**variables, "params": items["ema"]}
    flow = experiment.flow()
    expected = jax.eval_shape(lambda: flow.init(jax.random.key(0), np.zeros((1, *flow.config.image_shape), np.float32)))
    check_tree(variables["params"], expected["params"], str(run_dir))
    return flow, jax.tree.map(jax.numpy.asarray, variables), experiment


def check_tree(found: Any, expected: Any, name: str) -> None:
    """Raises ValueError naming the first array that is missing, left over or of another shape.

    Example:
        check_tree(variables["params"], abstract["params"], "runs/digits")
    """
    shapes = [
        {jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf) for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (found, expected))
    ]
    differing = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))
    if differing:
        path = differing[0][0]
        raise ValueError(
            f"{name} does not fit the model of its config: {path} has shape {shapes[0].get(path, 'missing')}, "
            f"expected {shapes[1].get(path, 'nothing')}; restore its {CONFIG_FILE}."
        )


def write_run(run_dir: str | Path, experiment: Any, variables: Any) -> None:
    """Writes a run directory that holds given weights as step 0, for `load` and `sample.py`.

    Raises FileExistsError where the directory exists and is not empty; nothing is overwritten.

    Example:
        write_run("runs/imported", experiment, variables)
    """
    run_dir = Path(run_dir)
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise FileExistsError(f"{run_dir} exists already; give another --to, or remove it first.")
    run_dir.mkdir(parents=True, exist_ok=True)
    write_config(run_dir, to_json(experiment))
    store = CheckpointStore(run_dir)
    store.save(0, {"variables": jax.tree.map(np.asarray, variables)}, metrics={})
    store.close()
