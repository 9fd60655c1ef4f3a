"""The grammar of all commands: `--group.field value` sets a field, and `--option value` sets an option.

In every command, the group may be omitted for fields of `sampling` and for some common fields. Hyphens and underscores
are equivalent.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import traceback
from collections.abc import Sequence
from typing import Any, TypeVar

from flowgen.cli.options import described
from flowgen.experiments.experiment import Experiment
from flowgen.experiments.files import config_path, load_config
from flowgen.optimizers import OPTIMIZERS, options_of
from flowgen.settings import FieldError, Setting, leaf_names, override, settings, type_name
from flowgen.settings.annotations import hints_of
from flowgen.settings.command import same_end
from flowgen.training.options import OptimConfig, check_unused

# Short names of common fields. Fields of `sampling` also need no group.
ALIASES = {
    "autoencoder": "codec.path",
    "init_from": "init.path",
    "text_encoder": "text.encoder",
    "steps": "train.steps",
    "batch_size": "train.batch_size",
    "lr": "optim.lr",
}
PARALLEL_PLANS = ("jacobi", "sliding")
OF_PARALLEL_PLANS = ("window", "tol", "init")

E = TypeVar("E", bound=Experiment)


def apply_words(
    words: Sequence[str], experiment: E, options: Any = None, *, groups: tuple[str, ...] | None = None
) -> tuple[E, Any, set[str]]:
    """Returns the experiment and options with the values from a command line, and the names of the fields that were
    set.

    words: the words of the command line. options: a dataclass whose fields are the command's own options for this
    kind of experiment. groups: the experiment's groups, or single fields such as "codec.path", that the command
    accepts; None for all.

    Raises ValueError if a field is unknown, is set twice or has an invalid value; the message names the field.

    Example:
        experiment, options, given = apply_words(["--num", "4", "--seed=1"], experiment, DrawOptions())
    """
    own = () if options is None else tuple(hints_of(type(options)))
    whole = tuple(hints_of(type(experiment))) if groups is None else ()
    short, began, known = short_names(experiment), experiment, leaf_names(experiment)
    spelled: dict[str, str] = {}
    values: dict[str, str] = {}
    for word, text in _pairs(words):
        name = word.replace("-", "_")
        target = name if name in own else short.get(name, name)
        if target in spelled and spelled[target] != word:
            raise ValueError(f"--{spelled[target]} and --{word} set the same field; leave one out.")
        group, dot, _ = target.partition(".")
        named = groups is not None and target in groups and (target in known or not dot)
        fits = target in (*own, *whole) or named or (dot and (groups is None or group in groups))
        if not fits:
            raise ValueError(_unknown(word, text, experiment, own, groups))
        spelled[target], values[target] = word, _value(target, text, experiment, options, own)
    of_options = [f"--{name}={values[name]}" for name in values if name in own]
    of_experiment = [f"--{name}={value}" for name, value in values.items() if name not in own]
    if of_options:
        options = _overridden(options, of_options)
    if of_experiment:
        _check_optimizer_options(values, experiment)
        experiment = override(experiment, of_experiment)
    _check_parallel(began, experiment, tunes=getattr(options, "tune", False))
    return experiment, options, set(values)


def _overridden(options: Any, words: list[str]) -> Any:
    """Returns the options with the values from the words; error messages spell options as on the command line."""
    try:
        return override(options, words)
    except ValueError as error:
        problems = error.args if isinstance(error, FieldError) else (str(error),)
        named = (problem.partition(" ") for problem in problems)
        raise FieldError(*(f"--{name.replace('_', '-')}{space}{rest}" for name, space, rest in named)) from error


def load_experiment(options: argparse.Namespace, words: list[str]) -> Experiment:
    """Returns the experiment in the config file `--config`, with fields set by the words of the command line.

    With `--debug`, the fields are set on the experiment's debug form.
    """
    path = config_path(options.config)
    try:
        experiment = load_config(path)
    except Exception as error:  # A config file is user code, which can raise anything.
        line = _line_of(str(path), error)
        if line is None:
            raise
        reason = str(error).rstrip(".") if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"config {path} fails on line {line} ({reason}); correct that line.") from error
    experiment = apply_words(words, experiment.debug() if options.debug else experiment)[0]
    check_unused(experiment.optim)
    return experiment


def _line_of(path: str, error: Exception) -> int | None:
    """Returns the line of a config file that raised an error, or None if the error came from elsewhere."""
    if isinstance(error, SyntaxError) and (error.filename in (path, None) or error.lineno is None):
        return error.lineno or 1  # An error about a NUL byte has no line number.
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return lines[-1] if lines else None


def short_names(experiment: Experiment) -> dict[str, str]:
    """Returns {short name: full name} for the fields that can be written without their group on a command line.

    Example:
        short_names(experiment)["guidance"]  # "sampling.guidance"
    """
    known = leaf_names(experiment)
    groups = hints_of(type(experiment))
    aliases = {name: field for name, field in ALIASES.items() if field.partition(".")[0] in groups}
    # `sample` reads --prompts from a file.
    sampling = [name for name in known if name.startswith("sampling.") and name != "sampling.prompts"]
    return {name.removeprefix("sampling."): name for name in sampling} | aliases


def options_help(
    title: str, options: Any, *, without: tuple[Any, ...] = (), group: str = "", omit: tuple[str, ...] = ()
) -> str:
    """Returns help text: a title, then one line for each field of a command's options or of a config group.

    without: options whose fields are left out because they are listed elsewhere. omit: names of other fields to leave
    out. group: prefix for the field names.
    """
    elsewhere = {setting.name for other in without for setting in settings(other)}
    chosen = [setting for setting in settings(options) if setting.name not in {*elsewhere, *omit}]
    named = [setting._replace(name=f"{group}.{setting.name}") for setting in chosen] if group else chosen
    lines = [f"  {described(setting)}" for setting in named]
    return "\n".join([f"{title}:", *lines])


def split_names(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the words that are neither options nor their values, and the other words.

    Example:
        split_names(["model", "--lr", "1e-3", "optim.b1"])  # (["model", "optim.b1"], ["--lr", "1e-3"])
    """
    names, rest = [], []
    for before, word in zip(("", *words), words, strict=False):
        is_value = before.startswith("--") and "=" not in before
        (rest if word.startswith("--") or is_value else names).append(word)
    return names, rest


def chosen_settings(experiment: Experiment, names: Sequence[str]) -> list[Setting]:
    """Returns the fields with these names, and the fields of the groups with these names.

    Raises ValueError if the experiment has no such field or group.
    """
    every, short, chosen = settings(experiment), short_names(experiment), []
    for name in names:
        path = name.replace("-", "_")
        # A group, such as init, comes before a short name.
        found = _under(path, every) or _under(path := short.get(path, path), every)
        if not found:
            known = [setting.name for setting in every]
            alike = same_end(path, known) or "".join(difflib.get_close_matches(path, known, n=1))
            groups = dict.fromkeys(setting.name.partition(".")[0] for setting in every)
            end = f"; did you mean {alike}?" if alike else f"; choose from {', '.join(groups)}."
            raise ValueError(f"{name} is not a field of this config{end}")
        chosen += found
    return chosen


def _under(path: str, every: Sequence[Setting]) -> list[Setting]:
    """Returns the field with a dotted name, or the fields of the group with this name."""
    return [setting for setting in every if f"{setting.name}.".startswith(f"{path}.")]


def _pairs(words: Sequence[str]) -> list[tuple[str, str | None]]:
    """Returns names and values from words such as "--a 1" and "--a=1"; the value is None if the word has none."""
    rest, pairs = list(words), []
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            if pairs and pairs[-1][1] and os.path.exists(word) and os.path.exists(pairs[-1][1]):
                raise ValueError(_several_paths(*pairs[-1], word))
            raise ValueError(f"'{word}' is not understood; set a field as in {_as_option(word) or '--sampling.num 4'}.")
        name, equals, text = word[2:].partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            pairs.append((name, rest.pop(0)))
        else:
            pairs.append((name, text if equals else None))
    return pairs


def _as_option(word: str) -> str:
    """Returns a word such as "model.width=64" as the option that sets this field, or "" for other words."""
    name, equals, text = word.partition("=")
    return f"--{name} {text}" if equals and all(part.isidentifier() for part in name.split(".")) else ""


def _several_paths(name: str, first: str, second: str) -> str:
    """Returns the error message for an option with several paths, such as the names to which a shell expands `*`."""
    folder = os.path.dirname(first)
    example = f", as in --{name} {folder}" if folder else ""
    return f"--{name} takes one path, but '{first}' and '{second}' are given; give the folder of all files{example}."


def _value(name: str, text: str | None, experiment: Experiment, options: Any, own: tuple[str, ...]) -> str:
    """Returns the text of a field's value; a switch without a value is turned on."""
    if text or (text is not None and name not in own):
        return text
    if name in own:
        owner, field = options, name
    else:
        *groups, field = name.split(".")
        owner = experiment
        for group in groups:
            owner = getattr(owner, group, None)
    if dataclasses.is_dataclass(owner) and hints_of(type(owner)).get(field) is bool:
        return "true"
    raise ValueError(f"--{name} has no value; write --{name} VALUE.")


def _unknown(
    word: str, text: str | None, experiment: Experiment, own: tuple[str, ...], groups: tuple[str, ...] | None
) -> str:
    known = [
        name for name in leaf_names(experiment) if groups is None or name in groups or name.partition(".")[0] in groups
    ]
    short = [name for name, field in short_names(experiment).items() if field in known]
    names = [name.replace("_", "-") for name in (*own, *short)]
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6) or difflib.get_close_matches(word, known, n=1)
    meant = same_end(word.replace("-", "_"), known, "--") or "".join(f"--{name}" for name in close)
    kind = type(experiment).__name__.removesuffix("Experiment")
    what = f"--{word} is not an option of this command for a {type_name(experiment.model)} ({kind} experiment)"
    if text and text.partition("=")[0] in (*known, *short):
        return f"{what}; set a field as in {_as_option(text)}."
    if meant:
        return f"{what}; did you mean {meant}?"
    options = f"options {', '.join(f'--{name}' for name in names)}" if names else ""
    present = dict.fromkeys(name if name in (groups or ()) else f"{name.partition('.')[0]}.*" for name in known)
    ours = "every field, such as --train.steps" if groups is None else " and ".join(f"--{g}" for g in present)
    return f"{what}; it accepts {' and '.join(filter(None, (options, ours)))}."


def _check_optimizer_options(values: dict[str, str], experiment: Experiment) -> None:
    """Raises ValueError if an option of the chosen optimizer is given without `options` in its path."""
    name = values.get("optim.name")
    optimizer = experiment.optim.optimizer if name is None else OPTIMIZERS.get(name)
    known = (options_of(optimizer) if optimizer else None) or {}
    for path in values:
        group, _, field = path.partition(".")
        if group == "optim" and field in known and field not in hints_of(OptimConfig):
            raise ValueError(f"{path} is not a field of this config; did you mean optim.options.{field}?")


def _check_parallel(began: Experiment, experiment: Experiment, *, tunes: bool) -> None:
    """Raises ValueError if a field for parallel plans was changed, but the plan is not parallel.

    tunes: whether the command tunes the plan; it then accepts a tolerance, but no window or initial guess.
    """
    before, now = (getattr(one, "sampling", None) for one in (began, experiment))
    names = [name for name in OF_PARALLEL_PLANS if not (tunes and name == "tol")]
    changed = any(getattr(before, name, None) != getattr(now, name, None) for name in names)
    if changed and getattr(now, "plan", None) not in PARALLEL_PLANS:
        raise ValueError(
            f"--window, --tol and --init need --plan {' or '.join(PARALLEL_PLANS)}; add it, or leave them out."
        )
