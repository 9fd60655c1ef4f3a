"""Simulators follow their definitions, their likelihoods are densities, and reference samples have the posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from tolerances import LAYER, assert_close

from flowgen.simulators import SLCP, TwoMoons

SIMULATORS = {simulator.name: simulator for simulator in (TwoMoons(), SLCP())}
named = pytest.mark.parametrize("simulator", SIMULATORS.values(), ids=SIMULATORS)
# Sums of samples are asked to be within five standard errors, which one comparison in two million is not.
MOST_ERRORS = 5
LONE_MOON = (0.323, 0.932)  # most points of the crescent give a negative |z₁|, or leave the prior


@named
def test_draws_have_the_documented_shapes_and_bounds(simulator, key):
    parameters, observations = jax.jit(simulator.sample_joint, static_argnums=1)(key, 1000)
    assert parameters.shape == (1000, simulator.parameter_dim)
    assert observations.shape == (1000, simulator.observation_dim)
    assert simulator.observations.shape[1] == simulator.observation_dim
    assert (parameters > jnp.array([simulator.low])).all()
    assert (parameters < jnp.array([simulator.high])).all()
    low, high = np.array(simulator.low), np.array(simulator.high)
    uniform = scipy.stats.kstest(((np.asarray(parameters) - low) / (high - low)).ravel(), "uniform")
    assert uniform.pvalue > 1e-4
    assert jnp.isfinite(jax.jit(simulator.log_likelihood)(parameters, observations)).all()


@named
def test_the_posterior_is_the_prior_times_the_likelihood(simulator, key):
    log_posterior = jax.jit(simulator.log_posterior)
    parameters, observations = jax.jit(simulator.sample_joint, static_argnums=1)(key, 50)
    volume = np.prod(np.array(simulator.high) - simulator.low)
    expected = jax.jit(simulator.log_likelihood)(parameters, observations) - np.log(volume)
    assert_close(log_posterior(parameters, observations), expected, LAYER)
    outside = parameters.at[:, 0].set(simulator.high[0] + 0.1)
    assert jnp.isneginf(log_posterior(outside, observations)).all()
    # One observation for all rows counts as the same in each.
    shared = log_posterior(parameters, observations[0])
    repeated = log_posterior(parameters, jnp.tile(observations[:1], (50, 1)))
    np.testing.assert_array_equal(shared, repeated)


@pytest.mark.usefixtures("x64")
def test_two_moons_is_the_published_formula(key):
    simulator, random = TwoMoons(), np.random.default_rng(0)
    theta = random.uniform(-1, 1, (100, 2))
    angle, radius = random.uniform(-np.pi / 2, np.pi / 2, 100), random.normal(0.1, 0.01, 100)
    crescent = np.stack([radius * np.cos(angle) + 0.25, radius * np.sin(angle)], axis=1)
    shift = np.stack([-np.abs(theta.sum(axis=1)), theta[:, 1] - theta[:, 0]], axis=1) / np.sqrt(2)
    log_likelihood = jax.jit(simulator.log_likelihood)
    log_prob = log_likelihood(jnp.array(theta), jnp.array(crescent + shift))
    expected = scipy.stats.norm.logpdf(radius, 0.1, 0.01) - np.log(np.pi * radius)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-9)
    # Points on the other side of the centre do not occur.
    mirrored = crescent * [-1, 1] + [0.5, 0]
    assert jnp.isneginf(log_likelihood(jnp.array(theta), jnp.array(mirrored + shift))).all()
    # Draws at one parameter follow the density: the angle is uniform, the radius normal.
    point = jnp.array(np.tile(theta[:1], (2000, 1)))
    p = np.asarray(jax.jit(simulator.simulate)(key, point)) - shift[0] - [0.25, 0]
    assert scipy.stats.kstest(np.arctan2(p[:, 1], p[:, 0]) / np.pi + 0.5, "uniform").pvalue > 1e-4
    assert scipy.stats.kstest(np.hypot(p[:, 0], p[:, 1]), scipy.stats.norm(0.1, 0.01).cdf).pvalue > 1e-4


@pytest.mark.usefixtures("x64")
def test_slcp_is_the_published_formula(key):
    simulator, random = SLCP(), np.random.default_rng(0)
    theta, observations = random.uniform(-3, 3, (20, 5)), random.normal(0, 3, (20, 8))
    log_prob = jax.jit(simulator.log_likelihood)(jnp.array(theta), jnp.array(observations))
    for parameters, observation, ours in zip(theta, observations, log_prob, strict=True):
        s1, s2, rho = parameters[2] ** 2, parameters[3] ** 2, np.tanh(parameters[4])
        covariance = [[s1**2 + 1e-6, rho * s1 * s2], [rho * s1 * s2, s2**2 + 1e-6]]
        normal = scipy.stats.multivariate_normal(parameters[:2], covariance)
        # The density in scipy loses digits if the covariance is nearly singular.
        np.testing.assert_allclose(ours, normal.logpdf(observation.reshape(4, 2)).sum(), rtol=1e-6)
    # The points of draws at one parameter, whitened by its covariance, are standard normal.
    s1, s2, rho = 1.5, 0.5, np.tanh(1.0)
    parameters = jnp.array([[1.0, -2.0, -np.sqrt(s1), np.sqrt(s2), 1.0]])
    draws = jax.jit(simulator.simulate)(key, jnp.tile(parameters, (500, 1)))
    points = np.asarray(draws).reshape(-1, 2) - [1, -2]
    covariance = [[s1**2 + 1e-6, rho * s1 * s2], [rho * s1 * s2, s2**2 + 1e-6]]
    white = np.linalg.solve(np.linalg.cholesky(covariance), points.T)
    assert scipy.stats.kstest(white.ravel(), "norm").pvalue > 1e-4
    assert abs(np.corrcoef(white)[0, 1]) < MOST_ERRORS / np.sqrt(len(points))


def two_moons_on_a_grid(observation, cells=30, fine=24):
    """The posterior in each of `cells`² squares of the prior, by the midpoint rule in fine² points of each."""
    line = (np.arange(cells * fine) + 0.5) / (cells * fine) * 2 - 1
    points = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)
    log_posterior = jax.jit(TwoMoons().log_posterior)
    density = np.exp(np.asarray(log_posterior(jnp.array(points), jnp.array(observation))))
    probability = density.reshape(cells, fine, cells, fine).sum(axis=(1, 3))
    return probability / probability.sum()


@pytest.mark.parametrize("observation", [*TwoMoons().fixed_observations, LONE_MOON])
def test_samples_of_two_moons_have_the_density_of_the_posterior(observation, key):
    probability, count = two_moons_on_a_grid(observation), 20_000
    sample = jax.jit(TwoMoons().sample_posterior, static_argnums=1)
    samples = np.asarray(sample(key, count, jnp.array(observation)))
    assert np.isfinite(samples).all()
    counts, _, _ = np.histogram2d(*samples.T, bins=len(probability), range=[(-1, 1)] * 2)
    expected, large = count * probability, count * probability > 10
    small = scipy.stats.binom(count, probability[~large].sum())
    assert abs(counts[~large].sum() - small.mean()) <= 1 + MOST_ERRORS * small.std()
    statistic = ((counts - expected) ** 2 / np.where(large, expected, 1))[large].sum()
    assert scipy.stats.chi2.sf(statistic, large.sum()) > 1e-4


def test_an_impossible_observation_has_no_samples(key):
    assert jnp.isnan(TwoMoons().sample_posterior(key, 10, jnp.array([5.0, 5.0]))).all()


def slcp_by_grid(observation, count, random):
    """Exact samples of SLCP's posterior, up to the width of a grid, with |θ₃| and |θ₄|.

    Given S, the mean of the points is normal, so that the integral over θ₁ and θ₂ is known. The rest are three
    dimensions, where a grid does.
    """
    points = np.reshape(observation, (4, 2))
    mean, scatter = points.mean(axis=0), 4 * np.cov(points.T, bias=True)
    middles = [(np.arange(80) + 0.5) / 80 * width - start for width, start in ((3, 0), (3, 0), (6, 3))]
    root1, root2, t5 = (x.ravel() for x in np.meshgrid(*middles, indexing="ij"))

    def covariance(root1, root2, t5):
        return root1**4 + 1e-6, np.tanh(t5) * (root1 * root2) ** 2, root2**4 + 1e-6

    a, b, c = covariance(root1, root2, t5)
    determinant = a * c - b**2
    square = (c * scatter[0, 0] + a * scatter[1, 1] - 2 * b * scatter[0, 1]) / determinant
    log_weight = -1.5 * np.log(determinant) - square / 2
    weight = np.exp(log_weight - log_weight.max())
    chosen = random.choice(len(weight), count, p=weight / weight.sum())
    rest = np.stack([root1, root2, t5], axis=1)[chosen]
    a, b, c = (x[chosen] / 4 for x in (a, b, c))
    noise = random.standard_normal((2, count))
    first = mean[0] + np.sqrt(a) * noise[0]
    second = mean[1] + b / np.sqrt(a) * noise[0] + np.sqrt(c - b**2 / a) * noise[1]
    samples = np.concatenate([first[:, None], second[:, None], rest], axis=1)
    return samples[(np.abs(samples[:, :2]) < 3).all(axis=1)]


@pytest.mark.parametrize("index", range(len(SLCP().fixed_observations)))
def test_recorded_samples_of_slcp_are_those_of_the_posterior(index, key):
    recorded = np.asarray(SLCP().reference_samples(key, 10_000, index), np.float64)
    signs = recorded[:, 2:4] > 0
    shares = [(signs == pair).all(axis=1).mean() for pair in np.ndindex(2, 2)]
    assert np.abs(np.array(shares) - 0.25).max() < MOST_ERRORS * np.sqrt(0.25 * 0.75 / 10_000)
    exact = slcp_by_grid(SLCP().fixed_observations[index], 200_000, np.random.default_rng(index))
    folded = np.concatenate([recorded[:, :2], np.abs(recorded[:, 2:4]), recorded[:, 4:]], axis=1)
    centre, width = exact.mean(axis=0), exact.std(axis=0)

    def moments(samples):
        """First and second moments, products of parameters included."""
        z = (samples - centre) / width
        return np.concatenate([z, np.einsum("ni,nj->nij", z, z).reshape(len(z), -1)], axis=1)

    ours, theirs = moments(folded), moments(exact)
    error = theirs.std(axis=0) * np.sqrt(1 / len(ours) + 1 / len(theirs))
    assert np.abs((ours.mean(axis=0) - theirs.mean(axis=0)) / error).max() < MOST_ERRORS


def test_reference_samples_are_by_index_and_key(key):
    first, second = jax.random.split(key)
    for simulator in SIMULATORS.values():
        samples = simulator.reference_samples(first, 100, 1)
        assert samples.shape == (100, simulator.parameter_dim)
        assert samples.dtype == jnp.float32
        assert len(np.unique(samples, axis=0)) == 100
        assert not np.array_equal(samples, simulator.reference_samples(second, 100, 1))
        with pytest.raises(ValueError, match="index is 9"):
            simulator.reference_samples(key, 100, 9)
        with pytest.raises(ValueError, match="num is 0"):
            simulator.reference_samples(key, 0, 1)
    with pytest.raises(ValueError, match="num is 10001"):
        SLCP().reference_samples(key, 10_001, 0)


OBSERVATIONS = {
    "integers": (jnp.zeros(2, jnp.int32), "observation is int32"),
    "a list": ([0.0, 0.0], "observation is a list"),
    "several": (jnp.zeros((3, 2)), r"observation has shape \(3, 2\)"),
    "three numbers": (jnp.zeros(3), r"observation has shape \(3,\)"),
}


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_wrong_observations_are_named(name, key, untyped):
    observation, message = OBSERVATIONS[name]
    with pytest.raises(ValueError, match=message):
        TwoMoons().sample_posterior(key, 3, observation)


def test_wrong_numbers_are_named(key, untyped):
    for simulator in SIMULATORS.values():
        with pytest.raises(ValueError, match=r"num is 2\.5"):
            simulator.reference_samples(key, 2.5, 0)
        with pytest.raises(ValueError, match=r"index is 0\.5"):
            simulator.reference_samples(key, 2, 0.5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_samples_have_the_precision_of_the_observation(dtype, key):
    samples = TwoMoons().sample_posterior(key, 3, jnp.zeros(2, dtype))
    assert samples.dtype == ("float64" if dtype == "float64" else "float32")
    assert jnp.isfinite(samples).all()
    assert TwoMoons().reference_samples(key, 3, 0).dtype == jnp.float32


def test_a_second_draw_of_as_many_samples_traces_nothing(key, monkeypatch):
    first, second = jax.random.split(key)
    before = TwoMoons().sample_posterior(first, 3, jnp.zeros(2))
    traces, rademacher = [], jax.random.rademacher
    monkeypatch.setattr(jax.random, "rademacher", lambda *rest: traces.append(rest) or rademacher(*rest))
    after = TwoMoons().sample_posterior(second, 3, jnp.full(2, 0.1))
    assert (before != after).all()
    assert not traces
