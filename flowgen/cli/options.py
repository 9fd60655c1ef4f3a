"""Code shared by several commands: option parsers, help lines, a memory check and printing."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import shlex
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from flowgen.printable import printable
from flowgen.settings import Setting, check

if TYPE_CHECKING:
    from flowgen.checkpoint import OpenRun
    from flowgen.experiments.experiment import Experiment
    from flowgen.runs import RunReader

HELP_COLUMN = 36  # column at which the help of a field starts
WIDTH = 120  # characters in a line of values
MAX_VALUE = 60  # characters of a value in such a line
BYTES_OF_PARAMETER = 4
MAX_MESSAGE = 4000  # characters
CHECKPOINT = "run, exported folder, shipped model such as digits, or hf://org/name"
SHARING = (
    "--train.parallel fsdp divides the parameters over the devices of this host, for a model that does not fit on one; "
    "data copies them to every device. The default is the run's."
)


def finite_number(text: str) -> float:
    """Returns the finite number that a text represents; argparse puts the option's name before the error message."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a finite number")
    return value


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Returns a parser for whole numbers from least to most; if most is None, there is no upper bound."""

    def parse(text: str) -> int:
        try:
            value = check(int, int(text) if text.isdecimal() else float(text), path="")  # "1e4" is a whole number, too.
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a whole number {bounds}")
        return value

    return parse


def step_or_best(text: str) -> int | str:
    """Returns the checkpoint number that a text represents, or "best" if the text is "best"."""
    if text != "best" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor best")
    return text if text == "best" else int(text)


def described(setting: Setting) -> str:
    """Returns a field as it is written on a command line, followed by its help as a shell comment."""
    option = f"--{setting.name} {_quoted(setting)}"
    return f"{option:<{HELP_COLUMN}}  # {setting.about.rstrip('.')} [{setting.choices}]"


def value_lines(fields: Sequence[Setting]) -> list[str]:
    """Returns lines with the values of fields by group, without their help."""
    groups: dict[str, list[str]] = {}
    for setting in fields:
        group, _, field = setting.name.partition(".")
        value = _quoted(setting)
        value = value if len(value) <= MAX_VALUE else f"{value[:MAX_VALUE]}..."
        groups.setdefault(group, []).append(f"{field} {value}".lstrip())
    wrap = partial(textwrap.wrap, width=WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return [line for group, values in groups.items() for line in wrap(f"{group}: {', '.join(values)}")]


def _quoted(setting: Setting) -> str:
    value = str(setting.value)
    return f'"{value}"' if "'" in value and not set(value) & set('"$`\\') else shlex.quote(value)


def num_parameters(flow: Any) -> int:
    """Returns the number of parameters in a model, without allocating them."""
    import jax

    from flowgen.nn import init

    abstract = jax.eval_shape(lambda: init(flow, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(abstract["params"]))


def check_memory(parameters: int, *, copies: int) -> None:
    """Raises ValueError if a model's parameters do not fit in this machine's memory.

    Warns if the parameters fit but the copies that training keeps (gradient, moments, average) do not. Only CPUs are
    checked: accelerators have their own memory, and several may share a model.
    """
    import jax

    from flowgen import backend

    if backend.platform() != "cpu" or jax.process_count() > 1 or "SC_PHYS_PAGES" not in os.sysconf_names:
        return
    available, needed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), BYTES_OF_PARAMETER * parameters
    if copies * needed <= available:
        return
    message = (
        f"the model's {parameters:,} parameters take {needed / 1e9:.1f} GB, and training keeps {copies} copies, but "
        f"this machine has {available / 1e9:.1f} GB of memory; make the model narrower, or use fewer layers."
    )
    if needed > available:
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)


def open_run(run_dir: str | RunReader, step: int | str | None) -> OpenRun:
    """Opens a run without reading its weights, and removes the mesh of the training from its experiment."""
    from flowgen import checkpoint

    opened = checkpoint.open_run(run_dir, step)
    train = dataclasses.replace(opened.experiment.train, mesh=None)
    return dataclasses.replace(opened, experiment=dataclasses.replace(opened.experiment, train=train))


def placed(variables: Any, experiment: Experiment, options: argparse.Namespace) -> Any:
    """Returns a run's variables on the devices: divided over them if `train.parallel` is "fsdp", else on the first one.

    Commands create one device per CPU core. These devices share memory, so nothing is divided over them.
    """
    import jax
    import jax.numpy as jnp

    from flowgen.training.fsdp import divided_over_heads

    if experiment.train.parallel == "fsdp" and jax.local_device_count() > 1 and not _has_core_devices(options):
        return divided_over_heads(variables)
    return jax.tree.map(jnp.asarray, variables)


def trains_alone(experiment: Experiment, options: argparse.Namespace) -> bool:
    """Returns whether training uses only one of the CPU devices that a command creates to speed up sampling."""
    return _has_core_devices(options) and experiment.train.parallel == "data"


def _has_core_devices(options: argparse.Namespace) -> bool:
    """Returns whether the devices are those that a command creates, one per core of a CPU."""
    from flowgen import backend

    return options.makes_devices and backend.platform() == "cpu"


def warn_of_guidance(experiment: Experiment, opened: OpenRun) -> None:
    """Warns if samples are guided, but the run did not train the unconditional branch.

    There is no warning for imported weights, whose unconditional branch may have been trained elsewhere.
    """
    from flowgen.experiments.autoregressive import AutoregressiveExperiment

    is_guided = isinstance(experiment, AutoregressiveExperiment) and experiment.sampling.guidance
    if is_guided and opened.was_trained():
        experiment.warn_of_guidance()


# The error of the first line that could not be printed.
_unprinted: list[OSError] = []


def say(line: str) -> None:
    """Prints a line of the command's result, with control characters escaped.

    If standard output is closed or full, this and all further lines are dropped, so that the command still writes its
    files. `take_unprinted` returns the error afterwards.
    """
    if _unprinted:
        return
    text, encoding = printable(line), getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        _unprinted.append(error)
        silence(sys.stdout)


def take_unprinted() -> OSError | None:
    """Returns the error with which `say` failed since the last call, or None."""
    error = next(iter(_unprinted), None)
    _unprinted.clear()
    return error


def silence(stream: Any) -> None:
    """Discards what is unwritten in a stream, so that Python does not report the error again at exit."""
    with contextlib.suppress(OSError, ValueError):  # Not a file, or already closed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def as_sentence(message: object) -> str:
    """Returns a message on one line, with control characters escaped; the middle of a very long message is dropped."""
    text = str(message)
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE // 2]} ... {text[-MAX_MESSAGE // 2 :]}"
    return printable(" ".join(text.split()))
