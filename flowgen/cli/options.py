"""What several commands share: option values, the experiment that options describe, and where they print."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import shlex
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from flowgen.printable import printable
from flowgen.settings import Setting, check, settings, words_of

HELP_COLUMN = 36  # from which on the help of a field is shown
BYTES_OF_PARAMETER = 4
MAX_MESSAGE = 4000  # letters
MAX_SEED = 2**32 - 1  # Without 64-bit integers jax would cut what is above, and two seeds would give one image.


def finite_number(text: str) -> float:
    """Returns a finite number; argparse puts the option's name before what is wrong."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a finite number")
    return value


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Returns the parser of whole numbers from least to most."""

    def parse(text: str) -> int:
        try:
            value = check(int, int(text) if text.isdecimal() else float(text), path="")  # 1e4 is whole, too.
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a whole number {bounds}")
        return value

    return parse


def step_or_best(text: str) -> int | str:
    """Returns the number of a checkpoint, or "best"."""
    if text != "best" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor best")
    return text if text == "best" else int(text)


def load_experiment(options: argparse.Namespace, rest: list[str]) -> Any:
    """Returns the experiment of `--config`, shrunk by `--debug`, with the fields in `rest` set."""
    from flowgen import config

    try:
        experiment = config.load(options.config)
    except Exception as error:  # The file is the user's program, which can raise anything.
        line = _line_of(options.config, error)
        if line is None:
            raise
        reason = str(error).rstrip(".") if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"config {options.config} fails in line {line} ({reason}); correct it there.") from error
    # Dataclasses do not look at types; the way through JSON does, and names the field.
    experiment = config.from_json(config.to_json(experiment))
    if options.debug:
        experiment = config.shrink(experiment)
    return config.override(experiment, rest)


def _line_of(path: str, error: Exception) -> int | None:
    """The line of a config file at which an error arose; None where the file is not to blame."""
    if isinstance(error, SyntaxError) and (error.filename in (path, None) or error.lineno is None):
        return error.lineno or 1  # A NUL byte has no place.
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return lines[-1] if lines else None


def described(setting: Setting) -> str:
    """Returns a field as it is given to a command, with its help behind it as a comment of the shell."""
    value = str(setting.value)
    quoted = f'"{value}"' if "'" in value and not set(value) & set('"$`\\') else shlex.quote(value)
    option = f"--{setting.name} {quoted}"
    return f"{option:<{HELP_COLUMN}}  # {setting.about.rstrip('.')} [{setting.choices}]"


def group_help(name: str, group: Any) -> str:
    """Returns a line for every field of a group of the config, with the values that it has."""
    return "\n".join(f"  {described(field._replace(name=f'{name}.{field.name}'))}" for field in settings(group))


def fields_of(words: Sequence[str], *, groups: tuple[str, ...], command: str) -> list[str]:
    """Returns the dotted names of the fields that words such as "--sampling.rule" or "--sampling.rule=linear" set.

    Raises ValueError where they are of other groups of the config, or no fields at all.
    """
    names = [word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")]
    other = [f"--{name}" for name in names if name.partition(".")[0] not in groups or "." not in name]
    if other or (words and not names):
        ours = " and ".join(f"--{group}.*" for group in groups)
        raise ValueError(
            f"{[*other, *words][0]} is not an option of {command}; of the config it takes {ours}; "
            f"see python -m flowgen {command} --help."
        )
    return names


def check_options(options: argparse.Namespace, model: Any, command: str) -> None:
    """Raises ValueError where an option was given that means nothing for a model of this kind."""
    from flowgen import tasks
    from flowgen.settings import type_name

    def names(task: Any) -> tuple[str, ...]:
        return task.SAMPLE_OPTIONS if command == "sample" else task.EVALUATE_OPTIONS

    own = names(tasks.task_of(model))
    for name in {*names(tasks.likelihood), *names(tasks.clips), *names(tasks.matching)} - {*own}:
        if getattr(options, name) not in (None, False):
            shown = ", ".join(f"--{other.replace('_', '-')}" for other in own)
            raise ValueError(
                f"--{name.replace('_', '-')} is not an option for a {type_name(model)}, which takes {shown}; "
                "leave it out."
            )


def class_words(text: str) -> list[str]:
    """Returns the classes that an option names, apart from each other; a name with a comma stands in double quotes."""
    return [unicodedata.normalize("NFC", word.strip()) for word in words_of(text, "--classes")]


def class_numbers_of(text: str, names: tuple[str, ...], num_classes: int) -> list[int]:
    """Returns the numbers of the classes that `--classes` names, by a name or, where no class has it, by a number.

    Raises ValueError where one is neither, with the names that there are.
    """
    known = {name: number for number, name in enumerate(names)}
    numbers = [known[word] if word in known else _class_number(word, names, num_classes) for word in class_words(text)]
    if not numbers:
        raise ValueError("--classes is empty; give classes by name or number, such as 0,1,2.")
    return numbers


def _class_number(word: str, names: tuple[str, ...], num_classes: int) -> int:
    from flowgen.data.inventory import name_list

    try:
        number, close = int(word), []
    except ValueError:
        number, close = num_classes, difflib.get_close_matches(word, names, n=1)
    if not -1 <= number < num_classes:
        meant = f" (did you mean {close[0]}?)" if close else ""
        which = f"the names {name_list(names, 20)}, or " if names else ""
        raise ValueError(
            f"--classes has {word!r}, which is no class of this model{meant}; give {which}numbers from 0 to "
            f"{num_classes - 1}, -1 for unconditional."
        )
    return number


def num_parameters(flow: Any) -> int:
    """Returns how many parameters a model has, without making them."""
    import jax

    from flowgen.models import init

    abstract = jax.eval_shape(lambda: init(flow, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(abstract["params"]))


def check_memory(parameters: int, *, copies: int) -> None:
    """Raises ValueError where a model's parameters cannot be kept in this machine's memory, and warns where as many
    copies of them cannot, as training keeps of parameters, moments and average.

    Looks at CPUs alone: accelerators have memory of their own, of which several may share a model.
    """
    import jax

    if jax.default_backend() != "cpu" or jax.process_count() > 1 or "SC_PHYS_PAGES" not in os.sysconf_names:
        return
    available, needed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), BYTES_OF_PARAMETER * parameters
    if copies * needed <= available:
        return
    message = (
        f"the model has {parameters:,} parameters of {needed / 1e9:.1f} GB, which training keeps {copies} times, and "
        f"this machine has {available / 1e9:.1f} GB; make the model narrower or give it fewer layers."
    )
    if needed > available:
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)


def per_second(rate: float) -> str:
    """Returns a rate in words, such as "12.3 per second" or "0.042 per second"."""
    return f"{rate:.1f} per second" if rate >= 1 else f"{rate:.2g} per second"


def say(line: str) -> None:
    """Prints a line of the command's result, in which what controls a terminal is written out."""
    text, encoding = printable(line), getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def as_sentence(message: object) -> str:
    """Returns a message on one line, in which what controls a terminal is written out, and the middle of one without
    end is left out."""
    text = str(message)
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE // 2]} ... {text[-MAX_MESSAGE // 2 :]}"
    return printable(" ".join(text.split()))
