"""Starts a run from the parameters of another run.

The two models may differ in their classes, image size, text encoder or number of frames. First, the models are
compared: their kinds, their fields, and the shapes of their parameters. A difference between fields that changes what
the parameters mean is an error, unless `InitConfig.allow` lists its kind. Each array of parameters is then taken
unchanged from the other run, mapped by a function in `flowgen.experiments.remapping`, or initialised as usual.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from flowgen import settings
from flowgen.data.inventory import name_list
from flowgen.experiments.experiment import Experiment
from flowgen.experiments.origin import PARAMS, Origin, Shape
from flowgen.experiments.remapping import NEW, matched_classes, remapped_classes, resampled
from flowgen.experiments.transfers import Transfer, table_of
from flowgen.runs import flatten
from flowgen.settings import type_name
from flowgen.training.job import Start
from flowgen.training.options import ALLOWED

# Fields of a model that do not change the meaning of its parameters.
FREE = ("noise_std", "dtype", "remat", "attention_implementation", "dropout")
# The kind of difference that a field belongs to; all other fields belong to "other".
DIFFERENCES = {
    "model.num_classes": "classes",
    "model.image_size": "size",
    "model.rope_base_grid": "size",
    "model.text_dim": "text",
    "model.text_length": "text",
    "model.frames": "frames",
}
# Fields of a matching experiment that determine what its network predicts.
TARGETS = ("path", "loss")
SHOWN = 4  # number of differences that an error message lists
INTERVALS = ("log_every", "eval_every", "sample_every", "checkpoint_every")


def started_from(experiment: Experiment, variables: Any) -> Start:
    """Returns a function that replaces initial variables with the parameters of the run at `experiment.init.path`.

    If the run keeps an average of its parameters, the average is used. All checks are made and all files are read in
    this call, not in the returned function.

    variables: the shapes and dtypes of the model's variables.

    Raises:
        FileNotFoundError: the run does not exist or has no checkpoint.
        ValueError: the run is damaged, is of another kind, or differs in a way that `experiment.init.allow` does not
            list; the message lists the differences.

    Example:
        variables, lines = started_from(experiment, jax.eval_shape(make))(make())
    """
    origin = Origin.of(experiment.init.path)
    check_differences(origin, experiment, variables)
    arrays = origin.arrays()

    def start(fresh: Any) -> tuple[Any, list[str]]:
        found, left_out, _ = transfers(origin, experiment, fresh)
        made = {
            name: leaf if (how := found[name]).function is None else how.function(arrays[name].astype(leaf.dtype))
            for name, leaf in flatten(fresh).items()
        }
        sizes = {name: math.prod(leaf.shape) for name, leaf in flatten(fresh).items()}
        gone = {name: math.prod(origin.shapes[name]) for name in left_out}
        title = f"Starting from {origin.path}, step {origin.step}, {origin.about}:"
        return jax.tree.unflatten(jax.tree.structure(fresh), list(made.values())), [
            title,
            *table_of(found, sizes, gone),
        ]

    return start


def check_differences(origin: Origin, experiment: Experiment, variables: Any) -> None:
    """Raises ValueError, with the differences, if an experiment cannot start from the parameters of a run.

    Example:
        check_differences(origin, experiment, jax.eval_shape(lambda: flowgen.init(flow, key)))
    """
    old, path = origin.experiment, experiment.init.path
    if type(old) is not type(experiment) or type(old.model) is not type(experiment.model):
        kinds = [f"{type_name(one.model)} ({type(one).__name__})" for one in (old, experiment)]
        raise ValueError(f"init.path '{path}' is the run of a {kinds[0]}, but this is a {kinds[1]}; give another run.")
    changed = differences(old, experiment)
    lines = [line for of_kind in changed.values() for line in of_kind]
    problems = transfers(origin, experiment, variables)[2]
    shrunk = _is_debug(old) and not _is_debug(experiment)
    if problems and shrunk and not differences(old, experiment.debug()).get("other"):
        raise ValueError(
            f"init.path '{path}' was trained with --debug, so its model is a tiny one; train that run without --debug, "
            "or add --debug to this command."
        )
    if problems:
        told = _listed(lines) if lines else "the fields of both models are the same"
        raise ValueError(
            f"init.path '{path}' does not fit this model ({_listed(problems)}; {told}), and no option of --init.allow "
            "changes this; set the fields of the model as in that run."
        )
    refused = [kind for kind in changed if kind not in experiment.init.allow]
    if refused:
        told = _listed([line for kind in refused for line in changed[kind]])
        allow = ",".join(kind for kind in ALLOWED if kind in (*refused, *experiment.init.allow))
        raise ValueError(
            f"init.path '{path}' differs from this experiment ({told}); set these fields as in that run, or add "
            f"--init.allow {allow}."
        )


def _is_debug(experiment: Experiment) -> bool:
    """Returns whether one of an experiment's intervals is that of debug runs, so that --debug probably made it."""
    small = experiment.debug().log
    return any(getattr(experiment.log, name) == getattr(small, name) for name in INTERVALS)


def differences(old: Experiment, new: Experiment) -> dict[str, list[str]]:
    """Compares two experiments, and describes each difference that changes what the parameters of the model mean.

    The keys of the result are kinds of differences, named and ordered as in `InitConfig.allow`; a kind without
    differences is left out. The values are lists of descriptions.

    Example:
        differences(old, new)  # {"classes": ["model.num_classes: 10 -> 20"]}
    """
    before, after = old.to_json(), new.to_json()
    found: dict[str, list[str]] = {kind: [] for kind in ALLOWED}
    for line in settings.differences(before["model"], after["model"], "model"):
        name = line.partition(":")[0]
        same_size = name == "model.image_size" and old.model.image_hw == new.model.image_hw
        if name.removeprefix("model.") not in FREE and not same_size:
            found[DIFFERENCES.get(name, "other")].append(line)
    if _class_names_differ(old, new):
        names = [name_list(one.data.classes) for one in (old, new)]
        found["classes"].append(f"data.classes: {names[0]} -> {names[1]}")
    if _encoder_differs(old, new):
        found["text"].append("text.encoder is another one")
    for line in settings.differences(before.get("codec"), after.get("codec"), "codec"):
        unknown = line.startswith("codec.digest:") and "None" in line  # One of the runs did not record it.
        if not line.startswith("codec.path:") and not unknown:
            found["other"].append(line)
    targets = [{name: (plain.get("matching") or {}).get(name) for name in TARGETS} for plain in (before, after)]
    found["other"] += settings.differences(*targets, "matching")
    return {kind: lines for kind, lines in found.items() if lines}


def _class_names_differ(old: Experiment, new: Experiment) -> bool:
    names = [getattr(one.data, "classes", ()) for one in (old, new)]
    return all(names) and names[0] != names[1] and all(_num_classes(one) for one in (old, new))


def _encoder_differs(old: Experiment, new: Experiment) -> bool:
    """Returns whether two experiments are known to have different text encoders."""
    digests = [getattr(getattr(one, "text", None), "digest", None) for one in (old, new)]
    return None not in digests and digests[0] != digests[1]


def _num_classes(experiment: Experiment) -> int:
    return getattr(experiment.model, "num_classes", 0)


class Rule(NamedTuple):
    """A rule that maps an array of one model's parameters to an array of another model's parameters.

    about: a description of the mapping. shape: the shape of the result. function: the mapping.
    """

    about: str
    shape: Shape
    function: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Rules:
    """The rules that map arrays of one experiment's model to arrays of another experiment's model."""

    old: Experiment
    new: Experiment

    def has_new_text(self) -> bool:
        """Whether the text features have changed, so that their projection must be initialised again."""
        dims = [getattr(one.model, "text_dim", 0) for one in (self.old, self.new)]
        return dims[0] != dims[1] or _encoder_differs(self.old, self.new)

    def has_new_classes(self) -> bool:
        return _num_classes(self.old) != _num_classes(self.new) or _class_names_differ(self.old, self.new)

    def is_optional(self, name: str) -> bool:
        """Whether only one of the models may have an array, because the array belongs to classes or texts."""
        return (self.has_new_classes() or self.has_new_text()) and _role(name) in ("classes", "prefix")

    def starts_anew(self, name: str) -> bool:
        return _role(name) == "prefix" and self.has_new_text()

    def of(self, name: str, shape: Shape) -> Rule | None:
        """Returns the rule for an old array of this shape, or None if the array is taken unchanged."""
        role, classes = _role(name), _num_classes(self.old)
        is_table = role == "classes" or (role == "prefix" and name.endswith("/kernel"))
        if is_table and self.has_new_classes() and classes and shape[0] - classes in (0, 1):
            return self._classes(shape)
        if role == "size" and self._grids[0] != self._grids[1] and shape[0] == math.prod(self._grids[0]):
            before, after = self._grids
            about = f"resampled from {_by(before)} to {_by(after)} tokens"
            return Rule(about, (math.prod(after), *shape[1:]), lambda array: resampled(array, before, after))
        return None

    def _classes(self, shape: Shape) -> Rule:
        before, after = _num_classes(self.old), _num_classes(self.new)
        names = [getattr(one.data, "classes", ()) for one in (self.old, self.new)]
        matched = matched_classes(before, after, *names)
        kept, how = int((matched != NEW).sum()), "name" if all(names) else "number"
        about = f"{kept} classes by {how}"
        about += f", {after - kept} new at the mean" if kept < after else ""
        about += f", {before - kept} dropped" if kept < before else ""
        size = (shape[0] - before + after, *shape[1:])
        return Rule(about, size, lambda table: remapped_classes(table, before, matched))

    @property
    def _grids(self) -> tuple[Any, Any]:
        old, new = (getattr(one.model, "token_hw", ()) for one in (self.old, self.new))
        return old, new


def _role(name: str) -> str | None:
    """Returns what the shape of a parameter depends on: "classes", "size", "prefix" (a class or a text) or None."""
    module, leaf = ["", *name.split("/")][-2:]
    if module == "proj_prefix":
        return "prefix"
    return {"class_embed": "classes", "pos_embed": "size"}.get(leaf, "size" if name == "prior/variance" else None)


def transfers(
    origin: Origin, experiment: Experiment, variables: Any
) -> tuple[dict[str, Transfer], list[str], list[str]]:
    """Returns how each array of the variables is obtained, which old arrays are left out, and any problems.

    Carried collections that do not fit are initialised again. Parameters that do not fit are problems.

    Example:
        found, left_out, problems = transfers(origin, experiment, variables)
    """
    rules, old = Rules(origin.experiment, experiment), origin.shapes
    found, problems = {}, []
    for name, leaf in flatten(variables).items():
        rule = rules.of(name, old[name]) if name in old else None
        shape = rule.shape if rule else old.get(name)
        if rules.starts_anew(name) or (shape is None and rules.is_optional(name)):
            found[name] = Transfer("new")
        elif shape == leaf.shape:
            found[name] = Transfer("mapped", rule.about, rule.function) if rule else Transfer("taken", "", _same)
        else:
            found[name] = Transfer("new")
            if name.startswith(PARAMS):
                given = "is missing there" if shape is None else f"has shape {old[name]} instead of {leaf.shape}"
                problems.append(f"{name.removeprefix(PARAMS)} {given}")
    left_out = [name for name in old if name not in found or (found[name].kind == "new")]
    for name in left_out:
        if name.startswith(PARAMS) and name not in found and not rules.is_optional(name):
            problems.append(f"{name.removeprefix(PARAMS)} is not in this model")
    return found, left_out, problems


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _by(grid: tuple[int, int]) -> str:
    return " x ".join(map(str, grid))


def _listed(lines: list[str]) -> str:
    more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return "; ".join(lines[:SHOWN]) + more
