"""Precision, recall, density and coverage: how much two sets of features overlap, measured by nearest neighbours.

The manifold of a set is the union of balls around its features. The radius of each ball is the distance from its centre
to the k-th nearest other feature of the set.

    precision  the fraction of samples in the manifold of the data (Kynkäänniemi et al., arXiv 1904.06991)
    recall     the fraction of data in the manifold of the samples
    density    the number of data balls that contain a sample, averaged over samples and divided by k (Naeem et al.,
               arXiv 2002.09797)
    coverage   the fraction of data balls that contain at least one sample
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from flowgen.arrays import check_finite

PRECISION_NEIGHBOURS = 3  # k of the papers
DENSITY_NEIGHBOURS = 5
ROWS_AT_ONCE = 512
# Equal distances differ in their last digits if they are computed from different sets. The radii are larger by this
# fraction of the largest square, so that a feature at the distance of the radius is inside.
ROUNDING = 1e-12


class ManifoldMetrics(NamedTuple):
    """Precision, recall, density and coverage of samples; see the module's description."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_metrics(
    samples: Float[np.ndarray, "n f"],
    data: Float[np.ndarray, "m f"],
    *,
    k: int = PRECISION_NEIGHBOURS,
    density_k: int = DENSITY_NEIGHBOURS,
) -> ManifoldMetrics:
    """Returns the precision, recall, density and coverage of the samples relative to the data.

    k: for precision and recall, the radius of each ball is the distance to the k-th nearest other feature vector.
    density_k: the same for density and coverage, which use balls of their own.

    The distances are computed in float64, a block of rows at a time.

    Raises ValueError if n or m is not above max(k, density_k), if the numbers of features differ, or if features are
    not finite.

    Example:
        metrics = manifold_metrics(features(samples), features(data))
    """
    least = max(k, density_k)
    if min(len(samples), len(data)) <= least or samples.shape[1:] != data.shape[1:]:
        raise ValueError(
            f"features have shapes {samples.shape} and {data.shape}; give at least {least + 1} feature vectors in each "
            "array, all of the same length."
        )
    check_finite(samples=samples, data=data)
    radii, density_radii = _radii(data, (k, density_k))
    (sample_radii,) = _radii(samples, (k,))
    inside, balls = 0, 0
    recalled, covered = np.zeros(len(data), bool), np.zeros(len(data), bool)
    for start, distances in _blocks(samples, data):
        inside += (distances <= radii).any(axis=1).sum()
        within = distances <= density_radii
        balls += within.sum()
        covered |= within.any(axis=0)
        recalled |= (distances <= sample_radii[start : start + len(distances), None]).any(axis=0)
    count = len(samples)
    return ManifoldMetrics(
        float(inside / count), float(recalled.mean()), float(balls / (density_k * count)), float(covered.mean())
    )


def perfect_coverage(num_samples: int, num_data: int, *, k: int = DENSITY_NEIGHBOURS) -> float:
    """Returns the expected coverage of a perfect model, whose samples have the distribution of the data.

    Choose one data point, and sort all samples and all other data by distance to this point; all orders are equally
    likely. The ball around this point contains no sample if the first k in this order are all data. For n = num_samples
    and m = num_data, in any number of dimensions, the expected coverage is therefore
    1 - Π (m - 1 - i) / (m - 1 - i + n), where i runs from 0 to k - 1. The expected density of a perfect model is 1 for
    all n and m.

    Raises ValueError if there are no samples, or if k is not from 1 to num_data - 1.

    Example:
        perfect_coverage(100, 2000)  # 0.217
    """
    if num_samples < 1 or not 1 <= k < num_data:
        raise ValueError(
            f"num_samples is {num_samples}, num_data {num_data} and k {k}; give at least one sample and k from 1 to "
            "num_data - 1."
        )
    others = num_data - 1 - np.arange(k)
    return float(1 - np.prod(others / (others + num_samples)))


def nearest_in(
    queries: Float[np.ndarray, "n f"], batches: Iterable[Float[np.ndarray, "b f"]], count: int
) -> tuple[Int[np.ndarray, "n count"], Float[np.ndarray, "n count"]]:
    """Returns the positions of the `count` vectors nearest to each query, nearest first, and their Euclidean distances
    to the query.

    batches: the vectors to search, in batches; position 0 is the first vector of the first batch.

    Raises ValueError if there are fewer than `count` vectors, or if values are not finite.

    Example:
        positions, distances = nearest_in(features(samples), map(features, batches), 5)
    """
    positions, squares = np.zeros((len(queries), 0), np.int64), np.zeros((len(queries), 0))
    first = 0
    check_finite(queries=queries)
    for batch in batches:
        check_finite(batch=batch)
        near = np.concatenate([block for _, block in _blocks(queries, batch)])
        squares = np.concatenate([squares, near], axis=1)
        numbers = np.broadcast_to(np.arange(first, first + len(batch)), near.shape)
        positions = np.concatenate([positions, numbers], axis=1)
        order = np.argsort(squares, axis=1, kind="stable")[:, :count]
        positions, squares = (np.take_along_axis(x, order, axis=1) for x in (positions, squares))
        first += len(batch)
    if first < count:
        raise ValueError(f"count is {count}, but there are only {first} vectors; lower it.")
    return positions, np.sqrt(squares)


def _radii(x: np.ndarray, neighbours: tuple[int, ...]) -> list[np.ndarray]:
    """Returns, for each k, the squared distances from all vectors to their k-th nearest other vectors."""
    parts, slack = [], ROUNDING * np.square(x - x.mean(axis=0, dtype=np.float64)).sum(axis=1).max()
    for start, distances in _blocks(x, x):
        rows = np.arange(len(distances))
        distances[rows, start + rows] = -1  # sorts each vector before its neighbours, even before its copies
        parts.append(np.partition(distances, neighbours, axis=1)[:, list(neighbours)] + slack)
    return list(np.concatenate(parts).T)


def _blocks(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields, for each block of rows of x, its first index and its squared distances to all rows of y, in float64."""
    centre = y.mean(axis=0, dtype=np.float64)  # reduces cancellation
    y = y - centre
    squares = np.square(y).sum(axis=1)
    for start in range(0, len(x), ROWS_AT_ONCE):
        rows = x[start : start + ROWS_AT_ONCE] - centre
        distances = np.square(rows).sum(axis=1)[:, None] + squares - 2 * rows @ y.T
        yield start, np.maximum(distances, 0)
