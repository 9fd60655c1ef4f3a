"""Anomaly scores from a flow, tests of its latents z against the prior, and the AUROC of scores.

A high likelihood alone does not mean that an image is normal (arXiv 2006.08545): smooth images often get a higher
likelihood than the training images. The scores "norm" and "ks" test z and do not depend on the log-determinant.
Volume-preserving flows, whose log-determinant is 0, are recommended for anomaly detection in arXiv 2510.09452.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from scipy import special

from flowgen import backend
from flowgen.arrays import check_no_nan
from flowgen.data.dataset import Dataset
from flowgen.data.loader import fixed_batches
from flowgen.evaluation.estimate import Estimate
from flowgen.flows.batches import batch_input

# Every score is higher for images that are more anomalous.
SCORES: Mapping[str, str] = MappingProxyType(
    {
        "nats": "-log p(x) per dimension",
        "typicality": "distance of nats from its mean over training images",
        "worst_token": "the largest -log p term of a token, per dimension of the token",
        "norm": "distance of |z|² from its mean under the prior, in standard deviations",
        "ks": "Kolmogorov-Smirnov distance of the values of z from N(0, 1)",
    }
)


class AnomalyScores(NamedTuple):
    """The quantities from which `scores` computes the anomaly scores of each image, in float64.

    Here z is the flow's latent of an image, divided by the standard deviation of the prior.

    nats: -log p(x) per dimension.
    tokens: the term of log p(x) for each token of the grid, in nats.
    squares: |z|².
    ks: the Kolmogorov-Smirnov distance of the values of z from N(0, 1).
    dims: number of values of the z of one image.
    """

    nats: Float[np.ndarray, " n"]
    tokens: Float[np.ndarray, "n *grid"]
    squares: Float[np.ndarray, " n"]
    ks: Float[np.ndarray, " n"]
    dims: int

    def scores(self, typical: float) -> dict[str, Float[np.ndarray, " n"]]:
        """Returns the scores that `SCORES` describes, by name. Every score is higher for more anomalous images.

        typical: the mean of `nats` over training images, from which the score "typicality" is computed.
        """
        size = self.dims / math.prod(self.tokens.shape[1:])
        return {
            "nats": self.nats,
            "typicality": np.abs(self.nats - typical),
            "worst_token": -self.tokens.reshape(len(self.tokens), -1).min(axis=1) / size,
            "norm": np.abs(self.squares - self.dims) / math.sqrt(2 * self.dims),
            "ks": self.ks,
        }

    def chi_square_p(self) -> Float[np.ndarray, " n"]:
        """Returns the two-sided p-value of each image's |z|². Under the prior, |z|² has a chi-square distribution with
        `dims` degrees of freedom.
        """
        below = special.gammainc(self.dims / 2, self.squares / 2)
        above = special.gammaincc(self.dims / 2, self.squares / 2)
        return 2 * np.minimum(below, above)

    def ks_p(self) -> Float[np.ndarray, " n"]:
        """Returns the p-value of each image's Kolmogorov-Smirnov distance, by Stephens' approximation."""
        root = math.sqrt(self.dims)
        return special.kolmogorov((root + 0.12 + 0.11 / root) * self.ks)


def anomaly_scores(
    flow: Any,
    variables: Any,
    dataset: Dataset,
    key: Key[Array, ""],
    *,
    noise_std: float | None = None,
    batch_size: int = 256,
    by_class: bool = True,
) -> AnomalyScores:
    """Returns the quantities from which `AnomalyScores.scores` computes the anomaly scores of each image.

    The dataset's labels are not used. For a class-conditional flow, p(x) is the mixture of the densities of all classes
    with equal weights, and `tokens`, `squares` and `ks` are computed for the class with the highest likelihood. This
    takes one forward pass per class, and one more.

    If `flow` was trained on the latents of an autoencoder, `dataset` must contain such latents. In this case, p(x) is
    the density of one noisy sample of an image's latents, not of the image itself.

    noise_std: standard deviation of the Gaussian noise that is added to x. 0 means uniform dequantisation of images, or
    no noise on latents; None means the noise with which the flow was trained.
    by_class: whether to use the mixture of classes; if False, a class-conditional flow is evaluated without a label.

    Example:
        scores = anomaly_scores(flow, params, dataset, jax.random.key(0)).scores(typical=1.5)
    """
    config = flow.config
    sigma = config.noise_std if noise_std is None else noise_std
    size = min(batch_size, len(dataset))
    mesh = backend.sharing(size, variables)
    shared = backend.copies(jax.device_put(variables), mesh), key
    num_classes = config.num_classes if by_class else 0
    parts = []
    for index, (batch, mask) in enumerate(fixed_batches(dataset, size)):
        positions = index * size + np.arange(size)
        found = backend.by_rows(_scored, shared, batch.x, positions, flow=flow, sigma=sigma, num_classes=num_classes)
        parts.append([np.asarray(part, np.float64)[mask] for part in found])
    log_prob, tokens, squares, ks = (np.concatenate(column) for column in zip(*parts, strict=True))
    grid = (*config.event_shape[:-3], *config.token_hw)
    return AnomalyScores(-log_prob / config.num_dims, tokens.reshape(-1, *grid), squares, ks, config.num_dims)


def _scored(shared, rows, positions, *, flow, sigma, num_classes):
    variables, key = shared
    keys = jax.vmap(partial(jax.random.fold_in, key))(positions)
    x = jax.vmap(lambda key, row: batch_input(key, jax.tree.map(lambda x: x[None], row), sigma)[0])(keys, rows)
    cond = mixture = None
    if num_classes:

        def of_class(label):
            return flow.apply(variables, x, jnp.full(len(x), label, jnp.int32), method="log_prob")

        each = jax.lax.map(of_class, jnp.arange(num_classes))
        cond = each.argmax(axis=0).astype(jnp.int32)
        mixture = jax.nn.logsumexp(each, axis=0) - math.log(num_classes)
    tokens, z = flow.apply(variables, x, cond, method="token_log_prob")
    variance = flow.apply(variables, method="prior_variance")
    values = jnp.sort((z / jnp.sqrt(variance)[None]).reshape(len(z), -1), axis=1)
    dims = values.shape[1]
    below = jax.scipy.special.ndtr(values)
    steps = jnp.arange(dims + 1)[None] / dims
    ks = jnp.maximum(steps[:, 1:] - below, below - steps[:, :-1]).max(axis=1)
    log_prob = tokens.sum(axis=1) if mixture is None else mixture
    return log_prob, tokens, jnp.square(values).sum(axis=1), ks


def auroc(
    normal: Float[np.ndarray, " n"],
    anomalous: Float[np.ndarray, " m"],
    *,
    origins: Int[np.ndarray, " m"] | None = None,
) -> Estimate:
    """Returns the area under the ROC curve: the probability that an anomaly scores higher than a normal image, where
    ties count one half.

    The standard error is DeLong's, which assumes that all images are independent. If the anomalies are altered copies
    of normal images, pass `origins`: the standard error then treats a normal image and its copies as one cluster
    (Obuchowski, Biometrics 53, 1997). The standard error is None if all anomalies score higher than all normal images,
    if all anomalies score lower than all normal images, or if all scores are equal.

    origins: for each anomaly, the position in `normal`, from 0, of the image of which it is a copy; None if all images
    are independent.

    Raises ValueError if there are fewer than two scores of either kind, if a score is NaN, if the arrays are not
    vectors, or if `origins` does not consist of one position in `normal` for each anomaly.

    Example:
        area = auroc(scores_of_data, scores_of_others)
        area = auroc(scores_of_data, scores_of_blurred_data, origins=np.arange(len(scores_of_data)))
    """
    if np.ndim(normal) != 1 or np.ndim(anomalous) != 1:
        raise ValueError(f"scores have shapes {np.shape(normal)} and {np.shape(anomalous)}; give two vectors.")
    if min(len(normal), len(anomalous)) < 2:
        raise ValueError(f"there are {len(normal)} normal and {len(anomalous)} anomalous scores; give at least 2 each.")
    check_no_nan(normal=normal, anomalous=anomalous)
    if origins is not None:
        _check_origins(origins, len(anomalous), len(normal))
    above = _fraction_below(normal, anomalous)
    below = 1 - _fraction_below(anomalous, normal)
    area, count = float(above.mean()), len(normal) + len(anomalous)
    if np.ptp(above) == 0 and np.ptp(below) == 0:
        return Estimate(area, None, count)
    if origins is None:
        variance = above.var(ddof=1) / len(anomalous) + below.var(ddof=1) / len(normal)
    else:
        terms = (below - area) / len(normal)
        np.add.at(terms, origins, (above - area) / len(anomalous))
        variance = len(normal) * terms.var(ddof=1)
    return Estimate(area, math.sqrt(variance), count)


def _check_origins(origins: np.ndarray, anomalies: int, normal: int) -> None:
    if origins.shape == (anomalies,) and origins.dtype.kind in "iu" and 0 <= origins.min() <= origins.max() < normal:
        return
    values = f" and values from {origins.min()} to {origins.max()}" if origins.size else ""
    raise ValueError(
        f"origins has dtype {origins.dtype}, shape {origins.shape}{values}; give one position from 0 to {normal - 1} "
        f"for each of {anomalies} anomalies."
    )


def _fraction_below(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Returns, for each value in `at`, the fraction of x below it; ties count one half."""
    x = np.sort(x)
    return (np.searchsorted(x, at, "left") + np.searchsorted(x, at, "right")) / (2 * len(x))
