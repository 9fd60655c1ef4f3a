"""Measures posteriors of simulators by C2ST, of three methods trained on the same simulations.

python benchmarks/posteriors.py --out benchmarks/results/posteriors.json --sbi-python PATH_TO_python

The flow is the task's config, at the checkpoint with the best held-out density. `icfm` and `wcfm` are velocity networks
(an MLP) with the same standardised inputs and batch size. Their parameters are averaged as those of the flow, and the
step with the lowest held-out loss of I-CFM is chosen. One of their steps takes about a seventieth of the flow's time,
so they make 60 times as many. `sbi_maf` and `sbi_nsf` are the density estimators of the package sbi with its defaults,
which decide when to stop; `--sbi-python` is an interpreter that has sbi. Rows are saved as soon as they are measured,
and `--resume` keeps those of an earlier call with as many `--samples`. Use another file for other `--steps`.
"""

import argparse
import dataclasses
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

TASKS, OF_SBI = ("two_moons", "slcp"), ("sbi_maf", "sbi_nsf")
OURS = ("flow", "icfm", "wcfm")
METHODS = (*OURS, *OF_SBI)
HIDDEN, LAYERS = 128, 3
MATCHING_STEPS = 60  # steps of a velocity network per step of the flow, which takes about 70 times as long
CHECKS = 40  # evaluations of the held-out loss of a velocity network
SOLVER = {"method": "heun", "num_steps": 50}


def main() -> None:
    arguments = parse_arguments()
    measure.confine(arguments.threads)
    rows = json.loads(arguments.out.read_text()) if arguments.resume and arguments.out.exists() else []
    known = {(row["task"], row["method"], row["simulations"], row["seed"], row["samples"]) for row in rows}
    methods = arguments.methods or (METHODS if arguments.sbi_python else OURS)
    for task in arguments.tasks:
        for simulations in arguments.simulations:
            for seed in range(arguments.seeds):
                for method in methods:
                    if (task, method, simulations, seed, arguments.samples) in known:
                        continue
                    experiment = experiment_of(task, simulations, seed, arguments.steps)
                    about = {"task": task, "method": method, "simulations": simulations, "seed": seed}
                    rows.append(about | measured(method, experiment, arguments))
                    measure.save(arguments.out, rows)
                    print(f"{task} {method}, {simulations} simulations, seed {seed}: C2ST {rows[-1]['c2st']:.3f}")


def measured(method: str, experiment, arguments: argparse.Namespace) -> dict:
    """Trains a method and returns the other columns of its row."""
    environment = measure.environment(arguments.threads, None)
    if method in OF_SBI:
        return of_sbi(method.removeprefix("sbi_"), experiment, arguments) | environment
    if method == "flow":
        found = of_flow(experiment, arguments.samples)
    else:
        train = dataclasses.replace(experiment.train, steps=MATCHING_STEPS * experiment.train.steps)
        experiment = dataclasses.replace(experiment, train=train)
        found = of_matching(experiment, arguments.samples, matching_of(method))
    return {"steps": experiment.train.steps, "batch": experiment.train.batch_size} | found | environment


def matching_of(method: str) -> Any:
    """Returns the config of flow matching by a method."""
    from flowgen import matching as fm

    if method == "icfm":
        return fm.MatchingConfig()
    return fm.MatchingConfig(coupling=fm.GibbsWeights(ess=0.7, normalize="batch"))


def experiment_of(task: str, simulations: int, seed: int, steps: int | None):
    """The experiment of a task's config, with the same steps for any number of simulations."""
    import flowgen

    base = flowgen.load_config(task)
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, simulations=simulations, seed=seed),
        train=dataclasses.replace(base.train, seed=seed, steps=steps or base.train.steps),
        log=dataclasses.replace(base.log, sample_every=0, tensorboard=False, progress=False),
    )


def of_flow(experiment, samples: int) -> dict:
    """Trains and evaluates the experiment."""
    import flowgen
    from flowgen.experiments.token_options import TokenEvaluateOptions

    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        flowgen.fit(experiment, folder)
        seconds = time.process_time() - began
        model, variables, _ = flowgen.load(folder, step="best")
    evaluation = experiment.evaluate(model, variables, TokenEvaluateOptions(samples=samples))
    return figures(evaluation, seconds, samples)


def of_matching(experiment, samples: int, matching: Any) -> dict[str, Any]:
    """Trains a velocity network on the same standardised parameters and observations, and compares its samples.

    matching: the config of flow matching, with the coupling of noise and parameters. The parameters of the network are
    averaged as those of the flow. Of `CHECKS` evaluations of the held-out loss, the one with the lowest is kept.
    """
    import jax
    import jax.numpy as jnp
    import optax

    import flowgen
    from flowgen import matching as fm
    from flowgen.experiments.posteriors import evaluate_observations
    from flowgen.experiments.units import context_to_flow, measured_units, to_data, to_flow

    dataset, train, optim = experiment.dataset("train"), experiment.train, experiment.optim
    units, dim = measured_units(dataset, experiment.box), experiment.model.shape[0]
    (x1, cond, _), (held_x1, held_cond, _) = (
        to_flow(units, part.x, part.context, experiment.box) for part in (dataset, experiment.dataset("eval"))
    )
    network = fm.VelocityMLP(fm.MLPConfig(dim=dim, width=HIDDEN, num_layers=LAYERS, context=experiment.model.context))
    few = min(2048, len(x1))
    matching = matching.fitted(jax.random.normal(jax.random.key(train.seed), (few, dim)), x1[:few])
    loss_fn, held_out_loss = matching.loss_fn(), fm.MatchingConfig().loss_fn()
    params, steps = flowgen.init(network, jax.random.key(train.seed)), train.steps // CHECKS * CHECKS
    optimizer = optax.adam(optax.cosine_decay_schedule(optim.lr, steps))

    def velocity(params):
        return lambda t, x, cond: network.apply(params, t, x, cond)

    @jax.jit
    def trained(params, key):
        def step(state, key):
            params, mean, moments = state
            rows_key, loss_key = jax.random.split(key)
            rows = jax.random.randint(rows_key, (train.batch_size,), 0, len(x1))
            batch = {"x1": x1[rows], "cond": cond[rows]}
            slope = jax.grad(lambda params: loss_fn(velocity(params), batch, loss_key)[0])(params)
            updates, moments = optimizer.update(slope, moments)
            params = optax.apply_updates(params, updates)
            return (params, optax.incremental_update(params, mean, 1 - optim.ema_decay), moments), None

        def check(state, keys):
            state, _ = jax.lax.scan(step, state, keys)
            held_out = {"x1": held_x1, "cond": held_cond}
            return state, (held_out_loss(velocity(state[1]), held_out, jax.random.key(0))[0], state[1])

        keys = jax.random.split(key, (CHECKS, steps // CHECKS))
        losses, means = jax.lax.scan(check, (params, params, optimizer.init(params)), keys)[1]
        best = jnp.nanargmin(losses)
        return jax.tree.map(lambda mean: mean[best], means), best

    began = time.process_time()
    params, best = jax.block_until_ready(trained(params, jax.random.key(train.seed + 1)))
    seconds = time.process_time() - began

    @jax.jit
    def solved(params, key, cond):
        return fm.integrate(velocity(params), jax.random.normal(key, (len(cond), dim)), cond, **SOLVER)[0]

    def draw(key, observations):
        u = solved(params, key, context_to_flow(units, jnp.asarray(observations)))
        return jax.device_get(to_data(units, u, None, experiment.box))

    evaluation = evaluate_observations(experiment.data.simulator, draw, jax.random.key(0), samples)
    return {"best_step": (int(best) + 1) * (steps // CHECKS)} | figures(evaluation, seconds, samples)


def of_sbi(estimator: str, experiment, arguments: argparse.Namespace) -> dict:
    """Trains sbi's estimator in its own interpreter on all simulations, and compares its samples."""
    import jax
    import numpy as np

    from flowgen.experiments.posteriors import evaluate_observations

    simulator, dataset = experiment.data.simulator, experiment.dataset("all")
    fixed = np.asarray(simulator.observations)
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data.npz", Path(folder) / "samples.npz"
        arrays = {"parameters": dataset.x, "observations": dataset.context, "fixed": fixed}
        np.savez(data, low=simulator.low, high=simulator.high, **arrays)
        options = {
            "--data": data,
            "--out": out,
            "--estimator": estimator,
            "--samples": arguments.samples,
            "--seed": experiment.train.seed,
            "--threads": arguments.threads,
        }
        script = Path(__file__).resolve().with_name("posteriors_sbi.py")
        command = [arguments.sbi_python.absolute(), script, *(part for pair in options.items() for part in pair)]
        subprocess.run([str(part) for part in command], check=True, cwd=folder)  # sbi writes logs there
        with np.load(out, allow_pickle=False) as found:
            samples, about = found["samples"], json.loads(str(found["about"]))

    def draw(key, observations):
        return samples[np.flatnonzero((fixed == observations[0]).all(axis=1))[0]]

    evaluation = evaluate_observations(simulator, draw, jax.random.key(0), arguments.samples)
    return figures(evaluation, about.pop("processor_seconds"), arguments.samples) | about


def figures(evaluation, seconds: float, samples: int) -> dict:
    """The columns of a row."""
    values = {name: round(one.value, 4) for name, one in evaluation.metrics.items()}
    each = [value for name, value in values.items() if name.startswith("c2st/")]
    rest = {name: value for name, value in values.items() if not name.startswith("c2st")}
    about = {"samples": samples, "processor_seconds": round(seconds, 1)}
    return {"c2st": values["c2st"], "c2st_each": each} | about | rest


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="all that can run by default")
    parser.add_argument("--sbi-python", type=Path, help="an interpreter that has sbi (default: no rows of sbi)")
    parser.add_argument("--simulations", type=int, nargs="+", default=[10_000, 30_000])
    parser.add_argument("--seeds", type=int, default=3, help="number of trainings per method, with seeds from 0")
    parser.add_argument("--samples", type=int, default=10_000, help="samples of each observation for C2ST")
    parser.add_argument("--steps", type=int, help="training steps (default: those of the config)")
    parser.add_argument("--threads", type=int, default=1, help="number of cores")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file has")
    arguments = parser.parse_args()
    measure.check_cores(parser, "--threads", arguments.threads)
    if not arguments.sbi_python and set(arguments.methods or ()) & set(OF_SBI):
        parser.error("the methods of sbi need --sbi-python, an interpreter that has sbi.")
    if not arguments.out.parent.is_dir():
        parser.error(f"--out is {arguments.out}, but its directory does not exist; create it first.")
    return arguments


if __name__ == "__main__":
    main()
