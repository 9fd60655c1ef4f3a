"""What is said of a package that flowgen can do without and that somebody asked for."""

from __future__ import annotations


def missing(purpose: str, package: str, *, options: str = "", otherwise: str = "") -> ModuleNotFoundError:
    """Returns the error of a missing package, which names the package and the command that installs it.

    purpose: what needs it, the subject of the sentence. package: its name on the package index, which may differ from
    that of the module. options: of pip. otherwise: what can be done without it.

    Example:
        raise missing("Reading and writing video", "av") from error
    """
    command = " ".join(["pip install", *filter(None, [options, package])])
    way_out = f", or {otherwise}" if otherwise else ""
    return ModuleNotFoundError(f"{purpose} needs the package {package}; install it with `{command}`{way_out}.")
