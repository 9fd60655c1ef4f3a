"""The classifier two-sample test: how well a classifier tells two sets of samples apart.

The settings are those of the benchmark sbibm (Lueckmann et al., arXiv 2101.04653), so results are comparable with the
literature. The classifier is scikit-learn's MLPClassifier with two hidden layers of 10 d units for d dimensions, ReLU,
Adam and at most 10,000 epochs. The samples are standardised with the mean and standard deviation of the first set.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from flowgen.arrays import check_finite, check_key
from flowgen.evaluation.estimate import Estimate, mean_of
from flowgen.packages import need

UNITS_PER_DIMENSION = 10
MOST_EPOCHS = 10_000


def c2st(
    key: Key[Array, ""],
    x: Float[Array, "n d"] | Float[np.ndarray, "n d"],
    y: Float[Array, "n d"] | Float[np.ndarray, "n d"],
    *,
    folds: int = 5,
) -> Estimate:
    """Returns the accuracy with which a classifier tells held-out samples of x from those of y: 0.5 if both sets are
    indistinguishable, 1 if they are separable.

    The accuracy is the mean of a cross-validation with `folds` folds (Lopez-Paz and Oquab, arXiv 1610.06545). By
    chance, it may be slightly below 0.5. The standard error is that of the mean over the folds, or None if all folds
    have the same accuracy. The `count` of the estimate is 2 n. More samples train a better classifier, so compare only
    results for equal numbers of samples; published values use 10,000 in each set. Pass the reference samples as x,
    because the mean and standard deviation of x standardise both sets.

    Raises ValueError if x and y are not of the same shape (n, d), if `key` is not a single key, if `folds` is not from
    2 to n, if values are not finite, or if x is constant in a dimension. Raises ModuleNotFoundError if scikit-learn is
    not installed.

    Example:
        accuracy = c2st(key, reference, samples)
    """
    networks, selection = classifier_modules()
    reference, other = np.asarray(x), np.asarray(y)
    check_key(key)
    _check(reference, other, folds)
    mean, std = reference.mean(axis=0), reference.std(axis=0, ddof=1)
    data = (np.concatenate([reference, other]) - mean) / std
    labels = np.repeat([0, 1], len(reference))
    seed = int(jax.random.randint(key, (), 0, np.iinfo(np.int32).max))
    units = UNITS_PER_DIMENSION * reference.shape[1]
    classifier = networks.MLPClassifier((units, units), max_iter=MOST_EPOCHS, random_state=seed)
    parts = selection.KFold(folds, shuffle=True, random_state=seed)
    accuracies = selection.cross_val_score(classifier, data, labels, cv=parts, scoring="accuracy")
    return mean_of(accuracies)._replace(count=len(data))


def classifier_modules() -> tuple[Any, Any]:
    """Returns the modules `sklearn.neural_network` and `sklearn.model_selection`.

    Raises ModuleNotFoundError if scikit-learn is not installed.

    Example:
        classifier_modules()
    """
    what, package = "The classifier two-sample test", "scikit-learn"
    return need("sklearn.neural_network", what, package), need("sklearn.model_selection", what, package)


def _check(x: np.ndarray, y: np.ndarray, folds: int) -> None:
    if x.shape != y.shape or x.ndim != 2 or not x.shape[1]:
        raise ValueError(
            f"x and y have shapes {x.shape} and {y.shape}; give two arrays of the same shape (n, d), one sample "
            "per row."
        )
    if not 2 <= folds <= len(x):
        raise ValueError(f"folds is {folds}; it must be from 2 to {len(x)}, the number of samples.")
    check_finite(x=x, y=y)
    constant = np.flatnonzero(np.ptp(x, axis=0) == 0)
    if len(constant):
        raise ValueError(f"x is constant in dimension {constant[0]}; leave this dimension out of x and y.")
