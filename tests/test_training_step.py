"""One update of all devices: sums in another order alone, the average, clipping, AdamW and the schedule as written."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripts import toy
from tolerances import LAYER, NETWORK, assert_close, assert_trees_close

from flowgen.training import OptimConfig, TrainConfig, make_schedule, make_step
from flowgen.training.fsdp import FullySharded
from flowgen.training.parallel import DataParallel
from flowgen.training.step import init_state
from flowgen.training.work import CountedStep


def train_steps(devices, *, accumulation=1, steps=20, objective=None, config=toy.OPTIM):
    """The state and metrics of each step of a deterministic objective on given devices."""
    parallel = DataParallel(devices)
    update = make_step(objective or toy.make_objective(), config, steps=steps, accumulation=accumulation)
    update = parallel.compile(update)
    state = parallel.replicate(init_state(toy.init(jax.random.key(0)), config, steps))
    key = parallel.replicate_key(jax.random.key(1))
    states = [parallel.to_host(state)]
    metrics = []
    for step in range(steps):
        state, row = update(state, parallel.shard(toy.batch_of(step)), key)
        states.append(parallel.to_host(state))
        metrics.append(parallel.to_host(row))
    return states, metrics


@pytest.fixture(scope="module")
def one_device():
    return train_steps(jax.devices()[:1])


@pytest.mark.parametrize(
    ("devices", "accumulation"),
    [(4, 1), (1, 4), (2, 8), *(pytest.param(*row, marks=pytest.mark.slow) for row in ((2, 1), (4, 2)))],
)
def test_devices_and_accumulation_change_only_the_order_of_sums(one_device, devices, accumulation):
    assert len(jax.devices()) == 4
    states, metrics = train_steps(jax.devices()[:devices], accumulation=accumulation)
    assert_trees_close(states[-1], one_device[0][-1], NETWORK)
    assert_trees_close(metrics, one_device[1], NETWORK)


def test_the_first_update_moves_the_parameters(one_device):
    first, last = one_device[0][0].params, one_device[0][-1].params
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).all()), first, last)))
    assert one_device[1][-1]["loss"] < one_device[1][0]["loss"]


def test_each_device_draws_its_own_noise():
    """The mean over 4 devices of one normal each: equal keys would give every device the same number."""

    def objective(variables, batch, key):
        noise = jax.random.normal(key)
        loss = jnp.sum(variables["params"]["second"]["bias"]) * 0.0
        return loss, {"noise": noise, "square": noise**2}

    _, metrics = train_steps(None, objective=objective, steps=5)
    means = np.array([row["noise"] for row in metrics])
    assert len(set(means.tolist())) == 5
    assert all(row["square"] - row["noise"] ** 2 > 0.01 for row in metrics)


@pytest.mark.parametrize(
    "optim",
    [
        toy.OPTIM,
        dataclasses.replace(toy.OPTIM, ema_decay=0.2),
        dataclasses.replace(toy.OPTIM, ema_decay=0.5, ema_warmup=False),
    ],
    ids=["warming", "warm", "plain"],
)
def test_the_average_against_numpy(optim):
    states, _ = train_steps(jax.devices()[:1], config=optim)
    average = states[0].params["first"]["kernel"].astype(np.float64)
    for step, state in enumerate(states[1:]):
        decay = min(optim.ema_decay, (1 + step) / (10 + step)) if optim.ema_warmup else optim.ema_decay
        average = decay * average + (1 - decay) * state.params["first"]["kernel"].astype(np.float64)
        assert_close(state.ema["first"]["kernel"], average, LAYER)
    assert states[-1].averaged["params"] is states[-1].ema
    assert states[-1].averaged["stats"] is states[-1].collections["stats"]


def test_without_an_average_the_parameters_are_evaluated():
    states, _ = train_steps(jax.devices()[:1], config=dataclasses.replace(toy.OPTIM, ema_decay=0.0), steps=4)
    assert states[-1].ema is None
    assert states[-1].averaged["params"] is states[-1].params


@pytest.mark.parametrize("layout", [DataParallel, partial(FullySharded, mesh_shape=(2, 2))])
def test_fixed_collections_are_arguments_and_no_part_of_the_state(layout):
    parallel = layout()

    def objective(variables, batch, key):
        loss, metrics = jnp.square(variables["params"]["w"]).sum(), {"seen": variables["other"]["w"].sum()}
        return loss, metrics, {"stats": variables["stats"] + 1}

    optim, traces = OptimConfig(), []
    step = CountedStep(make_step(objective, optim, steps=2, axis_name=parallel.axis_name), parallel.program_devices)

    def traced(*arguments):
        traces.append(None)
        return step(*arguments)

    update = parallel.compile(traced)
    state = parallel.place(init_state({"params": {"w": jnp.ones(4)}, "stats": jnp.zeros(())}, optim, 2))
    batch, key = parallel.shard({"x": np.zeros((4, 1), np.float32)}), parallel.replicate_key(jax.random.key(0))
    for value in (1.0, 3.0):
        fixed = parallel.place({"other": {"w": np.full((3, 1), value, np.float32)}})
        state, metrics = update(state, batch, key, fixed)
        assert parallel.to_host(metrics)["seen"] == 3 * value
    assert len(traces) == 1
    assert parallel.to_host(state).collections == {"stats": 2}


def test_the_update_against_numpy():
    """Clipping, AdamW and the schedule written out in float64, on a loss whose gradient is known."""
    optim = OptimConfig(lr=0.1, min_lr=0.02, warmup_steps=2, weight_decay=0.3, b1=0.8, b2=0.9, clip_norm=1.0)
    steps, target = 6, np.arange(5.0)
    parallel = DataParallel(jax.devices()[:1])

    def objective(variables, batch, key):
        return jnp.sum((variables["params"]["w"] - batch["t"][0]) ** 2), {}

    update = parallel.compile(make_step(objective, optim, steps=steps))
    state = parallel.replicate(init_state({"params": {"w": jnp.ones(5)}}, optim, steps))
    key = parallel.replicate_key(jax.random.key(0))
    w, m, v = np.ones(5), np.zeros(5), np.zeros(5)
    for step in range(steps):
        state, metrics = update(state, parallel.shard({"t": target[None].astype(np.float32)}), key)
        g = 2 * (w - target)
        norm = np.linalg.norm(g)
        g = g / max(norm, 1.0)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        if step < 2:
            lr = 0.02 + (0.1 - 0.02) * step / 2
        else:
            lr = 0.02 + (0.1 - 0.02) * (1 + np.cos(np.pi * (step - 2) / 4)) / 2
        adam = m / (1 - 0.8 ** (step + 1)) / (np.sqrt(v / (1 - 0.9 ** (step + 1))) + optim.eps)
        w = w - lr * (adam + 0.3 * w)
        row = parallel.to_host(metrics)
        np.testing.assert_allclose([row["grad_norm"], row["lr"]], [norm, lr], rtol=LAYER)
        assert_close(parallel.to_host(state).params["w"], w, LAYER)


@pytest.mark.parametrize("warmup", [0, 10])
def test_the_schedule_begins_peaks_and_ends_where_it_says(warmup):
    optim = OptimConfig(lr=1e-2, min_lr=1e-4, warmup_steps=warmup)
    schedule = make_schedule(optim, steps=50)
    lrs = np.array([float(schedule(step)) for step in range(51)])
    np.testing.assert_allclose(lrs[0], 1e-4 if warmup else 1e-2, rtol=1e-5)
    np.testing.assert_allclose(lrs[warmup], 1e-2, rtol=1e-5)
    np.testing.assert_allclose(lrs[50], 1e-4, rtol=1e-4)
    assert lrs.argmax() == warmup
    assert (np.diff(lrs[: warmup + 1]) > 0).all()
    assert (np.diff(lrs[warmup:]) < 0).all()
    with pytest.raises(
        ValueError, match=r"optim\.warmup_steps is 50; it must be below train\.steps, which is 50, so add"
    ):
        make_schedule(dataclasses.replace(optim, warmup_steps=50), steps=50)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(6, 1), (16, 8), (2, 1)])
def test_a_batch_that_cannot_be_shared_is_refused(batch_size, accumulation):
    message = rf"train\.batch_size is {batch_size}; it must be a multiple of 4 devices × train\.accumulation"
    with pytest.raises(ValueError, match=message):
        DataParallel().check_batch(TrainConfig(batch_size=batch_size, accumulation=accumulation))
    DataParallel().check_batch(TrainConfig(batch_size=4 * accumulation, accumulation=accumulation))


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulation": 2, "others": {"second": dataclasses.replace(toy.OPTIM, lr=0.02)}}],
    ids=["one optimizer", "micro-batches and two optimizers"],
)
def test_frozen_parameters_are_constants_of_the_objective(options):
    """The others train as if the objective contained the frozen values: norms, moments and skips do not see them."""
    config = dataclasses.replace(toy.OPTIM, skip_norm=3.0, skip_after=1, weight_decay=0.5, clip_norm=0.1)
    objective, variables = toy.make_objective(), toy.init(jax.random.key(0))
    kernel, bias = (variables["params"]["second"][name] for name in ("kernel", "bias"))

    def with_constant(given, batch, key):
        params = {**given["params"], "second": {"kernel": kernel, **given["params"]["second"]}}
        return objective({**given, "params": params}, batch, key)

    def trained(variables, objective, frozen):
        parallel, others = DataParallel(jax.devices()[:2]), options.get("others")
        update = parallel.compile(make_step(objective, config, steps=6, frozen=frozen, **options))
        state = parallel.replicate(init_state(variables, config, 6, others, frozen))
        key = parallel.replicate_key(jax.random.key(1))
        for step in range(6):
            state, metrics = update(state, parallel.shard(toy.batch_of(step)), key)
        return parallel.to_host(state), parallel.to_host(metrics)

    fewer = {**variables, "params": {**variables["params"], "second": {"bias": bias}}}
    state, metrics = trained(variables, objective, ("second/kernel",))
    expected, others = trained(fewer, with_constant, ())
    np.testing.assert_array_equal(state.params["second"].pop("kernel"), kernel)
    np.testing.assert_array_equal(state.ema["second"].pop("kernel"), kernel)
    assert_trees_close((state.params, state.ema, metrics), (expected.params, expected.ema, others), NETWORK)
    moments, of_fewer = (jax.tree.leaves(one.opt_state) for one in (state, expected))
    assert [leaf.shape for leaf in moments] == [leaf.shape for leaf in of_fewer]
    assert (state.params["first"]["kernel"] != variables["params"]["first"]["kernel"]).all()
