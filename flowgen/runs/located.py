"""Finds models by name: those that ship with flowgen, such as "digits", and those on a hub, such as hf://org/name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flowgen.packages import need
from flowgen.runs.checkpoints import CHECKPOINTS
from flowgen.runs.exported import CARD_FILE, CONFIG_FILE, FILES, MODEL_FILE

SHIPPED = Path(__file__).parents[1] / "models"
HUB = "hf://"
_LONGEST_REASON = 200
# A folder with any of these is, or was, a run or an exported model.
_OF_MODELS = (CONFIG_FILE, MODEL_FILE, CHECKPOINTS)


def shipped_models() -> tuple[str, ...]:
    """Returns the names of the models that ship with flowgen.

    Example:
        shipped_models()  # ("digits", "digits-cfm")
    """
    return tuple(sorted(path.name for path in SHIPPED.iterdir() if path.is_dir())) if SHIPPED.is_dir() else ()


def located(place: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Returns the folder of a shipped model, or of a model downloaded from a hub. Returns other paths unchanged.

    place: the name of a shipped model; hf://org/name or hf://org/name@revision for a model on the Hugging Face Hub; or
    any path or URL. If the current directory contains a run or an exported model that has the name of a shipped model,
    `place` is returned unchanged.

    Raises ModuleNotFoundError if huggingface_hub is not installed, ValueError if the name on the hub is invalid, or
    OSError if the download fails.

    Example:
        run = RunReader(located("digits"))
    """
    text = os.fspath(place)
    if text.startswith(HUB):
        return _downloaded(text)
    if text in shipped_models() and not any(os.path.lexists(os.path.join(text, name)) for name in _OF_MODELS):
        return SHIPPED / text
    return place


def _downloaded(url: str) -> str:
    name, _, revision = url.removeprefix(HUB).rstrip("/").partition("@")
    if name.count("/") != 1 or not all(name.split("/")):
        raise ValueError(f"'{url}' is not the name of a model on a hub; write {HUB}org/name or {HUB}org/name@revision.")
    hub: Any = need("huggingface_hub", HUB)
    try:
        return hub.snapshot_download(name, revision=revision or None, allow_patterns=[*FILES, CARD_FILE])
    except Exception as error:  # the errors of its connections have no common class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{url} could not be downloaded ({reason[:_LONGEST_REASON]}).") from error
