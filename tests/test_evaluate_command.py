"""The command `evaluate` end to end: comparisons of samples, cached statistics, neighbours, anomalies."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import refused, succeed
from laws import drawn
from PIL import Image

from flowgen import checkpoint
from flowgen.experiments import FlowExperiment, SamplingConfig
from flowgen.flows import TARFlowConfig
from flowgen.nn import init


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
            assert area["standard_error"] >= 0
    with np.load(tmp_path / "a.anomaly.npz") as arrays:
        assert arrays["normal_tokens"].shape == (180, 2, 2)
        assert arrays["anomaly_blur_ks_p"].shape == (180,)


def test_what_cannot_be_saved_is_refused_first(flow_run, tmp_path):
    (tmp_path / "a.neighbours.png").write_text("mine")
    told = refused("evaluate --checkpoint", flow_run, "--out", tmp_path / "a.json")
    assert "a.neighbours.png' exists already" in told
    (tmp_path / "file").write_text("mine")
    assert "file' is a file, not a folder" in refused(
        "evaluate --samples 8 --checkpoint", flow_run, "--cache", tmp_path / "file"
    )
