"""Samples and metrics on all devices of a host are those of one device, and no device waits for another in a loop."""

import dataclasses
import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
import toy_clips
from conftest import rows
from jax.sharding import NamedSharding, PartitionSpec
from scripts import toy
from tolerances import NETWORK, assert_close, assert_trees_close

import flowgen
from flowgen import backend
from flowgen import matching as fm
from flowgen.data import ArrayDataset, PointsConfig
from flowgen.decoding import Clip, Guidance, Jacobi, Sequential, invert, sample
from flowgen.evaluation import flow_bits_per_dim, velocity_bits_per_dim
from flowgen.experiments import MatchingExperiment, SolverConfig
from flowgen.experiments.solving import VelocityDrawOptions

KEY = jax.random.key(5)
# Nineteen samples: four devices get five each, and one row is repeated.
NUMBERS = np.arange(3, 22)
LABELS = NUMBERS % 3
IMAGES = np.random.default_rng(0).integers(0, 256, (19, 6, 6, 2), dtype=np.uint8)
POINTS = MatchingExperiment(
    name="points",
    model=fm.MLPConfig(dim=2, width=16, num_layers=1),
    data=PointsConfig(),
    sampling=SolverConfig(num=19, num_steps=2),
)
COLLECTIVE = re.compile(r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter")


def on_one_device(call):
    with jax.default_device(jax.local_devices()[0]):
        assert len(backend.devices_for(len(NUMBERS))) == 1
        return call()


def perturbed(experiment):
    """An experiment's model, and variables with noise on every leaf."""
    model, random = experiment.build(), np.random.default_rng(0)
    shapes = jax.eval_shape(partial(flowgen.init, model), KEY)
    return model, jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape) / 8, x.dtype), shapes)


def draw_images():
    experiment = flowgen.load_config("tarflow_digits").debug()  # with guidance
    return partial(experiment.draw_batch, *perturbed(experiment), KEY, NUMBERS, LABELS, certify=True)


def draw_clips():
    experiment = toy_clips.experiment_of()
    given = np.random.default_rng(1).normal(size=(1, 1, 12, 12, 1)).astype(np.float32)
    clip = Clip(frames=5, given=given, context=1)  # with a restart, and a learned denoiser
    return partial(experiment.draw_batch, *perturbed(experiment), KEY, NUMBERS, LABELS, clip=clip)


def draw_by_solver(**sampling):
    experiment = flowgen.load_config("wcfm_digits").debug()
    return draw_of(dataclasses.replace(experiment, sampling=SolverConfig(num_steps=2, **sampling)), LABELS)


def draw_points():
    # dopri5 chooses its steps for all samples of a device, so they agree only as far as it is accurate.
    return draw_of(dataclasses.replace(POINTS, sampling=SolverConfig(method="dopri5", rtol=1e-6, atol=1e-6)), None)


def draw_of(experiment, labels):
    return partial(experiment.draw_batch, *perturbed(experiment), KEY, NUMBERS, labels)


DRAWS = {
    "images": draw_images,
    "clips": draw_clips,
    "heun": partial(draw_by_solver, guidance=0.5),
    "dopri5": draw_points,
}


@pytest.mark.parametrize("name", rows(DRAWS, rare=("clips", "dopri5")))
def test_samples_do_not_depend_on_the_number_of_devices(name):
    assert len(backend.devices_for(len(NUMBERS))) == 4
    draw = DRAWS[name]()
    four, line = draw()
    one, expected_line = on_one_device(draw)
    assert four.shape == one.shape
    assert_close(four, one, NETWORK)
    if name != "dopri5":
        assert line.partition(";")[0] == expected_line.partition(";")[0]


def test_batches_of_any_size_give_the_same_samples():
    model, variables = perturbed(POINTS)
    drawn = [POINTS.draw(model, variables, VelocityDrawOptions(batch=batch)).arrays for batch in (19, 9, 2)]
    assert_trees_close(drawn[1:], [drawn[0]] * 2, NETWORK)
    assert drawn[0].shape == (19, 2)


def test_likelihoods_do_not_depend_on_the_number_of_devices():
    flow, variables = laws.perturbed(laws.FLOWS["classes"], KEY)
    dataset = ArrayDataset(IMAGES, LABELS.astype(np.int32), class_names=("a", "b", "c"))
    bits = partial(flow_bits_per_dim, flow, variables, dataset, KEY, batch_size=17)
    assert_close(bits(), on_one_device(bits), NETWORK)

    def log_prob(x, labels, key):
        return fm.log_prob(lambda t, x, cond: jnp.sin(3 * x), x, labels, key=key, num_steps=3)

    estimate = partial(velocity_bits_per_dim, log_prob, dataset, KEY, batch_size=19)
    assert_close(estimate(), on_one_device(estimate), NETWORK)


@pytest.mark.parametrize(
    "plan",
    [pytest.param(plan, marks=pytest.mark.slow) for plan in (Sequential(), Jacobi(window=3, tol=1e-3))],
    ids=["sequential", "windows"],
)
def test_no_device_waits_for_another(plan):
    flow, variables = laws.perturbed(laws.FLOWS["classes"], KEY)
    z = np.random.default_rng(0).normal(size=(16, flow.config.num_tokens, flow.config.token_dim)).astype(np.float32)
    decode = partial(invert, flow, plan=plan, guidance=Guidance(scale=1.5))
    mesh, labels = backend.sharing(16), np.arange(16) % 3
    divided = backend.share_rows(z, mesh)
    r = decode(variables, divided, labels)
    assert r.x.sharding == NamedSharding(mesh, PartitionSpec("rows"))
    expected = decode(variables, z, labels)
    assert_trees_close((r.x, r.residual), (expected.x, expected.residual), NETWORK)
    assert r.sweeps.shape == expected.sweeps.shape

    by_each = jax.jit(lambda scale: decode(variables, divided, labels).x * scale).lower(1.0).compile().as_text()
    assert "num_partitions=4" in by_each
    assert not COLLECTIVE.search(by_each)
    # Inside jit, the division of an argument is unknown and left to the compiler, whose devices exchange rows.
    by_compiler = jax.jit(lambda z: decode(variables, z, labels).x).lower(divided).compile().as_text()
    assert COLLECTIVE.search(by_compiler)


@pytest.mark.slow
@pytest.mark.parametrize("of_all", [False, True])
def test_the_null_text_is_one_for_each_sample_or_for_all(of_all):
    flow, variables = laws.perturbed(laws.FLOWS["starflow text"], KEY)
    texts = jax.tree.map(np.asarray, laws.labels(flow.config, 8))
    guidance = Guidance(scale=1.0, null=jax.tree.map(lambda x: x[:1] if of_all else x[::-1], texts))
    draw = partial(sample, flow, variables, KEY, cond=texts, guidance=guidance, denoise=False)
    assert_close(draw(num=backend.share_rows(np.arange(8), backend.sharing(8))).x, draw(num=8).x, NETWORK)


@pytest.mark.slow  # beside the progress of clips and of a terminal
def test_one_device_reports_progress():
    experiment, told = toy_clips.experiment_of(), []
    flow, variables = perturbed(experiment)
    clip = Clip(progress=lambda *now: told.append(now))
    experiment.draw_batch(flow, variables, KEY, NUMBERS, LABELS, clip=clip)
    jax.effects_barrier()
    (total,) = {total for _, total in told}
    assert sum(solved for solved, _ in told) == total == flow.config.num_tokens


def test_cpu_devices_share_the_memory_of_variables():
    for given in (np.ones((64, 64), np.float32), jnp.ones((64, 64))):
        copied = backend.copies(given, backend.sharing(16))
        addresses = {shard.data.unsafe_buffer_pointer() for shard in copied.addressable_shards}
        assert (len(copied.addressable_shards), len(addresses)) == (4, 1)


def test_variables_that_the_caller_divides_stay_where_they_are():
    mesh = backend.sharing(8)
    divided = backend.share_rows(np.ones((8, 2), np.float32), mesh)
    assert backend.sharing(8, {"w": divided}) is None
    assert backend.sharing(8, {"w": jnp.ones(2)}) == mesh
    assert [len(backend.devices_for(count)) for count in (1, 7, 8, 15, 16, 100)] == [1, 1, 2, 3, 4, 4]


@pytest.mark.slow
def test_a_job_names_the_devices_to_train_on(whole, tmp_path):
    job = dataclasses.replace(toy.make_job(), devices=jax.local_devices()[:1])
    toy.run(job, tmp_path / "run")
    assert_trees_close(toy.arrays_of(tmp_path / "run"), toy.arrays_of(whole), NETWORK)


COUNT = "import jax; print(len(jax.local_devices()))"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
MAKE = "from flowgen.backend import make_core_devices; print(make_core_devices());"
PROGRAMS = {
    "a command": ("from flowgen.cli import program; program(['info', '--config', 'tarflow_digits']);", {}, CORES),
    "main": ("from flowgen.cli import main; main(['info', '--config', 'tarflow_digits']);", {}, 1),
    "an importer": ("import flowgen.cli, flowgen.experiments;", {}, 1),
    "a variable": (MAKE, {"JAX_NUM_CPU_DEVICES": "3"}, 3),
    "a flag": (MAKE, {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, 3),
    "jax runs": ("import jax; jax.devices();" + MAKE, {}, 1),
}


@pytest.mark.parametrize("name", rows(PROGRAMS, rare=set(PROGRAMS)))
def test_only_commands_make_a_device_per_core(name):
    code, chosen, expected = PROGRAMS[name]
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    told = subprocess.run(
        [sys.executable, "-c", code + COUNT], env={**environment, **chosen}, check=True, capture_output=True, text=True
    ).stdout
    assert int(told.split()[-1]) == expected
    if MAKE in code:
        assert "True" not in told
