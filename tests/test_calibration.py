"""Ranks and coverage of Gaussian and discrete posteriors, whose calibration and miscalibration are known by formula."""

import re

import jax
import numpy as np
import pytest
import scipy.stats

from flowgen.data import NumbersDataset
from flowgen.evaluation import expected_coverage, rank_uniformity, sbc_ranks
from flowgen.experiments.posteriors import evaluate_calibration
from flowgen.simulators import TwoMoons

COUNT, SAMPLES, DIM = 4000, 99, 2
NOISE = 0.5  # standard deviation of x given theta
LEAST_P = 1e-4  # which one trial of a calibrated posterior in 10,000 is below
MOST_ERRORS = 5


def gaussian(stretch, seed=0):
    """Samples, truths and their log-densities: theta ~ N(0, I), x ~ N(theta, 0.25 I), and a posterior that is too wide
    by `stretch` in each parameter."""
    random = np.random.default_rng(seed)
    truths = random.standard_normal((COUNT, DIM))
    x = truths + NOISE * random.standard_normal((COUNT, DIM))
    mean, std = x / (1 + NOISE**2), stretch * NOISE / np.sqrt(1 + NOISE**2)
    samples = mean[:, None] + std * random.standard_normal((COUNT, SAMPLES, DIM))
    density = scipy.stats.norm(scale=std)
    return samples, truths, density.logpdf(samples - mean[:, None]).sum(-1), density.logpdf(truths - mean).sum(-1)


def covered(levels, stretch):
    """The exact coverage: |theta - mean|² / variance is chi-square, here with a variance that is too large."""
    chi2 = scipy.stats.chi2(DIM)
    return chi2.cdf(stretch**2 * chi2.ppf(levels))


def test_ranks_count_the_samples_below():
    samples = np.array([[[0.1, 5.0], [0.2, 6.0], [0.3, 7.0]]])
    np.testing.assert_array_equal(sbc_ranks(samples, np.array([[0.25, 4.0]])), [[2, 0]])
    np.testing.assert_array_equal(sbc_ranks(samples, np.array([[0.35, 6.5]])), [[3, 2]])


def test_ranks_of_the_exact_posterior_are_uniform():
    samples, truths, _, _ = gaussian(1.0)
    ranks = sbc_ranks(samples, truths)
    result = rank_uniformity(ranks, SAMPLES)
    assert result.counts.shape == (DIM, 10)
    assert (result.counts.sum(axis=1) == COUNT).all()
    for column, statistic, p_value in zip(ranks.T, result.statistic, result.p_value, strict=True):
        counts = np.histogram(column, bins=10, range=(-0.5, SAMPLES + 0.5))[0]
        np.testing.assert_allclose((statistic, p_value), scipy.stats.chisquare(counts))
        assert p_value > LEAST_P
    band = scipy.stats.binom(COUNT, 0.1)
    np.testing.assert_array_equal(result.low, np.full(10, band.ppf(0.005)))
    np.testing.assert_array_equal(result.high, np.full(10, band.ppf(0.995)))
    # Small integers do not overflow.
    np.testing.assert_array_equal(rank_uniformity(ranks.astype(np.int8), SAMPLES).counts, result.counts)


def test_p_values_of_uniform_ranks_are_uniform_even_if_bins_are_uneven():
    ranks = np.random.default_rng(0).integers(0, 101, (500, 400))
    p_values = rank_uniformity(ranks, 100, bins=7).p_value
    assert scipy.stats.kstest(p_values, "uniform").pvalue > LEAST_P


@pytest.mark.parametrize(("stretch", "full"), [(0.7, (0, -1)), (1.4, (4, 5))])
def test_ranks_gather_at_the_ends_if_the_posterior_is_narrow_and_in_the_middle_if_it_is_wide(stretch, full):
    samples, truths, _, _ = gaussian(stretch)
    result = rank_uniformity(sbc_ranks(samples, truths), SAMPLES)
    assert (result.p_value < 1e-6).all()
    assert (result.counts[:, full] > result.high[list(full)]).all()


@pytest.mark.parametrize("stretch", [0.5, 1.0, 1.5])
def test_coverage_is_that_of_the_formula(stretch):
    _, _, samples, truths = gaussian(stretch)
    result = expected_coverage(samples, truths)
    exact = covered(result.levels, stretch)
    # The region is that of 99 samples, which blurs its credibility by less than one of them.
    error = np.sqrt(exact * (1 - exact) / COUNT)
    assert np.abs(result.coverage - exact).max() < MOST_ERRORS * error.max() + (stretch != 1) / SAMPLES
    fine = (np.arange(10_000) + 0.5) / 10_000
    area = covered(fine, stretch).mean() - 0.5
    assert abs(result.area.value - area) < MOST_ERRORS * result.area.standard_error + (stretch != 1) / SAMPLES
    assert (result.p_value > LEAST_P) == (stretch == 1)
    deviation = np.abs(covered(fine, stretch) - fine).max()
    assert abs(result.max_deviation - deviation) < 2 / np.sqrt(COUNT) + 1 / SAMPLES
    np.testing.assert_allclose(result.standard_error, np.sqrt(result.levels * (1 - result.levels) / COUNT))


def test_coverage_of_exact_ranks_is_exactly_the_level():
    # Truths of which 0, 1, ..., 99 samples have a higher density, each once.
    samples = np.tile(np.arange(99.0), (100, 1))
    result = expected_coverage(samples, np.arange(100) - 0.5)
    np.testing.assert_allclose(result.coverage, result.levels, atol=1e-12)
    np.testing.assert_allclose(result.area.value, 0, atol=1e-12)
    ends = expected_coverage(samples, np.arange(100) - 0.5, levels=np.array([0.0, 1.0]))
    np.testing.assert_array_equal(ends.coverage, [0, 1])


def test_a_constant_of_each_observation_changes_nothing():
    _, _, samples, truths = gaussian(1.3)
    shift = np.random.default_rng(1).normal(0, 100, COUNT)
    for ours, other in zip(
        expected_coverage(samples, truths), expected_coverage(samples + shift[:, None], truths + shift), strict=True
    ):
        np.testing.assert_array_equal(ours, other)


def test_tied_truths_take_each_possible_rank_equally_often():
    # One sample is below the truth, three are equal to it.
    samples, truths = np.tile([[[0.0], [1.0], [1.0], [1.0], [2.0]]], (COUNT, 1, 1)), np.ones((COUNT, 1))
    ranks = sbc_ranks(samples, truths)
    counts = np.bincount(ranks[:, 0], minlength=6)
    np.testing.assert_array_equal(counts[[0, 5]], 0)
    assert scipy.stats.chisquare(counts[1:5]).pvalue > LEAST_P
    np.testing.assert_array_equal(ranks, sbc_ranks(samples, truths))
    assert (ranks != sbc_ranks(samples, truths, seed=1)).any()


def test_the_seed_changes_nothing_without_ties():
    samples, truths, *log_probs = gaussian(1.3)
    np.testing.assert_array_equal(sbc_ranks(samples, truths), sbc_ranks(samples, truths, seed=1))
    for ours, other in zip(expected_coverage(*log_probs), expected_coverage(*log_probs, seed=1), strict=True):
        np.testing.assert_array_equal(ours, other)


def discrete(blur, seed=0):
    """Samples and truths in {0, 1, 2} with their log-probabilities, of a posterior that is different for each
    observation; the estimate mixes it with the uniform distribution."""
    random = np.random.default_rng(seed)
    exact = random.dirichlet(np.ones(3), COUNT)
    estimate = (1 - blur) * exact + blur / 3

    def drawn(probability, count):
        return (random.random((COUNT, count, 1)) > probability.cumsum(axis=1)[:, None, :2]).sum(axis=2)

    samples, truths = drawn(estimate, SAMPLES), drawn(exact, 1)
    of_samples, of_truths = (np.log(np.take_along_axis(estimate, values, axis=1)) for values in (samples, truths))
    return samples[..., None].astype(float), truths.astype(float), of_samples, of_truths[:, 0]


def test_the_exact_posterior_of_a_discrete_parameter_passes():
    samples, truths, *log_probs = discrete(0.0)
    assert rank_uniformity(sbc_ranks(samples, truths), SAMPLES).p_value > LEAST_P
    result = expected_coverage(*log_probs)
    assert result.p_value > LEAST_P
    assert abs(result.area.value) < MOST_ERRORS * result.area.standard_error
    assert (np.abs(result.coverage - result.levels) < MOST_ERRORS * result.standard_error).all()


def test_a_wrong_posterior_of_a_discrete_parameter_fails():
    _, _, *log_probs = discrete(0.5)
    result = expected_coverage(*log_probs)
    assert result.p_value < 1e-6
    assert result.area.value > MOST_ERRORS * result.area.standard_error


def test_the_uniform_prior_passes(key):
    simulator, count = TwoMoons(), 1000

    @jax.jit
    def log_prior(key):
        return simulator.log_prior(simulator.sample_prior(key, count * (SAMPLES + 1)))

    log_probs = np.asarray(log_prior(key)).reshape(count, SAMPLES + 1)
    samples, truths = log_probs[:, 1:], log_probs[:, 0]
    result = expected_coverage(samples, truths)
    assert result.p_value > LEAST_P
    assert abs(result.area.value) < MOST_ERRORS * result.area.standard_error
    # Regions of credibility 0 contain nothing, those of credibility 1 everything.
    ends = expected_coverage(samples, truths, levels=np.array([0.0, 1.0]))
    np.testing.assert_array_equal(ends.coverage, [0, 1])


@pytest.mark.parametrize(("count", "bins", "num_samples"), [(31, 6, 99), (45, 9, 99), (100, 50, 99), (49, 6, 9)])
def test_the_advice_for_fewer_bins_or_more_ranks_holds(count, bins, num_samples):
    random = np.random.default_rng(0)

    def uniformity(count, bins):
        return rank_uniformity(random.integers(0, num_samples + 1, (count, 1)), num_samples, bins=bins)

    with pytest.raises(ValueError, match=f"bins is {bins}") as caught:
        uniformity(count, bins)
    advised = re.search(r"at most (\d+) bins, or give at least (\d+) ranks", str(caught.value))
    assert advised, caught.value
    fewer, more = map(int, advised.groups())
    uniformity(count, fewer)
    uniformity(more, bins)
    for refused in ((count, fewer + 1), (more - 1, bins)):
        with pytest.raises(ValueError, match="expected in a bin"):
            uniformity(*refused)


def test_too_few_ranks_for_two_bins_are_advised_to_be_more():
    for count in (0, 9):
        with pytest.raises(ValueError, match=r"at least 5; give at least 10 ranks"):
            rank_uniformity(np.zeros((count, 1), int), 99, bins=2)


@pytest.mark.parametrize("num", [19, 20, 24, 25, 30, 31, 35, 40, 41, 45, 49, 50, 500])
def test_any_number_of_held_out_pairs_is_evaluated(num, key):
    """A standard normal posterior, whatever the observation."""
    random = np.random.default_rng(num)
    held_out = NumbersDataset(
        random.standard_normal((num, 1)).astype(np.float32), random.standard_normal((num, 1)).astype(np.float32)
    )
    found = evaluate_calibration(
        lambda key, context: random.standard_normal((len(context), 1)),
        lambda x, context: scipy.stats.norm.logpdf(x[:, 0]),
        held_out,
        key,
        num,
    )
    if num < 20:
        assert "at least 20 samples" in found.lines[0]
        return
    bins = 10 if num >= 50 else 5 if num >= 25 else 4
    assert np.shape(found.about["calibration"]["rank_counts"]) == (1, bins)
    assert found.metrics["sbc_p_value"].value > LEAST_P


MISTAKES = {
    "shapes of samples": (lambda: sbc_ranks(np.zeros((3, 9, 2)), np.zeros((4, 2))), "samples and truths"),
    "no samples": (lambda: sbc_ranks(np.zeros((3, 0, 2)), np.zeros((3, 2))), "with s at least 1"),
    "NaN in samples": (lambda: sbc_ranks(np.full((3, 9, 2), np.nan), np.zeros((3, 2))), "samples has 54"),
    "one bin": (lambda: rank_uniformity(np.zeros((100, 1), int), 9, bins=1), "bins is 1"),
    "many bins": (lambda: rank_uniformity(np.zeros((100, 1), int), 99, bins=50), "bins is 50"),
    "ranks": (lambda: rank_uniformity(np.full((100, 1), 10), 9, bins=5), "ranks are from 10"),
    "ranks of one parameter": (lambda: rank_uniformity(np.zeros(100, int), 99), r"ranks is int64 of shape \(100,\)"),
    "no parameters": (lambda: rank_uniformity(np.zeros((100, 0), int), 99), r"ranks is int64 of shape \(100, 0\)"),
    "ranks as fractions": (lambda: rank_uniformity(np.zeros((100, 1)), 99), "ranks is float64"),
    "number of samples": (lambda: rank_uniformity(np.zeros((100, 1), int), 0), "num_samples is 0"),
    "bins as a fraction": (lambda: rank_uniformity(np.zeros((100, 1), int), 99, bins=2.5), "bins is 2.5"),
    "shape of levels": (lambda: expected_coverage(np.zeros((3, 9)), np.zeros(3), levels=np.array(0.5)), "levels has"),
    "shapes of densities": (lambda: expected_coverage(np.zeros((3, 9)), np.zeros(4)), "log_probs_of_samples"),
    "NaN in densities": (lambda: expected_coverage(np.zeros((3, 9)), np.full(3, np.nan)), "log_probs_of_truths"),
    "levels": (lambda: expected_coverage(np.zeros((3, 9)), np.zeros(3), levels=np.array([50.0])), "levels are"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name, untyped):
    call, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        call()
