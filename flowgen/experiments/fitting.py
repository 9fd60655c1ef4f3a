"""`fit` trains an experiment in a directory, optionally with your own data and model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax

from flowgen.arrays import check_count, shown
from flowgen.data import ClipsConfig, DataConfig, Dataset, LatentsConfig, told_once
from flowgen.data.dataset import OWN
from flowgen.data.inventory import name_list
from flowgen.experiments.attention import warn_of_dtype
from flowgen.experiments.experiment import Experiment
from flowgen.experiments.files import KINDS
from flowgen.experiments.fine_tuning import started_from
from flowgen.experiments.own_data import check_protocol
from flowgen.experiments.token_flow import TokenFlowExperiment
from flowgen.nn import init
from flowgen.places import is_same_place
from flowgen.runs import RunReader, passing_warnings
from flowgen.settings.named import fields_of_program
from flowgen.training import Result, Signals, is_primary, train
from flowgen.training.frozen import check_frozen, check_patterns
from flowgen.training.fsdp import parallel_for
from flowgen.training.job import Start


def _of_own(experiment: Experiment, dataset: Any, held_out: Any) -> Experiment:
    """Checks a user's dataset, and returns the experiment that is saved with a run on this dataset."""
    for name, given in (("dataset", dataset), ("held_out", held_out)):
        if given is not None:
            check_protocol(name, given)
    data = experiment.data
    if isinstance(data, LatentsConfig):
        # The user's images or clips replace the cached latents.
        data = next(field.default for field in dataclasses.fields(experiment) if field.name == "data")
    if not isinstance(data, DataConfig | ClipsConfig):
        if isinstance(experiment, TokenFlowExperiment):
            raise ValueError(
                "dataset is given, but a TokenFlowExperiment reads its numbers from data; save them with np.savez, and "
                "set data to a NumbersConfig(path)."
            )
        raise ValueError("dataset is given, but data is a PointsConfig, which draws points; set data to a DataConfig.")
    known, found = data.classes, tuple(dataset.class_names)
    if known and found and known != found and getattr(experiment.model, "num_classes", 0):
        raise ValueError(
            f"dataset has the classes {name_list(found)}, but data.classes are {name_list(known)}; give the "
            "same classes in the same order."
        )
    unused = [name for name in ("drop_first", "images") if getattr(data, name, None)]
    if unused:
        raise ValueError(f"data.{unused[0]} does not apply to your own dataset; leave it out.")
    own = dataclasses.replace(data, name=OWN, path="", classes=data.classes or dataset.class_names)
    return dataclasses.replace(experiment, data=own).with_provenance()


def _start(
    experiment: Experiment, saved: dict[str, Any] | None, model: Any, devices: Sequence[jax.Device] | None
) -> Start | None:
    """Returns the function that puts another run's parameters into a new run.

    The result is None if the run is not new, or if it does not start from another run.

    saved: the config of the run that is resumed; None for a new run.

    Raises an error if the other run or the devices do not fit, or if a pattern of parameter names matches none. The
    other run's parameters are read last.
    """
    train, optim = experiment.train, experiment.optim
    parallel = parallel_for(train, devices)
    if not (experiment.init.path or train.frozen or optim.not_decayed):
        return None
    network = experiment.build() if model is None else model
    variables = parallel.abstract(lambda: init(network, jax.random.key(0)))
    check_frozen(variables["params"], train.frozen)
    check_patterns("optim.not_decayed", variables["params"], optim.not_decayed)
    return started_from(experiment, variables) if experiment.init.path and saved is None else None


def _check_devices(devices: Any) -> None:
    """Raises ValueError unless `devices` is None or a sequence of this process's devices."""
    if devices is None:
        return
    local = jax.local_devices()
    if not isinstance(devices, Sequence) or not devices or not all(device in local for device in devices):
        told = "an empty list" if isinstance(devices, Sequence) and not devices else shown(devices)
        raise ValueError(
            f"devices is {told}; give a list of this process's devices, such as jax.local_devices()[:1], or leave it "
            "out to use all of them."
        )


def _check_origin(experiment: Experiment, workdir: str | Path) -> None:
    """Raises ValueError if a run would start from its own directory."""
    path = experiment.init.path
    if path and is_same_place(path, workdir):
        raise ValueError(
            f"init.path '{path}' is the workdir itself; give another --workdir, or leave out --init-from to resume "
            "that run."
        )


def _begun_with(config: dict[str, Any], saved: dict[str, Any], workdir: str | Path) -> dict[str, Any]:
    """Returns a resumed run's config with the `init` that the run began with; warns if `init.path` has changed."""
    given, begun = config["init"], saved.get("init", {})
    if given["path"] and given["path"] != begun.get("path"):
        warnings.warn(
            f"init.path '{given['path']}' is not read, because {workdir} has a checkpoint and is resumed; to start "
            "from that run, train in a new --workdir.",
            stacklevel=3,
        )
    return {**config, "init": begun} if begun else config


def fit(
    experiment: Experiment,
    workdir: str | Path,
    *,
    dataset: Dataset | None = None,
    held_out: Dataset | None = None,
    model: Any = None,
    signals: Signals | None = None,
    profile: int = 0,
    devices: Sequence[jax.Device] | None = None,
) -> Result:
    """Trains an experiment in `workdir` and returns the result; resumes the run if the directory has a checkpoint.

    If `experiment.init.path` is set, a new run starts from the parameters of the run or model at this path; a resumed
    run ignores it.

    dataset: images or clips to train on instead of those that `experiment.data` selects; see `flowgen.data.Dataset`.
    held_out: the data to evaluate on if `dataset` is given. A run on `dataset` without `held_out` is not evaluated.
    model: the model to train instead of `experiment.build()`, with the same methods as the result of this call. To load
    the run later, pass `model` to `flowgen.load` too.
    signals: a `flowgen.training.Signals` context that has already been entered, and that makes training stop and save
    on Ctrl-C or SIGTERM; by default, `fit` creates one.
    profile: the number of steps to trace with the JAX profiler, beginning with the second step of this call; 0 for
    none. The trace is written to the folder `profile` in `workdir`.
    devices: list of this process's devices to train on; by default, all of them. Sampling and evaluation always use all
    of this process's devices.

    Raises ValueError if an argument is invalid or does not fit the experiment or the run in `workdir`, as well as the
    errors of `flowgen.training.train` and the errors that occur when the data and the frozen networks (codec, text
    encoder) are opened.

    Example:
        result = fit(flowgen.load_config("tarflow_digits"), "runs/digits")
    """
    if not isinstance(experiment, Experiment):
        raise ValueError(f"experiment is {shown(experiment)}; pass a flowgen.Experiment first, and then the workdir.")
    if type(experiment) not in KINDS:
        raise ValueError(
            f"experiment is a {type(experiment).__name__}, a class of your own, so its run could not be loaded; give "
            "your own parts to an experiment of flowgen, or train a flowgen.training.Job."
        )
    if dataset is None and held_out is not None:
        raise ValueError("held_out is given without dataset; give both, or neither.")
    if profile:
        check_count("profile", profile)
    _check_devices(devices)
    _check_origin(experiment, workdir)
    told: list[str] = []
    with Signals() if signals is None else nullcontext(signals) as signals:
        with signals.raising(), passing_warnings(told.append):
            experiment = experiment.with_provenance() if dataset is None else _of_own(experiment, dataset, held_out)
            # This comes before the data are encoded, because it raises an error if a user's object has no name to save.
            config = experiment.to_json()
            if own := fields_of_program(config):
                warnings.warn(
                    f"{', '.join(own)} is defined in this program or notebook, so only it can load the run; to use the "
                    "run in commands, too, define it in a module file, such as my_parts.py, and import it.",
                    stacklevel=2,
                )
            run = RunReader(workdir)
            with run.named():
                run.check(experiment.check_resumable, locks=is_primary())
                step = run.checkpoints.latest_step()
                saved = None if step is None else run.checkpoints.manifest(step)["config"]
            config = config if saved is None else _begun_with(config, saved, workdir)
            warn_of_dtype(experiment.model)
            start = _start(experiment, saved, model, devices)
            with told_once():
                job = experiment.job(dataset=dataset, held_out=held_out, model=model)
        return train(
            dataclasses.replace(job, profile=profile, devices=devices, start=start, warnings=told),
            workdir,
            optim=experiment.optim,
            train=experiment.train,
            log=experiment.log,
            config=config,
            check_config=experiment.check_resumable,
            signals=signals,
        )
