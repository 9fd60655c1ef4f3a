"""What `info` says about the memory and FLOP of a config, and the machines that it fits."""

import dataclasses
import re

import jax
import pytest
from commands import succeed

import flowgen
from flowgen.cli.info import COMPARED, estimates
from flowgen.experiments import MatchingExperiment
from flowgen.experiments.estimates import training_cost

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
