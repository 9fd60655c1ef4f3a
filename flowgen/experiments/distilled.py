"""Opens the flow from which an experiment distils a coupling of noise and data; see `flowgen.matching.distilled`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flowgen.data.inventory import name_list
from flowgen.experiments.flow import FlowExperiment
from flowgen.matching import FlowDistilled, FromFlow, MatchingConfig
from flowgen.matching.objective import combined_state
from flowgen.nn import init
from flowgen.rows import StatefulObjective
from flowgen.runs import DIGEST, RunReader, located
from flowgen.settings import TYPE
from flowgen.training.step import Objective

FIELD = "matching.coupling.path"
COLLECTION = "coupling"  # the name of the collection of the flow's variables in a training step


def with_flow(matching: MatchingConfig, model: Any, class_names: tuple[str, ...] = ()) -> MatchingConfig:
    """Returns the config with the flow at `coupling.path` opened; a config with another coupling is returned unchanged.

    model: the config of the velocity network. class_names: the class names of its data, if known. Raises
    FileNotFoundError or ValueError if the path has no flow, or if the flow does not fit the network or these classes.

    Example:
        matching = with_flow(experiment.matching, experiment.model, dataset.class_names)
    """
    if not isinstance(matching.coupling, FromFlow):
        return matching
    return dataclasses.replace(matching, coupling=open_flow(matching.coupling.path, model, class_names))


def fixed_variables(matching: MatchingConfig) -> dict[str, Any]:
    """Returns the collections that a training step reads, but does not change: the variables of a coupling's flow.

    Example:
        job = Job(fixed=fixed_variables(matching), objective=distilled_objective(matching, objective), ...)
    """
    coupling = matching.coupling
    return {COLLECTION: coupling.variables} if isinstance(coupling, FlowDistilled) else {}


def distilled_objective(matching: MatchingConfig, objective: Callable[[MatchingConfig], Objective]) -> Objective:
    """Returns the training objective. The variables must include the collections `fixed_variables(matching)`.

    The flow's variables are arguments of the compiled step, because as constants they would be copied into it.

    objective: a function that returns the objective of a config.

    Example:
        objective = distilled_objective(matching, lambda given: matching_objective(network, given.loss_fn(), pairs))
    """
    coupling = matching.coupling
    if not isinstance(coupling, FlowDistilled):
        return objective(matching)

    def of_variables(variables, batch, key):
        rest = {name: value for name, value in variables.items() if name != COLLECTION}
        of_flow = dataclasses.replace(coupling, variables=variables[COLLECTION])
        return objective(dataclasses.replace(matching, coupling=of_flow))(rest, batch, key)

    return StatefulObjective(of_variables, combined_state)


def open_flow(path: str, model: Any, class_names: tuple[str, ...] = ()) -> FlowDistilled:
    """Returns the coupling of a flow. path: run directory, exported folder, or name of a flow that ships with flowgen.

    Raises the same errors as `with_flow`.

    Example:
        coupling = open_flow("digits", experiment.model)
    """
    try:
        run = RunReader(located(path))
        with run.named():
            plain = {name: value for name, value in run.config().items() if name != DIGEST}
            if plain.get(TYPE) != FlowExperiment.__name__:
                raise ValueError(f"this is the run of a {plain.get(TYPE)!s:.80}; give the run of a FlowExperiment.")
            experiment = FlowExperiment.from_json(plain)
            assert isinstance(experiment, FlowExperiment)
            check_fits(experiment, model, class_names)
            flow, reader = experiment.build(), run.checkpoints
            step = reader.latest_step()
            if step is None:
                reader.check_not_broken()
                raise FileNotFoundError(f"{path} has no checkpoint yet; train the flow first, or give another run.")
            expected = jax.eval_shape(lambda: init(flow, jax.random.key(0)))
            variables = reader.variables(step, expected["params"])
    except (FileNotFoundError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{FIELD} '{path}': {error}") from error
    # A flow without noise was trained on dequantised images.
    noise = "normal" if flow.config.noise_std else "uniform"
    return FlowDistilled(flow, jax.tree.map(jnp.asarray, variables), noise=noise)


def check_fits(experiment: FlowExperiment, model: Any, class_names: tuple[str, ...] = ()) -> None:
    """Raises ValueError if a flow cannot teach a velocity network.

    A flow of latents, or with texts, cannot. The samples of both must have the same shape and, if the flow has classes,
    both must have the same classes.

    experiment: that of the flow. model: the config of the velocity network.

    class_names: the class names of the network's data. They are compared with those that the flow's run stores, if both
    are known: each label must have the same name.

    Example:
        check_fits(load("digits")[2], DiTConfig(image_size=8, channels=1))
    """
    flow = experiment.model
    if experiment.codec is not None:
        raise ValueError("this flow models latents of a codec; give a flow of pixels.")
    if tuple(flow.event_shape) != tuple(model.event_shape):
        raise ValueError(
            f"this flow models samples of shape {tuple(flow.event_shape)}, but the velocity network models samples of "
            f"shape {tuple(model.event_shape)}; give a flow that was trained on the same data."
        )
    if flow.text_dim or flow.num_classes not in (0, model.num_classes):
        has = "texts" if flow.text_dim else f"{flow.num_classes} classes"
        raise ValueError(
            f"this flow has {has}, but model.num_classes is {model.num_classes}; give a flow with the same classes, or "
            "without classes."
        )
    known = experiment.data.classes
    if flow.num_classes and known and class_names and known[: len(class_names)] != class_names:
        raise ValueError(
            f"this flow was trained on the classes {name_list(known)}, in this order, but the data have "
            f"{name_list(class_names)}; give a flow with the same classes, or set data.classes to the flow's."
        )
