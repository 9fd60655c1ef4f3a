"""Loads exported models from the Hugging Face Hub, and uploads them. Needs the extra `hub`."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

from flowgen.checkpoint import load
from flowgen.data.inventory import name_list
from flowgen.experiments import Experiment
from flowgen.exports import export
from flowgen.packages import need
from flowgen.runs import is_exported, located
from flowgen.runs.exported import CARD_FILE, CODEC, FILES
from flowgen.runs.located import HUB

# What is uploaded of a folder; other files, such as notes or credentials, stay there.
_OF_MODEL = (*FILES, CARD_FILE, f"{CODEC}/{CARD_FILE}")


def from_pretrained(name: str, revision: str | None = None) -> tuple[Any, Any, Experiment]:
    """Returns the model, variables and experiment of a model on the hub, like `load("hf://org/name@revision")`.

    The files are downloaded once, into the hub's cache. No code in the files is executed.

    name: the model's name, such as "org/name". revision: a branch, tag or commit; None for the main branch.

    Raises ModuleNotFoundError if huggingface_hub is not installed, OSError if the download fails, or ValueError if the
    files are damaged or do not belong to a flowgen model.

    Example:
        flow, params, experiment = from_pretrained("org/digits")
    """
    return load(f"{HUB}{name}" + (f"@{revision}" if revision else ""))


def push_to_hub(model: str | os.PathLike[str], name: str, *, private: bool = True, **options: Any) -> str:
    """Uploads a model to the hub, into the repository `name`, and returns the URL of the commit.

    The repository is created if it does not exist. If it contains a model already, the new model replaces it.

    model: an exported folder, or a run, which is exported first. From a folder, the model and its card are uploaded
    unchanged, so edit README.md first. Other files in the folder are not uploaded; a warning lists them. private:
    whether a new repository is private. options: for a run, the options of `flowgen.export`.

    Raises ModuleNotFoundError if huggingface_hub is not installed, and the errors of `flowgen.export` and of the hub.

    Example:
        push_to_hub("exported/digits", "org/digits")
    """
    api = need("huggingface_hub", "push_to_hub")
    folder = located(model)
    if is_exported(folder):
        if options:
            raise ValueError(f"{', '.join(options)} cannot be set for the exported folder {model}; leave it out.")
        return _uploaded(api, folder, name, private)
    with tempfile.TemporaryDirectory(prefix="flowgen-") as temporary:
        return _uploaded(api, export(folder, Path(temporary) / "model", **options), name, private)


def _uploaded(api: Any, folder: str | os.PathLike[str], name: str, private: bool) -> str:
    files = sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())
    if others := [file for file in files if file not in _OF_MODEL]:
        warnings.warn(
            f"'{folder}' has files that are not part of the model, so they are not uploaded: {name_list(others)}.",
            stacklevel=3,
        )
    api.create_repo(name, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=name,
        folder_path=os.fspath(folder),
        commit_message="Upload a flowgen model",
        allow_patterns=list(_OF_MODEL),
        delete_patterns=[f"{CODEC}/*"],  # of an earlier model, which the new one would otherwise open
    )
    return str(commit)
