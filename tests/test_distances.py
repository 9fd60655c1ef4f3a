"""Distances between sets of features, against brute force, and the files that keep their statistics."""

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial

from flowgen.evaluation import (
    FeatureStatistics,
    feature_statistics,
    frechet_between,
    frechet_distance,
    kernel_distance,
    manifold_metrics,
    nearest_in,
    perfect_coverage,
    read_statistics,
    save_statistics,
)
from flowgen.evaluation.kernel import mmd

# The project's promise: equal to the formula with scipy's matrix square root.
FRECHET = 1e-3


def features(count, seed, shift=0.0, dims=24):
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).standard_normal((dims, dims))
    return (random.standard_normal((count, dims)) @ mixing + shift).astype(np.float32)


def batches(x, size):
    return (x[start : start + size] for start in range(0, len(x), size))


@pytest.mark.parametrize("size", [1, 7, 300])
def test_statistics_of_batches_are_those_of_all(untyped, size):
    x = features(300, 0, shift=100)
    statistics = feature_statistics(batches(x, size), 300)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(statistics.mean, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(statistics.features, x)
    with pytest.raises(ValueError, match="count is 301, but there are 300"):
        feature_statistics(batches(x, size), 301)


def test_statistics_keep_an_evenly_spaced_subset(untyped, monkeypatch):
    monkeypatch.setattr("flowgen.evaluation.statistics.MOST_KEPT", 4)
    x = features(10, 0)
    np.testing.assert_array_equal(feature_statistics(batches(x, 3), 10).features, x[[0, 3, 6, 9]])


def test_the_frechet_distance_of_statistics_is_that_of_scipys_root(untyped):
    x, y = features(500, 0), features(400, 1, shift=0.5) * 1.3
    moments = [(side.astype(np.float64).mean(0), np.cov(side.astype(np.float64), rowvar=False)) for side in (x, y)]
    (mean_x, cov_x), (mean_y, cov_y) = moments
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    expected = np.square(mean_x - mean_y).sum() + np.trace(cov_x + cov_y - 2 * root)
    found = feature_statistics(batches(x, 64), 500).frechet(feature_statistics(batches(y, 64), 400))
    np.testing.assert_allclose([found, frechet_distance(x, y)], expected, rtol=FRECHET)
    for sides in ((cov_x, -cov_y), (np.triu(cov_x), cov_y)):
        with pytest.raises(ValueError, match=r"negative variance|not symmetric"):
            frechet_between(mean_x, sides[0], mean_y, sides[1])
    with pytest.raises(ValueError, match="lengths 24 and 3"):
        feature_statistics([x], 500).frechet(feature_statistics([y[:, :3]], 400))


def test_the_kernel_distance_is_that_of_a_double_loop(untyped):
    x, y = features(9, 0, dims=5).astype(np.float64), features(7, 1, shift=1.0, dims=5).astype(np.float64)

    def kernel(a, b):
        return (a @ b / 5 + 1) ** 3

    def within(side):
        pairs = [kernel(a, b) for i, a in enumerate(side) for j, b in enumerate(side) if i != j]
        return np.mean(pairs)

    expected = within(x) + within(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    np.testing.assert_allclose(mmd(x, y), expected, rtol=1e-10)


def test_the_kernel_distance_is_unbiased_over_subsets(untyped):
    x, y, other = features(600, 0), features(600, 1), features(600, 2, shift=2.0)
    same, far = (kernel_distance(x, side, subsets=40, size=100) for side in (y, other))
    # The distance of equal distributions is zero on average, within its spread over subsets.
    assert abs(same.mean) < 3 * same.std
    assert far.mean > 10 * same.std
    assert same == kernel_distance(x, y, subsets=40, size=100)
    assert kernel_distance(x[:9], y, subsets=2).size == 4
    with pytest.raises(ValueError, match="at least four feature vectors"):
        kernel_distance(x[:3], y)


def test_precision_and_recall_are_those_of_brute_force(untyped):
    data, samples = features(40, 0, dims=3), features(30, 1, shift=0.8, dims=3) * 0.8
    data[5] = data[4]  # A copy is a neighbour at distance zero, not the vector itself.
    far = scipy.spatial.distance.cdist(samples.astype(np.float64), data.astype(np.float64))

    def radii(x, k):
        distances = scipy.spatial.distance.cdist(x.astype(np.float64), x.astype(np.float64))
        return np.array([np.sort(np.delete(row, i))[k - 1] for i, row in enumerate(distances)])

    expected = (
        np.mean([(far[j] <= radii(data, 3)).any() for j in range(30)]),
        np.mean([(far[:, i] <= radii(samples, 3)).any() for i in range(40)]),
        np.mean([(far[j] <= radii(data, 5)).sum() / 5 for j in range(30)]),
        np.mean([far[:, i].min() <= radii(data, 5)[i] for i in range(40)]),
    )
    np.testing.assert_allclose(manifold_metrics(samples, data), expected, rtol=1e-12)
    assert 0 < expected[0] <= 1
    assert 0 < expected[1] < 1
    with pytest.raises(ValueError, match="at least 6 feature vectors"):
        manifold_metrics(samples[:5], data)


def test_a_perfect_model_has_the_coverage_of_repeated_draws(untyped):
    """In any number of dimensions: of normal and of uniform features."""
    random = np.random.default_rng(0)
    for count, dims in ((10, 1), (30, 16), (90, 3)):
        drawn = [
            manifold_metrics(random.normal(size=(count, dims)), random.normal(size=(40, dims))) for _ in range(100)
        ]
        # The coverage of one draw varies by less than 0.1, that of 100 by less than 0.01. 4 standard deviations.
        np.testing.assert_allclose(np.mean([one.coverage for one in drawn]), perfect_coverage(count, 40), atol=0.04)
        np.testing.assert_allclose(np.mean([one.density for one in drawn]), 1, atol=0.2)
    # The nearest of 2 samples and 1 other data point is a sample with probability 2/3.
    assert perfect_coverage(2, 2, k=1) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="num_data 5 and k 5"):
        perfect_coverage(2, 5)


def test_neighbours_are_the_nearest_in_any_batches(untyped):
    data, queries = features(50, 0, dims=3), features(4, 1, dims=3)
    far = scipy.spatial.distance.cdist(queries.astype(np.float64), data.astype(np.float64))
    for size in (6, 50):
        positions, distances = nearest_in(queries, batches(data, size), 5)
        np.testing.assert_array_equal(positions, np.argsort(far, axis=1)[:, :5])
        np.testing.assert_allclose(distances, np.sort(far, axis=1)[:, :5], rtol=1e-6)
    with pytest.raises(ValueError, match="there are only 50"):
        nearest_in(queries, batches(data, 6), 51)


def test_statistics_are_read_as_written(untyped, tmp_path):
    statistics = feature_statistics([features(20, 0)], 20, about={"data": "abc"})
    save_statistics(tmp_path / "a.npz", statistics)
    read = read_statistics(tmp_path / "a.npz")
    assert (read.count, read.about) == (20, {"data": "abc"})
    np.testing.assert_array_equal(read.features, statistics.features)
    # Square roots of eigenvalues near 0, of a covariance of few vectors, lose half of the digits of float64.
    assert abs(read.frechet(statistics)) < 1e-7 * np.trace(statistics.covariance)
    # Statistics of other programs have only mu and sigma.
    np.savez(tmp_path / "b.npz", mu=statistics.mean, sigma=statistics.covariance)
    foreign = read_statistics(tmp_path / "b.npz")
    assert isinstance(foreign, FeatureStatistics)
    assert foreign.features is None
    assert foreign.count == 0


BROKEN = {
    "no sigma": ({"mu": np.zeros(3)}, "has the arrays mu; it must have mu and sigma"),
    "other shapes": ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"sigma \(2, 2\); mu must be"),
    "not finite": ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "not finite"),
    "features that are not finite": (
        {"mu": np.zeros(2), "sigma": np.eye(2), "features": np.full((6, 2), np.nan)},
        "features that are not finite",
    ),
    "text": ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "mu of dtype <U1; it must be of real numbers"),
    "several counts": ({"mu": np.zeros(2), "sigma": np.eye(2), "count": np.zeros(3)}, r"the count \[0.0, 0.0, 0.0\]"),
    "no count": ({"mu": np.zeros(2), "sigma": np.eye(2), "count": np.nan}, "the count nan"),
    "a negative count": ({"mu": np.zeros(2), "sigma": np.eye(2), "count": -1}, "the count -1"),
    "infinitely many": ({"mu": np.zeros(2), "sigma": np.eye(2), "count": np.inf}, "the count inf"),
    "negative variances": ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "negative variance -1"),
    "no symmetry": ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.4, 1.0]])}, "not symmetric"),
    "correlations above 1": ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2.0], [2.0, 1.0]])}, "above the product"),
    "pickled objects": ({"mu": np.array([{}], object), "sigma": np.eye(1)}, "Object arrays cannot be loaded"),
}


def test_other_arrays_are_not_read_and_arrays_alone_are_refused(untyped, tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(2), sigma=np.eye(2), other=np.array([{}], object))
    assert read_statistics(tmp_path / "a.npz").mean.shape == (2,)
    with (tmp_path / "b.npz").open("wb") as file:
        np.save(file, np.zeros(2))
    with pytest.raises(ValueError, match=r"not an \.npz file"):
        read_statistics(tmp_path / "b.npz")


def test_features_that_are_not_finite_are_refused(untyped):
    x = features(8, 0)
    x[5, 3] = np.nan
    with pytest.raises(ValueError, match="features 4 to 7 have values that are not finite"):
        feature_statistics(batches(x, 4), 8)


def test_distances_that_equal_a_radius_are_inside(untyped):
    # Many distances are the same, as with binary images, but float64 rounds them differently around another centre.
    random = np.random.default_rng(0)
    samples, data = (random.integers(0, 3, (count, 4)) / 7 for count in (60, 50))
    squares = [
        np.rint(49 * scipy.spatial.distance.cdist(x, y, "sqeuclidean"))
        for x, y in ((data, data), (samples, samples), (samples, data))
    ]
    of_data, of_samples, between = squares
    radii = np.sort(of_data, axis=1)  # the first one is the distance to itself
    expected = (
        (between <= radii[:, 3]).any(axis=1).mean(),
        (between <= np.sort(of_samples, axis=1)[:, 3:4]).any(axis=0).mean(),
        (between <= radii[:, 5]).sum() / (5 * 60),
        (between <= radii[:, 5]).any(axis=0).mean(),
    )
    np.testing.assert_allclose(manifold_metrics(samples, data), expected, rtol=1e-12)


@pytest.mark.parametrize("name", BROKEN)
def test_other_files_are_refused(tmp_path, name):
    arrays, sentence = BROKEN[name]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=sentence):
        read_statistics(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"not an \.npz file"):
        read_statistics(tmp_path / "b.npz")
    with pytest.raises(FileNotFoundError, match="check --reference"):
        read_statistics(tmp_path / "c.npz")
