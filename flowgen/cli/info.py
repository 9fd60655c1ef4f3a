"""The command `info`, which prints the fields of a config or a run, and estimates the memory and FLOP of a config."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgen.cli.options import CHECKPOINT, described, num_parameters, say, trains_alone, value_lines

if TYPE_CHECKING:
    from flowgen.backend import Machine
    from flowgen.experiments.estimates import TrainingCost
    from flowgen.experiments.experiment import Experiment, SamplingCost
    from flowgen.training import TrainConfig

# The machines whose memory is compared with what a config needs.
COMPARED = (
    "H100 80 GB",
    "H200 141 GB",
    "A100 40 GB",
    "A100 80 GB",
    "TPU v5e 16 GB",
    "TPU v5p 95 GB",
    "TPU v6e 32 GB",
    "RTX 4090 24 GB",
)


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--config", help="Python file with config(), or the name of one, such as tarflow_digits")
    group.add_argument("--checkpoint", help=CHECKPOINT)
    parser.add_argument(
        "--debug", action="store_true", help="with --config: show the experiment that train.py --debug runs"
    )
    parser.usage = "%(prog)s (--config CONFIG | --checkpoint CHECKPOINT) [--debug] [--import MODULE] [NAME ...]"
    parser.epilog = (
        "Without names, info prints what a config needs and the value of each field. With the names of fields or "
        "groups, such as model optim.lr, it prints the meaning and the allowed values of these fields."
    )


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Runs the command and returns its exit code."""
    from flowgen.cli.grammar import chosen_settings, load_experiment, split_names
    from flowgen.experiments import from_json
    from flowgen.experiments.attention import attention_lines, on_any_device
    from flowgen.runs import RunReader, located
    from flowgen.settings import settings

    names, words = split_names(rest)
    if options.checkpoint:
        given = ["--debug"] * options.debug + words
        if given:
            raise ValueError(f"{given[0]} is not an option of info --checkpoint; see --help.")
        run = RunReader(located(options.checkpoint))
        with run.named():
            experiment, steps = from_json(run.config()), run.checkpoints.steps()
    else:
        experiment = load_experiment(options, words)
    if names:
        for setting in chosen_settings(experiment, names):
            say(described(setting))
        return 0
    if options.checkpoint:
        say(f"checkpoints: {', '.join(map(str, steps)) or 'none'}")
        for line in _plan_lines(run.directory):
            say(line)
    say(f"parameters: {num_parameters(on_any_device(experiment).build()):,}")
    for line in attention_lines(experiment.model):
        say(line)
    if not options.checkpoint:
        for line in estimates(on_any_device(experiment), alone=trains_alone(experiment, options)):
            say(line)
    if options.checkpoint and (classes := getattr(experiment.data, "classes", ())):
        say("classes: " + ", ".join(f"{number} {name}" for number, name in enumerate(classes)))
    for line in value_lines(settings(experiment)):
        say(line)
    say("For the meaning and the allowed values of fields, add their names or groups, such as: model optim.lr")
    return 0


def _plan_lines(run_dir: Path) -> list[str]:
    """Returns a line about the plan that `sample --tune` saved with a run; [] if there is none."""
    from flowgen.experiments.tuning import read_tuned_plan

    try:
        tuned = read_tuned_plan(run_dir)
    except FileNotFoundError:
        return []
    except ValueError as error:
        return [str(error)]
    return [f"plan.json: measured on {tuned.device} for {tuned.batch} samples at a time, {tuned.time}"]


def estimates(experiment: Experiment, *, alone: bool = False) -> list[str]:
    """Returns lines of text about the memory and FLOP that an experiment needs and the machines that it fits on.

    docs/training.md describes the method. The list is empty if the experiment cannot be traced without data. alone:
    whether training uses only one device of this machine.
    """
    import jax

    from flowgen.backend import FSDP, MACHINES, TENSOR
    from flowgen.experiments.drawing import AT_ONCE
    from flowgen.experiments.estimates import training_cost
    from flowgen.nn import init

    train = experiment.train
    axes = _axes(train, alone)
    devices = math.prod(axes.values())
    rows = max(1, train.batch_size // (axes[FSDP] * train.accumulation))
    sharded = train.parallel == "fsdp"
    cost = training_cost(experiment, rows, axes if sharded else None)
    if cost is None:
        return []
    model, num = experiment.build(), min(AT_ONCE, getattr(getattr(experiment, "sampling", None), "num", 1))
    variables = jax.eval_shape(lambda: init(model, jax.random.key(0)))
    drawn = experiment.sampling_cost(model, variables, num)
    told = f"{train.batch_size} on {devices} {'device' if devices == 1 else 'devices'}"
    told += f" in {train.accumulation} parts" if train.accumulation > 1 else ""
    told += f"; the devices share the parameters, in a mesh of {axes[FSDP]} x {axes[TENSOR]}" if sharded else ""
    lines = [
        *_batch_lines(train, axes[FSDP]),
        f"estimates by counting, for {rows} samples at a time on each device (train.batch_size {told}):",
        *_training_lines(cost, str(getattr(experiment.model, "remat", False)).lower(), sharded),
        *_flop_lines(cost, drawn, train.batch_size),
    ]
    weights = 0 if drawn is None else _weights_to_sample(drawn, variables, devices if sharded else 1)
    return lines + [
        f"{machine.name}: {_training_fit(cost, rows, machine)}{_sampling_fit(weights, drawn, num, machine)}"
        for machine in MACHINES
        if machine.name in COMPARED
    ]


def _batch_lines(train: TrainConfig, devices: int) -> list[str]:
    """Returns the error that training would raise for the batch; [] if the devices can share the batch equally."""
    from flowgen.training.parallel import check_batch

    try:
        check_batch(train, devices)
    except ValueError as error:
        return [f"training refuses this batch: {error}"]
    return []


def _axes(train: TrainConfig, alone: bool) -> dict[str, int]:
    """Returns the mesh that a run would use: `train.mesh`, or by default all devices of the run on the first axis.

    `train.mesh` may have more devices than this machine.
    """
    import jax

    from flowgen.backend import FSDP, TENSOR

    return dict(zip((FSDP, TENSOR), train.mesh or (1 if alone else jax.device_count(), 1), strict=True))


def _weights_to_sample(drawn: SamplingCost, variables: Any, devices: int) -> int:
    """Returns the bytes per device of the parameters and of their copy for decoding."""
    from flowgen.backend import FSDP, TENSOR
    from flowgen.counting import bytes_of
    from flowgen.training.sharding import bytes_per_device

    whole = bytes_of(variables["params"])
    share = bytes_per_device(variables["params"], {FSDP: 1, TENSOR: devices}) / whole
    return int(share * (whole + drawn.weights))


def _training_lines(cost: TrainingCost, remat: str, sharded: bool) -> list[str]:
    state = {"parameters": cost.parameters, "gradient": cost.gradient, "moments": cost.moments, "average": cost.average}
    stored = f"activations: {_bytes(cost.stored)} stored"
    if cost.recomputed is not None:
        stored += f", or {_bytes(cost.recomputed)} if the backward pass recomputes layers"
        stored += f" (model.remat is {remat})"
    named = ", ".join(f"{name} {_bytes(size)}" for name, size in state.items())
    return [f"training state{' on each device' * sharded}: {named}", stored]


def _flop_lines(cost: TrainingCost, drawn: SamplingCost | None, batch_size: int) -> list[str]:
    from flowgen.runs.progress import with_prefix

    line = f"FLOP: {with_prefix(cost.flop * batch_size)}FLOP per training step, {with_prefix(cost.flop)}FLOP per sample"
    if drawn is None:
        return [line]
    if drawn.flop is not None:
        line += f" in training; {with_prefix(drawn.flop)}FLOP to draw a sample"
    read = ", ".join(f"{_bytes(size)} in {dtype}" for dtype, size in drawn.read.items())
    return [
        line,
        *([f"decoding cache: {_bytes(drawn.cache)} per sample"] if drawn.cache else []),
        *([f"weights that decoding reads per pass through all blocks: {read}"] if read else []),
    ]


def _training_fit(cost: TrainingCost, rows: int, machine: Machine) -> str:
    """Returns a clause that says whether training fits in a machine's memory and, if not, what is too large."""
    memory, needed = machine.memory * 10**9, cost.state + cost.activations
    if needed <= memory:
        return f"training fits ({_bytes(needed)})"
    if cost.state >= memory:
        return f"training does not fit (the state alone takes {_bytes(cost.state)})"
    most = int((memory - cost.state) / (cost.activations / rows))
    instead = f"about {most} at a time would fit" if most else "not even 1 at a time would fit"
    return f"training does not fit ({_bytes(needed)}; {instead})"


def _sampling_fit(weights: int, drawn: SamplingCost | None, num: int, machine: Machine) -> str:
    """Returns a clause that says whether sampling fits in a machine's memory. weights: bytes of all weights."""
    if drawn is None:
        return ""
    needed = weights + drawn.memory
    fits = "fits" if needed <= machine.memory * 10**9 else "does not fit"
    return f", sampling {num} at a time {fits} ({_bytes(needed)})"


def _bytes(size: int) -> str:
    from flowgen.runs.progress import with_prefix

    return f"{with_prefix(float(size))}B"
