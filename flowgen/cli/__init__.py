"""The commands: `python -m flowgen {train,sample,evaluate,encode,convert,info}`; `train.py` and `sample.py` open two.

A mistake of the user ends in one sentence on standard error and exit code 2, before anything is computed.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from types import ModuleType
from typing import NoReturn, TextIO

from flowgen.cli import convert, encode, evaluate, info, sample, train
from flowgen.cli.options import as_sentence

EXIT_MISTAKE = 2
EXIT_NOT_FINITE = 3
EXIT_INTERRUPTED = 130
INTERRUPTED = "Interrupted without saving; checkpoints are as they were."
EXIT_BROKEN_PIPE = 141
MISTAKES = (ValueError, OSError, ImportError)
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # as the runtime says it

# Commands after whose options any field of the config may be set.
TAKES_FIELDS = ("train", "sample", "info", "evaluate", "encode")

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

    # What a command says of fields below its options, made when it is asked for.
    fields_help: Callable[[], str] | None = None

    def format_help(self) -> str:
        """Returns the help of the options and, where the command has it, that of fields of the config."""
        return super().format_help() + ("" if self.fields_help is None else f"\n{self.fields_help()}\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Ends, with the help written out: nobody may read it any more."""
        sys.stdout.flush()
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[0].upper()}{message[1:]}; see {self.prog} --help.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of a command line: 0, 2 for a mistake, 3 for numbers that are not finite, 141 where nobody
    reads its output any more, 128 + signal where a signal stopped a training run.

    Example:
        main(["info", "--config", "configs/tarflow_digits.py"])
    """
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        _flush()
        return code
    except BrokenPipeError:  # As of `info | head`: who reads has seen enough.
        _silence()
        return EXIT_BROKEN_PIPE


def make_parser() -> Parser:
    """Returns the parser of all commands; fields of the config are what it does not know.

    Example:
        options, fields = make_parser().parse_known_args(["info", "--config", "configs/tarflow_digits.py"])
    """
    parser = Parser(prog="python -m flowgen", description="Transformer normalizing flows in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (command, summary) in COMMANDS.items():
        of_command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        of_command.fields_help = getattr(command, "fields_help", None)
        command.declare(of_command)
    return parser


def _run(words: list[str]) -> int:
    parser = make_parser()
    try:
        for word in words:
            if word.endswith("=--"):  # argparse would take it for no value at all.
                raise ValueError(f"{word[:-3]} has the value '--'; give another.")
        options, rest = parser.parse_known_args(words)
        if rest and options.command not in TAKES_FIELDS:
            raise ValueError(
                f"{rest[0]} is not an option of {options.command}; see {parser.prog} {options.command} --help."
            )
        with _ending_at_once():
            import flowgen.experiments  # noqa: F401
        with warnings.catch_warnings(), _log_as_sentences():
            warnings.showwarning = _show_warning  # ty: ignore[invalid-assignment]
            return COMMANDS[options.command][0].run(options, rest)
    except BrokenPipeError:
        raise
    except FloatingPointError as error:
        return _fail(error, EXIT_NOT_FINITE)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, EXIT_INTERRUPTED)
    except ModuleNotFoundError as error:
        return _fail(_outside(error.name) if error.name else error, EXIT_MISTAKE)
    except MISTAKES as error:
        return _fail(error, EXIT_MISTAKE)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and OUT_OF_MEMORY not in str(error):
            raise
        return _fail(f"There is not enough memory ({error}); make the model, the batch or the images smaller.", 2)


def _outside(module: str) -> str:
    """What is said where a package that flowgen cannot do without is missing."""
    return (
        f"The package {module.partition('.')[0]} is missing in {sys.executable}; install flowgen there with "
        f'`{sys.executable} -m pip install -e ".[train]"` in its folder, or run the python of the environment that '
        "has it, such as .venv/bin/python after `make demo`."
    )


def _silence() -> None:
    """Sends what is still to be written nowhere, without which Python complains of the broken pipe when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # One that is no file, or closed already.
            os.dup2(nowhere, stream.fileno())


def program(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of `main`, for a process that ends with it: Ctrl-C has nothing left to stop.

    Example:
        sys.exit(program())
    """
    code = main(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python would answer it with a traceback while it shuts down.
    if code > 128:  # What was interrupted may still compile, and crashes if Python shuts down around it.
        _flush()
        os._exit(code)
    return code


@contextlib.contextmanager
def _ending_at_once() -> Generator[None]:
    """While packages are imported, Ctrl-C ends the program itself: an exception may be lost in a callback of theirs."""

    def end(number, frame):
        _fail(INTERRUPTED, EXIT_INTERRUPTED)
        os._exit(EXIT_INTERRUPTED)

    watched = threading.current_thread() is threading.main_thread()
    if not watched or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # Closed when the program began.
            stream.flush()


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
    if sys.stderr is not None:
        sys.stderr.write(f"flowgen: {as_sentence(error)}\n")
    return code
