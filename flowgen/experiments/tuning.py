"""Plans that `sample --tune` measures and saves with a run, and that `--plan tuned` reads."""

from __future__ import annotations

import dataclasses
import datetime
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flowgen import __version__, backend
from flowgen.data.media import check_writable
from flowgen.decoding import measure_plans, sample
from flowgen.decoding.plan import BlockPlan
from flowgen.experiments.autoregressive import AutoregressiveExperiment
from flowgen.experiments.drawing import AT_ONCE
from flowgen.experiments.flow_options import FlowDrawOptions
from flowgen.places import check_local, is_remote
from flowgen.runs import PLAN_FILE, read_plan, write_plan
from flowgen.runs.located import SHIPPED
from flowgen.settings import FieldError, config, from_plain, to_plain
from flowgen.settings.ranges import BatchSize, NonNegative

TUNED = "tuned"


@config
class TunedPlan:
    """A measured plan, and the conditions of the measurement.

    plan: the plan of each block, data side first.
    device: the kind of the device.
    batch: number of samples that the device decoded together.
    guidance: guidance weight.
    tol: tolerance of the parallel plans.
    time: when the plan was measured, in UTC.
    versions: the versions of flowgen and JAX.

    Example:
        experiment = with_tuned_plan(experiment, "runs/digits", params, num=16)
    """

    plan: tuple[BlockPlan, ...]
    device: str
    batch: BatchSize
    guidance: NonNegative
    tol: NonNegative
    time: str
    versions: dict[str, str]


def why_plan_unsaved(run_dir: str | Path) -> str:
    """Returns the reason why no plan can be saved with a run, or "" if a plan can be saved.

    Raises OSError if the plan's path is a folder, or a file that cannot be overwritten.

    Example:
        why_plan_unsaved("gs://bucket/digits")  # "the run is in a bucket"
    """
    if is_remote(run_dir):
        return "the run is in a bucket"
    if Path(run_dir).parent == SHIPPED:
        return f"{Path(run_dir).name} ships with flowgen"
    if not os.access(run_dir, os.W_OK | os.X_OK):
        return "the run is not writable"
    check_writable(Path(run_dir) / PLAN_FILE)
    return ""


def tuned_plan(
    experiment: AutoregressiveExperiment,
    flow: Any,
    variables: Any,
    options: FlowDrawOptions,
    say: Callable[[str], None],
) -> TunedPlan:
    """Measures plans for the samples that the options describe, and returns the fastest.

    A batch of the size that one device decodes is first decoded sequentially. The plans are measured on the resulting
    samples. Clips have the default length of the flow, and begin without given frames.

    say: called with each line of a table of the plans.

    Example:
        tuned = tuned_plan(experiment, flow, params, FlowDrawOptions(), print)
    """
    sampling, flow = experiment.sampling, experiment.sized(flow, options.aspect)
    conditions, _ = experiment.asked(flow, options.classes)
    batch = _per_device(min(options.batch or AT_ONCE, sampling.num), variables)
    numbers, guidance = np.arange(batch), experiment.guidance(flow)
    cond, key = conditions(numbers), jax.random.key(options.seed)
    say(f"Measuring plans for batches of {batch} on {_device_kind()}; each plan is compiled first.")
    known = sample(flow, variables, key, numbers, cond, plan="sequential", guidance=guidance, denoise=False)
    tuning = measure_plans(flow, variables, known.x, cond, guidance=guidance, tol=sampling.tol)
    for line in tuning.lines():
        say(line)
    return TunedPlan(
        plan=tuning.plan.blocks,
        device=_device_kind(),
        batch=batch,
        guidance=sampling.guidance,
        tol=sampling.tol,
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={"flowgen": __version__, "jax": jax.__version__},
    )


def save_tuned_plan(run_dir: str | Path, tuned: TunedPlan) -> Path:
    """Saves a plan in a run's directory, and returns the path of its file.

    Example:
        save_tuned_plan("runs/digits", tuned_plan(experiment, flow, params, FlowDrawOptions(), print))
    """
    write_plan(run_dir, to_plain(tuned))
    return Path(run_dir) / PLAN_FILE


def read_tuned_plan(run_dir: str | Path) -> TunedPlan:
    """Returns the plan that was saved in a run's directory.

    Raises:
        FileNotFoundError: no plan was saved.
        ValueError: the file is damaged, or the run is in a cloud bucket.

    Example:
        print(read_tuned_plan("runs/digits").plan)
    """
    check_local("the run with a tuned plan", run_dir)
    path = Path(run_dir) / PLAN_FILE
    try:
        return from_plain(TunedPlan, read_plan(run_dir))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist; measure a plan first with sample --tune.") from error
    except FieldError as error:
        raise ValueError(f"{path} does not contain a plan ({str(error).rstrip('.')}); measure it again.") from error


def with_tuned_plan(
    experiment: AutoregressiveExperiment, run_dir: str | Path, variables: Any, num: int
) -> AutoregressiveExperiment:
    """Returns the experiment with the plan that was saved in the run's directory.

    Warns if the plan was measured for another device, batch size or guidance.

    variables: the flow's variables. num: number of samples that are decoded together, on all devices.

    Raises the errors of `read_tuned_plan`, and ValueError if the plan does not fit the flow.

    Example:
        experiment = with_tuned_plan(experiment, "runs/digits", params, num=16)
    """
    tuned, path = read_tuned_plan(run_dir), Path(run_dir) / PLAN_FILE
    if len(tuned.plan) != experiment.model.num_blocks:
        raise ValueError(
            f"{path} has plans for {len(tuned.plan)} blocks, but the flow has {experiment.model.num_blocks}; measure "
            "it again with sample --tune."
        )
    now = {"device": _device_kind(), "batch": _per_device(num, variables), "guidance": experiment.sampling.guidance}
    other = [
        f"{name} {getattr(tuned, name)} instead of {value}"
        for name, value in now.items()
        if getattr(tuned, name) != value
    ]
    if other:
        warnings.warn(
            f"{path} was measured for {', '.join(other)}, so another plan may be faster; measure it again with "
            "sample --tune.",
            stacklevel=2,
        )
    return with_plan(experiment, tuned)


def with_plan(experiment: AutoregressiveExperiment, tuned: TunedPlan) -> AutoregressiveExperiment:
    """Returns the experiment with a measured plan.

    Example:
        experiment = with_plan(experiment, tuned_plan(experiment, flow, params, FlowDrawOptions(), print))
    """
    return dataclasses.replace(experiment, sampling=dataclasses.replace(experiment.sampling, plan=tuned.plan))


def _per_device(num: int, variables: Any) -> int:
    """Number of samples that each device decodes if the devices of this host draw `num` samples together."""
    mesh = backend.sharing(num, variables)
    return num if mesh is None else -(-num // mesh.size)


def _device_kind() -> str:
    return jax.local_devices()[0].device_kind
