"""Velocity networks end to end: trained by the one loop, stopped and resumed, sampled, evaluated, refused."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import refused, succeed
from PIL import Image
from tolerances import NETWORK, assert_close

from flowgen import checkpoint, experiments
from flowgen import matching as fm
from flowgen.data import PointsConfig
from flowgen.experiments import MatchingExperiment, SolverConfig, fit
from flowgen.matching import GibbsWeights, Independent, MatchingConfig, MinibatchOT, MLPConfig
from flowgen.nn import init
from flowgen.training import LogConfig, TrainConfig

SHRUNK = ("meanflow_digits", "otcfm_digits", "wcfm_digits_nala")
CONFIGS = Path(__file__).parent.parent / "configs"
pytestmark = pytest.mark.usefixtures("quick_features")
POINTS = MatchingExperiment(
    name="points",
    model=MLPConfig(dim=2, width=16, num_layers=1),
    data=PointsConfig(x0="eight_gaussians", x1="moons"),
    matching=MatchingConfig(coupling=GibbsWeights(ess=0.5)),
    train=TrainConfig(steps=8, batch_size=16),
    log=LogConfig(log_every=2, eval_every=4, checkpoint_every=4, tensorboard=False, progress=False),
    sampling=SolverConfig(num=6, num_steps=3),
)


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """A finished run on points, and its result."""
    path = tmp_path_factory.mktemp("runs") / "points"
    return path, fit(POINTS, path)


@pytest.fixture(scope="module")
def digits(quick_features, tmp_path_factory):
    """A run of the shrunk W-CFM digits by the command, and what it printed."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    words = "train --debug --log.progress false --log.eval_every 0 --sampling.frechet_samples 8 --config"
    return path, succeed(words, CONFIGS / "wcfm_digits.py", "--workdir", path)


@pytest.mark.slow
def test_a_run_on_points_reports_distances_and_draws_a_plot(points):
    path, result = points
    assert {"w2", "w2_floor", "euler_1", "euler_4", "euler_10", "path_energy", "signed_npe"} <= set(result.metrics)
    assert all(map(np.isfinite, result.metrics.values()))
    assert result.metrics["w2_floor"] < result.metrics["w2"]
    image = np.asarray(Image.open(result.samples))
    assert image.shape == (500, 1000, 3)
    assert 0 < (image != 255).mean() < 0.5
    network, variables, experiment = checkpoint.load(path)
    assert (network.config, experiment) == (POINTS.model, POINTS)
    assert checkpoint.load(path, step="best")[2] == POINTS
    # What the weights' running mean has become travels with the parameters.
    assert np.isfinite(variables["matching"]["log_mean"])


@pytest.mark.slow
def test_a_stopped_run_resumes_bitwise_weights_included(points, tmp_path):
    _, whole = points
    half = dataclasses.replace(POINTS, train=dataclasses.replace(POINTS.train, steps=4))
    # The learning rate of the first half must be that of the whole run.
    constant = {"optim": dataclasses.replace(POINTS.optim, schedule="constant")}
    whole = fit(dataclasses.replace(POINTS, **constant), tmp_path / "whole")
    fit(dataclasses.replace(half, **constant), tmp_path / "halves")
    resumed = fit(dataclasses.replace(POINTS, **constant), tmp_path / "halves")
    for one, other in zip(jax.tree.leaves(whole.state), jax.tree.leaves(resumed.state), strict=True):
        np.testing.assert_array_equal(one, other)
    assert "log_mean" in resumed.state.collections["matching"]


def test_an_open_epsilon_is_chosen_from_the_data_and_only_then():
    x0, x1 = POINTS.data.draw(jax.random.key(1), 512)
    fitted = POINTS.matching.fitted(x0, x1)
    assert fitted.coupling.epsilon > 0
    given = MatchingConfig(coupling=GibbsWeights(epsilon=1.5, sinkhorn_sweeps=2))
    assert given.fitted(x0, x1) == given
    for coupling in (Independent(), MinibatchOT(), GibbsWeights(epsilon=1.0, normalize="batch")):
        assert MatchingConfig(coupling=coupling).state() == {}
    assert np.isneginf(given.state()["matching"]["log_mean"])


def test_weights_that_tilt_more_than_they_couple_are_warned_of():
    # N -> moons: the moons' distances from the origin differ most.
    x0, x1 = PointsConfig(x0="normal", x1="moons").draw(jax.random.key(0), 512)
    with pytest.warns(UserWarning, match="sinkhorn_sweeps"):
        MatchingConfig(coupling=GibbsWeights(epsilon=1.0)).fitted(x0 * 0.1, x1)


@pytest.mark.slow
def test_sampling_points_writes_a_plot_or_arrays(points, tmp_path):
    path, _ = points
    out = succeed("sample --num 40 --checkpoint", path, "--out", tmp_path / "a.png")
    assert re.fullmatch(r"samples 0\.\.39: .* per second \(with compilation\); heun, 6 evaluations\nWrote .*\n", out)
    assert Image.open(tmp_path / "a.png").size == (1000, 500)
    for method, evaluations in (("euler --num-steps 5", "5"), ("dopri5", r"\d+")):
        words = f"sample --num 5 --method {method} --checkpoint"
        out = succeed(words, path, "--out", tmp_path / "b.npz")
        assert re.search(rf"; {method.split()[0]}, {evaluations} evaluations\n", out)
        arrays = np.load(tmp_path / "b.npz")
        assert arrays["points"].shape == (5, 2)
    succeed("sample --num 5 --batch 2 --method dopri5 --checkpoint", path, "--out", tmp_path / "c.npz")
    # One step size for the whole batch: other batches, other steps, within the tolerance.
    np.testing.assert_allclose(np.load(tmp_path / "c.npz")["points"], arrays["points"], atol=1e-3)


@pytest.mark.slow
def test_the_classes_of_images_and_guidance_reach_the_network(digits, tmp_path):
    path, out = digits
    assert re.search(
        r"Held-out frechet -?\d+\.\d{3}, class_accuracy \d\.\d{3}, loss \d+\.\d{3}, unweighted_loss \d+\.\d{3}\.\n", out
    )

    def images(words):
        succeed(f"sample --num 4 {words} --checkpoint", path, "--out", tmp_path / "a.npz")
        return np.load(tmp_path / "a.npz")["images"]

    three = images("--classes 3 --guidance 0")
    assert three.shape == (4, 8, 8, 1)
    np.testing.assert_array_equal(three, images("--classes 3 --guidance 0 --batch 4"))
    assert np.abs(three - images("--classes 4 --guidance 0")).max() > 0
    assert np.abs(three - images("--classes 3 --guidance 5")).max() > 0
    assert "sampling.guidance is -1" in refused("sample --guidance -1 --checkpoint", path)
    assert_close(three[:2], images("--classes 3 --guidance 0 --batch 2")[:2], NETWORK)
    out = succeed("evaluate --samples 20 --batch 64 --checkpoint", path)
    first, bits, distance, few, kernel, overlap, accuracy, _ = out.splitlines()
    assert first == "180 images (eval)"
    assert re.match(r"bits/dim \d+\.\d{4} ± 0\.\d{4} ", bits)
    assert re.match(r"Fréchet distance of 20 samples \d+\.\d{3} \(.*classifier", distance)
    assert few == "too few samples for 64 features, so the distance is too large"
    assert re.match(r"kernel distance -?\d+\.\d{5}, std \d+\.\d{5} over 100 subsets of 10 ", kernel)
    assert re.match(r"precision \d\.\d{3}, recall \d\.\d{3}, density \d+\.\d{3}, coverage \d\.\d{3} ", overlap)
    assert re.match(r"samples that show their class \d\.\d{3} ", accuracy)
    # Without classes there is nothing to guide to.
    succeed("evaluate --samples 4 --batch 64 --unconditional --checkpoint", path)


@pytest.mark.slow
def test_evaluating_points_prints_every_metric(points):
    path, _ = points
    out = succeed("evaluate --samples 64 --checkpoint", path)
    assert out.startswith("64 points\n")
    assert re.search(r"^w2 \d+\.\d{4}$", out, re.MULTILINE)


@pytest.mark.parametrize("name", SHRUNK)
@pytest.mark.slow
def test_shrunk_configs_train(name, tmp_path):
    experiment = experiments.load_config(CONFIGS / f"{name}.py").debug()
    log = dataclasses.replace(experiment.log, progress=False, tensorboard=False, eval_every=0)
    result = fit(dataclasses.replace(experiment, log=log), tmp_path / "run")
    assert result.samples is not None
    assert np.isfinite(result.metrics["loss"])


MISTAKES = {
    "sample --out a.png --plan jacobi --checkpoint POINTS": "--plan is not an option of this command for a MLP",
    "sample --out a.png --certify --checkpoint POINTS": "--certify is not an option of this command for a MLP",
    "sample --out a.png --single some --checkpoint POINTS": "--single writes images, but this model draws numbers",
    "sample --out a.png --classes 1 --checkpoint POINTS": "--classes is 1, but this model has no classes",
    "sample --out a.png --guidance 1 --checkpoint POINTS": "but the model has no classes to guide towards (num_",
    "sample --out a.png --method rk5 --checkpoint POINTS": "sampling.method is 'rk5'; it must be 'euler' or 'midpoint'",
    "sample --out a.png --method mean_flow --checkpoint POINTS": "sampling.method is 'mean_flow', which works only",
    "sample --out a.png --num-steps 0 --checkpoint POINTS": "sampling.num_steps is 0; it must be ",
    "evaluate --noise uniform --checkpoint POINTS": "--noise is not an option of this command for a MLP",
    "evaluate --samples 1 --checkpoint POINTS": "samples is 1, but a distance needs at least 2; ",
    "evaluate --checkpoint POINTS --data.x1 circles": "data.x1 is 'circles'; it must be 'normal' or",
    "train --workdir POINTS --config CONFIG --matching.coupling.ess 0.3": "started with another config",
}


@pytest.mark.parametrize(("command", "part"), MISTAKES.items())
@pytest.mark.slow
def test_mistakes_are_one_sentence(command, part, points, tmp_path, monkeypatch, untyped):
    monkeypatch.chdir(tmp_path)
    command = command.replace("POINTS", str(points[0])).replace("CONFIG", str(CONFIGS / "cfm_moons.py"))
    assert part in refused(command)
    assert not list(tmp_path.iterdir())


def test_whatever_a_network_predicts_is_sampled_as_a_velocity():
    # A network that always predicts the datum (1, -1): every sample must arrive there.
    network = fm.VelocityMLP(fm.MLPConfig(dim=2, width=4, num_layers=1))
    variables = jax.tree.map(jnp.zeros_like, init(network, jax.random.key(0)))
    variables["params"]["Dense_1"]["bias"] = jnp.array([1.0, -1.0])
    matching = MatchingConfig(loss=fm.FlowMatching(prediction="x1"))
    experiment = dataclasses.replace(
        POINTS, matching=matching, model=network.config, sampling=SolverConfig(method="euler", num_steps=50)
    )
    samples, line = experiment.draw_batch(network, variables, jax.random.key(0), np.arange(5), None)
    assert_close(samples, np.tile([1.0, -1.0], (5, 1)), NETWORK)
    assert line == "euler, 50 evaluations"
