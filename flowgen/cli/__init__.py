"""The commands: `python -m flowgen {train,sample,evaluate,encode,convert,info}`; `train.py` and `sample.py` open two.

A mistake of the user ends in one sentence on standard error and exit code 2, before anything is computed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn, TextIO

from flowgen.cli import convert, encode, evaluate, info, sample, train

EXIT_MISTAKE = 2
EXIT_NOT_FINITE = 3
EXIT_INTERRUPTED = 130
MISTAKES = (ValueError, OSError, ImportError)

# Commands after whose options any field of the config may be set.
TAKES_FIELDS = ("train", "info", "evaluate", "encode")

COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "train": (train, "Train a model, or go on training it."),
    "sample": (sample, "Draw samples from a trained model."),
    "evaluate": (evaluate, "Print the bits per dimension of a model on its data."),
    "encode": (encode, "Compute the latents and text features of a data set once."),
    "convert": (convert, "Make a run directory of published weights."),
    "info": (info, "Print the fields of a config or of a run."),
}


class Parser(argparse.ArgumentParser):
    """argparse, with one sentence instead of a usage text before an error."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[0].upper()}{message[1:]}; see {self.prog} --help.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of a command line: 0, 2 for a mistake, 3 for numbers that are not finite,
    128 + signal where a signal stopped a training run.

    Example:
        main(["info", "--config", "configs/tarflow_digits.py"])
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="python -m flowgen", description="Transformer normalizing flows in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (command, summary) in COMMANDS.items():
        command.declare(commands.add_parser(name, help=summary, description=summary, allow_abbrev=False))
    try:
        options, rest = parser.parse_known_args(words)
        if rest and options.command not in TAKES_FIELDS:
            raise ValueError(
                f"{rest[0]} is not an option of {options.command}; see {parser.prog} {options.command} --help."
            )
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # ty: ignore[invalid-assignment]
            return COMMANDS[options.command][0].run(options, rest)
    except FloatingPointError as error:
        return _fail(error, EXIT_NOT_FINITE)
    except KeyboardInterrupt:
        return _fail("Interrupted without saving; checkpoints are as they were.", EXIT_INTERRUPTED)
    except MISTAKES as error:
        return _fail(error, EXIT_MISTAKE)


def program(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of `main`, for a process that ends with it: Ctrl-C has nothing left to stop.

    Example:
        sys.exit(program())
    """
    code = main(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python would answer it with a traceback while it shuts down.
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Shows a warning as one sentence; where in the code it arose is for those of other packages."""
    sentence = " ".join(str(message).split())
    place = "" if category is UserWarning else f" ({category.__name__}, {filename}:{lineno})"
    sys.stderr.write(f"flowgen: warning: {sentence}{place}\n")


def _fail(error: Exception | str, code: int) -> int:
    sentence = " ".join(str(error).split())
    sys.stderr.write(f"flowgen: {sentence}\n")
    return code
