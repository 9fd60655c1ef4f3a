"""The layout of an exported model: a folder of files in open formats, with only what is needed to use the model.

<folder>/config.json         the version of flowgen, the experiment, where the weights come from, and their metrics
<folder>/model.safetensors   the variables by path, such as "params/blocks_0/proj_in/kernel"
<folder>/README.md           a model card
<folder>/codec/              the autoencoder of a latent flow, if this autoencoder was trained with flowgen
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from flowgen import documents
from flowgen.runs.arrays import Flat, layout
from flowgen.runs.checkpoints import CheckpointReader
from flowgen.runs.files import DIGEST, digest_of_file, is_regular, verified
from flowgen.safetensors import read_safetensors

CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"
CARD_FILE = "README.md"
CODEC = "codec"
FORMAT = 1
EXPERIMENT, WEIGHTS, METRICS = "experiment", "weights", "metrics"
# The files that loading reads.
FILES = (CONFIG_FILE, MODEL_FILE, f"{CODEC}/{CONFIG_FILE}", f"{CODEC}/{MODEL_FILE}")
# The types of the values that describe the weights.
_ABOUT = {"step": int, "averaged": bool, "trained": bool, DIGEST: str}
# Text encoders that are named rather than given by a path.
_NAMED_ENCODERS = ("minilm", "words")
_GROUPS = ("params/", "collections/")
_STORED = {"float16": "float32"}  # the dtypes that are smaller in files than in use
_AGAIN = "copy or download the whole folder again, or export the run again"


def without_paths(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the plain values of an experiment with "" for the paths of files and runs, which differ between machines.

    Example:
        without_paths(experiment.to_json())["data"]["path"]  # ""
    """
    plain = copy.deepcopy(dict(experiment))
    plain["init"] = {"path": "", "allow": []}
    data = plain.get("data")
    for group in (data, data.get("images") if isinstance(data, dict) else None, plain.get("codec")):
        if isinstance(group, dict) and "path" in group:
            group["path"] = ""
    if isinstance(text := plain.get("text"), dict) and text.get("encoder") not in _NAMED_ENCODERS:
        text["encoder"] = ""
    return plain


def is_exported(folder: str | os.PathLike[str]) -> bool:
    """Returns whether a folder contains an exported model. Does not read the weights.

    Example:
        is_exported("exported/digits")
    """
    path = Path(folder) / CONFIG_FILE
    if not is_regular(path):
        return False
    try:
        config = documents.read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and isinstance(config.get(EXPERIMENT), dict) and WEIGHTS in config


class ExportedReader(CheckpointReader):
    """Reads an exported model as if it were a run with a single checkpoint. Arrays stored as float16 become float32.

    Example:
        reader = ExportedReader("exported/digits")
        variables = reader.variables(reader.latest_step(), expected["params"])
    """

    def __init__(self, folder: str | Path):
        super().__init__(folder)
        self._path = self.directory / MODEL_FILE
        self._warned = False

    def config(self) -> dict[str, Any]:
        """Returns the experiment as plain JSON values.

        If the folder contains an autoencoder, `codec.path` is the path of this autoencoder. All other paths in the
        experiment become "", so that a config.json from an untrusted source cannot make flowgen read other files or
        URLs.

        Warns if config.json was changed after the export. Exports by earlier versions of flowgen have no digest, and
        cannot be checked.

        Raises FileNotFoundError if config.json is missing, or ValueError if it is damaged or has an unsupported format.
        """
        about = self._about()
        if DIGEST in about and not self._warned:
            self._warned = True
            try:
                verified(about)
            except ValueError:
                warnings.warn(
                    f"'{self.directory / CONFIG_FILE}' was changed after the export, so the model may not give the "
                    "results that it gave then.",
                    stacklevel=2,
                )
        experiment = without_paths(about[EXPERIMENT])
        if (self.directory / CODEC).is_dir() and isinstance(codec := experiment.get("codec"), dict):
            experiment["codec"] = {**codec, "path": str(self.directory / CODEC)}
        return experiment

    def steps(self) -> list[int]:
        """Returns a list with one entry: the training step at which the exported weights were saved."""
        return [self._about()[WEIGHTS]["step"]]

    def manifest(self, step: int) -> dict[str, Any]:
        """Returns the same items as `CheckpointReader.manifest`; the only file is model.safetensors."""
        entries = layout(self._tensors())
        arrays = {path: [shape, _STORED.get(dtype, dtype)] for path, (shape, dtype) in entries.items()}
        files = {MODEL_FILE: self._about()[WEIGHTS][DIGEST]}
        return {"step": step, "config": self.config(), "arrays": arrays, "files": files}

    def was_trained(self) -> bool:
        """Returns True if training produced the weights, and False if they were imported."""
        return self._about()[WEIGHTS]["trained"]

    def evaluation(self, step: int) -> dict[str, float]:
        """Returns the evaluation metrics that the run recorded for the weights; {} if there are none."""
        return self._about()[METRICS]

    def arrays(self, step: int, choose: Callable[[str], bool] = lambda path: True) -> Flat:
        """Returns the arrays whose paths `choose` accepts, after checking the digest of model.safetensors.

        Raises ValueError if this file has been changed or is truncated.
        """
        tensors = self._tensors()
        if digest_of_file(self._path) != self._about()[WEIGHTS][DIGEST]:
            raise ValueError(
                f"'{self._path}' is not the file that {CONFIG_FILE} describes (its SHA-256 differs); {_AGAIN}."
            )
        chosen = {path: tensor for path, tensor in tensors.items() if choose(path)}
        return {path: np.array(x, _STORED.get(x.dtype.name, x.dtype)) for path, x in chosen.items()}

    def is_averaged(self, step: int) -> bool:
        """Returns whether the weights are the moving average that training kept."""
        return self._about()[WEIGHTS]["averaged"]

    def _group(self, step: int, ema: bool) -> str:
        if not ema and self.is_averaged(step):
            raise ValueError(
                f"'{self.directory}' contains only the averaged parameters; leave out --no-ema, or export the run "
                "with --no-ema."
            )
        return "params"

    def _name_of(self, step: int) -> str:
        return f"The exported model '{self._path}'"

    def _entries(self) -> dict[str, str | None]:
        return {str(step): None for step in self.steps()}

    def _tensors(self) -> dict[str, np.ndarray]:
        if not is_regular(self._path):
            raise FileNotFoundError(f"'{self._path}' is missing; {_AGAIN}.")
        tensors = read_safetensors(self._path, fix=_AGAIN)
        for name in tensors:
            above = {parent.as_posix() for parent in PurePosixPath(name).parents}
            if not name.startswith(_GROUPS) or name.startswith("collections/params/") or not above.isdisjoint(tensors):
                raise ValueError(f"'{self._path}' has the tensor {name[:80]!r}, which no exported model has; {_AGAIN}.")
        return tensors

    def _about(self) -> dict[str, Any]:
        """Returns the content of config.json. Raises ValueError if `export` cannot have written it."""
        path = self.directory / CONFIG_FILE
        if not is_regular(path):
            raise FileNotFoundError(f"The exported model in '{self.directory}' has no {CONFIG_FILE}; {_AGAIN}.")
        config = documents.read_json(path, fix=_AGAIN)
        if not isinstance(config, dict) or not isinstance(config.get(EXPERIMENT), dict):
            raise ValueError(f"{path} does not describe a model of flowgen; {_AGAIN}.")
        if config.get("format") != FORMAT:
            raise ValueError(
                f"{path} has format {config.get('format')!r:.80}, but this flowgen reads format {FORMAT}; install the "
                f"flowgen that wrote it ({config.get('flowgen')!s:.80}) or a newer one."
            )
        weights, metrics = config.get(WEIGHTS), config.setdefault(METRICS, {})
        whole = isinstance(weights, dict) and all(type(weights.get(name)) is kind for name, kind in _ABOUT.items())
        if not whole or weights["step"] < 0 or not isinstance(metrics, dict) or not _are_numbers(metrics.values()):
            raise ValueError(f"{path} does not describe the weights; {_AGAIN}.")
        return config


def _are_numbers(values: Any) -> bool:
    return all(type(value) in (int, float) for value in values)
