"""The kernel distance between two sets of features (KID; Bińkowski et al., arXiv 1801.01401)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from flowgen.arrays import check_finite

SUBSETS = 100
SUBSET_SIZE = 1000


class KernelDistance(NamedTuple):
    """Statistics of the kernel distance over random subsets of the feature vectors.

    mean, std: mean and standard deviation of the distance over the subsets.
    subsets: number of subsets.
    size: each subset consists of this many feature vectors of either set.
    """

    mean: float
    std: float
    subsets: int
    size: int


def kernel_distance(
    x: Float[np.ndarray, "n f"],
    y: Float[np.ndarray, "m f"],
    *,
    seed: int = 0,
    subsets: int = SUBSETS,
    size: int = SUBSET_SIZE,
) -> KernelDistance:
    """Returns the squared maximum mean discrepancy between two sets of feature vectors, averaged over random subsets.

    The kernel is (x·y / f + 1)³. With the features of an Inception network, the mean is the KID. The estimate is
    unbiased for samples of any size, so it may be negative. Each subset consists of `size` feature vectors of x and as
    many of y, drawn without replacement. If `size` is more than half of n or of m, half of the smaller number is used
    instead, so that subsets differ. The computation is done in float64.

    Raises ValueError if n or m is below 4, if x and y have different numbers of features, or if a feature is not
    finite.

    Example:
        distance = kernel_distance(features(samples), features(data)).mean
    """
    if min(len(x), len(y)) < 4 or x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"features have shapes {x.shape} and {y.shape}; give at least four feature vectors in each array, all of "
            "the same length."
        )
    check_finite(x=x, y=y)
    random, size = np.random.default_rng(seed), min(size, len(x) // 2, len(y) // 2)
    values = [
        mmd(*(np.asarray(side[random.choice(len(side), size, replace=False)], np.float64) for side in (x, y)))
        for _ in range(subsets)
    ]
    return KernelDistance(float(np.mean(values)), float(np.std(values)), subsets, size)


def mmd(x: Float[np.ndarray, "n f"], y: Float[np.ndarray, "m f"]) -> float:
    """Returns the unbiased estimate of the squared maximum mean discrepancy with the kernel (x·y / f + 1)³.

    Example:
        distance = mmd(features(samples), features(data))
    """
    within = 0.0
    for side in (x, y):
        kernel = _kernel(side, side)
        within += (kernel.sum() - np.trace(kernel)) / (len(side) * (len(side) - 1))
    return float(within - 2 * _kernel(x, y).mean())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3
