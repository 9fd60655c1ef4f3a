"""The command `train`, which trains a model or resumes a run."""

from __future__ import annotations

import argparse
import os

from flowgen.cli.options import check_memory, num_parameters, say, trains_alone, whole_number

DEBUG = "--debug trains a tiny model to check that everything runs; its metrics mean nothing."


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.add_argument(
        "--config", required=True, help="Python file with config(), or the name of one, such as tarflow_digits"
    )
    parser.add_argument(
        "--workdir", required=True, help="run directory, or its URL; if it has a checkpoint, the run resumes"
    )
    parser.add_argument(
        "--debug", action="store_true", help="train a tiny version of the experiment, which takes seconds on a CPU"
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="train together with the other processes of this SLURM job, MPI run or TPU pod",
    )
    parser.add_argument(
        "--profile",
        type=whole_number(1),
        metavar="STEPS",
        help="write a profiler trace of this many steps, after the first one, to WORKDIR/profile",
    )
    parser.epilog = (
        "Any field of the config can be set, such as --optim.lr 3e-4 or, for short, --lr 3e-4; info lists the fields. "
        "--init-from RUN is short for --init.path RUN, which starts a new run from the parameters of another run."
    )


def fields_help() -> str:
    """Returns the help on the fields that every experiment has."""
    from flowgen.cli.grammar import options_help
    from flowgen.training import InitConfig, LogConfig, OptimConfig, TrainConfig

    groups = {"train": TrainConfig(), "optim": OptimConfig(), "log": LogConfig(), "init": InitConfig()}
    return "\n\n".join(options_help(f"{name} (in every config)", group, group=name) for name, group in groups.items())


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Runs the command and returns its exit code."""
    import jax

    from flowgen import backend, huge_pages
    from flowgen.cli.grammar import load_experiment
    from flowgen.experiments import fit
    from flowgen.training import Interrupted, Signals, is_primary

    tell = say if is_primary() else lambda line: None

    # The second signal ends the program even during compilation; complete checkpoints stay intact.
    with Signals(on_second=lambda number: os._exit(128 + number)) as signals:
        try:
            with signals.raising():
                experiment = load_experiment(options, rest)
                parameters = num_parameters(experiment.build())
            # Copies: parameters, their gradient, two moments, and the average.
            check_memory(parameters, copies=4 + (experiment.optim.ema_decay > 0))
            tell(f"{experiment.name}: {parameters:,} parameters, {experiment.train.steps} steps")
            if options.debug:
                tell(DEBUG)
            if backend.platform() == "cpu" and (problem := huge_pages.why_absent()):
                tell(f"No huge pages, which would speed up the training of larger flows on CPUs: {problem}.")
            devices = jax.local_devices()[:1] if trains_alone(experiment, options) else None
            result = fit(experiment, options.workdir, signals=signals, profile=options.profile or 0, devices=devices)
        except Interrupted as stop:
            tell("Stopped before the first step; nothing is lost. Run the same command to start over.")
            return 128 + stop.number
    if result.signal:
        tell(
            f"Stopped at step {result.state.step}, which is saved in {options.workdir}; run the same command to resume."
        )
        return 128 + result.signal
    if result.metrics:
        tell("Held-out " + ", ".join(f"{name} {value:.3f}" for name, value in result.metrics.items()) + ".")
    if result.samples:
        tell(f"Samples: {result.samples}")
    return 0
