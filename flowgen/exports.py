"""Exports a trained model to a folder that `flowgen.load` and all commands read like a run."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from flowgen import __version__
from flowgen.cards import model_card
from flowgen.checkpoint import check_new, choose_step
from flowgen.experiments import from_json
from flowgen.places import is_remote
from flowgen.runs import DIGEST, RunReader, is_exported, is_run, located
from flowgen.runs.arrays import Flat
from flowgen.runs.exported import (
    CARD_FILE,
    CODEC,
    CONFIG_FILE,
    EXPERIMENT,
    FORMAT,
    METRICS,
    MODEL_FILE,
    WEIGHTS,
    without_paths,
)
from flowgen.runs.files import digest_of_file, signed, write_json
from flowgen.runs.new_folder import new_folder
from flowgen.safetensors import write_safetensors


def export(
    run_dir: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    step: int | str | None = None,
    ema: bool = True,
    dtype: str | None = None,
    licence: str = "",
) -> Path:
    """Writes the model of a run to a new folder: config.json, model.safetensors and a model card. Returns the folder.

    The folder appears only once it is complete. Leftovers of interrupted exports to the same folder are removed. The
    exported config contains no paths on this machine. If the model uses an autoencoder that flowgen trained, the
    autoencoder is exported to the subfolder `codec`.

    run_dir, step, ema: see `flowgen.load`.
    dtype: None to keep the parameters bit for bit, or "float16" to halve the size of the file. Loading converts them to
    float32. licence: the licence of the weights, for the card, such as "apache-2.0"; if empty, the card says that none
    is stated.

    Raises:
        FileExistsError: the folder exists and is not empty.
        FileNotFoundError: the run does not exist or has no such checkpoint.
        ValueError: the checkpoint is damaged, `dtype` is unknown, or the parameters are not finite or exceed the range
            of float16.

    Example:
        export("runs/digits", "exported/digits")
        flow, params, experiment = flowgen.load("exported/digits")
    """
    if dtype not in (None, "float16"):
        raise ValueError(f"dtype is {dtype!r:.80}; it must be float16, or None to keep the dtype of the run.")
    check_new(folder)
    with new_folder(folder) as unfinished:
        _write(run_dir, unfinished, step, ema, dtype, licence)
    return Path(folder)


def _write(
    run_dir: str | os.PathLike[str], folder: Path, step: int | str | None, ema: bool, dtype: str | None, licence: str
) -> None:
    run = RunReader(located(run_dir))
    with run.named():
        reader = run.checkpoints
        experiment: Any = from_json(run.config())
        step = choose_step(reader, os.fspath(run_dir), step, experiment.best_metric)
        weights = _as_stored(reader.weights(step, ema=ema), dtype)
        about = {
            "step": step,
            "averaged": ema and reader.is_averaged(step),
            "trained": reader.was_trained(),
            "dtype": dtype,
        }
        metrics = reader.evaluation(step) or {}
    if path := _codec_run(experiment):
        experiment.encoding.open_codec()  # raises an error if it is not the one that the flow was trained with
        (folder / CODEC).mkdir()
        _write(path, folder / CODEC, None, True, None, licence)  # the flow knows the digest of these very values
    plain = without_paths(experiment.to_json())
    write_safetensors(folder / MODEL_FILE, weights, {"format": "flax", "flowgen": __version__})
    config = {
        "flowgen": __version__,
        "format": FORMAT,
        EXPERIMENT: plain,
        WEIGHTS: {**about, DIGEST: digest_of_file(folder / MODEL_FILE)},
        METRICS: metrics,
    }
    write_json(folder / CONFIG_FILE, signed(config))
    size = sum(array.size for name, array in weights.items() if name.startswith("params/"))
    card = model_card(from_json(plain), size, about, metrics, licence=licence, has_codec=bool(path))
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def _codec_run(experiment: Any) -> str:
    """Returns the path of the run in which flowgen trained the experiment's codec, or "" if there is no such run."""
    path = getattr(getattr(experiment, "codec", None), "path", "")
    if not path or is_remote(path) or is_exported(path) or is_run(path):
        return path
    warnings.warn(
        f"codec.path '{path}' is not a run of flowgen, so its autoencoder is not exported; users of the folder give "
        "its path with --codec.path.",
        stacklevel=2,
    )
    return ""


def _as_stored(weights: Flat, dtype: str | None) -> Flat:
    """Returns the weights, with float32 arrays converted to `dtype`; raises ValueError if they exceed its range."""
    if dtype is None:
        return weights
    most = np.finfo(dtype).max
    for name, array in weights.items():
        if array.dtype == np.float32 and array.size and np.abs(array).max() > most:
            raise ValueError(f"{name} has values above {most:g}, the largest {dtype}; leave out dtype.")
    return {name: array.astype(dtype) if array.dtype == np.float32 else array for name, array in weights.items()}
