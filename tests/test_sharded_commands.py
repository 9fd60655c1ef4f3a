"""The commands `sample` and `evaluate` on parameters that all devices share: the results of one device."""

import dataclasses

import jax
import numpy as np
import pytest
from commands import refused, succeed
from tolerances import NETWORK, assert_close

import flowgen
from flowgen import checkpoint
from flowgen.backend import shards
from flowgen.decoding.weights import decoding_weights
from flowgen.experiments import MatchingExperiment
from flowgen.matching import DiTConfig
from flowgen.training import TrainConfig
from flowgen.training.fsdp import divided_over_heads

DIT = DiTConfig(image_size=8, channels=1, patch_size=4, width=32, head_dim=8, num_layers=1, num_classes=10)
FSDP = TrainConfig(parallel="fsdp", mesh=(2, 8))  # of another host with more devices


@pytest.fixture(autouse=True)
def every_array_is_divided(monkeypatch):
    monkeypatch.setattr(shards, "MIN_SIZE", 1)


def experiments():
    """Runs of sharded training: a flow on images, a flow on clips, and a velocity network."""
    tarflow = flowgen.load_config("tarflow_digits").debug()
    model = dataclasses.replace(tarflow.model, head_dim=8)  # four heads
    return {
        "tarflow": dataclasses.replace(tarflow, model=model, train=FSDP),
        "clips": dataclasses.replace(flowgen.load_config("starflow_v_bouncing").debug(), train=FSDP),
        "DiT": dataclasses.replace(
            MatchingExperiment(name="own", model=DIT), data=flowgen.data.DataConfig(), train=FSDP
        ),
    }


def run_of(folder, experiment):
    """A run whose parameters are not those of the start."""
    random = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: np.asarray(x + 0.02 * random.normal(size=x.shape), x.dtype),
        flowgen.init(experiment.build(), jax.random.key(0)),
    )
    checkpoint.write_run(folder / "run", experiment, variables)
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("name", experiments())
def test_divided_parameters_give_the_samples_and_metrics_of_one_device(name, tmp_path, monkeypatch):
    run, lines = run_of(tmp_path, experiments()[name]), {}
    placed = []
    monkeypatch.setattr("flowgen.training.fsdp.divided_over_heads", lambda x: placed.append(1) or divided_over_heads(x))
    for parallel in ("fsdp", "data"):
        words = [] if parallel == "fsdp" else ["--train.parallel", "data"]  # the run's, and another
        succeed(f"sample --checkpoint {run} --num 4 --out {tmp_path / parallel}.npz", *words)
        lines[parallel] = succeed(f"evaluate --checkpoint {run}", *words, *["--samples", "4"] * (name == "DiT"))
        assert len(placed) == 2
    one, other = (np.load(tmp_path / f"{parallel}.npz") for parallel in ("data", "fsdp"))
    for array in one.files:
        assert_close(other[array], one[array], NETWORK)
    assert lines["fsdp"].splitlines()[0] == lines["data"].splitlines()[0]
    numbers = [[float(x) for x in text.split() if x.replace(".", "").isdigit()] for text in lines.values()]
    # Standard errors are printed with four digits after the point.
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=2e-4)


def test_no_device_has_the_weights_of_other_heads(tmp_path):
    run = run_of(tmp_path, experiments()["tarflow"])
    flow, variables, _ = checkpoint.load_on_host(run)
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(variables))
    divided = divided_over_heads(variables)
    for params in (divided["params"]["blocks_0"], decoding_weights(flow.config, divided)[0]["params"]):
        for path, x in jax.tree.leaves_with_path(params["layers"]):
            names, count = [entry.key for entry in path], len(jax.devices())
            is_kernel = names[-1] == "kernel"
            assert x.addressable_shards[0].data.size == x.size // (count if is_kernel else 1) or names[-1] == "bias"


def test_what_is_no_layout_is_refused(tmp_path):
    run = run_of(tmp_path, experiments()["tarflow"])
    assert "train.parallel is 'pmap'" in refused(f"sample --checkpoint {run} --train.parallel pmap --out {run}.npz")
    told = refused(f"evaluate --checkpoint {run} --train.seed 3")
    assert "--train.parallel" in told
