"""The command `evaluate` end to end: comparisons of samples, cached statistics, neighbours, anomalies."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import outcome_of, refused, succeed
from laws import drawn
from PIL import Image

from flowgen import checkpoint
from flowgen.evaluation import Estimate, Evaluation
from flowgen.experiments import FlowExperiment, SamplingConfig, SpaceToDepth, comparison
from flowgen.experiments.anomalies import open_anomalies
from flowgen.experiments.images import training_images
from flowgen.flows import STARFlowConfig, TARFlowConfig
from flowgen.nn import init
from flowgen.runs import CheckpointReader, save_evaluation


@pytest.fixture(scope="module")
def flow_run(tmp_path_factory):
    """A run of a tiny class flow that was never trained, whose parameters are no zeros."""
    model = TARFlowConfig(
        image_size=8, channels=1, patch_size=4, width=16, head_dim=8, num_blocks=2, layers_per_block=1, num_classes=10
    )
    experiment = FlowExperiment(name="flow", model=model, sampling=SamplingConfig(num=4))
    path = tmp_path_factory.mktemp("evaluated") / "run"
    checkpoint.write_run(path, experiment.with_provenance(), drawn(init, experiment.build(), jax.random.key(0)))
    return path


def _saved(out):
    return json.loads(Path(re.search(r"Wrote (\S+\.json)", out)[1]).read_text())


@pytest.mark.slow
def test_samples_are_compared_in_every_way(flow_run, tmp_path):
    words = "evaluate --samples 20 --features pixels --neighbours 2 --checkpoint"
    first = _saved(succeed(words, flow_run, "--cache", tmp_path, "--out", tmp_path / "a.json"))
    (cached,) = tmp_path.glob("reference-*.npz")
    written = cached.stat().st_mtime_ns
    again = _saved(succeed(words, flow_run, "--cache", tmp_path, "--out", tmp_path / "b.json"))
    assert cached.stat().st_mtime_ns == written
    assert first["metrics"] == again["metrics"]
    names = ("frechet", "kernel", "kernel_std", "precision", "recall", "density", "coverage")
    assert all(first["metrics"][name]["value"] is not None for name in names)
    assert first["extractor"] == {"name": "pixels", "digest": "pixels"}
    assert first["files"] == ["a.neighbours.png"]
    # Two rows of a sample and seven neighbours, each 64 pixels wide with a margin of 2.
    with Image.open(tmp_path / "a.neighbours.png") as image:
        assert image.size == (8 * 66 + 2, 2 * 66 + 2)
    assert np.shape(first["neighbours"]["positions"]) == (2, 7)
    # The same statistics as a file of another program, which has no features.
    with np.load(cached) as arrays:
        np.savez(tmp_path / "stats.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    reference = ("--reference", tmp_path / "stats.npz", "--out", tmp_path / "c.json")
    out = succeed("evaluate --samples 20 --features pixels --checkpoint", flow_run, *reference)
    assert "no kernel distance, precision and recall, because the reference has no features" in out
    assert _saved(out)["metrics"]["frechet"] == first["metrics"]["frechet"]


@pytest.mark.slow
def test_anomalies_are_scored(flow_run, tmp_path):
    out = succeed("evaluate --anomaly corrupted --checkpoint", flow_run, "--out", tmp_path / "a.json")
    record = _saved(re.sub(r" and .*", "", out))
    for corruption in ("noise", "blur", "occlusion", "shuffle", "inversion"):
        assert f"AUROC of 180 {corruption} against 180 images (eval): nats " in out
        for score in record["anomaly"]["scores_higher_if_anomalous"]:
            area = record["metrics"][f"auroc_{corruption}_{score}"]
            assert 0 <= area["value"] <= 1
            assert area["standard_error"] is None or area["standard_error"] > 0
    with np.load(tmp_path / "a.anomaly.npz") as arrays:
        assert arrays["normal_tokens"].shape == (180, 2, 2)
        assert arrays["anomaly_blur_ks_p"].shape == (180,)


def _statistics(path, length):
    np.savez(path, mu=np.zeros(length), sigma=np.eye(length))
    return path


BEFORE = {
    "reference of pixels": "--samples 8 --features pixels --reference {reference}",
    "reference of a classifier": "--samples 8 --features classifier --reference {reference}",
    "reference, features chosen by the data": "--samples 8 --reference {reference}",
    "anomalies that are no images": "--anomaly {reference}",
    "one anomaly": "--anomaly {one}",
    "data of one image to score": "--anomaly corrupted --unconditional --data.name folder --data.path {one}",
    "data of one image to compare": "--samples 8 --unconditional --data.name folder --data.path {one}",
}


@pytest.mark.parametrize("name", BEFORE)
def test_what_does_not_fit_is_refused_before_anything_is_computed(flow_run, tmp_path, monkeypatch, name):
    def computed(*arguments, **options):
        raise AssertionError("something was computed")

    for place in ("flow.evaluate_likelihood", "flow.compare_samples", "comparison.train_features"):
        monkeypatch.setattr(f"flowgen.experiments.{place}", computed)
    reference, one = _statistics(tmp_path / "fid.npz", 7), tmp_path / "one"
    one.mkdir()
    Image.new("L", (8, 8)).save(one / "a.png")
    told = refused("evaluate --checkpoint", flow_run, *BEFORE[name].format(reference=reference, one=one).split())
    if "one" in name:
        assert "at least 2" in told
    if "reference" in name:
        assert re.search(r"fid.npz' has features of length 7, but those of --features \w+ have length 64; ", told)


def test_a_run_is_opened_once_and_its_weights_are_read_last(flow_run, monkeypatch):
    opened = []

    class Counted(checkpoint.RunReader):
        def __init__(self, run_dir):
            opened.append(run_dir)
            super().__init__(run_dir)

    def read(*arguments, **options):
        raise ValueError("the weights are read")

    monkeypatch.setattr(checkpoint, "RunReader", Counted)
    monkeypatch.setattr(Counted, "free", lambda self: None)
    monkeypatch.setattr(CheckpointReader, "weights", read)
    assert "--bach is not an option" in refused("evaluate --bach 3 --checkpoint", flow_run)
    for command in ("evaluate --samples 8 --guidance 1 --checkpoint", "sample --guidance 1 --out x.npz --checkpoint"):
        opened.clear()
        assert "the weights are read" in refused(command, flow_run)
        assert len(opened) == 1


@pytest.mark.slow
def test_anomalies_are_scored_by_latents(tmp_path):
    model = STARFlowConfig(image_size=4, channels=4, width=40, head_dim=20, layers_per_block=(1, 1), num_classes=0)
    experiment = FlowExperiment(name="latents", model=model, codec=SpaceToDepth(2))
    variables = drawn(init, experiment.build(), jax.random.key(0))
    checkpoint.write_run(tmp_path / "run", experiment.with_provenance(), variables)
    out = succeed("evaluate --anomaly corrupted --checkpoint", tmp_path / "run", "--out", tmp_path / "a.json")
    assert "AUROC of 180 blur against 180 images (eval, density of latents): nats " in out
    record = _saved(re.sub(r" and .*", "", out))
    assert record["anomaly"]["density_of"] == "latents"
    # Space-to-depth keeps all pixels, so large changes are seen even by a flow that was never trained.
    assert all(0 <= record["metrics"][f"auroc_{name}_nats"]["value"] <= 1 for name in ("noise", "inversion"))
    with np.load(tmp_path / "a.anomaly.npz") as arrays:
        assert arrays["normal_tokens"].shape == (180, 4, 4)


def test_likelihoods_that_are_not_finite_are_refused(flow_run, tmp_path, monkeypatch):
    def overflowing(flow, variables, dataset, key, **options):
        return np.where(np.arange(len(dataset)) < 3, np.nan, 1.0)

    monkeypatch.setattr("flowgen.experiments.likelihoods.flow_nats", overflowing)
    told = refused("evaluate --anomaly corrupted --checkpoint", flow_run, "--out", tmp_path / "a.json")
    assert "3 of 180 images have no finite likelihood" in told
    assert not list(tmp_path.iterdir())


def test_evaluations_without_json_leave_no_file(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        save_evaluation(str(tmp_path / "a.json"), {"value": float("nan")}, {"anomaly.npz": {"x": np.zeros(2)}})
    assert not list(tmp_path.iterdir())
    save_evaluation(str(tmp_path / "a.json"), {"value": 1}, {"anomaly.npz": {"x": np.zeros(2)}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"value": 1, "files": ["a.anomaly.npz"]}


def test_other_data_are_compared_with_the_runs_training_images(flow_run, tmp_path, monkeypatch):
    other = tmp_path / b"caf\xe9".decode(errors="surrogateescape")
    other.mkdir()
    for index in range(6):
        Image.new("L", (8, 8), 40 * index).save(other / f"{index}.png")
    opened = []

    def evaluate(self, model, variables, options, *, trained_on=None):
        opened.append((trained_on, self.data.name))
        sets = open_anomalies(self, options, lambda: training_images(self, trained_on, options.split, read))
        return Evaluation(metrics={f"auroc_{name}_nats": Estimate(0.5) for name in sets.anomalies})

    def read(one, split):
        return one.dataset(split)

    monkeypatch.setattr(FlowExperiment, "evaluate", evaluate)
    words = ("--anomaly", other, "--out", tmp_path / "a.json")
    succeed("evaluate --checkpoint", flow_run, *words)
    # The name of a folder that is no UTF-8 is escaped.
    assert list(json.loads((tmp_path / "a.json").read_text())["metrics"]) == ["auroc_caf\\udce9_nats"]
    succeed("evaluate --data.name folder --anomaly corrupted --checkpoint", flow_run, "--data.path", other)
    (own, evaluated), (known, other_data) = opened
    assert (own, evaluated) == (None, "digits")
    assert (known.name, other_data) == ("digits", "folder")


def test_what_cannot_be_saved_is_refused_first(flow_run, tmp_path):
    (tmp_path / "a.neighbours.png").write_text("mine")
    told = refused("evaluate --samples 8 --neighbours 2 --checkpoint", flow_run, "--out", tmp_path / "a.json")
    assert "a.neighbours.png' exists already" in told
    (tmp_path / "file").write_text("mine")
    assert "file' is a file, not a folder" in refused(
        "evaluate --samples 8 --checkpoint", flow_run, "--cache", tmp_path / "file"
    )


def test_only_files_that_are_written_stand_in_the_way(flow_run, tmp_path):
    (tmp_path / "a.neighbours.png").write_text("mine")
    succeed("evaluate --checkpoint", flow_run, "--out", tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["files"] == []


def test_a_cache_that_cannot_be_written_costs_no_evaluation(flow_run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("Cannot write 'reference.npz': No space left on device.")

    monkeypatch.setattr(comparison, "save_statistics", full)
    outcome = outcome_of(
        "evaluate --samples 8 --features pixels --checkpoint",
        flow_run,
        "--out",
        tmp_path / "a.json",
        "--cache",
        tmp_path,
    )
    assert outcome.code == 0
    assert "The statistics of the data are not cached: Cannot write 'reference.npz'" in outcome.err
    assert "frechet" in (tmp_path / "a.json").read_text()
