"""Scores of anomalies: terms of tokens sum to the likelihood, tests of z against scipy, areas against brute force."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
import scipy.special
import scipy.stats
from PIL import Image
from tolerances import LAYER, NETWORK, assert_close

from flowgen.data import ArrayDataset, Batch, DataConfig, Moments
from flowgen.evaluation import CORRUPTIONS, SCORES, AnomalyScores, anomaly_scores, auroc, flow_nats
from flowgen.experiments import FlowExperiment
from flowgen.experiments.anomalies import check_anomaly, evaluate_anomalies, open_anomalies
from flowgen.experiments.flow import ImageEvaluateOptions
from flowgen.experiments.images import TrainingImages
from flowgen.flows import TARFlowConfig


# Every kind of block; the other rows of the table differ in what is inside them.
@pytest.mark.parametrize(
    "name",
    [
        "volume preserving",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("classes", "starflow added class", "starflow video")),
    ],
)
def test_terms_of_tokens_sum_to_the_density(name):
    flow, params, x, cond = laws.case(name)
    terms, z = laws.apply(flow, params, x, cond, method="token_log_prob")
    assert terms.shape == (len(x), flow.config.num_tokens)
    assert_close(terms.sum(axis=1), laws.apply(flow, params, x, cond, method="log_prob"), NETWORK)
    assert_close(z, laws.apply(flow, params, x, cond, method="forward")[0], LAYER)


def images(count, flow):
    levels = np.random.default_rng(0).integers(0, 256, (count, *flow.config.image_shape), np.uint8)
    return ArrayDataset(levels, np.full(count, -1, np.int32))


def test_scores_do_not_depend_on_the_batch_and_agree_with_the_likelihood():
    flow, params, _, _ = laws.case("affine")
    dataset, key = images(7, flow), jax.random.key(0)
    found = [anomaly_scores(flow, params, dataset, key, batch_size=size, by_class=False) for size in (7, 3)]
    nats = flow_nats(flow, params, dataset, key, conditional=False)
    for one in found:
        assert one.tokens.shape == (7, *flow.config.token_hw)
        assert_close(one.nats, nats, NETWORK)
        assert_close(one.squares, found[0].squares, NETWORK)
        assert_close(one.tokens.sum(axis=(1, 2)), -one.nats * one.dims, NETWORK)
    scores = found[0].scores(typical=found[0].nats[0])
    assert scores.keys() == SCORES.keys()
    assert scores["typicality"][0] == 0


def test_a_flow_with_classes_is_a_mixture_of_them():
    flow, params, _, _ = laws.case("classes")
    dataset, key = images(3, flow), jax.random.key(0)
    each = []
    for label in range(flow.config.num_classes):
        labelled = ArrayDataset(dataset.x, np.full(3, label, np.int32))
        each.append(-flow_nats(flow, params, labelled, key) * flow.config.num_dims)
    expected = scipy.special.logsumexp(each, axis=0) - np.log(len(each))
    found = anomaly_scores(flow, params, dataset, key)
    assert_close(-found.nats * found.dims, expected, NETWORK)
    assert_close(found.tokens.sum(axis=(1, 2)), np.max(each, axis=0), NETWORK)


class Latents:
    """Latents of one shape; the std of their posterior is 0, so that each draw is the mean."""

    class_names = ()

    def __init__(self, mean):
        self.mean, self.event_shape = mean, mean.shape[1:]

    def __len__(self):
        return len(self.mean)

    def __getitem__(self, indices):
        return Batch(Moments(self.mean[indices], np.zeros_like(self.mean[indices])))


def test_latents_are_scored_by_their_own_density():
    flow, params, _, _ = laws.case("affine")
    means = np.random.default_rng(0).normal(size=(5, *flow.config.event_shape)).astype(np.float32)
    options = {"noise_std": 0.0, "batch_size": 3, "by_class": False}
    found = anomaly_scores(flow, params, Latents(means), jax.random.key(0), **options)
    expected = laws.apply(flow, params, jnp.asarray(means), None, method="log_prob")
    assert_close(-found.nats * found.dims, np.asarray(expected, np.float64), NETWORK)


class Standing:
    """A flow that leaves images of one token row unchanged; its prior has variance 4."""

    class config:
        num_classes, num_dims, noise_std, event_shape, token_hw = 0, 64, 0.0, (8, 8, 1), (1, 64)
        scale_parameterisation = "exponential"

    def apply(self, variables, *args, method):
        if method == "prior_variance":
            return jnp.full((64, 1), 4.0)
        z = args[0].reshape(-1, 64, 1) * 100
        return -jnp.square(z[:, :, 0]), z


def test_tests_of_z_are_those_of_scipy():
    dataset = images(5, type("flow", (), {"config": type("c", (), {"image_shape": (8, 8, 1)})}))
    found = anomaly_scores(Standing(), {}, dataset, jax.random.key(0))
    key = jax.random.key(0)
    uniform = [jax.random.uniform(jax.random.fold_in(key, i), (1, 8, 8, 1)) for i in range(5)]
    z = 100 * ((dataset.x + np.concatenate(uniform).astype(np.float64)) / 128 - 1).reshape(5, 64) / 2
    expected = scipy.stats.ks_1samp(z, scipy.stats.norm.cdf, axis=1).statistic
    np.testing.assert_allclose(found.ks, expected, atol=1e-5)
    np.testing.assert_allclose(found.squares, np.square(z).sum(axis=1), rtol=1e-5)


def test_p_values_are_uniform_under_the_prior(untyped):
    random = np.random.default_rng(0)
    z = random.standard_normal((500, 64))
    ks = scipy.stats.ks_1samp(z, scipy.stats.norm.cdf, axis=1)
    scores = AnomalyScores(np.zeros(500), np.zeros((500, 8, 8)), np.square(z).sum(axis=1), ks.statistic, 64)
    np.testing.assert_allclose(scores.ks_p(), ks.pvalue, atol=0.02)
    chi = scipy.stats.chi2(64)
    expected = 2 * np.minimum(chi.cdf(scores.squares), chi.sf(scores.squares))
    np.testing.assert_allclose(scores.chi_square_p(), expected, rtol=1e-6)
    for p in (scores.ks_p(), scores.chi_square_p()):
        # 0.05 ± 4 standard deviations of a fraction of 500.
        assert abs((p < 0.05).mean() - 0.05) < 0.04


def test_the_area_is_that_of_all_pairs_and_its_error_that_of_repetitions(untyped):
    random = np.random.default_rng(0)
    normal, other = random.integers(0, 9, 30).astype(float), random.integers(2, 12, 20).astype(float)
    pairs = other[:, None] - normal
    expected = (pairs > 0).mean() + 0.5 * (pairs == 0).mean()
    assert auroc(normal, other).value == pytest.approx(expected, abs=1e-12)
    assert auroc(other, normal).value == pytest.approx(1 - expected, abs=1e-12)
    drawn = [auroc(random.normal(size=60), random.normal(0.7, 1, 40)) for _ in range(400)]
    spread = np.std([one.value for one in drawn])
    # A standard deviation of 400 values is known to 4 %.
    assert np.mean([one.standard_error for one in drawn]) == pytest.approx(spread, rel=0.15)


def test_the_error_of_copies_is_that_of_repetitions(untyped):
    """Copies score as their originals do, plus a shift and noise; a few of the images have no copy, or two."""
    random = np.random.default_rng(0)

    def draw(origins):
        normal = random.normal(size=80)
        copies = normal[origins] + random.normal(0.3, 0.5, len(origins))
        return auroc(normal, copies, origins=origins), auroc(normal, copies)

    for origins in (np.arange(80), np.arange(0, 80, 3), np.repeat(np.arange(40), 2)):
        drawn = [draw(origins) for _ in range(200)]
        spread = np.std([copied.value for copied, _ in drawn])
        # A standard deviation of 200 values is known to 5 %.
        assert np.mean([copied.standard_error for copied, _ in drawn]) == pytest.approx(spread, rel=0.15)
    copied, apart = draw(np.arange(80))
    assert copied.value == apart.value
    assert copied.standard_error < 0.6 * apart.standard_error


MISTAKES = {
    "one score": ([1.0], [1.0, 2.0], "1 normal and 2 anomalous scores; give at least 2 each"),
    "no scores": ([], [], "0 normal and 0 anomalous scores"),
    "NaN among normal ones": ([1.0, np.nan, np.nan], [1.0, 2.0], "normal has 2 values that are NaN"),
    "NaN among anomalies": ([1.0, 2.0], [1.0, np.nan], "anomalous has 1 value that is NaN"),
    "a matrix": (np.ones((2, 2)), [1.0, 2.0], r"shapes \(2, 2\) and \(2,\); give two vectors"),
}
ORIGINS = {"too few": [0], "none": [], "too large": [0, 2], "negative": [-1, 0], "fractions": [0.5, 1.0]}


@pytest.mark.parametrize("anomalous", [[0.0, 1.5], [3.0, 4.0]], ids=["mixed", "apart"])
@pytest.mark.parametrize("name", ORIGINS)
def test_origins_that_are_no_positions_are_refused(name, anomalous, untyped):
    with pytest.raises(ValueError, match="give one position from 0 to 1 for each of 2 anomalies"):
        auroc(np.array([1.0, 2.0]), np.array(anomalous), origins=np.array(ORIGINS[name]))


@pytest.mark.parametrize("name", MISTAKES)
def test_scores_that_have_no_area_are_refused(name, untyped):
    normal, anomalous, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        auroc(np.array(normal), np.array(anomalous))


def test_ties_and_infinite_scores_are_ordered(untyped):
    ones, infinite = np.ones(3), np.array([np.inf, np.inf])
    # Their estimated variances are 0, which says nothing about the error.
    assert auroc(ones, ones)[:2] == (0.5, None)
    assert auroc(ones, infinite)[:2] == (1.0, None)
    assert auroc(infinite, ones)[:2] == (0.0, None)
    assert auroc(infinite, infinite).value == 0.5


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_keep_shape_and_change_images(name):
    before = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), np.uint8)
    kept = before.copy()
    after = CORRUPTIONS[name](before, np.random.default_rng(1))
    assert (after.dtype, after.shape) == (np.uint8, before.shape)
    assert (after != before).any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(before, kept)
    np.testing.assert_array_equal(after, CORRUPTIONS[name](before, np.random.default_rng(1)))


def test_a_flow_that_needs_texts_scores_no_anomalies():
    experiment = SimpleNamespace(model=SimpleNamespace(text_dim=4))
    with pytest.raises(ValueError, match="this flow needs texts"):
        check_anomaly(experiment, "corrupted")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Folders `known` and `new` of photos, each of one shade of grey, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for folder, shades in {"known": [99] * 8, "new": [90, 255, 20]}.items():
        (tmp_path / folder).mkdir()
        for name, shade in zip("abcdefgh", shades, strict=False):
            Image.new("L", (8, 8), shade).save(tmp_path / folder / f"{name}.png")


def scored_photos(anomaly):
    """The experiment's options, and its evaluation by a flow that leaves images unchanged."""
    model = TARFlowConfig(image_size=8, channels=1, num_classes=0)
    data = DataConfig("folder", path="known", eval_fraction=0.25)
    experiment = FlowExperiment(name="photos", model=model, data=data)
    options = ImageEvaluateOptions(anomaly=anomaly)
    train = TrainingImages(experiment.dataset("train"), "training images")
    sets = open_anomalies(experiment, options, lambda: train)
    return evaluate_anomalies(experiment, Standing(), {}, options, experiment.dataset("eval"), sets)


@pytest.mark.usefixtures("photos", "untyped")
def test_the_most_anomalous_files_are_named(caplog):
    evaluation = scored_photos("new")
    arrays = evaluation.files["anomaly.npz"]
    assert arrays["anomaly_new_files"].tolist() == ["a.png", "b.png", "c.png"]
    assert len(arrays["normal_files"]) == len(arrays["normal_nats"]) == 2
    worst = arrays["anomaly_new_files"][np.argsort(-arrays["anomaly_new_typicality"])]
    assert worst.tolist() == ["b.png", "c.png", "a.png"]  # -log p grows with the distance from shade 128
    (line,) = (line for line in evaluation.lines if line.startswith("Most anomalous of new by typicality: b.png "))
    assert [line.index(f"{name} ") for name in worst] == sorted(line.index(f"{name} ") for name in worst)
    assert "only 2 images of data" in caplog.text
    assert "only 3 images of new" in caplog.text
    assert "is expected" not in caplog.text


@pytest.mark.usefixtures("photos", "untyped")
def test_anomalies_that_are_the_data_are_told(caplog):
    assert len(scored_photos("./known/").files["anomaly.npz"]["anomaly_known_files"]) == 8
    assert "--anomaly is ./known/, which is where the data come from" in caplog.text
    files = scored_photos("corrupted").files["anomaly.npz"]
    assert files["anomaly_blur_files"].tolist() == files["normal_files"].tolist()
