"""The PSNR of images, and the Fréchet distance between two sets of features."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from flowgen.arrays import check_finite

# A covariance may have been rounded to float32, by this fraction of its largest entry or a little more.
ROUNDING = 1e-6
PEAK = 2.0  # the largest difference between two values in [-1, 1]


def psnr(mean_square_error: float) -> float:
    """Returns the peak signal-to-noise ratio of images in [-1, 1], in dB: 10 log10(2² / mean_square_error).

    Errors below 10⁻¹² count as 10⁻¹², so the result is at most about 126.

    Example:
        decibels = psnr(0.01)  # 26.0
    """
    return 10 * math.log10(PEAK**2 / max(mean_square_error, 1e-12))


def frechet_distance(x: Float[np.ndarray, "n features"], y: Float[np.ndarray, "m features"]) -> float:
    """Returns |μx - μy|² + tr(Σx + Σy - 2 (Σx½ Σy Σx½)½), the squared Fréchet distance of Gaussians fitted to x and y.

    With the features of an Inception network, this is the FID (Heusel et al., arXiv 1706.08500). Distances are
    comparable only if they use the same features and the same n and m, because smaller samples give larger distances.
    The computation is done in float64.

    Raises ValueError if n or m is below 2, if x and y have different numbers of features, or if a feature is not
    finite.

    Example:
        distance = frechet_distance(features(samples), features(data))
    """
    if min(len(x), len(y)) < 2 or x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"features have shapes {x.shape} and {y.shape}; give at least two feature vectors in each array, all of "
            "the same length."
        )
    check_finite(x=x, y=y)
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    covariances = [np.atleast_2d(np.cov(side, rowvar=False)) for side in (x, y)]
    return frechet_between(x.mean(axis=0), covariances[0], y.mean(axis=0), covariances[1])


def frechet_between(
    mean: Float[np.ndarray, " f"],
    covariance: Float[np.ndarray, "f f"],
    other_mean: Float[np.ndarray, " g"],
    other_covariance: Float[np.ndarray, "g g"],
) -> float:
    """Returns the squared Fréchet distance between two Gaussians, in float64; see `frechet_distance`.

    Raises ValueError if f and g differ, if values are not finite, or if a matrix cannot be a covariance matrix.

    Example:
        distance = frechet_between(mu_x, sigma_x, mu_y, sigma_y)
    """
    if mean.shape != other_mean.shape:
        raise ValueError(
            f"features have lengths {len(mean)} and {len(other_mean)}; compare features of the same extractor."
        )
    check_finite(mean=mean, covariance=covariance, other_mean=other_mean, other_covariance=other_covariance)
    check_covariance("covariance", covariance)
    check_covariance("other_covariance", other_covariance)
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ other_covariance @ root)
    spread = np.trace(covariance) + np.trace(other_covariance) - 2 * np.sqrt(np.maximum(cross, 0)).sum()
    return float(np.square(mean - other_mean).sum() + spread)


def check_covariance(name: str, matrix: Float[np.ndarray, "f f"]) -> None:
    """Raises ValueError if a finite matrix is asymmetric, or if it has a negative variance or too large a covariance.

    Example:
        check_covariance("sigma", sigma)
    """
    variances = np.diag(matrix)
    slack = ROUNDING * np.abs(matrix).max(initial=0)
    if variances.min(initial=0) < 0:
        raise ValueError(f"{name} has the negative variance {variances.min():g}; compute it again.")
    if np.abs(matrix - matrix.T).max(initial=0) > slack:
        raise ValueError(f"{name} is not symmetric, as covariances are; compute it again.")
    deviations = np.sqrt(variances)
    if (np.abs(matrix) - np.outer(deviations, deviations)).max(initial=0) > slack:
        raise ValueError(f"{name} has a covariance above the product of the standard deviations; compute it again.")
