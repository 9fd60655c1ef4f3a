"""The commands: `python -m flowgen {train,sample,evaluate,encode,convert,info}`; `train.py` and `sample.py` open two.

A mistake of the user ends in one sentence on standard error and exit code 2, before anything is computed.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import warnings
from collections.abc import Generator, Sequence
from types import ModuleType
from typing import NoReturn, TextIO

from flowgen.cli import convert, encode, evaluate, info, sample, train
from flowgen.cli.options import as_sentence

EXIT_MISTAKE = 2
EXIT_NOT_FINITE = 3
EXIT_INTERRUPTED = 130
MISTAKES = (ValueError, OSError, ImportError)
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # as the runtime says it

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
        with warnings.catch_warnings(), _log_as_sentences():
            warnings.showwarning = _show_warning  # ty: ignore[invalid-assignment]
            return COMMANDS[options.command][0].run(options, rest)
    except FloatingPointError as error:
        return _fail(error, EXIT_NOT_FINITE)
    except KeyboardInterrupt:
        return _fail("Interrupted without saving; checkpoints are as they were.", EXIT_INTERRUPTED)
    except MISTAKES as error:
        return _fail(error, EXIT_MISTAKE)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and OUT_OF_MEMORY not in str(error):
            raise
        return _fail(f"There is not enough memory ({error}); make the model, the batch or the images smaller.", 2)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Shows a warning as one sentence; where in the code it arose is for those of other packages."""
    place = "" if category is UserWarning else f" ({category.__name__}, {filename}:{lineno})"
    sys.stderr.write(f"flowgen: warning: {as_sentence(message)}{place}\n")


class _Sentences(logging.Handler):
    """Shows what the library logs as warnings are shown."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"flowgen: {record.levelname.lower()}: {as_sentence(record.getMessage())}\n")


@contextlib.contextmanager
def _log_as_sentences() -> Generator[None]:
    handler, logger = _Sentences(logging.WARNING), logging.getLogger("flowgen")
    # Other packages give the root a handler of their own, which would show the same line as it is.
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


def _fail(error: BaseException | str, code: int) -> int:
    sys.stderr.write(f"flowgen: {as_sentence(error)}\n")
    return code
