"""Sharded training: which arrays are divided and how, checkpoints of every layout, and what is refused."""

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import laws
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scripts import toy
from tolerances import NETWORK, assert_close, assert_trees_close

import flowgen
from flowgen.backend import shards
from flowgen.data import DataConfig
from flowgen.decoding import sample
from flowgen.experiments import FlowExperiment, LikelihoodConfig, from_json
from flowgen.experiments.estimates import training_cost
from flowgen.training import CheckpointReader, LogConfig, OptimConfig, TrainConfig, make_step
from flowgen.training.fsdp import FullySharded, divided_over_heads
from flowgen.training.sharding import bytes_per_device, partition_spec
from flowgen.training.step import init_state

ROOT = Path(__file__).parent.parent
LAYOUTS = {"data": None, "fsdp": (4, 1), "tensor": (1, 4), "both": (2, 2)}
BOTH, ONE_AXIS = {"fsdp": 4, "tensor": 2}, {"fsdp": 8, "tensor": 1}


@pytest.fixture
def every_array_is_divided(monkeypatch):
    monkeypatch.setattr(shards, "MIN_SIZE", 1)


# (path, shape) -> the spec on a mesh with both axes, and on a mesh with one.
LAYER = "params/blocks_0/layers"
SPECS = {
    (f"{LAYER}/attention/qkv/kernel", (8, 256, 768)): (P(None, "fsdp", "tensor"), P(None, None, "fsdp")),
    (f"{LAYER}/attention/proj/kernel", (8, 256, 256)): (P(None, "tensor", "fsdp"), P(None, "fsdp", None)),
    (f"{LAYER}/mlp/up/kernel", (8, 256, 1024)): (P(None, "fsdp", "tensor"), P(None, None, "fsdp")),
    (f"{LAYER}/mlp/gate/kernel", (8, 256, 1024)): (P(None, "fsdp", "tensor"), P(None, None, "fsdp")),
    (f"{LAYER}/mlp/down/kernel", (8, 1024, 256)): (P(None, "tensor", "fsdp"), P(None, "fsdp", None)),
    (f"{LAYER}/mlp/up/bias", (32, 1024)): (P(None, "tensor"), P(None, "fsdp")),
    (f"{LAYER}/mlp/down/bias", (64, 256)): (P(None, "fsdp"), P(None, "fsdp")),
    (f"{LAYER}/mlp_norm/weight", (8, 256)): (P(None, None), P(None, None)),
    (f"opt_state/1/0/mu/blocks_0/{LAYER[16:]}/mlp/up/kernel", (8, 256, 1024)): (
        P(None, "fsdp", "tensor"),
        P(None, None, "fsdp"),
    ),
    # A stack of as many layers as there are devices is not divided by layers.
    (f"{LAYER}/own/kernel", (1024, 3, 96)): (P(None, None, "fsdp"), P(None, None, "fsdp")),
    (f"{LAYER}/own/odd", (1024, 3, 7)): (P(None, None, None), P(None, None, None)),
    # Layers that are not stacked have no axis of layers.
    ("layers/layer_0/mlp/up/kernel", (256, 1024)): (P("fsdp", "tensor"), P(None, "fsdp")),
    ("params/blocks_0/proj_in/kernel", (64, 256)): (P(None, "fsdp"), P(None, "fsdp")),
    ("params/blocks_0/pos_embed", (1023, 256)): (P(None, "fsdp"), P(None, "fsdp")),
    ("params/net/conv/kernel", (3, 3, 128, 64)): (P(None, None, "fsdp", None), P(None, None, "fsdp", None)),
    ("step", ()): (P(), P()),
}


@pytest.mark.parametrize(("path", "shape"), SPECS)
def test_how_an_array_is_divided(path, shape):
    names = tuple(path.split("/"))
    assert (partition_spec(names, shape, BOTH), partition_spec(names, shape, ONE_AXIS)) == SPECS[path, shape]


def test_no_device_has_a_whole_array_even_at_the_start(every_array_is_divided):
    def initial():
        return init_state(toy.init(jax.random.key(0)), OptimConfig(), 10)

    parallel = FullySharded(mesh_shape=(2, 2))
    state = parallel.create(initial)
    for x in (state.params["first"]["kernel"], state.ema["second"]["kernel"]):
        assert x.addressable_shards[0].data.size == x.size / 2
    stored = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert stored == bytes_per_device(state, {"fsdp": 2, "tensor": 2})
    assert_trees_close(parallel.to_host(state.params), jax.device_get(initial().params), NETWORK)


def test_a_step_is_compiled_once_and_its_state_stays_divided(every_array_is_divided, caplog):
    parallel = FullySharded(mesh_shape=(2, 2))
    optim = OptimConfig()
    update = parallel.compile(make_step(toy.make_objective(), optim, steps=9, axis_name=None))
    state = parallel.create(lambda: init_state(toy.init(jax.random.key(0)), optim, 9))
    key, placed = parallel.replicate_key(jax.random.key(1)), jax.tree.map(lambda x: x.sharding, state)
    state, _ = update(state, parallel.shard(toy.batch_of(0)), key)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for step in range(1, 4):
            state, _ = update(state, parallel.shard(toy.batch_of(step)), key)
    assert not [record for record in caplog.records if "ompiling" in record.message]
    assert jax.tree.all(jax.tree.map(lambda x, was: x.sharding.is_equivalent_to(was, x.ndim), state, placed))
    assert state.params["first"]["kernel"].addressable_shards[0].data.shape == (3, toy.WIDTH // 2)


def layouts():
    shown = {("data", "both"), ("both", "data")}
    for saved in LAYOUTS:
        for resumed in LAYOUTS:
            marks = [] if (saved, resumed) in shown else pytest.mark.slow
            yield pytest.param(saved, resumed, marks=marks)


@pytest.fixture(scope="module")
def complete(whole, tmp_path_factory):
    """A function from a layout to the directory of a toy run in it, which tests only copy."""
    runs = {"data": whole}

    def run(layout):
        if layout not in runs:
            runs[layout] = tmp_path_factory.mktemp(layout) / "run"
            toy.run(toy.make_job(), runs[layout], log=toy.TEN, mesh=LAYOUTS[layout])
        return runs[layout]

    return run


def copy_of_half(run, workdir):
    """Copies a run as it was after 20 steps."""
    shutil.copytree(run, workdir)
    for step in (30, 40):
        shutil.rmtree(workdir / "checkpoints" / str(step))


def resume(run, workdir, **options):
    """Copies a run as it was after 20 steps, and trains the copy to its end."""
    copy_of_half(run, workdir)
    toy.run(toy.make_job(devices=options.pop("devices", None)), workdir, log=toy.TEN, **options)
    return toy.arrays_of(workdir)


def assert_same_run(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], NETWORK, err_msg=name)


@pytest.mark.parametrize(("saved", "resumed"), list(layouts()))
def test_every_layout_resumes_a_run_of_every_layout(saved, resumed, complete, tmp_path, every_array_is_divided):
    run = complete(saved)
    found = resume(run, tmp_path / "run", mesh=LAYOUTS[resumed])
    assert_same_run(found, toy.arrays_of(complete("data")))
    if saved == resumed:
        toy.assert_bitwise(found, toy.arrays_of(run))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, (1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("saved", LAYOUTS)
def test_fewer_devices_resume_a_run_of_every_layout(saved, mesh, complete, tmp_path, every_array_is_divided):
    used = jax.devices()[: 1 if mesh is None else math.prod(mesh)]
    found = resume(complete(saved), tmp_path / "run", mesh=mesh, devices=used)
    assert_same_run(found, toy.arrays_of(complete("data")))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(), ("8", "1"), ("4", "2")])
@pytest.mark.parametrize("saved", LAYOUTS)
def test_more_devices_resume_a_run_of_every_layout(saved, mesh, complete, tmp_path, every_array_is_divided):
    copy_of_half(complete(saved), tmp_path / "run")
    process = toy.start(tmp_path / "run", *(["--mesh", *mesh] if mesh else []), devices=8)
    assert process.wait() == 0, process.communicate()[1]
    assert_same_run(toy.arrays_of(tmp_path / "run"), toy.arrays_of(complete("data")))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_run_continues_bit_for_bit(layout, tmp_path):
    mesh = LAYOUTS[layout]
    options = [] if mesh is None else ["--mesh", *map(str, mesh)]
    killed = toy.start(tmp_path / "killed", *options, "--pause-at", "23")
    toy.wait_for(lambda: any(row["step"] >= 23 for row in toy.rows_of(tmp_path / "killed")), killed)
    killed.kill()
    killed.communicate()
    assert CheckpointReader(tmp_path / "killed" / "checkpoints").latest_step() < toy.STEPS
    for name in ("killed", "whole"):
        process = toy.start(tmp_path / name, *options)
        assert process.wait() == 0, process.communicate()[1]
    toy.assert_bitwise(toy.arrays_of(tmp_path / "killed"), toy.arrays_of(tmp_path / "whole"))


REFUSED = {
    "devices": (TrainConfig(batch_size=16, parallel="fsdp", mesh=(3, 2)), "train.mesh is .3, 2.*4"),
    "batch": (TrainConfig(batch_size=18, parallel="fsdp"), "train.batch_size is 18.*4 devices"),
    "accumulation": (TrainConfig(batch_size=12, parallel="fsdp", accumulation=2), "train.batch_size is 12.*= 8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_the_run_is_written(name, tmp_path):
    length, told = REFUSED[name]
    options = {"optim": toy.OPTIM, "log": toy.QUIET, "config": {}, "check_config": print}
    with pytest.raises(ValueError, match=told):
        flowgen.training.train(toy.make_job(), tmp_path / "run", train=length, **options)
    assert not (tmp_path / "run").exists()


def test_a_mesh_without_sharding_is_refused():
    with pytest.raises(ValueError, match="mesh is set"):
        TrainConfig(mesh=(2, 2))


def test_heads_that_the_mesh_does_not_divide_are_refused():
    flow = flowgen.TARFlow(flowgen.TARFlowConfig(image_size=4, channels=1, patch_size=2, width=16, head_dim=8))
    with pytest.raises(ValueError, match=r"train.mesh .* 4 devices.* 2 heads"):
        FullySharded(mesh_shape=(1, 4)).create(lambda: flowgen.init(flow, jax.random.key(0)))


def digits(**options):
    """A tiny flow on digits, trained on a mesh or on one device."""
    return FlowExperiment(
        name="sharded_digits",
        model=flowgen.TARFlowConfig(
            image_size=8,
            channels=1,
            patch_size=4,
            width=32,
            head_dim=8,
            num_blocks=2,
            layers_per_block=1,
            num_classes=10,
        ),
        data=DataConfig(),
        likelihood=LikelihoodConfig(),
        optim=OptimConfig(lr=1e-3),
        train=TrainConfig(steps=6, batch_size=16, **options),
        log=LogConfig(eval_every=3, sample_every=3, progress=False, tensorboard=False),
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "tensor", "both"])
def test_a_run_evaluates_and_samples_with_divided_parameters(layout, tmp_path, every_array_is_divided):
    one = flowgen.fit(digits(), tmp_path / "one", devices=jax.devices()[:1])
    other = flowgen.fit(digits(parallel="fsdp", mesh=LAYOUTS[layout]), tmp_path / "other")
    assert other.metrics["bits_per_dim"] == pytest.approx(one.metrics["bits_per_dim"], rel=1e-5)
    assert other.samples.name == one.samples.name
    _, variables, experiment = flowgen.load(tmp_path / "other")
    assert experiment.train.mesh == LAYOUTS[layout]
    assert from_json(json.loads(json.dumps(experiment.to_json()))) == experiment
    _, expected, _ = flowgen.load(tmp_path / "one")
    assert_trees_close(variables, expected, NETWORK)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "tensor", "both"])
def test_divided_parameters_draw_the_samples_of_whole_ones(layout, every_array_is_divided):
    flow, variables = laws.perturbed(laws.FLOWS["classes"], jax.random.key(0))
    variables, labels = jax.device_get(variables), np.arange(4) % 3
    divided = FullySharded(mesh_shape=LAYOUTS[layout]).place(variables)
    found, expected = (sample(flow, x, jax.random.key(1), 4, labels).x for x in (divided, variables))
    assert_close(np.asarray(found), np.asarray(expected), NETWORK)


@pytest.mark.slow
def test_no_weights_are_exchanged_for_a_token(every_array_is_divided):
    config = flowgen.TARFlowConfig(
        image_size=4, channels=1, patch_size=2, width=32, head_dim=8, num_blocks=1, layers_per_block=1
    )
    flow = config.build()
    variables = divided_over_heads(jax.device_get(flowgen.init(flow, jax.random.key(0))))
    program = jax.jit(lambda variables: sample(flow, variables, jax.random.key(1), 2).x).lower(variables).compile()
    in_loops = [line for line in program.as_text().splitlines() if "while/body" in line]
    assert any(" all-reduce(" in line for line in in_loops)
    assert " all-gather(" not in program.as_text()


# Config -> (devices, rows per device and micro-batch, micro-batches), as docs/training.md says.
LARGE = {"starflow_t2i_256": (8, 32, 1), "starflow_v_480p": (8, 1, 24)}
H100 = 80e9


def abstract_state(experiment, rehearsal):
    def initial(key):
        return init_state(rehearsal.init(key), experiment.optim, experiment.train.steps)

    return jax.eval_shape(initial, jax.eval_shape(lambda: jax.random.key(0)))


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_the_largest_configs_fit(name):
    devices, rows, micro_batches = LARGE[name]
    experiment = flowgen.load_config(name)
    rehearsal = experiment.rehearsal(experiment.build(), rows)
    assert rehearsal is not None
    state = abstract_state(experiment, rehearsal)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    axes = {"fsdp": devices, "tensor": 1}
    assert bytes_per_device(state, axes) < 1.01 * whole / devices
    # Accumulation keeps a sum beside the gradient of a micro-batch.
    gradients = bytes_per_device(state.params, axes) * (1 + (micro_batches > 1))
    assert bytes_per_device(state, axes) + gradients + training_cost(experiment, rows).recomputed < 0.9 * H100


def lower(name):
    """Lowers a step of a config for all devices; allocates nothing."""
    experiment, parallel = flowgen.load_config(name), FullySharded(mesh_shape=(4, 2))
    rehearsal = experiment.rehearsal(experiment.build(), 8)
    step = make_step(rehearsal.objective, experiment.optim, steps=experiment.train.steps, axis_name=None)
    state = abstract_state(experiment, rehearsal)
    rows = NamedSharding(parallel.mesh, P("fsdp"))

    def placed(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    state = jax.tree.map(placed, state, parallel.shardings(state))
    batch = jax.tree.map(lambda x: placed(x, rows), rehearsal.batch)
    with jax.set_mesh(parallel.mesh):
        jax.jit(step, donate_argnums=0).lower(state, batch, jax.eval_shape(lambda: jax.random.key(0)))


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_the_largest_configs_lower_for_eight_devices(name):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    code = f"import test_sharded_training; test_sharded_training.lower({name!r})"
    environment = {**os.environ, "PYTHONPATH": paths, "XLA_FLAGS": flags}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_what_a_state_is_made_of_is_divided_too():
    """Parameters of another run, of which each host has a copy, become a state that no device has a copy of."""
    parallel = FullySharded(None, (4, 1))
    state = parallel.create(lambda params: {"params": params, "ema": params}, {"kernel": np.ones((256, 256), "f4")})
    for leaf in jax.tree.leaves(state):
        assert {shard.data.size for shard in leaf.addressable_shards} == {256 * 256 // 4}
