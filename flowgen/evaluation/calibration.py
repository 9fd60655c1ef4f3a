"""Two tests of the calibration of estimated posteriors, on many simulated pairs of parameters and observations.

For each observation, samples from the estimated posterior are compared with the parameters that produced the
observation, called the truth. The exact posterior passes both tests. A posterior that passes them is not necessarily
exact: the prior passes too.

Simulation-based calibration (Talts et al., arXiv 1804.06788): if the posterior is exact, the rank of each true
parameter among s samples is uniform on 0, ..., s. If the ranks cluster in the middle, the posterior is too wide; if
they cluster at both ends, it is too narrow.

Expected coverage (Hermans et al., arXiv 2110.06581): if the posterior is exact, its highest-density region of
probability c contains the truth for a fraction c of the observations. If the fraction is smaller, the posterior is
overconfident; if it is larger, the posterior is conservative.

Both tests rank the truth among samples. Ties are common for discrete parameters and for flat densities, such as that of
a uniform prior. If a truth is tied with samples, its rank is chosen at random among the possible ones, so ties do not
make a calibrated posterior fail. Without ties, the results are deterministic.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Array, Bool, Float, Int

from flowgen.arrays import check_count, check_no_nan, shown
from flowgen.evaluation.estimate import Estimate, mean_of

Arrays = Array | np.ndarray
LEAST_EXPECTED = 5  # truths in a bin, below which the distribution of the statistic is not chi-square
BAND = 0.99


class RankUniformity(NamedTuple):
    """Chi-square tests of whether the ranks of each parameter are uniform.

    counts: for each of the d parameters, the number of ranks in each bin.
    low, high: the bounds of the central 99 % interval of the count in each bin if the ranks are uniform; both bounds
        belong to the interval.
    statistic: the chi-square statistic of the counts, with (bins - 1) degrees of freedom.
    p_value: the probability of a statistic at least as large if the ranks are uniform.
    """

    counts: Int[np.ndarray, "d bins"]
    low: Int[np.ndarray, " bins"]
    high: Int[np.ndarray, " bins"]
    statistic: Float[np.ndarray, " d"]
    p_value: Float[np.ndarray, " d"]


class ExpectedCoverage(NamedTuple):
    """How often the highest-density regions of the estimated posterior contain the truth.

    levels: the credibilities of the regions. The credibility of a region is its probability under the estimated
        posterior.
    coverage: for each level, the fraction of observations whose region of this credibility contains the truth; about
        equal to the level if the posterior is calibrated.
    standard_error: the standard error of each coverage if the posterior is calibrated.
    area: the integral of coverage - level over levels from 0 to 1; near 0 if the posterior is calibrated, negative if
        it is overconfident, positive if it is conservative.
    max_deviation: the largest |coverage - level| over levels from 0 to 1, the Kolmogorov-Smirnov statistic.
    p_value: the probability of a `max_deviation` at least as large if the posterior is calibrated.
    """

    levels: Float[np.ndarray, " l"]
    coverage: Float[np.ndarray, " l"]
    standard_error: Float[np.ndarray, " l"]
    area: Estimate
    max_deviation: float
    p_value: float


def sbc_ranks(
    samples: Float[Arrays, "n s d"], truths: Float[Arrays, "n d"], *, seed: int = 0
) -> Int[np.ndarray, "n d"]:
    """Returns, for each of n observations and each parameter, how many of the s samples are below the truth.

    If t samples are equal to the truth, as often happens for discrete parameters, a random integer from 0 to t is added
    to this number, so that the ranks of a calibrated posterior are uniform even with ties.

    samples: for each observation, s independent samples of the estimated posterior. If s + 1 is a multiple of the
    argument `bins` of `rank_uniformity`, as s = 99 is for 10 bins, all bins cover equally many ranks.
    truths: the parameters that produced each observation.
    seed: the seed of the random numbers for ties; it has no effect without ties.

    Raises ValueError if the shapes of `samples` and `truths` do not match, if s is 0, or if a value is NaN.

    Example:
        ranks = sbc_ranks(samples, truths)
    """
    samples, truths = np.asarray(samples), np.asarray(truths)
    if samples.ndim != 3 or not samples.shape[1] or truths.shape != (len(samples), samples.shape[2]):
        raise ValueError(
            f"samples and truths have shapes {samples.shape} and {truths.shape}; give (n, s, d) and (n, d), with s at "
            "least 1."
        )
    check_no_nan(samples=samples, truths=truths)
    return _random_ranks(samples < truths[:, None], samples == truths[:, None], seed)


def rank_uniformity(ranks: Int[Arrays, "n d"], num_samples: int, *, bins: int = 10) -> RankUniformity:
    """Returns the results of chi-square tests of whether the ranks of each parameter are uniform.

    num_samples: the number s of samples among which the truths were ranked. If s + 1 is not a multiple of `bins`, some
    bins cover one rank more than others, and the expected counts take this into account.
    bins: the number of bins into which the possible ranks 0, ..., s are divided.

    To test all d parameters together, multiply the smallest p-value by d (Bonferroni correction).

    Raises ValueError if `ranks` is not an array of integers of shape (n, d) with d at least 1, if a rank is not from 0
    to num_samples, if num_samples is not a whole number of at least 1, if `bins` is not a whole number from 2 to
    num_samples + 1, or if fewer than five ranks are expected in a bin.

    Example:
        uniformity = rank_uniformity(sbc_ranks(samples, truths), samples.shape[1])
    """
    check_count("num_samples", num_samples)
    check_count("bins", bins)
    ranks = np.asarray(ranks)
    if ranks.ndim != 2 or not ranks.shape[1] or not np.issubdtype(ranks.dtype, np.integer):
        raise ValueError(f"ranks is {shown(ranks)}; give integers of shape (n, d), such as those of sbc_ranks.")
    if not 2 <= bins <= num_samples + 1:
        raise ValueError(f"bins is {bins}; it must be from 2 to {num_samples + 1}, the number of possible ranks.")
    if ranks.size and not 0 <= ranks.min() <= ranks.max() <= num_samples:
        raise ValueError(f"ranks are from {ranks.min()} to {ranks.max()}; they must be from 0 to {num_samples}.")
    _check_expected(len(ranks), num_samples + 1, bins)
    probability = np.bincount(np.arange(num_samples + 1) * bins // (num_samples + 1)) / (num_samples + 1)
    expected = len(ranks) * probability
    places = ranks.astype(np.int64) * bins // (num_samples + 1)
    counts = np.stack([np.bincount(column, minlength=bins) for column in places.T])
    low, high = scipy.stats.binom.interval(BAND, len(ranks), probability)
    statistic = ((counts - expected) ** 2 / expected).sum(axis=1)
    p_value = scipy.stats.chi2.sf(statistic, bins - 1)
    return RankUniformity(counts, low.astype(np.int64), high.astype(np.int64), statistic, p_value)


def expected_coverage(
    log_probs_of_samples: Float[Arrays, "n s"],
    log_probs_of_truths: Float[Arrays, " n"],
    *,
    levels: Float[Arrays, " l"] | None = None,
    seed: int = 0,
) -> ExpectedCoverage:
    """Returns how often the highest-density regions of the estimated posterior contain the truth.

    log_probs_of_samples: for each of n observations, the estimated log-densities of s independent samples of the
    estimated posterior. Terms that depend only on the observation may be left out of both arrays, but not of one alone.
    log_probs_of_truths: the estimated log-density of the parameters that produced each observation.
    levels: the credibilities, 0.05, 0.10, ..., 0.95 by default.
    seed: the seed of the random numbers for ties; it has no effect without ties.

    The truth is in the region of credibility c if fewer than c (s + 1) samples have a higher density. If t samples have
    the same density as the truth, a random number of them, from 0 to t, count as higher. Where the density is constant,
    the highest-density region is not unique, and the random number chooses one of the possible regions. If the
    posterior is calibrated, the probability that the truth is in the region is c, rounded up to a multiple of
    1 / (s + 1). With 99 or 999 samples, the default levels are such multiples. The p-value assumes that s is well above
    √n.

    Raises ValueError if the shapes of the two arrays of log-densities do not match, if one of their values is NaN, if n
    is below 2, if s is 0, or if levels are not a vector of numbers from 0 to 1.

    Example:
        result = expected_coverage(log_probs_of_samples, log_probs_of_truths)
        print(f"coverage - credibility: {result.area}, p-value {result.p_value:.3f}")
    """
    samples, truths = np.asarray(log_probs_of_samples), np.asarray(log_probs_of_truths)
    if samples.ndim != 2 or truths.shape != samples.shape[:1] or len(truths) < 2 or not samples.shape[1]:
        raise ValueError(
            f"log_probs_of_samples and log_probs_of_truths have shapes {samples.shape} and {truths.shape}; give (n, s) "
            "and (n,), with n at least 2."
        )
    check_no_nan(log_probs_of_samples=samples, log_probs_of_truths=truths)
    levels = np.arange(1, 20) / 20 if levels is None else np.asarray(levels, np.float64)
    if levels.ndim != 1:
        raise ValueError(f"levels has shape {levels.shape}; give a vector, such as np.array([0.5, 0.9]).")
    if not ((levels >= 0) & (levels <= 1)).all():
        raise ValueError(f"levels are from {levels.min()} to {levels.max()}; they must be from 0 to 1.")
    higher = _random_ranks(samples > truths[:, None], samples == truths[:, None], seed)
    possible = samples.shape[1] + 1
    # Levels are rounded to 12 digits, so that 0.15 * 100 counts as 15.
    coverage = (higher[:, None] < np.round(levels * possible, 12)).mean(axis=0)
    # The credibility of the smallest region that contains the truth.
    credibility = (higher + 0.5) / possible
    deviation = scipy.stats.kstest(credibility, "uniform")
    conservative = mean_of(0.5 - credibility)
    error = np.sqrt(levels * (1 - levels) / len(truths))
    return ExpectedCoverage(levels, coverage, error, conservative, float(deviation.statistic), float(deviation.pvalue))


def _random_ranks(
    before: Bool[np.ndarray, "n s *d"], tied: Bool[np.ndarray, "n s *d"], seed: int
) -> Int[np.ndarray, "n *d"]:
    """Returns the ranks of the truths among s samples: the number of samples before the truth plus, if t samples are
    tied with it, a random number from 0 to t.
    """
    ties = tied.sum(axis=1)
    return before.sum(axis=1) + np.random.default_rng(seed).integers(0, ties + 1)


def _check_expected(num: int, possible: int, bins: int) -> None:
    """Raises ValueError if fewer than five of `num` ranks are expected in a bin. The smallest bin covers
    ⌊possible / bins⌋ of the possible ranks.
    """
    fewest, needed = possible // bins, LEAST_EXPECTED * possible
    if num * fewest >= needed:
        return
    most = possible // -(-needed // num) if num else 0
    fewer = f"use at most {most} bins, or " if most > 1 else ""
    raise ValueError(
        f"bins is {bins}, so only {num * fewest / possible:.6g} of {num} ranks are expected in a bin, instead of at "
        f"least {LEAST_EXPECTED}; {fewer}give at least {-(-needed // fewest)} ranks."
    )
