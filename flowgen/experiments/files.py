"""Loads experiments from the Python files that define them and from the JSON that a run saves."""

from __future__ import annotations

import difflib
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from flowgen import settings
from flowgen.experiments.autoencoder import AutoencoderExperiment
from flowgen.experiments.experiment import Experiment
from flowgen.experiments.flow import FlowExperiment
from flowgen.experiments.matching import MatchingExperiment
from flowgen.experiments.token_flow import TokenFlowExperiment
from flowgen.experiments.video_flow import VideoFlowExperiment
from flowgen.places import check_local
from flowgen.runs import DIGEST

KINDS: tuple[type[Experiment], ...] = (
    FlowExperiment,
    VideoFlowExperiment,
    TokenFlowExperiment,
    MatchingExperiment,
    AutoencoderExperiment,
)
# The shipped configs are next to the package in a checkout, and inside the package if flowgen is installed.
_PLACES = tuple(Path(__file__).parents[up] / "configs" for up in (2, 1))

E = TypeVar("E", bound=Experiment)


def load_config(path: str | Path) -> Experiment:
    """Runs a Python file that defines a function config(), and returns the experiment that this function returns.

    path: path to the file, or the name of a shipped config, such as "tarflow_digits".

    Raises FileNotFoundError if there is neither a file nor a shipped config of this name, or ValueError if `path` is a
    URL or the file has no function config() that returns an experiment.

    Example:
        experiment = load_config("configs/tarflow_digits.py")
    """
    make = runpy.run_path(str(config_path(path))).get("config")
    experiment = make() if callable(make) else None
    if not isinstance(experiment, Experiment):
        kinds = ", ".join(kind.__name__ for kind in KINDS)
        raise ValueError(f"config {path} must define a function config() that returns one of {kinds}.")
    return experiment


def config_path(path: str | Path) -> Path:
    """Returns the path to a config file. path: the path itself, or the name of a shipped config.

    Raises FileNotFoundError if there is no such config; the message lists the shipped configs.

    Example:
        config_path("tarflow_digits")
    """
    check_local("config", path)
    if Path(path).is_file():
        return Path(path)
    known = {file.stem: file for place in _PLACES if place.is_dir() for file in sorted(place.glob("[!_]*.py"))}
    if str(path) in known:
        return known[str(path)]
    close = difflib.get_close_matches(Path(path).stem, known, n=1)
    meant = f"; did you mean {close[0]}?" if close else "."
    raise FileNotFoundError(f"config {path} does not exist{meant} The shipped configs are {', '.join(known)}.")


def override(experiment: E, arguments: Sequence[str]) -> E:
    """Returns a copy of an experiment with fields set as on the command line.

    arguments: names of fields and their new values, such as ["--optim.lr", "3e-4"].

    Raises ValueError if an argument is invalid.

    Example:
        experiment = override(experiment, ["--optim.lr", "3e-4"])
    """
    return settings.override(experiment, arguments)


def from_json(plain: Mapping[str, Any]) -> Experiment:
    """Restores an experiment of any class from the result of `Experiment.to_json`.

    Raises ValueError if the class or a field is unknown or a value is invalid; the message names the field.

    Example:
        experiment = from_json(json.loads(text))
    """
    kinds = {kind.__name__: kind for kind in KINDS}
    name = plain.get(settings.TYPE)
    if name is None:
        raise ValueError(
            f"config.json has no 'type' (for example, {next(iter(kinds))}); if flowgen.training.train wrote the run, "
            "read its weights with flowgen.runs.CheckpointReader."
        )
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"type is {name!r:.80}; it must be one of {', '.join(kinds)}.")
    # A saved config.json contains a digest of itself, which `flowgen.runs` checks.
    return kinds[name].from_json({field: value for field, value in plain.items() if field != DIGEST})
