"""What `info` says about the memory and FLOP of a config, and the machines that it fits."""

import dataclasses
import re

import jax
import pytest
from commands import succeed
from conftest import rows

import flowgen
from flowgen.cli.info import COMPARED, estimates
from flowgen.decoding.weights import decoding_weights
from flowgen.experiments import FlowExperiment, MatchingExperiment
from flowgen.experiments.estimates import training_cost
from flowgen.training import TrainConfig
from flowgen.training.fsdp import FullySharded
from flowgen.training.step import init_state

KINDS = [
    "tarflow_digits",
    pytest.param("starflow_digits", marks=pytest.mark.slow),
    pytest.param("starflow_v_bouncing", marks=pytest.mark.slow),
    pytest.param("meanflow_digits", marks=pytest.mark.slow),
    "cfm_moons",
    "autoencoder_digits",
]


def debug(name):
    return flowgen.load_config(name).debug()


def told(lines, what):
    """The text after a line's name."""
    return next(line.removeprefix(f"{what}: ") for line in lines if line.startswith(f"{what}: "))


def test_info_tells_memory_and_flop():
    lines = succeed("info --debug --config tarflow_digits").splitlines()
    parameters = int(told(lines, "parameters").replace(",", ""))
    state = dict(part.split(" ", 1) for part in told(lines, "training state").split(", "))
    size = f"{4 * parameters / 1e3:.3g} kB"
    assert state["parameters"] == state["gradient"] == state["average"] == size
    stored = r"[\d.]+ [kM]B stored, or [\d.]+ [kM]B if the backward pass .* is auto\)"
    assert re.fullmatch(stored, told(lines, "activations"))
    assert re.fullmatch(
        r"[\d.]+ [MG]FLOP per training step, [\d.]+ [kM]FLOP per sample in training; [\d.]+ [kM]FLOP to draw a sample",
        told(lines, "FLOP"),
    )
    assert told(lines, "decoding cache").endswith("B per sample")
    for machine in COMPARED:
        assert re.fullmatch(r"training fits \(\S+ kB\), sampling \d+ at a time fits \(.*\)", told(lines, machine))


def test_info_tells_what_does_not_fit():
    batch = dataclasses.replace(debug("tarflow_digits").train, batch_size=2**20)
    lines = estimates(dataclasses.replace(debug("tarflow_digits"), train=batch))
    assert re.match(r"training does not fit \(\S+ [TG]B; about \d+ at a time would fit\)", told(lines, "TPU v5e 16 GB"))
    assert lines[0].startswith(f"estimates by counting, for {2**20 // jax.device_count()} samples at a time")


def test_an_experiment_that_does_not_tell_has_no_estimates():
    class Untold(MatchingExperiment):
        def rehearsal(self, model, rows):
            return None

    moons = flowgen.load_config("cfm_moons")
    fields = {field.name: getattr(moons, field.name) for field in dataclasses.fields(moons)}
    assert estimates(Untold(**fields)) == []


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_a_cost(name):
    experiment = debug(name)
    cost = training_cost(experiment, rows=4)
    variables = jax.eval_shape(lambda: flowgen.init(experiment.build(), jax.random.key(0)))
    assert cost.parameters == 4 * sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert cost.moments >= 2 * cost.parameters
    assert cost.flop > 0
    if cost.recomputed is not None:
        assert cost.recomputed < cost.stored
        assert cost.activations == (cost.recomputed if experiment.model.remat else cost.stored)


def test_costs_grow_with_the_batch():
    one, two = (training_cost(debug("tarflow_digits"), rows) for rows in (64, 128))
    assert one.flop == two.flop
    assert two.stored == pytest.approx(2 * one.stored, rel=0.05)
    assert one.state == two.state


def test_guidance_doubles_the_cost_of_decoding():
    experiment = debug("tarflow_digits")
    flow, sampling = experiment.build(), dataclasses.replace(experiment.sampling, guidance=0.0, denoise=0.0)
    variables = jax.eval_shape(lambda: flowgen.init(flow, jax.random.key(0)))
    costs = [
        dataclasses.replace(experiment, sampling=dataclasses.replace(sampling, guidance=weight)).sampling_cost(
            flow, variables, 4
        )
        for weight in (0.0, 1.5)
    ]
    config = flow.config
    cache = 2 * config.layers_per_block * config.num_tokens * config.width * 4
    assert [cost.cache for cost in costs] == [cache, 2 * cache]
    assert [cost.memory for cost in costs] == [4 * cache, 8 * cache]
    assert costs[1].flop == 2 * costs[0].flop


def test_solvers_count_their_evaluations():
    experiment = debug("cfm_moons")
    network, variables = experiment.build(), None
    variables = jax.eval_shape(lambda: flowgen.init(network, jax.random.key(0)))

    def flop(**changes):
        sampling = dataclasses.replace(experiment.sampling, **changes)
        return dataclasses.replace(experiment, sampling=sampling).sampling_cost(network, variables, 8).flop

    assert (
        flop(method="euler", num_steps=6) == flop(method="heun", num_steps=3) == 6 * flop(method="euler", num_steps=1)
    )
    assert flop(method="dopri5") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters", "state"),
    [
        ("starflow_t2i_256", "3,858,281,544", "77.2 GB"),
        ("starflow_v_480p", "6,890,096,528", "138 GB"),
        ("starflow_imagenet512", "1,412,255,816", None),
    ],
)
def test_published_models(name, parameters, state):
    lines = succeed("info --config", name, "--train.batch_size", jax.device_count()).splitlines()
    assert told(lines, "parameters") == parameters
    alone = "does not fit (the state alone takes "
    small = told(lines, "TPU v5e 16 GB")
    assert alone in small
    assert state is None or state in small
    assert (alone in told(lines, "H100 80 GB")) == (name == "starflow_v_480p")


WIDE = flowgen.TARFlowConfig(
    image_size=8, channels=1, patch_size=2, width=128, head_dim=32, num_blocks=2, layers_per_block=3, remat=True
)


@pytest.mark.parametrize("mesh", rows([(4, 1), (2, 2)], [(4, 1)]))
def test_a_divided_state_is_counted_as_it_is_stored(mesh):
    """By the bytes of each device's parts of a real state."""
    train = TrainConfig(batch_size=16, parallel="fsdp", mesh=mesh)
    experiment = FlowExperiment(name="wide", model=WIDE, train=train)
    axes = {"fsdp": mesh[0], "tensor": mesh[1]}
    cost, whole = (training_cost(experiment, 4, of) for of in (axes, None))
    flow = experiment.build()
    state = FullySharded(mesh_shape=mesh).create(
        lambda: init_state(flowgen.init(flow, jax.random.key(0)), experiment.optim, 10)
    )
    parts = {"parameters": state.params, "gradient": state.params, "moments": state.opt_state, "average": state.ema}
    for name, tree in parts.items():
        assert getattr(cost, name) == sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    assert cost.state < 0.3 * whole.state
    # A layer has kernels of 12 times the squared width, of which tensor devices have a part.
    layer = 12 * WIDE.width**2 * 4 // mesh[1]
    assert cost.recomputed - whole.recomputed == layer
    assert cost.stored - whole.stored == 6 * layer + sum(
        x.nbytes for path, x in jax.tree.leaves_with_path(state.params) if is_divided_and_unstacked(path, x)
    )


def is_divided_and_unstacked(path, x):
    names = [entry.key for entry in path]
    return "layers" not in names and names[-1] == "kernel" and not x.sharding.is_fully_replicated


def test_accumulation_stores_a_sum_of_gradients():
    train = TrainConfig(batch_size=16, accumulation=2)
    one, two = (training_cost(dataclasses.replace(debug("tarflow_digits"), train=t), 4) for t in (TrainConfig(), train))
    assert two.gradient == 2 * one.gradient


@pytest.mark.slow
def test_info_counts_what_a_device_of_the_mesh_holds():
    words = ["--model.width", "512", "--model.head_dim", "64", "--train.batch_size", "64"]
    copied, here, eight = (
        succeed("info --config tarflow_digits", *words, *more).splitlines()
        for more in ([], ["--train.parallel", "fsdp"], ["--train.parallel", "fsdp", "--train.mesh", "4,2"])
    )
    devices = jax.device_count()
    assert any(
        f"16 samples at a time on each device (train.batch_size 64 on {devices} devices)" in line for line in copied
    )
    assert any(
        f"64 on {devices} devices; the devices share the parameters, in a mesh of 4 x 1)" in line for line in here
    )
    assert any("64 on 8 devices; the devices share the parameters, in a mesh of 4 x 2)" in line for line in eight)

    def parameters(lines, where=""):
        number, unit, *_ = told(lines, f"training state{where}").removeprefix("parameters ").split(" ", 2)
        return float(number) * {"kB,": 1e3, "MB,": 1e6}[unit]

    whole = parameters(copied)
    assert parameters(here, " on each device") == pytest.approx(whole / 4, rel=0.05)
    assert parameters(eight, " on each device") == pytest.approx(whole / 8, rel=0.05)


def test_decoding_needs_a_copy_of_the_weights():
    experiment = debug("tarflow_digits")
    flow = experiment.build()
    variables = flowgen.init(flow, jax.random.key(0))
    cost = experiment.sampling_cost(flow, jax.eval_shape(lambda: variables), 4)
    assert cost.weights == sum(x.nbytes for x in jax.tree.leaves(decoding_weights(flow.config, variables)))
