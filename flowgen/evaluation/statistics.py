"""Statistics of feature vectors: the mean, the covariance and a subset, computed in one pass and stored in files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from flowgen.data.media import atomic_file
from flowgen.documents import ARRAY_DAMAGE
from flowgen.evaluation.metrics import check_covariance, frechet_between

MOST_KEPT = 10_000  # feature vectors that are kept for kernel distances and manifolds
# The arrays of a file of statistics, besides texts, whose names have a prefix. Other arrays are not read.
_ARRAYS, _ABOUT = ("mu", "sigma", "count", "features"), "about_"


@dataclass(frozen=True)
class FeatureStatistics:
    """Statistics of feature vectors, from which distances to other feature vectors can be computed.

    mean: `f`, float64. covariance: `f f`, unbiased, float64. count: number of feature vectors; 0 if unknown.
    features: some of the feature vectors, for metrics other than the Fréchet distance; None if unknown.
    `feature_statistics` keeps at most 10,000 of them, evenly spaced, in float32.
    about: how the features were computed, for example the digests of the data and of the extractor.

    Example:
        statistics = feature_statistics([extractor.features(images)], len(images))
    """

    mean: Float[np.ndarray, " f"]
    covariance: Float[np.ndarray, "f f"]
    count: int
    features: Float[np.ndarray, "m f"] | None = None
    about: Mapping[str, str] = field(default_factory=dict)

    def frechet(self, other: FeatureStatistics) -> float:
        """Returns the squared Fréchet distance between Gaussians with the means and covariances of `self` and `other`.

        Raises ValueError in the same cases as `frechet_between`.
        """
        return frechet_between(self.mean, self.covariance, other.mean, other.covariance)


def feature_statistics(
    batches: Iterable[Float[np.ndarray, "b f"]], count: int, *, about: Mapping[str, str] | None = None
) -> FeatureStatistics:
    """Returns the statistics of `count` feature vectors, which are given in batches.

    The covariance is accumulated in float64, batch by batch, so the vectors are never all in memory at once.

    about: how the features were computed, as in `FeatureStatistics`; None means {}.

    Raises ValueError if there are fewer than two vectors, if their number is not `count`, or if a value is not finite.

    Example:
        statistics = feature_statistics((extractor.features(batch) for batch in batches), 50_000)
    """
    kept_positions = np.unique(np.linspace(0, count - 1, min(count, MOST_KEPT)).round().astype(np.int64))
    seen, kept = 0, []
    mean, products = np.zeros(0), np.zeros((0, 0))
    for batch in batches:
        kept.append(batch[kept_positions[(kept_positions >= seen) & (kept_positions < seen + len(batch))] - seen])
        x = np.asarray(batch, np.float64)
        if not np.isfinite(x).all():
            raise ValueError(
                f"features {seen} to {seen + len(x) - 1} have values that are not finite; check the images."
            )
        centre = x.mean(axis=0)
        if not seen:
            mean, products = np.zeros(x.shape[1]), np.zeros((x.shape[1], x.shape[1]))
        # The products of deviations from the common mean are those of both parts plus that of their means.
        delta, total = centre - mean, seen + len(x)
        products += (x - centre).T @ (x - centre) + np.outer(delta, delta) * (seen * len(x) / total)
        mean = mean + delta * (len(x) / total)
        seen = total
    if seen != count or count < 2:
        raise ValueError(f"count is {count}, but there are {seen} feature vectors; give at least two.")
    features = np.concatenate(kept).astype(np.float32, copy=False)
    return FeatureStatistics(mean, products / (count - 1), count, features, dict(about or {}))


def save_statistics(path: str | os.PathLike[str], statistics: FeatureStatistics) -> None:
    """Writes statistics atomically to an .npz file.

    Its arrays are mu (the mean), sigma (the covariance), count, features (unless None) and, for each entry of `about`,
    a string array about_<name>. Other programs that use FID statistics can read this file, because they need only mu
    and sigma.

    Example:
        save_statistics("reference.npz", statistics)
    """
    about = {f"{_ABOUT}{name}": np.array(text) for name, text in statistics.about.items()}
    features = {} if statistics.features is None else {"features": statistics.features}
    with atomic_file(path) as file:
        np.savez(
            file,
            allow_pickle=False,
            mu=statistics.mean,
            sigma=statistics.covariance,
            count=np.array(statistics.count),
            **features,
            **about,
        )


def read_statistics(path: str | os.PathLike[str]) -> FeatureStatistics:
    """Returns the statistics in an .npz file that contains at least mu and sigma; see `save_statistics`.

    If the file contains no count, `count` is 0; if it contains no features, `features` is None.

    Raises ValueError if the file is damaged, if mu or sigma is missing, if an array has a wrong shape or type, if
    values are not finite, or if sigma is not a covariance matrix. Raises FileNotFoundError if there is no such file.

    Example:
        reference = read_statistics("fid_stats_cifar10_train.npz")
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file '{path}' of reference statistics; check --reference.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = arrays.files
            found = {name: arrays[name] for name in names if name in _ARRAYS or name.startswith(_ABOUT)}
    except (OSError, *ARRAY_DAMAGE) as error:
        raise ValueError(f"'{path}' is not an .npz file of arrays ({error}); give one with mu and sigma.") from error
    if not {"mu", "sigma"} <= set(found):
        raise ValueError(f"'{path}' has the arrays {', '.join(names) or 'none'}; it must have mu and sigma.")
    odd = [name for name in _ARRAYS if name in found and found[name].dtype.kind not in "fiu"]
    if odd:
        raise ValueError(f"'{path}' has {odd[0]} of dtype {found[odd[0]].dtype}; it must be of real numbers.")
    mean, covariance = (np.asarray(found[name], np.float64) for name in ("mu", "sigma"))
    features = found.get("features")
    fits = mean.ndim == 1 and covariance.shape == 2 * mean.shape
    if not fits or (features is not None and (features.ndim != 2 or features.shape[1:] != mean.shape)):
        shapes = ", ".join(f"{name} {found[name].shape}" for name in ("mu", "sigma", "features") if name in found)
        raise ValueError(f"'{path}' has arrays of shapes {shapes}; mu must be (f,), sigma (f, f), features (n, f).")
    count = found.get("count", np.array(0))
    if count.ndim or not 0 <= count < np.inf or count != np.floor(count):
        raise ValueError(f"'{path}' has the count {count.tolist()!r:.80}; it must be one whole number from 0.")
    if not all(np.isfinite(part).all() for part in (mean, covariance, *([] if features is None else [features]))):
        raise ValueError(f"'{path}' has values in mu, sigma or features that are not finite; compute them again.")
    check_covariance(f"sigma in '{path}'", covariance)
    about = {name.removeprefix(_ABOUT): str(text) for name, text in found.items() if name.startswith(_ABOUT)}
    return FeatureStatistics(mean, covariance, int(count), features, about)
