"""The models that ship with flowgen: small, described, and as good as their cards say."""

import json
import shutil

import jax
import numpy as np
import pytest
from commands import refused
from exported_runs import EXPERIMENTS, write_trained

import flowgen
from flowgen import exports
from flowgen.experiments import from_json
from flowgen.flows import density
from flowgen.runs import RunReader, located, shipped_models
from flowgen.runs.exported import without_paths
from flowgen.runs.located import SHIPPED

SHIPPED_FROM = {"digits": "tarflow_digits", "digits-cfm": "cfm_digits"}


def test_the_shipped_models_are_small_and_described():
    assert shipped_models() == tuple(SHIPPED_FROM)
    sizes = [path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(sizes) < 2_000_000
    for name, config in SHIPPED_FROM.items():
        stored = from_json(RunReader(located(name)).config())  # without the fields that flowgen has gained since
        trained, given = (
            json.loads(json.dumps(without_paths(one.to_json()))) for one in (stored, flowgen.load_config(config))
        )
        assert trained["data"].pop("classes") == [str(digit) for digit in range(10)]
        given["data"].pop("classes")
        assert trained == given
        reader = RunReader(located(name)).checkpoints
        measured = reader.evaluation(stored.train.steps)
        assert all(measured[metric] == pytest.approx(value, rel=1e-3) for metric, value in stored.reference.items())
        card = (SHIPPED / name / "README.md").read_text()
        assert "license: apache-2.0" in card
        assert "CC BY 4.0" in card


@pytest.mark.slow
def test_the_shipped_models_know_the_digits():
    """The flow, which nothing else in the tests has trained, tells held-out digits and the network's samples apart."""
    flow, params, experiment = flowgen.load("digits")
    network, weights, matching = flowgen.load("digits-cfm")
    batch = experiment.dataset("eval")[np.arange(60)]
    posterior = jax.jit(lambda x: density.class_posterior(flow, params, x))
    guessed = np.asarray(posterior(batch.x / np.float32(127.5) - 1)).argmax(-1)
    assert (guessed == batch.labels).mean() > 0.9
    asked = np.arange(60) % 10
    drawn_digits, _ = matching.draw_batch(network, weights, jax.random.key(0), np.arange(60), asked)
    assert (np.asarray(posterior(drawn_digits)).argmax(-1) == asked).mean() > 0.9


def test_a_model_goes_before_a_shipped_model_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert located("digits") == SHIPPED / "digits"
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "0.png").touch()  # as `sample --single digits` writes
    assert located("digits") == SHIPPED / "digits"
    shutil.rmtree(tmp_path / "digits")
    exports.export(write_trained(tmp_path / "run", EXPERIMENTS["flow"]), tmp_path / "digits")
    assert flowgen.load("digits")[2].name == "flow"
    assert "did you mean --checkpoint digits-cfm?" in refused("sample digits-cfm")
    assert "or a shipped model (digits, digits-cfm)" in refused("info --checkpoint digit")
    shutil.rmtree(tmp_path / "digits")
    (tmp_path / "digits" / "checkpoints").mkdir(parents=True)
    assert "It hides the shipped model of this name." in refused("info --checkpoint digits")
