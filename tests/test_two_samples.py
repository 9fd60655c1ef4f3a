"""The classifier two-sample test: chance for equal distributions, the Bayes accuracy for known ones."""

import sys

import jax
import numpy as np
import pytest
import scipy.stats

from flowgen.evaluation import c2st

COUNT = 300
# Four standard deviations of the accuracy on 600 samples, which is 0.02. A classifier of 300 samples misses about 0.01.
TOLERANCE = 0.08


def normal(seed, shift=0.0):
    return np.random.default_rng(seed).standard_normal((COUNT, 2)).astype(np.float32) + np.float32([shift, 0])


def test_equal_distributions_are_told_apart_by_chance_only(key):
    result = c2st(key, normal(0), normal(1), folds=2)
    assert abs(result.value - 0.5) < TOLERANCE
    assert result.count == 2 * COUNT
    assert 0 < result.standard_error < TOLERANCE


def test_shifted_normals_are_told_apart_as_well_as_can_be():
    shift = 2.0
    result = c2st(jax.random.key(0), normal(0), normal(1, shift), folds=2)
    assert abs(result.value - scipy.stats.norm.cdf(shift / 2)) < TOLERANCE
    # The same key gives the same answer; the scale of the parameters does not matter.
    again = c2st(jax.random.key(0), 1024 * normal(0), 1024 * normal(1, shift), folds=2)
    assert again.value == pytest.approx(result.value, abs=0.02)


MISTAKES = {
    "numbers": ((np.zeros((9, 2)), np.zeros((8, 2))), {}, r"shapes \(9, 2\) and \(8, 2\)"),
    "vectors": ((np.arange(9.0), np.arange(9.0)), {}, r"shapes \(9,\) and \(9,\)"),
    "images": ((np.ones((9, 2, 2)), np.ones((9, 2, 2))), {}, r"shapes \(9, 2, 2\)"),
    "no dimensions": ((np.ones((9, 0)), np.ones((9, 0))), {}, r"shapes \(9, 0\)"),
    "folds": ((np.zeros((9, 2)), np.zeros((9, 2))), {"folds": 1}, "folds is 1"),
    "infinite": ((np.ones((9, 1)), np.full((9, 1), np.inf)), {}, "y has 9"),
    "constant": ((np.ones((9, 1)), np.zeros((9, 1))), {}, "x is constant in dimension 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name, key, untyped):
    (x, y), options, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        c2st(key, x, y, **options)


def test_a_missing_package_is_named(key, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.neural_network", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        c2st(key, normal(0), normal(1))
