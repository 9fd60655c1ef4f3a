"""Entropic plans: marginals to the tolerance at every epsilon, the plan of float64, and what cannot be reached."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import rows

from flowgen import matching as fm
from flowgen.matching.plans import assignment, entropic_plan, relative_cost

NUM = 256


@pytest.fixture(scope="module")
def draws():
    """Noise and data in the plane, as float32 arrays: normal to normal, and to a ring that is far from round."""
    x0, normal = np.random.default_rng(0).standard_normal((2, NUM, 2)).astype(np.float32)
    return jnp.asarray(x0), {"normal": jnp.asarray(normal), "ring": fm.toy.gaussian_ring(jax.random.key(0), NUM)}


def costs(x0, x1):
    return ((np.float64(x1)[:, None] - np.float64(x0)[None]) ** 2).sum(-1)


def plan_of(cost, epsilon, tolerance=1e-2, max_sweeps=5000, allowed=None):
    cost = jnp.asarray(cost, jnp.float32)
    allowed = jnp.ones(cost.shape, bool) if allowed is None else jnp.asarray(allowed)
    run = jax.jit(lambda c, a: entropic_plan(c, a, epsilon, tolerance=tolerance, max_sweeps=max_sweeps))
    plan = run(cost, allowed)
    return np.exp(np.float64(plan.log_plan)) / len(cost) ** 2, float(plan.error), int(plan.sweeps)


@pytest.mark.parametrize("epsilon", rows([1e-1, 1e-2, 1e-3, 1e-4], (1e-3,)))
@pytest.mark.parametrize("name", ["normal", "ring"])
def test_x0_keep_their_marginal_and_cost_falls_to_the_optimum(draws, name, epsilon):
    x0, x1 = draws[0], draws[1][name]
    cost = costs(x0, x1)
    plan, error, _ = plan_of(cost, epsilon)
    assert error <= 1e-2
    assert np.abs(NUM * plan.sum(axis=0) - 1).mean() <= 1.01e-2  # as reported, and rounding
    np.testing.assert_allclose(NUM * plan.sum(axis=1), 1, atol=1e-5)
    # E |x0|² under the plan is that of x0, within the mass that may be misplaced.
    square = np.square(np.float64(x0)).sum(1)
    np.testing.assert_allclose((plan.sum(axis=0) * square).sum(), square.mean(), rtol=1e-2)
    optimum = cost[np.arange(NUM), np.asarray(assignment(jnp.asarray(cost, jnp.float32)))].mean()
    assert optimum * 0.98 < (plan * cost).sum() < optimum + 4 * epsilon * cost.mean()


@pytest.mark.parametrize("epsilon", rows([1.0, 1e-1, 1e-2], (1.0, 1e-1)))
def test_the_plan_is_that_of_float64(draws, epsilon):
    cost = costs(draws[0][:40], draws[1]["ring"][:40])
    plan, *_ = plan_of(cost, epsilon, tolerance=1e-5)
    logits, g = -cost / (epsilon * cost.mean()), np.zeros(40)
    for _ in range(20_000):
        f = -scipy.special.logsumexp(logits + g[None], axis=1)
        g = -scipy.special.logsumexp(logits + f[:, None], axis=0)
    expected = np.exp(logits + f[:, None] + g[None]) / 40
    assert np.abs(plan - expected).sum() < 1e-3  # of a mass of 1


def test_costs_that_are_alike_large_small_or_one(draws):
    even, error, sweeps = plan_of(np.zeros((4, 4)), 1e-4)
    np.testing.assert_allclose(even, 1 / 16, rtol=1e-6)
    assert (error, sweeps) == (0, 1)
    np.testing.assert_allclose(plan_of([[7.0]], 1e-3)[0], 1)
    cost = costs(*(x[:32] for x in (draws[0], draws[1]["normal"])))
    plan, *_ = plan_of(cost, 1e-2)
    for factor in (1e-30, 1e30, 1e36):
        scaled, error, _ = plan_of(cost * factor, 1e-2)
        assert error <= 1e-2
        # Potentials that the tolerance lets differ by a hundredth.
        np.testing.assert_allclose(scaled, plan, atol=1e-3 * plan.max())
    ties = np.round(np.asarray(draws[0]))
    assert plan_of(costs(ties, ties[::-1]), 1e-3)[1] <= 1e-2
    # Beyond the reciprocals of float32.
    np.testing.assert_allclose(relative_cost(jnp.array([[1e38, 3e38]])), [[0.5, 1.5]], rtol=1e-6)


def test_far_clusters_that_must_exchange_mass_are_balanced():
    # 20 x0 are left and 44 right, of the data 30 are left: ten must cross.
    random = np.random.default_rng(0)
    side = lambda left: np.where(np.arange(64) < left, -20.0, 20.0)[:, None]  # noqa: E731
    x0, x1 = (side(left) + random.standard_normal((64, 2)) for left in (20, 30))
    for epsilon in (1e-2, 1e-3):
        plan, error, _ = plan_of(costs(x0, x1), epsilon)
        assert error <= 1e-2
        assert plan[:30, 20:].sum() * 64 == pytest.approx(10, abs=0.7)


def test_classes_keep_their_own_marginals(draws):
    labels = np.arange(NUM) % 3
    allowed = labels[:, None] == labels[None]
    plan, error, _ = plan_of(costs(draws[0], draws[1]["ring"]), 1e-2, allowed=allowed)
    assert error <= 1e-2
    assert plan[~allowed].sum() == 0


def test_a_plan_that_is_not_reached_is_reported(draws, key):
    x0, x1 = draws[0], draws[1]["normal"]
    short = fm.MinibatchOT("sinkhorn", epsilon=1e-4, num_sweeps=3)
    with pytest.raises(ValueError, match=r"num_sweeps is 3, .* above tolerance 0\.01"):
        short(jax.random.key(0), x0, x1)
    loss = fm.flow_matching_loss(coupling=short)
    value, _, _ = jax.jit(lambda key: loss(lambda t, x, cond: x, {"x0": x0, "x1": x1}, key))(key)
    assert np.isnan(value)


def test_entropic_transport_keeps_x0_on_average(draws):
    x0, x1 = draws[0], draws[1]["ring"]

    @jax.jit
    def square(key):
        pairs = fm.MinibatchOT("sinkhorn", epsilon=1e-3)(key, x0, x1)
        return jnp.square(pairs.x0).mean(), pairs.log_weight

    drawn, log_weight = zip(*(square(jax.random.key(i)) for i in range(8)), strict=True)
    np.testing.assert_array_equal(log_weight, 0)
    # Eight draws of 256 x0 with replacement: four standard errors, of squares whose std is √2 of their mean.
    np.testing.assert_allclose(np.mean(drawn), np.square(np.float64(x0)).mean(), rtol=4 * np.sqrt(2 / (8 * 2 * NUM)))
