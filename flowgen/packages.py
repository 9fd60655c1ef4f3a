"""Errors for missing optional packages."""

from __future__ import annotations

import importlib
from types import ModuleType


def need(module: str, purpose: str, package: str = "") -> ModuleType:
    """Imports and returns a module. If it is not installed, raises the error that `missing` returns.

    package: the name on the package index, if it differs from the name of the module.

    Example:
        av = need("av", "Reading and writing video")
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing(purpose, package or module) from error


def missing(purpose: str, *packages: str, options: str = "", otherwise: str = "") -> ModuleNotFoundError:
    """Returns an error that lists the missing packages and the command that installs them.

    purpose: the feature that needs the packages, as the subject of the message. packages: names on the package index,
    which may differ from the module names. options: options for pip. otherwise: an alternative to installing the
    packages.

    Example:
        raise missing("Reading and writing video", "av") from error
    """
    command = " ".join(["pip install", *filter(None, [options]), *packages])
    way_out = f", or {otherwise}" if otherwise else ""
    noun, them = ("package", "it") if len(packages) == 1 else ("packages", "them")
    return ModuleNotFoundError(
        f"{purpose} needs the {noun} {' and '.join(packages)}; install {them} with `{command}`{way_out}."
    )
