"""Couplings against recorded plans, scipy, closed forms of Gaussians, and their limits."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from matching_cases import X0, X1
from tolerances import FORMULA, LAYER, assert_close

from flowgen import matching as fm
from flowgen.matching.couplings import assignment, cost_matrix, paired_cost

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def toys():
    """64 points of the ring and as many of the moons."""
    draw = jax.jit(lambda a, b: (fm.toy.gaussian_ring(a, 64), fm.toy.moons(b, 64)))
    return draw(jax.random.key(1), jax.random.key(2))


def test_assignment_and_sinkhorn_are_the_recorded_ones():
    cost = cost_matrix(X0, X1, "sqeuclidean")
    assert_close(cost, [[5, 1, 4.25], [9, 5, 1.25], [3.25, 9.25, 8.5]], FORMULA)
    np.testing.assert_array_equal(assignment(cost), [1, 2, 0])
    plan = jax.jit(lambda logits, f, g: jnp.exp(logits + f[:, None] + g[None]) / 3)
    expected = [[0.091506, 0.787381, 0.121113], [0.018714, 0.161032, 0.820254], [0.88978, 0.051588, 0.058633]]
    assert_close(plan(-cost / 2, *fm.sinkhorn_potentials(-cost / 2, 500)), expected, LAYER)
    # Sharper, where it is far from converged, against the iteration on the matrix itself in float64.
    kernel, v = np.exp(-np.float64(cost) / 0.5), np.ones(3)
    for _ in range(500):
        u = 1 / (kernel @ v)
        v = 1 / (kernel.T @ u)
    sharp = plan(-cost / 0.5, *fm.sinkhorn_potentials(-cost / 0.5, 500))
    assert_close(sharp, u[:, None] * kernel * v, LAYER)  # float32 exponents near 20
    extreme = jnp.array([[-1e4, 0.0, -1.0], [-2e4, -3e4, 0.0], [0.0, 1.0, 2.0]])
    assert np.isfinite(fm.sinkhorn_potentials(extreme, 500)).all()


def test_exact_transport_of_images_is_scipys_and_uses_every_x0_once():
    random = np.random.default_rng(0)
    x0, x1 = random.standard_normal((2, 32, 2, 2, 2)).astype(np.float32)
    labels = jnp.arange(32)
    pairs = fm.MinibatchOT()(jax.random.key(0), jnp.asarray(x0), jnp.asarray(x1), labels)
    cost = ((x1.reshape(32, 1, -1) - x0.reshape(1, 32, -1)) ** 2).sum(-1)
    _, chosen = scipy.optimize.linear_sum_assignment(cost)
    np.testing.assert_array_equal(pairs.x0, x0[chosen])
    np.testing.assert_array_equal(pairs.x1, x1)
    np.testing.assert_array_equal(pairs.cond, labels)
    np.testing.assert_array_equal(pairs.log_weight, 0)
    assert (chosen != np.arange(32)).any()


def test_compiled_transport_is_exact_in_loops_and_on_every_device():
    random = np.random.default_rng(1)
    cost = random.standard_normal((2, 48, 48)).astype(np.float32) ** 2
    expected = [scipy.optimize.linear_sum_assignment(one)[1] for one in cost]
    inside = jax.jit(lambda cost: jax.lax.map(assignment, cost))
    np.testing.assert_array_equal(inside(cost), expected)
    on_two = jax.pmap(assignment, devices=jax.devices()[:2])
    np.testing.assert_array_equal(on_two(cost), expected)
    np.testing.assert_array_equal(jax.vmap(assignment)(cost), expected)


def test_sinkhorn_comes_near_exact_transport_and_classes_stay_apart(toys):
    x0, x1 = toys
    cost = lambda pairs: jnp.square(pairs.x0 - pairs.x1).sum(1).mean()  # noqa: E731
    labels = jnp.arange(64) % 4

    @jax.jit
    def run(key):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        entropic = fm.MinibatchOT(method="sinkhorn", epsilon=0.01, num_sweeps=200)(k1, x0, x1)
        aware = [
            fm.MinibatchOT(method=method, class_aware=True)(k, x0, x1, labels).x0
            for method, k in (("exact", k2), ("sinkhorn", k3))
        ]
        exact = fm.MinibatchOT()(k4, x0, x1)
        return cost(exact), cost(entropic), cost(fm.Independent()(KEY, x0, x1)), aware

    exact, entropic, independent, aware = run(jax.random.key(0))
    # Entropy of 1 % of the mean cost, and draws with replacement: a third more than the optimum at most.
    assert exact < entropic < 1.3 * exact < independent
    for moved in aware:
        chosen = np.abs(np.asarray(moved)[:, None] - np.asarray(x0)[None]).sum(-1).argmin(1)
        np.testing.assert_array_equal(labels[chosen], labels)
        assert (chosen != np.arange(64)).any()


# x ~ N(0, 1), y ~ N(2, 1/4), squared cost: under the weights both are jointly Gaussian, and the best velocity at
# t = 1/2 is affine: (epsilon, slope, value, centre, effective sample size).
CLOSED_FORMS = [
    (1.0, -0.461538, 0.571429, 1.428571, 0.26986),
    (4.0, -0.857143, 1.230769, 1.230769, None),
    (1e9, -1.2, 2.0, 1.0, 1.0),
]


@pytest.mark.parametrize(("epsilon", "slope", "value", "centre", "share"), CLOSED_FORMS)
def test_weighted_matching_has_the_minimiser_of_the_closed_form(epsilon, slope, value, centre, share):
    random = np.random.default_rng(3)
    x0, noise = random.standard_normal((2, 400_000, 1)).astype(np.float32)
    x1 = 2 + 0.5 * noise
    weights = fm.GibbsWeights(epsilon=epsilon, cost="sqeuclidean", normalize="batch")

    @jax.jit
    def run(x0, x1):
        log_weight = weights(KEY, x0, x1).log_weight
        return log_weight, fm.effective_sample_size(log_weight)

    log_weight, found = run(x0, x1)
    w, x, u = np.exp(log_weight), (x0 + x1)[:, 0] / 2, (x1 - x0)[:, 0]
    design = np.stack([np.ones_like(x), x - centre], axis=1)
    fitted = np.linalg.solve((design.T * w) @ design, (design.T * w) @ u)
    np.testing.assert_allclose(fitted, [value, slope], atol=0.01)  # sampling error of 400,000 pairs
    if share:
        np.testing.assert_allclose(found, share, atol=0.005)  # the same


def test_gibbs_weights_in_their_limits(toys):
    x0, x1 = toys
    shifted_cost = lambda a, b: jnp.linalg.norm(a - b, axis=1) + 100  # noqa: E731
    couplings = {
        "flat": fm.GibbsWeights(epsilon=1e9, normalize="batch"),
        "plain": fm.GibbsWeights(2.0, normalize="batch"),
        "raw": fm.GibbsWeights(2.0, normalize="none"),
        "shifted": fm.GibbsWeights(2.0, cost=shifted_cost, normalize="batch"),
        "extreme": fm.GibbsWeights(1e-4, normalize="batch", sinkhorn_sweeps=20),
        "corrected": fm.GibbsWeights(2.0, normalize="none", sinkhorn_sweeps=50),
        "corrected shifted": fm.GibbsWeights(2.0, cost=shifted_cost, normalize="none", sinkhorn_sweeps=50),
    }
    got = jax.jit(lambda a, b: {name: c(KEY, a, b).log_weight for name, c in couplings.items()})(x0, x1)
    assert_close(got["flat"], 0, FORMULA, scale=1)  # 20 / 1e9, and rounding
    # Rounding of costs near 110 in float32.
    assert_close(got["shifted"], got["plain"], FORMULA, scale=110)
    assert_close(got["corrected shifted"], got["corrected"], FORMULA, scale=110)
    assert jnp.isfinite(got["extreme"]).all()
    # The plan has 64 rows of mean 1, and its diagonal is a sample of it.
    mean = lambda name: np.log(np.exp(np.float64(got[name])).mean())  # noqa: E731
    assert abs(mean("corrected")) < 0.5
    assert abs(mean("raw")) > 1


def test_samples_on_a_sphere_have_the_norm_of_noise():
    x = jnp.array([[[3.0, 4.0]], [[0.0, 0.0]], [[1e-20, 0.0]]])
    expected = np.sqrt(2) * np.array([[[0.6, 0.8]], [[0.0, 0.0]], [[1.0, 0.0]]])
    assert_close(jax.jit(fm.to_sphere)(x), expected, FORMULA)


def test_samples_on_a_sphere_and_equal_points_have_finite_gradients():
    x, up = jnp.array([[3.0, 4.0], [0.0, 0.0], [2.0, 0.0]]), np.array([1.0, 3.0])
    gradient = jax.jit(jax.grad(lambda x: (fm.to_sphere(x) @ jnp.asarray(up, x.dtype)).sum()))(x)
    # The derivative of √2 x / |x| is √2 (1 - u uᵀ) / |x| with u = x / |x|; a point at the origin stays there.
    lengths = np.array([5.0, 1.0, 2.0])[:, None]
    u = np.asarray(x) / lengths
    expected = np.sqrt(2) * (up - u * (u @ up)[:, None]) / lengths
    assert_close(gradient, np.array([[1.0], [0.0], [1.0]]) * expected, FORMULA)
    distance = lambda a, b: paired_cost(a, b, "euclidean").sum() + jnp.trace(cost_matrix(a, b, "euclidean"))  # noqa: E731
    moved = x.at[2, 1].add(1.0)
    assert_close(jax.jit(jax.grad(distance))(x, moved), [[0, 0], [0, 0], [0, -2]], FORMULA)


def test_an_epsilon_of_none_is_to_be_chosen_first():
    with pytest.raises(ValueError, match=r"fit_epsilon\(coupling, x0, x1\)"):
        fm.GibbsWeights()(KEY, X0, X1)


def test_a_cost_of_nan_is_refused_outside_jit_and_spoils_the_loss_inside(untyped):
    bad = lambda a, b: jnp.where(jnp.arange(len(a)) == 1, jnp.nan, 1.0) + 0 * a[:, 0]  # noqa: E731
    couplings = [fm.GibbsWeights(1.0, cost=bad, normalize=normalize) for normalize in ("running", "batch", "none")]
    couplings.append(fm.GibbsWeights(1.0, cost=bad, sinkhorn_sweeps=3))
    with pytest.raises(ValueError, match=r"1 of 3 costs are NaN"):
        couplings[0](jax.random.key(0), X0, X1)
    spoilt = X0.at[1, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="costs are NaN"):
        fm.MinibatchOT()(jax.random.key(0), spoilt, X1)

    @jax.jit
    def losses(key, spoilt):
        velocity = lambda t, x, cond: jnp.zeros_like(x)  # noqa: E731
        loss = lambda c, x0: fm.flow_matching_loss(coupling=c)(velocity, {"x0": x0, "x1": X1}, jax.random.clone(key))[0]  # noqa: E731
        # The plan spoilt by an x0 of NaN need not draw that x0.
        return [
            *(loss(coupling, X0) for coupling in couplings),
            *(loss(fm.MinibatchOT(method=m), spoilt) for m in ("exact", "sinkhorn")),
        ]

    assert np.isnan(losses(jax.random.key(0), spoilt)).all()


def test_each_x0_goes_to_the_cell_it_lies_in():
    y = jnp.array([[-1.0], [1.0]])
    x0 = jnp.array([[-0.4], [0.1], [0.4]])

    @jax.jit
    def run(x0):
        labelled = fm.SemidiscreteOT(y, jnp.zeros(2), labels=jnp.array([7, 8]))
        # (x + 1)² - (x - 1)² = 4x: a potential of 1 moves the border from 0 to 1/4.
        moved = fm.SemidiscreteOT(y, jnp.array([1.0, 0.0]))
        return labelled(KEY, x0, jnp.zeros((3, 1)), jnp.zeros(3, jnp.int32)), moved(KEY, x0, jnp.zeros((3, 1)))

    pairs, moved = run(x0)
    np.testing.assert_array_equal(pairs.x0, x0)
    np.testing.assert_array_equal(pairs.x1, [[-1], [1], [1]])
    np.testing.assert_array_equal(pairs.cond, [7, 8, 8])
    np.testing.assert_array_equal(pairs.log_weight, 0)
    np.testing.assert_array_equal(moved.x1, [[-1], [-1], [1]])
    assert moved.cond is None


@pytest.mark.slow  # for what importing and compiling OTT-JAX takes
def test_semidiscrete_potentials_give_cells_of_equal_probability():
    # One dimension: cells are intervals between quantiles of normal noise, in the order of the data.
    y = jnp.array([2.0, -1.0, 0.5, 0.6]).reshape(4, 1, 1)
    coupling, error = fm.fit_semidiscrete(jax.random.key(0), y, num_steps=200, batch_size=128)
    x0 = jax.scipy.stats.norm.ppf((jnp.arange(1000) + 0.5) / 1000).reshape(1000, 1, 1)
    cells = np.bincount(coupling.partner(x0), minlength=4)
    np.testing.assert_allclose(cells, 250, atol=25)  # what 200 steps of 128 draws leave
    assert abs(error) < 0.05
    uneven = np.bincount(fm.SemidiscreteOT(y, jnp.zeros(4)).partner(x0), minlength=4)
    assert np.abs(uneven - 250).max() > 100


def test_without_ott_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ott.geometry", None)
    with pytest.raises(ModuleNotFoundError, match="pip install ott-jax"):
        fm.fit_semidiscrete(jax.random.key(0), X1)


REFUSED = {
    "half a Sinkhorn sweep": (lambda: fm.GibbsWeights(1.0, sinkhorn_sweeps=2.5), "sinkhorn_sweeps is 2.5"),
    "endless sweeps": (lambda: fm.MinibatchOT(num_sweeps=float("inf")), "num_sweeps is inf"),
    "small epsilon of a plan": (lambda: fm.MinibatchOT("sinkhorn", epsilon=1e-38), "epsilon is 1e-38; it must be at"),
    "cost of a column": (
        lambda: fm.GibbsWeights(1.0, cost=lambda a, b: a[:, :1], sinkhorn_sweeps=2)(None, X0, X1),
        "cost returned shape (3, 1)",
    ),
    "nothing to choose from": (lambda: fm.choose_epsilon(X0, X0), "the mean cost is 0.0"),
    "negative epsilon": (lambda: fm.GibbsWeights(-1.0), "epsilon is -1.0; it must be at least 1e-20"),
    "epsilon of infinity": (lambda: fm.GibbsWeights(float("inf")), "epsilon is inf"),
    "share of one": (lambda: fm.GibbsWeights(ess=1.0), "ess is 1.0; it must be below 1"),
    "tilt": (lambda: fm.GibbsWeights(tilt=0.0), "tilt is 0.0; it must be positive"),
    "unknown cost": (lambda: fm.GibbsWeights(1.0, cost="l1"), "cost is 'l1'"),
    "unknown normalisation": (lambda: fm.GibbsWeights(1.0, normalize="mean"), "normalize is 'mean'"),
    "epsilon that float32 cannot divide by": (lambda: fm.GibbsWeights(1e-38), "epsilon is 1e-38; it must be at"),
    "scope of a plan": (lambda: fm.MinibatchOT(scope="host"), "scope is 'host'"),
    "scope of weights": (lambda: fm.GibbsWeights(scope="host"), "scope is 'host'"),
    "no tolerance": (lambda: fm.MinibatchOT(tolerance=0.0), "tolerance is 0.0"),
    "no pairs": (lambda: fm.MinibatchOT("sinkhorn")(jax.random.key(0), X0[:0], X1[:0]), "the batch is empty"),
    "no weighted pairs": (lambda: fm.GibbsWeights(1.0)(None, X0[:0], X1[:0]), "the batch is empty"),
    "half a sweep": (lambda: fm.MinibatchOT(num_sweeps=1.5), "num_sweeps is 1.5"),
    "labels of classes": (
        lambda: fm.MinibatchOT(class_aware=True)(None, X0, X1, jnp.zeros((3, 2))),
        "needs one label per sample",
    ),
    "negative sweeps": (lambda: fm.GibbsWeights(1.0, sinkhorn_sweeps=-1), "sinkhorn_sweeps is -1"),
    "cost of one number": (
        lambda: fm.GibbsWeights(1.0, cost=lambda a, b: a.sum())(None, X0, X1),
        "cost returned shape ()",
    ),
    "unknown method": (lambda: fm.MinibatchOT(method="partial"), "method is 'partial'"),
    "batches that differ": (lambda: fm.Independent()(None, X0, X1[:2]), "must have the same shape"),
    "weighted batches that differ": (lambda: fm.GibbsWeights(1.0)(None, X0, X1[:2]), "must have the same shape"),
    "events that differ": (
        lambda: cost_matrix(X0, X1[:, :1], "euclidean"),
        "samples of shape (2,), but x1 has samples of shape (1,)",
    ),
    "no labels": (lambda: fm.MinibatchOT(class_aware=True)(None, X0, X1), "needs labels, but cond is None"),
    "potentials": (lambda: fm.SemidiscreteOT(X1, jnp.zeros(2)), "potentials have shape (2,)"),
    "labels without labels": (
        lambda: fm.SemidiscreteOT(X1, jnp.zeros(3))(None, X0, X1, T3),
        "SemidiscreteOT has no labels",
    ),
    "no data points": (
        lambda: fm.SemidiscreteOT(X1[:0], jnp.zeros(0)),
        "y contains no data points; give at least one.",
    ),
    "no data to fit": (lambda: fm.fit_semidiscrete(jax.random.key(0), X1[:0]), "y contains no data points"),
    "bytes on a sphere": (lambda: fm.to_sphere(jnp.ones((3, 2), jnp.uint8)), "x is uint8"),
    "no steps": (lambda: fm.fit_semidiscrete(None, X1, num_steps=0), "num_steps is 0"),
}
T3 = jnp.arange(3)


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what, untyped):
    call, part = REFUSED[what]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert part in str(error.value)


@pytest.mark.parametrize(
    "cond", [{"y": jnp.arange(3)}, jnp.arange(4), jnp.arange(3.0), jnp.zeros((3, 1), jnp.int32), [0, 1, 2]]
)
def test_classes_that_are_no_labels_are_refused_in_one_sentence(cond):
    for method in ("exact", "sinkhorn"):
        with pytest.raises(ValueError, match=r"cond is .*; class_aware transport needs one label per"):
            fm.MinibatchOT(method=method, class_aware=True)(jax.random.key(0), X0, X1, cond)
