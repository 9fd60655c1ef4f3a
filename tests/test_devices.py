"""Any number of devices trains the same run: noise, plans and carried state are those of the whole batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows
from scripts.device_cases import BATCH, CASES, SINGLE, Case, difference, train

from flowgen import matching as fm
from flowgen.backend import shards
from flowgen.rows import ROWS
from flowgen.training import OptimConfig, make_step
from flowgen.training.parallel import DataParallel
from flowgen.training.step import init_state

SCRIPT = Path(__file__).parent / "scripts" / "device_cases.py"
EXACT = 1e-9  # float64: 20 steps of sums in another order, which AdamW divides by roots not below 1e-8
ROUNDING = 1e-5  # float32: one step of sums in another order
# The others show the same objectives once more.
SHOWN = ("flow", "running weights")
RARE = set(CASES) - set(SHOWN)


@pytest.mark.parametrize("name", rows(CASES, RARE))
def test_one_device_and_four_train_the_same_run(name, x64):
    one, of_one = train(CASES[name], 1)
    four, of_four = train(CASES[name], 4)
    assert difference(four, one) < EXACT
    assert difference(of_four, of_one) < ROUNDING  # metrics are float32
    assert difference(one.params, train(CASES[name], 1, steps=0)[0].params) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_with_another_number_of_devices(name, x64):
    whole, _ = train(CASES[name], 1)
    half, _ = train(CASES[name], 2, steps=10)
    assert difference(train(CASES[name], 4, state=half)[0], whole) < EXACT


@pytest.mark.parametrize("name", rows(CASES, set(CASES) - {"running weights"}))
def test_accumulation_depends_on_no_device(name, x64):
    parts, _ = train(CASES[name], 1, steps=6, accumulation=2)
    shared, _ = train(CASES[name], 4, steps=6, accumulation=2)
    assert difference(shared, parts) < EXACT
    if CASES[name].linear:
        assert difference(parts, train(CASES[name], 1, steps=6)[0]) < EXACT


@pytest.mark.parametrize("name", rows({**CASES, **SINGLE}, {*CASES, *SINGLE} - {"exact transport"}))
@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_step_in_float32(name, accumulation):
    case = {**CASES, **SINGLE}[name]
    one, of_one = train(case, 1, steps=1, accumulation=accumulation)
    four, of_four = train(case, 4, steps=1, accumulation=accumulation)
    assert difference(of_four, of_one) < ROUNDING
    assert difference(four.collections, one.collections) < ROUNDING
    # AdamW's first moment is a tenth of the gradient.
    assert difference_in_norm(moment(four), moment(one)) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "accumulation"), [(1, 2), (4, 2)])
def test_statistics_of_latents_are_of_the_whole_batch(devices, accumulation):
    whole, _ = train(SINGLE["autoencoder"], 1, steps=1)
    parts, _ = train(SINGLE["autoencoder"], devices, steps=1, accumulation=accumulation)
    assert difference(parts.collections, whole.collections) < ROUNDING


def moment(state):
    """AdamW's first moment."""

    def has_moment(x):
        return hasattr(x, "mu")

    return [x.mu for x in jax.tree.leaves(state.opt_state, is_leaf=has_moment) if has_moment(x)]


def difference_in_norm(a, b):
    """Of gradients taken together: some of their leaves are zero but for rounding."""
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def start(out, names, *group, devices, form="data"):
    """The table as a program with so many devices, which saves parameters to `out`."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent.parent), "XLA_FLAGS": flags}
    command = [sys.executable, str(SCRIPT), str(out), ",".join(names), form, *group]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def assert_trained_alike(out, names):
    found = np.load(out)
    for name in names:
        expected = jax.tree.leaves(train(CASES[name], 1)[0].params)
        assert difference([found[f"{name}/{i}"] for i in range(len(expected))], expected) < EXACT, name


# Some cases have a single attention head.
MANY_HEADS = ("flow", "volume preserving", "running weights", "exact transport", "entropic transport", "mean flow")


@pytest.fixture
def every_array_is_divided(monkeypatch):
    monkeypatch.setattr(shards, "MIN_SIZE", 1)


def sharded_cases():
    for name in CASES:
        for mesh in [(4, 1), *([(2, 2), (2, 1), (1, 2)] if name in MANY_HEADS else [])]:
            shown = (name, mesh) == ("flow", (2, 2))
            yield pytest.param(name, mesh, marks=[] if shown else pytest.mark.slow)


@pytest.mark.parametrize(("name", "mesh"), list(sharded_cases()))
def test_sharded_parameters_train_what_one_device_does(name, mesh, x64, every_array_is_divided):
    one, of_one = train(CASES[name], 1)
    sharded, of_sharded = train(CASES[name], mesh[0] * mesh[1], mesh=mesh)
    assert difference(sharded, one) < EXACT
    assert difference(of_sharded, of_one) < ROUNDING  # metrics are float32


LAYOUTS = {"data of 2": (2, None), "data": (4, None), "fsdp": (4, (4, 1)), "tensor": (2, (1, 2)), "both": (4, (2, 2))}


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY_HEADS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_in_float32(layout, name, every_array_is_divided):
    """The losses, of which some cancel, and the gradients: AdamW's first moment is their running mean."""
    devices, mesh = LAYOUTS[layout]
    one, of_one = train(CASES[name], 1)
    state, metrics = train(CASES[name], devices, mesh=mesh)
    found, expected = (np.array([row["loss"] for row in rows]) for rows in (metrics, of_one))
    assert difference(found, expected) < ROUNDING
    assert difference_in_norm(moment(state), moment(one)) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY_HEADS)
def test_accumulation_depends_on_no_sharding(name, x64, every_array_is_divided):
    parts, _ = train(CASES[name], 1, steps=6, accumulation=2)
    sharded, _ = train(CASES[name], 4, steps=6, accumulation=2, mesh=(2, 2))
    assert difference(sharded, parts) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", {**CASES, **SINGLE})
def test_one_sharded_step_in_float32(name, every_array_is_divided):
    case = {**CASES, **SINGLE}[name]
    one, of_one = train(case, 1, steps=1)
    four, of_four = train(case, 4, steps=1, mesh=(4, 1))
    assert difference(of_four, of_one) < ROUNDING
    assert difference(four.collections, one.collections) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("form", ["data", "8x1", "4x2"])
def test_eight_devices_train_what_one_does(form, x64, tmp_path):
    names = CASES if form != "4x2" else MANY_HEADS
    process = start(tmp_path / "eight.npz", names, devices=8, form=form)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-4000:]
    assert_trained_alike(tmp_path / "eight.npz", names)


def free_address():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["data", "4x1", "2x2"])
def test_two_processes_train_what_one_device_does(form, x64, tmp_path):
    names = ("flow", "running weights", "exact transport", "entropic transport")
    address = free_address()
    processes = [start(tmp_path / f"{i}.npz", names, address, "2", str(i), devices=2, form=form) for i in range(2)]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-4000:]
    for i in range(2):
        assert_trained_alike(tmp_path / f"{i}.npz", names)


def one_step(objective, batch, devices, accumulation=1):
    """The metrics and the state of one step of a custom objective."""
    parallel = DataParallel(jax.devices()[:devices])
    optim = OptimConfig(lr=1.0)
    update = parallel.compile(make_step(objective, optim, steps=2, accumulation=accumulation))
    state = init_state({"params": {"w": jnp.ones(1)}, "seen": {"mean": jnp.zeros(1)}}, optim, 2)
    state, metrics = update(parallel.replicate(state), parallel.shard(batch), parallel.replicate_key(jax.random.key(0)))
    return parallel.to_host(state), parallel.to_host(metrics)


NUMBERS = {"x": np.arange(BATCH, dtype=np.float32)[:, None]}


def test_an_objective_of_ones_own_draws_by_position_if_it_asks_its_rows():
    def objective(variables, batch, key):
        noise = batch[ROWS].draw(lambda key, x: jax.random.normal(key, x.shape), batch["x"])
        return variables["params"]["w"].sum(), {"noise": noise.mean(), "product": (noise * batch["x"]).mean()}

    expected = one_step(objective, NUMBERS, 1)[1]
    assert abs(expected["noise"]) > 1e-3
    for devices, accumulation in ((2, 1), (4, 1), (1, 4), (2, 4), (4, 2)):
        assert difference(one_step(objective, NUMBERS, devices, accumulation)[1], expected) < ROUNDING


def test_an_objective_that_knows_nothing_of_rows_draws_anew_on_every_device():
    def objective(variables, batch, key):
        noise = jax.random.normal(key)
        return variables["params"]["w"].sum(), {"noise": noise, "square": noise**2}

    for devices, accumulation in ((4, 1), (1, 4), (2, 2)):
        metrics = one_step(objective, NUMBERS, devices, accumulation)[1]
        assert metrics["square"] - metrics["noise"] ** 2 > 0.01  # not the same number four times


def test_micro_batches_have_the_same_rows_on_any_number_of_devices():
    def objective(variables, batch, key):
        whole = batch[ROWS].gather(batch["x"])
        # The first row and the last of the micro-batch, over all devices.
        return variables["params"]["w"].sum(), {"spread": (whole[-1, 0] - whole[0, 0]) ** 2, "first": whole[0, 0]}

    expected = one_step(objective, NUMBERS, 1, 4)[1]
    assert expected["first"] == np.mean([0, 1, 2, 3])
    for devices in (2, 4):
        assert one_step(objective, NUMBERS, devices, 4)[1] == expected


def test_a_batch_that_has_rows_already_is_refused():
    with pytest.raises(ValueError, match="rows"):
        one_step(lambda variables, batch, key: (0.0, {}), {ROWS: np.zeros(BATCH)}, 1)


def test_a_plan_of_each_device_is_asked_for_by_name():
    # Half of the sources are far from half of the data: with one plan over all, none crosses.
    data = np.where(np.arange(BATCH) < BATCH // 2, -9.0, 9.0)[:, None].astype(np.float32)

    def crossing(scope, devices):
        loss = fm.flow_matching_loss(coupling=fm.MinibatchOT(scope=scope))

        def objective(variables, batch, key):
            velocity = lambda t, x, cond: jnp.zeros_like(x)  # noqa: E731
            given = {"x1": batch["x1"], "x0": batch["x0"], ROWS: batch[ROWS]}
            value, _, _ = loss(velocity, given, key)
            return variables["params"]["w"].sum(), {"moved": value}

        return one_step(objective, {"x1": data, "x0": data[::-1].copy()}, devices)[1]["moved"]

    assert crossing("global", 4) == crossing("global", 1) == 0
    assert crossing("device", 1) == 0
    assert crossing("device", 2) == pytest.approx(18.0**2)


def test_the_running_log_mean_is_the_log_of_a_mean_over_devices_and_micro_batches():
    # Weights that differ by orders of magnitude from row to row, and so from share to share.
    costs = np.linspace(0, 40, BATCH).astype(np.float32)[:, None]
    coupling = fm.GibbsWeights(1.0, cost=lambda a, b: jnp.abs(a - b)[:, 0])
    loss = fm.flow_matching_loss(coupling=coupling)
    expected = np.log(np.exp(-np.float64(costs)).mean())
    for devices, accumulation in ((1, 1), (4, 1), (1, 4), (2, 2)):

        def pairs(key, batch):
            return {"x0": batch["x"], "x1": 0 * batch["x"]}

        variables = {"params": {"w": jnp.ones(1)}, **fm.MatchingConfig(coupling=coupling).state()}

        class Field:
            def apply(self, variables, t, x, cond, **_):
                return x * variables["params"]["w"][0]

        case = Case(
            lambda: (variables, fm.matching_objective(Field(), loss, pairs)),  # noqa: B023
            lambda random: {"x": costs},
        )
        state, _ = train(case, devices, steps=1, accumulation=accumulation)
        np.testing.assert_allclose(state.collections["matching"]["log_mean"], expected, rtol=ROUNDING)


@pytest.mark.slow  # three programs
def test_the_command_trains_one_run_in_two_processes(tmp_path):
    words = [sys.executable, "-m", "flowgen", "train", "--config", "tarflow_digits", "--debug", "--workdir"]
    environment = {**os.environ, "JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": "2"}
    group = [
        subprocess.Popen(
            [*words, str(tmp_path / "two"), "--distributed"],
            env={**environment, "JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        first, second = (process.communicate(timeout=300)[0] for process in group)
    finally:
        for process in group:
            process.kill()
    alone = subprocess.run([*words, str(tmp_path / "one")], capture_output=True, text=True, timeout=300, check=True)
    assert [process.returncode for process in group] == [0, 0]
    held_out = next(line for line in first.splitlines() if line.startswith("Held-out"))
    assert held_out in alone.stdout
    assert "Held-out" not in second


@pytest.mark.slow  # a program for one sentence
def test_a_process_without_a_group_is_told_so(tmp_path):
    words = ["-m", "flowgen", "train", "--config", "tarflow_digits", "--workdir", str(tmp_path), "--distributed"]
    told = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300, check=False)
    assert told.returncode == 2
    assert told.stderr.startswith("flowgen: --distributed found no group of processes")
