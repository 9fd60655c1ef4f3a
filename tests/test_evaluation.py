"""Bits/dim and distances, against independent numpy and closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
import scipy.linalg
from tolerances import LAYER, assert_close

from flowgen.data import ArrayDataset, DataConfig, from_uint8, load
from flowgen.evaluation import (
    Estimate,
    Evaluation,
    bits_of_nats,
    flow_bits_per_dim,
    flow_nats,
    frechet_distance,
    gaussian_bits_per_dim,
    kernel_distance,
    manifold_metrics,
    mean_of,
    nearest_in,
    point_metrics,
    point_samples,
    ratio_of,
    train_classifier,
    velocity_bits_per_dim,
)
from flowgen.matching import log_prob


def dataset(count, shape=(2, 2, 1), seed=0):
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((int(np.prod(shape)),) * 2)
    latent = random.standard_normal((count, mixing.shape[0])) @ mixing * 20 + 128
    images = np.clip(latent, 0, 255).astype(np.uint8).reshape(count, *shape)
    return ArrayDataset(images, np.full(count, -1, np.int32))


@pytest.mark.parametrize("noise_std", [0.0, 0.2])
def test_gaussian_baseline_is_the_mean_density_of_noised_images(noise_std):
    train, held_out = dataset(3000), dataset(2500, seed=1)
    random = np.random.default_rng(2)

    def noised(s):
        flat = s.x.reshape(len(s), -1).astype(np.float64)
        if noise_std:
            return flat / 127.5 - 1 + noise_std * random.standard_normal(flat.shape)
        return (flat + random.random(flat.shape)) / 128 - 1

    x, y = noised(train), noised(held_out)
    covariance = np.cov(x.T, bias=True)
    deviation = y - x.mean(axis=0)
    nats = 0.5 * np.einsum("bi,ij,bj->b", deviation, np.linalg.inv(covariance), deviation)
    nats += 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]
    expected = (nats.mean() / 4 + np.log(128)) / np.log(2)
    np.testing.assert_allclose(gaussian_bits_per_dim(train, held_out, noise_std=noise_std), expected, atol=0.02)


def test_gaussian_baseline_of_few_images_is_diagonal_and_sane():
    # 30 images of 64 dimensions: a full covariance would be singular but for the noise.
    bits = gaussian_bits_per_dim(dataset(30, (8, 8, 1)), dataset(20, (8, 8, 1), seed=1), noise_std=0.0)
    assert bits < 10


def test_standard_errors_of_ratios_are_those_of_repeated_datasets():
    random = np.random.default_rng(0)
    sizes = random.integers(1, 6, (2000, 200)).astype(float)
    values = 3 * sizes + random.standard_normal(sizes.shape) * sizes
    found = [ratio_of(*pair) for pair in zip(values, sizes, strict=True)]
    spread = np.std([estimate.value for estimate in found])
    # The spread of 2000 values has a relative error of 1 / sqrt(4000), or 1.6%.
    assert np.mean([estimate.standard_error for estimate in found]) == pytest.approx(spread, rel=0.08)
    assert ratio_of(values[0], np.full(200, 2.0)) == pytest.approx(mean_of(values[0] / 2))


def test_standard_errors_are_those_of_means():
    values = np.random.default_rng(0).normal(3, 2, 400)
    estimate = mean_of(values)
    assert estimate.count == 400
    np.testing.assert_allclose(estimate[:2], (values.mean(), np.sqrt(values.var(ddof=1) / 400)), rtol=1e-12)
    # One value, and outcomes that are all the same, do not tell their spread.
    for same in (values[:1], np.ones(50), np.zeros(2)):
        assert mean_of(same) == (same[0], None, len(same))
    assert f"{estimate:.1f}" == f"{estimate.value:.1f} ± 0.1"
    assert f"{Estimate(2.98, 0.01)} {Estimate(2.98)}" == "2.9800 ± 0.0100 2.9800"
    joined = Evaluation(("a",), {"x": estimate}) + Evaluation(("b",), {"y": Estimate(np.nan)}, {"noise": "none"})
    assert joined.lines == ("a", "b")
    assert joined.record()["metrics"]["y"] == {"value": None, "standard_error": None, "count": None}
    assert joined.record()["noise"] == "none"
    about = Evaluation(about={"centre": {"nats": [np.float64("nan"), 1, "a"]}, "of": np.inf}).record()
    assert about == {"metrics": {}, "centre": {"nats": [None, 1, "a"]}, "of": None, "lines": []}


def test_flow_bits_do_not_depend_on_the_batch_and_ignore_padding():
    flow, params, _, _ = laws.case("affine")
    images = dataset(7, flow.config.image_shape)
    bits = [flow_bits_per_dim(flow, params, images, jax.random.key(0), batch_size=size) for size in (7, 3, 100)]
    assert_close(bits, bits[0], LAYER)
    each = bits_of_nats(flow_nats(flow, params, images, jax.random.key(0), batch_size=3))
    assert each.shape == (7,)
    assert_close(each.mean(), bits[0], LAYER)


def test_frechet_distance_is_that_of_the_formula_and_of_shifts(untyped):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 4)), rng.normal(size=(200, 4)) @ rng.normal(size=(4, 4)) + 1
    covariances = [np.cov(side, rowvar=False) for side in (x, y)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    np.testing.assert_allclose(frechet_distance(x, y), expected, rtol=1e-8)
    np.testing.assert_allclose(frechet_distance(x, x + 3), 4 * 9, rtol=1e-8)
    np.testing.assert_allclose(frechet_distance(x[:, :1], x[:, :1]), 0, atol=1e-8)
    # Fewer samples than dimensions: covariances have no inverse, the distance is still there.
    assert frechet_distance(x[:3], y[:3]) > 0
    for left, right in ((x[:1], y), (x, y[:, :3])):
        with pytest.raises(ValueError, match="give at least two feature vectors in each array, all of the same"):
            frechet_distance(left, right)


@pytest.mark.slow
def test_a_classifier_of_the_digits_knows_held_out_ones(key):
    dataset = load(DataConfig("digits"), image_size=(8, 8), channels=1, split="train")
    held_out = load(DataConfig("digits"), image_size=(8, 8), channels=1, split="eval")
    classifier = train_classifier(dataset, key)
    everything = held_out[np.arange(len(held_out))]
    images = np.asarray(from_uint8(everything.x))
    assert (classifier.classes(images) == everything.context).mean() > 0.95
    assert classifier.features(images).shape == (len(held_out), 64)
    # Its features order damage, and 90 images differ less from 90 others than from their own ruins.
    noise = np.random.default_rng(0).standard_normal(images.shape).astype(np.float32)
    features = classifier.features(images)
    damage = [frechet_distance(features, classifier.features(images + level * noise)) for level in (0.1, 0.3, 1.0)]
    assert damage == sorted(damage)
    assert frechet_distance(features[::2], features[1::2]) < damage[-1]


def test_images_without_a_label_do_not_train_the_classifier(key):
    """Most black images are unlabelled. As members of the last class, they would make it the class of black images."""
    shades, labels = np.repeat(np.uint8([0, 255, 0]), [32, 32, 128]), np.repeat(np.int32([0, 1, -1]), [32, 32, 128])
    images = np.array(np.broadcast_to(shades[:, None, None, None], (192, 8, 8, 1)))
    dataset = ArrayDataset(images, labels, class_names=("black", "white"))
    rest, labelled = dataset.select(np.flatnonzero(labels < 0)), dataset.select(np.flatnonzero(labels >= 0))
    classifier = train_classifier(dataset, key, steps=30)
    assert (classifier.classes(np.asarray(from_uint8(labelled.x))) == labelled.labels).all()
    for unlabelled in (rest, dataclasses.replace(labelled, class_names=())):
        with pytest.raises(ValueError, match="has no labels"):
            train_classifier(unlabelled, key)


def test_bits_of_a_field_that_stands_still_are_those_of_its_source(key):
    images = np.random.default_rng(0).integers(0, 256, (10, 2, 2, 1), np.uint8)
    dataset = ArrayDataset(images, np.full(10, -1, np.int32))
    still = lambda t, x, cond: jnp.zeros_like(x)  # noqa: E731
    for batch_size in (4, 10):
        bits = velocity_bits_per_dim(
            lambda x, labels, key: log_prob(still, x, key=key, num_steps=1), dataset, key, batch_size=batch_size
        )
        # E over the uniform noise of one level of x²: that of its middle, and 1/12 of a level squared.
        middles = (images.astype(np.float64) + 0.5) / 128 - 1
        nats = 0.5 * (np.square(middles) + (1 / 128) ** 2 / 12 + np.log(2 * np.pi)).mean()
        # One draw of noise per pixel, of 40 pixels.
        np.testing.assert_allclose(bits, (nats + np.log(128)) / np.log(2), atol=2e-3)


def test_metrics_of_a_translation_are_known(key):
    def draw(key, num):
        x0 = jax.random.normal(key, (num, 2))
        return x0, x0 + jnp.array([[3.0, 4.0]])

    velocity = lambda t, x, cond: jnp.broadcast_to(jnp.array([[3.0, 4.0]]), x.shape)  # noqa: E731
    metrics = point_metrics(jax.jit(lambda key: point_samples(velocity, draw, key, num=50))(key))
    # A distance is the root of costs that float32 knows to 1e-6.
    exact = [metrics[name] for name in ("w2", "euler_1", "euler_4", "euler_10", "curvature")]
    np.testing.assert_allclose(exact, 0, atol=1e-3)
    np.testing.assert_allclose(metrics["path_energy"], 25, rtol=1e-4)
    assert_close(metrics["signed_npe"], 0, LAYER, scale=25)
    assert metrics["w2_floor"] > 0.1


SOME, NOT_FINITE = np.arange(16.0).reshape(8, 2) ** 2, np.full((8, 2), np.nan)
NAN_REFUSED = {
    "frechet": (lambda: frechet_distance(SOME, NOT_FINITE), "y has 16 values that are not finite"),
    "kernel": (lambda: kernel_distance(NOT_FINITE, SOME), "x has 16 values"),
    "manifolds": (lambda: manifold_metrics(SOME, NOT_FINITE), "data has 16 values"),
    "neighbours": (lambda: nearest_in(SOME, [SOME, NOT_FINITE], 1), "batch has 16 values"),
    "no values": (lambda: mean_of(np.zeros(0)), "values is empty"),
}


@pytest.mark.parametrize("name", NAN_REFUSED)
def test_what_gives_no_number_is_refused(name, untyped):
    call, message = NAN_REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()
