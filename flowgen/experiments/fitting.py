"""`fit`: train an experiment in a directory, optionally on your own data and model."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from flowgen.arrays import shown
from flowgen.data import Dataset, told_once
from flowgen.experiments.experiment import Experiment
from flowgen.runs import check_workdir
from flowgen.training import Result, Signals, is_primary, train


def fit(
    experiment: Experiment,
    workdir: str | Path,
    *,
    dataset: Dataset | None = None,
    held_out: Dataset | None = None,
    model: Any = None,
    signals: Signals | None = None,
) -> Result:
    """Returns the result of training an experiment in `workdir`; resumes if it holds a checkpoint.

    dataset: used instead of `experiment.data`; see `flowgen.data.Dataset`. held_out: used for evaluation; None
    evaluates nothing. model: trained instead of `experiment.build()`, with the same methods; `flowgen.load` takes it
    too. signals: already watched ones; None watches those of this process.

    Raises what `train` and the experiment's parts raise, before any compute.

    Example:
        result = fit(flowgen.load_config("tarflow_digits"), "runs/digits")
    """
    if not isinstance(experiment, Experiment):
        raise ValueError(f"experiment is {shown(experiment)}; give a flowgen.Experiment, and then the workdir.")
    if dataset is None and held_out is not None:
        raise ValueError("held_out is given without dataset; give both.")
    with Signals() if signals is None else nullcontext(signals) as signals:
        with signals.raising():
            if dataset is None:
                experiment = experiment.with_provenance()
            # Before data are encoded.
            check_workdir(Path(workdir), experiment.check_resumable, locks=is_primary())
            with told_once():
                job = experiment.job(dataset=dataset, held_out=held_out, model=model)
        return train(
            job,
            workdir,
            optim=experiment.optim,
            train=experiment.train,
            log=experiment.log,
            config=experiment.to_json(),
            check_config=experiment.check_resumable,
            signals=signals,
        )
