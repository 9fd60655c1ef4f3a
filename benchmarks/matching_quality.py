"""The quality part of benchmarks/matching.py: trains and evaluates flow matching with every coupling and several seeds.

Also defines the training step that matching_speed.py times.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import measure
import optax

from flowgen import matching as fm
from flowgen.matching import toy
from flowgen.matching.couplings import Coupling

BATCH = 256
LEARNING_RATE = 2e-3  # decays to 0 along a half cosine
POINTS, DISTANCE_POINTS, ESS_BATCHES = 1500, 3000, 64
FEW_STEPS = (1, 4, 10)
ENTROPIC_EPSILON = 1.0
SWEEPS = {2.0: 5, 1.0: 10, 0.5: 20}  # numbers of Sinkhorn sweeps, by epsilon
RUNNING_EPSILON = 0.5
# Columns, and the number of decimals shown.
COLUMNS = {
    "w2": 3,
    "w2_floor": 3,
    "path_energy": 2,
    "signed_npe": 3,
    "curvature": 2,
    **{f"euler_{steps}": 2 for steps in FEW_STEPS},
    "ess": 2,
}

Sampler = Callable[[jax.Array, int], jax.Array]


class Pair(NamedTuple):
    """The distributions of x0 and x1, the mean of |x1 - x0|² over independent pairs, and the epsilons for W-CFM.

    evaluated: the distribution to compare generated points with.
    """

    x0: Sampler
    x1: Sampler
    evaluated: Sampler
    mean_cost: float
    epsilons: tuple[float, ...]


def even_moons(key: jax.Array, num: int) -> jax.Array:
    """Returns moons as torchcfm draws them: half of the points in each moon, at evenly spaced angles. W2 is then less
    noisy.
    """
    angle = jnp.linspace(0, jnp.pi, num // 2), jnp.linspace(0, jnp.pi, num - num // 2)
    x = jnp.concatenate([jnp.cos(angle[0]), 1 - jnp.cos(angle[1])])
    y = jnp.concatenate([jnp.sin(angle[0]), 0.5 - jnp.sin(angle[1])])
    return 3 * (jnp.stack([x, y], axis=1) + 0.2 * jax.random.uniform(key, (num, 1))) - 1


five_gaussians = partial(toy.gaussian_ring, components=5)


PAIRS = {
    "8gaussians-moons": Pair(toy.gaussian_ring, toy.moons, even_moons, 35.3, (0.5, 1.0, 2.0, 3.0, 5.0, 10.0)),
    "normal-8gaussians": Pair(toy.normal, toy.gaussian_ring, toy.gaussian_ring, 27.2, (0.5, 1.0, 2.0, 4.0)),
    "8gaussians-5gaussians": Pair(toy.gaussian_ring, five_gaussians, five_gaussians, 51.2, (0.5, 1.0, 2.0, 4.0)),
}
# In order of cost.
KINDS = ("exact", "entropic", "corrected", "weighted", "running", "independent")


class Method(NamedTuple):
    """A coupling with its name in the tables. kind: one of KINDS."""

    kind: str
    name: str
    coupling: Coupling


class State(NamedTuple):
    """The training state: network and optimizer, the weights' running log-mean, and the number of steps done."""

    variables: Any
    optimizer: Any
    log_mean: jax.Array
    step: jax.Array


def training(
    pair: Pair, coupling: Coupling, learning_rate: optax.ScalarOrSchedule
) -> tuple[Callable[[jax.Array], State], Callable[[jax.Array, State], tuple[State, jax.Array]]]:
    """Returns start(key) and update(key, state) -> (state, loss), one step on fresh points."""
    network = fm.VelocityMLP(fm.MLPConfig(dim=2, width=64, num_layers=3))
    loss_fn = fm.flow_matching_loss(coupling=coupling)
    adam = optax.adam(learning_rate)

    def start(key):
        variables = network.init(key, jnp.zeros(1), jnp.zeros((1, 2)))
        return State(variables, adam.init(variables), jnp.array(-jnp.inf), jnp.array(0))

    def update(key, state):
        x0_key, x1_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step), 3)
        batch = {"x0": pair.x0(x0_key, BATCH), "x1": pair.x1(x1_key, BATCH)}

        def objective(variables):
            velocity = partial(network.apply, variables)
            value, _, log_mean = loss_fn(velocity, batch, loss_key, state.log_mean)
            return value, log_mean

        (value, log_mean), gradient = jax.value_and_grad(objective, has_aux=True)(state.variables)
        changes, optimizer = adam.update(gradient, state.optimizer, state.variables)
        return State(optax.apply_updates(state.variables, changes), optimizer, log_mean, state.step + 1), value

    return start, update


def methods(pair: Pair) -> list[Method]:
    """Returns the methods to compare on a pair."""
    entropic = fm.MinibatchOT(method="sinkhorn", epsilon=ENTROPIC_EPSILON / pair.mean_cost)
    running = fm.GibbsWeights(epsilon=RUNNING_EPSILON)
    return [
        Method("independent", "I-CFM", fm.Independent()),
        *(Method("weighted", f"W-CFM eps {e:g}", fm.GibbsWeights(epsilon=e, normalize="none")) for e in pair.epsilons),
        Method("running", f"W-CFM eps {RUNNING_EPSILON:g}, running normalisation", running),
        Method("exact", "OT-CFM exact, permutation", fm.MinibatchOT(method="exact")),
        Method("entropic", f"entropic OT eps {ENTROPIC_EPSILON:g}, sampled", entropic),
        *(
            Method("corrected", f"corrected W-CFM eps {e:g} ({n} sweeps)", fm.GibbsWeights(e, sinkhorn_sweeps=n))
            for e, n in SWEEPS.items()
        ),
    ]


def measure_quality(arguments: argparse.Namespace) -> Iterable[list[dict]]:
    """Yields all rows so far, after each new row."""
    context = multiprocessing.get_context("spawn")
    cores = context.SimpleQueue()
    for core in sorted(os.sched_getaffinity(0))[: arguments.jobs]:
        cores.put(core)
    asked = [(name, m) for name in arguments.pairs for m in methods(PAIRS[name]) if m.kind in arguments.methods]
    start, references, found = time.perf_counter(), {}, {}
    where = measure.environment(1, None) | {"jobs": arguments.jobs}
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, context, _take_core, (cores,)) as pool:
        futures: dict[Any, tuple[str, Method | None]] = {
            pool.submit(reference, name, arguments.seeds): (name, None) for name in arguments.pairs
        }
        for name, method in sorted(asked, key=lambda task: KINDS.index(task[1].kind)):
            futures[pool.submit(train, name, method, arguments.steps, arguments.seeds)] = (name, method)
        for future in concurrent.futures.as_completed(futures):
            name, method = futures[future]
            if method is None:
                references[name] = future.result()
            else:
                found[name, method] = future.result()
            label = "distances" if method is None else method.name
            print(f"{time.perf_counter() - start:6.0f} s  {name}: {label}", flush=True)
            ready = [task for task in asked if task in found and task[0] in references]
            yield [
                quality_row(name, method, found[name, method], references[name], arguments.steps) | where
                for name, method in ready
            ]


def _take_core(cores) -> None:
    os.sched_setaffinity(0, {cores.get()})
    # On one core, XLA has one thread. The callback for exact assignment asks this thread to copy a matrix, so a program
    # with 500 points or more would wait forever (jax 0.10).
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def reference(name: str, seeds: int) -> dict[str, list[float]]:
    """Returns W2² between x0 and x1 and the W2 of a perfect network, with one value of each per seed."""
    pair, distance = PAIRS[name], jax.jit(fm.wasserstein)
    found: dict[str, list[float]] = {"squared_distance": [], "w2_floor": []}
    for seed in range(seeds):
        x0_key, x1_key, data_key, more_key = jax.random.split(jax.random.key(seed), 4)
        far = distance(pair.x0(x0_key, DISTANCE_POINTS), pair.evaluated(x1_key, DISTANCE_POINTS))
        near = distance(pair.x1(data_key, POINTS), pair.evaluated(more_key, POINTS))
        found["squared_distance"].append(float(far) ** 2)
        found["w2_floor"].append(float(near))
    return found


def train(name: str, method: Method, steps: int, seeds: int) -> list[dict[str, float]]:
    """Returns the metrics for each seed. With the same seed, all methods have the same points and initial network."""
    pair = PAIRS[name]
    start, update = training(pair, method.coupling, optax.cosine_decay_schedule(LEARNING_RATE, steps))

    @jax.jit
    def run(key):
        start_key, key = jax.random.split(key)
        state, _ = jax.lax.scan(lambda state, _: update(key, state), start(start_key), length=steps)
        return state.variables

    results = []
    for seed in range(seeds):
        train_key, key = jax.random.split(jax.random.key(seed))
        results.append(evaluate(name, method.coupling, run(train_key), key))
    return results


def evaluate(name: str, coupling: Coupling, variables: Any, key: jax.Array) -> dict[str, float]:
    """Returns the metrics of a network on fresh points, and the mean effective sample size over batches."""
    points_key, ess_key = jax.random.split(key)
    metrics = _transport(name)(variables, points_key) | {"ess": _mean_ess(PAIRS[name], coupling, ess_key)}
    return {name: float(value) for name, value in metrics.items()}


@functools.cache
def _transport(name: str) -> Callable[[Any, jax.Array], dict[str, jax.Array]]:
    """Returns the function that measures networks on a pair, compiled once for all methods."""
    pair, network = PAIRS[name], fm.VelocityMLP(fm.MLPConfig(dim=2, width=64, num_layers=3))

    @jax.jit
    def metrics(variables, key):
        x0_key, x1_key = jax.random.split(key)
        x0, x1 = pair.x0(x0_key, POINTS), pair.evaluated(x1_key, POINTS)
        velocity = partial(network.apply, variables)
        generated, _ = fm.integrate(velocity, x0, method="rk4", num_steps=100)
        paths = fm.path_report(velocity, x0, num_steps=100)
        few = {steps: fm.integrate(velocity, x0, method="euler", num_steps=steps)[0] for steps in FEW_STEPS}
        return {
            "w2": fm.wasserstein(generated, x1),
            "path_energy": paths.energy,
            "curvature": paths.curvature,
            **{f"euler_{steps}": fm.wasserstein(coarse, x1) for steps, coarse in few.items()},
        }

    return metrics


def _mean_ess(pair: Pair, coupling: Coupling, key: jax.Array) -> jax.Array:
    """Returns the mean effective sample size over batches of training size, because corrected W-CFM's weights depend on
    the batch.
    """

    def of_batch(key):
        x0_key, x1_key, pair_key = jax.random.split(key, 3)
        coupled = coupling(pair_key, pair.x0(x0_key, BATCH), pair.x1(x1_key, BATCH))
        return fm.effective_sample_size(coupled.log_weight)

    if not isinstance(coupling, fm.GibbsWeights):
        return jnp.ones(())
    return jax.jit(partial(jax.lax.map, of_batch))(jax.random.split(key, ESS_BATCHES)).mean()


def quality_row(name: str, method: Method, results: list[dict], against: dict[str, list[float]], steps: int) -> dict:
    """Returns a row with means and sample standard deviations (n - 1) over the seeds."""
    squared = statistics.mean(against["squared_distance"])
    columns = {column: [result[column] for result in results] for column in results[0]}
    columns["signed_npe"] = [fm.signed_path_energy(energy, squared) for energy in columns["path_energy"]]
    columns |= against
    row = {
        "part": "quality",
        "pair": name,
        "name": method.name,
        "coupling": {"class": type(method.coupling).__name__, **dataclasses.asdict(method.coupling)},
        "steps": steps,
        "seeds": len(results),
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
    }
    for column, values in columns.items():
        row[column] = round(statistics.mean(values), 4)
        row[f"{column}_sd"] = round(statistics.stdev(values), 4) if len(values) > 1 else None
    return row


def print_tables(rows: list[dict]) -> None:
    """Prints one table per pair."""
    for name, of_pair in itertools.groupby(rows, key=lambda row: row["pair"]):
        found = list(of_pair)
        squared, seeds = _cell(found[0], "squared_distance", 3), found[0]["seeds"]
        print(f"\n{name}: W2² between x0 and x1 {squared}; mean ± sd of {seeds} seeds")
        print(" " * 38 + "".join(f"{column:>16}" for column in COLUMNS))
        for row in found:
            print(f"{row['name']:38}" + "".join(f"{_cell(row, *column):>16}" for column in COLUMNS.items()))


def _cell(row: dict, column: str, digits: int) -> str:
    spread = row[f"{column}_sd"]
    shown = f"{row[column]:.{digits}f}"
    return shown if spread is None else f"{shown} ± {spread:.{digits}f}"
