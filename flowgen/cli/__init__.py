"""The commands of `python -m flowgen`: train, sample, evaluate, report, encode, convert, export and info.

The scripts `train.py` and `sample.py` run the commands of the same names. On a user error, a command prints one
sentence to standard error and exits with code 2 before it computes anything.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from types import ModuleType
from typing import NoReturn, TextIO

from flowgen import huge_pages
from flowgen.cli import convert, encode, evaluate, export, info, report, sample, train
from flowgen.cli.options import as_sentence, silence, take_unprinted
from flowgen.settings.ranges import meant

EXIT_MISTAKE = 2
EXIT_NOT_FINITE = 3
EXIT_INTERRUPTED = 130
INTERRUPTED = "Interrupted without saving; existing checkpoints are unchanged."
EXIT_BROKEN_PIPE = 141
MISTAKES = (ValueError, OSError, ImportError)
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # the runtime's name for this error

# Commands whose options may be followed by fields of the config.
TAKES_FIELDS = ("train", "sample", "info", "evaluate", "report", "encode")

# The options of which a command needs one, and the options that take no value.
NEEDS = {
    **dict.fromkeys(("train", "encode"), ("--config",)),
    **dict.fromkeys(("sample", "evaluate"), ("--checkpoint",)),
    "info": ("--config", "--checkpoint"),
}
SWITCHES = ("--debug", "--distributed", "--no-ema")
# The options and arguments that are paths.
PLACES = ("run", "file", "checkpoint", "config", "workdir", "out", "to", "single", "arguments", "autoencoder")

COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "train": (train, "Train a model, or resume a run."),
    "sample": (sample, "Draw samples from a trained model."),
    "evaluate": (evaluate, "Print the metrics of a model on its data, such as bits per dimension."),
    "report": (report, "Write an HTML page about a run: curves, samples, decoding, data and config."),
    "encode": (encode, "Compute and store the latents and text features of a dataset."),
    "convert": (convert, "Create a run directory from published weights."),
    "export": (export, "Write the model of a run to a folder of open formats."),
    "info": (info, "Print the fields of a config or a run."),
}


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one sentence, without the usage text."""

    # Builds the help on config fields, which is printed after the help on a command's options.
    fields_help: Callable[[], str] | None = None

    def format_help(self) -> str:
        """Returns the help on the command's options, and on the config fields if the command accepts any."""
        return super().format_help() + ("" if self.fields_help is None else f"\n{self.fields_help()}\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Flushes standard output before exiting, so that a closed output pipe raises an error that can be caught."""
        sys.stdout.flush()
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[0].upper()}{message[1:]}; see {self.prog} --help.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code.

    The code is 0 for success, 2 for a user error, 3 for non-finite numbers, 141 if the output pipe was closed, or
    128 plus the signal's number if a signal stopped the command.

    Example:
        main(["info", "--config", "configs/tarflow_digits.py"])
    """
    return _guarded(arguments, owns_process=False)


def _guarded(arguments: Sequence[str] | None, *, owns_process: bool) -> int:
    take_unprinted()  # of an earlier command in this process
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments), owns_process)
        _flush()
        unprinted = take_unprinted()
    except BrokenPipeError:  # The reader closed the pipe, as in `info | head`.
        silence(sys.stdout)
        silence(sys.stderr)
        return EXIT_BROKEN_PIPE
    if unprinted is None or code:
        return code
    if isinstance(unprinted, BrokenPipeError):
        return EXIT_BROKEN_PIPE
    return _fail(f"Standard output could not be written to ({unprinted.strerror}), so lines are missing.", EXIT_MISTAKE)


def make_parser() -> Parser:
    """Returns the parser for all commands; it leaves config fields unparsed.

    Example:
        options, fields = make_parser().parse_known_args(["info", "--config", "configs/tarflow_digits.py"])
    """
    parser = Parser(prog="python -m flowgen", description="Transformer normalizing flows and flow matching in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (command, summary) in COMMANDS.items():
        of_command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        of_command.fields_help = getattr(command, "fields_help", None)
        command.declare(of_command)
        if name in TAKES_FIELDS:
            of_command.add_argument(
                "--import",
                dest="modules",
                metavar="MODULE",
                action="append",
                default=[],
                help="import a module that defines objects used in a run or config; can be repeated",
            )
    return parser


def _run(words: list[str], owns_process: bool) -> int:
    parser = make_parser()
    try:
        for word in words:
            if word.endswith("=--"):  # argparse would read this as a missing value.
                raise ValueError(f"{word[:-3]} has the value '--'; give another value.")
        _check_command(words)
        _check_strays(words)
        options, rest = parser.parse_known_args(words)
        _check_places(options)
        if rest and options.command not in TAKES_FIELDS:
            raise ValueError(
                f"{rest[0]} is not an option of {options.command}; see {parser.prog} {options.command} --help."
            )
        with _ending_at_once():
            import flowgen.experiments  # noqa: F401
            from flowgen.settings import import_module

            for module in getattr(options, "modules", ()):
                try:
                    import_module(module)
                except ValueError as error:
                    raise ValueError(f"--import {error}") from error
            from flowgen.backend import join_processes, make_core_devices

            if getattr(options, "distributed", False):
                join_processes()
            options.makes_devices = owns_process and make_core_devices()
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
        return _fail(f"Out of memory ({error}); use a smaller model, batch or image size.", 2)


def _check_command(words: list[str]) -> None:
    """Raises ValueError if the first word is neither a command nor an option."""
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        raise ValueError(
            f"'{words[0]}' is not a command; choose one of {', '.join(COMMANDS)}{meant(words[0], COMMANDS)}"
        )


def _check_places(options: argparse.Namespace) -> None:
    """Raises ValueError if the path of a run, config or file is empty, as from an unset variable of the shell."""
    for name in PLACES:
        if getattr(options, name, None) == "":
            raise ValueError(f"{'' if name in ('run', 'file') else '--'}{name} is empty; give a path.")


def _check_strays(words: list[str]) -> None:
    """Raises ValueError if the name of a config or a run's directory is given without its option."""
    options = NEEDS.get(words[0], ()) if words else ()
    if any(word.partition("=")[0] in options for word in words):
        return
    for before, word in itertools.pairwise(words):
        is_value = before.startswith("-") and "=" not in before and before not in SWITCHES
        if is_value or word.startswith("-"):
            continue
        if named := [option for option in options if _names(option, word)]:
            raise ValueError(f"'{word}' is not understood; did you mean {named[0]} {word}?")


def _names(option: str, word: str) -> bool:
    if option == "--checkpoint":
        from flowgen.runs.located import shipped_models

        return os.path.isdir(word) or word in shipped_models()
    from flowgen.experiments.files import config_path

    try:
        return config_path(word).suffix == ".py"
    except FileNotFoundError:
        return False


def _outside(module: str) -> str:
    """Returns the message for a missing package that flowgen requires."""
    return (
        f"The package {module.partition('.')[0]} is not installed for {sys.executable}; run "
        f'`{sys.executable} -m pip install -e ".[train]"` in the flowgen folder, or use a Python environment that has '
        "it, such as .venv/bin/python after `make demo`."
    )


def program(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line as the main program of this process and returns its exit code.

    Call this function last, because the process ignores Ctrl-C afterwards. Unlike `main`, this function creates one CPU
    device per core, unless the environment sets another number; see `flowgen.backend.make_core_devices`.

    The command `train` first restarts the process with huge pages, if they are available and the process was started
    with the same arguments; see `flowgen.huge_pages.restart`.

    Example:
        sys.exit(program())
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["train"] and {"-h", "--help"}.isdisjoint(words):
        huge_pages.restart(words[1:])
    code = _guarded(words, owns_process=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python would print a traceback while it shuts down.
    if code > 128:  # A compilation may still be running, and would crash if Python shut down.
        _flush()
        if workers := sys.modules.get("flowgen.data.workers"):
            workers.end_processes()
        os._exit(code)
    return code


@contextlib.contextmanager
def _ending_at_once() -> Generator[None]:
    """Returns a context manager for imports. Inside it, Ctrl-C ends the process at once.

    Otherwise, an imported package could lose the KeyboardInterrupt in a callback."""

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
        if stream is not None:  # None if it was closed before the program began.
            stream.flush()


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Shows a warning as one sentence, with its location in the code unless it comes from flowgen."""
    place = "" if category is UserWarning else f" ({category.__name__}, {filename}:{lineno})"
    sys.stderr.write(f"flowgen: warning: {as_sentence(message)}{place}\n")


class _Sentences(logging.Handler):
    """Shows flowgen's log messages in the form of warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"flowgen: {record.levelname.lower()}: {as_sentence(record.getMessage())}\n")


@contextlib.contextmanager
def _log_as_sentences() -> Generator[None]:
    handler, logger = _Sentences(logging.WARNING), logging.getLogger("flowgen")
    # Other packages add a root handler, which would print the line again.
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
