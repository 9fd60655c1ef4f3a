"""What weights and fields are worth: against exact assignments, recorded population quantities and closed forms."""

import dataclasses
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matching_cases import X0, X1
from tolerances import FORMULA, LAYER, assert_close

from flowgen import matching as fm

# Compiled once per epsilon, not operation by operation.
weight_report = jax.jit(fm.weight_report, static_argnames="epsilon")
tilted_wasserstein = jax.jit(fm.tilted_wasserstein, static_argnames="epsilon")


@pytest.fixture(scope="module")
def toys():
    """512 points of each toy distribution."""
    draws = {"ring": fm.toy.gaussian_ring, "moons": fm.toy.moons, "normal": fm.toy.normal}
    return jax.jit(lambda: {name: draw(jax.random.key(i), 512) for i, (name, draw) in enumerate(draws.items())})()


def test_distances_are_the_recorded_ones():
    assert_close(fm.wasserstein(X0, X1), 1.354006, FORMULA)
    assert_close(fm.wasserstein(X0, X0 + jnp.array([[3.0, 4.0]])), 5, FORMULA)
    assert_close(fm.wasserstein(X0, X0[::-1]), 0, FORMULA, scale=2)


def test_distances_have_gradients_which_are_0_between_equal_samples():
    gradient = jax.jit(jax.grad(fm.wasserstein))
    # 1.354006 is the recorded distance, and X1[[1, 0, 2]] the nearest partners: (x - partner) / (3 · distance).
    partner = min(itertools.permutations(range(3)), key=lambda order: jnp.square(X0 - X1[jnp.array(order)]).sum())
    assert_close(gradient(X0, X1), (X0 - X1[jnp.array(partner)]) / (3 * 1.354006), FORMULA)
    np.testing.assert_array_equal(gradient(X0, X0[::-1]), 0)


def test_effective_sample_size_of_weights_known():
    for weights, share in (([1, 1, 1, 1], 1.0), ([1, 0, 0, 0], 0.25), ([2, 1, 1, 0], 16 / 24)):
        log_weight = jnp.log(jnp.array(weights, jnp.float32)) - 300
        assert_close(fm.effective_sample_size(log_weight), share, LAYER)


# Population values of the fact sheet, c = |x - y|: (noise, data, epsilon, ESS, tilts of noise and data, W2 of the
# tilted noise and data from their untilted selves).
RECORDED = [
    ("ring", "moons", 2.0, 0.43, 0.17, 0.012, 1.47, 0.31),
    ("normal", "moons", 1.0, 0.36, 0.016, 0.65, 0.14, 1.53),
]


@pytest.mark.parametrize(("noise", "data", "epsilon", "ess", "tilt0", "tilt1", "far0", "far1"), RECORDED)
def test_tilts_are_the_recorded_ones(toys, noise, data, epsilon, ess, tilt0, tilt1, far0, far1):
    x0, x1 = toys[noise], toys[data]
    report, far = weight_report(x0, x1, epsilon=epsilon), tilted_wasserstein(x0, x1, epsilon=epsilon)
    np.testing.assert_allclose(report.ess, ess, atol=0.03)
    # Over seeds, 800 points scatter by a tenth of the tilts and of the distances, and by less than 0.2 (0.31 here was
    # found between 0.3 and 0.5): how many points a mode got counts.
    np.testing.assert_allclose([report.noise_tilt, report.data_tilt], [tilt0, tilt1], rtol=0.2, atol=0.02)
    np.testing.assert_allclose([far.noise, far.data], [far0, far1], rtol=0.1, atol=0.2)


def test_tilted_distances_vanish_with_the_tilt_and_come_with_a_floor(toys):
    x0, x1 = toys["normal"], toys["ring"]
    far = tilted_wasserstein(x0, x1, epsilon=1e4)
    np.testing.assert_array_equal([far.noise, far.data], 0)
    # Halves of 256 points of a standard normal in the plane differ by about 0.3; the ring by its modes' counts.
    assert 0.15 < far.noise_floor < 0.5
    assert 0.4 < far.data_floor < 2


def test_resampling_repeats_in_proportion():
    x = jnp.arange(8.0)[:, None]
    weights = jnp.array([4.0, 0.0, 1.0, 1.0, 2.0, 0.0, 0.0, 0.0])
    resample = jax.jit(fm.resample)
    np.testing.assert_array_equal(resample(x, jnp.log(weights))[:, 0], [0, 0, 0, 0, 2, 3, 4, 4])
    np.testing.assert_array_equal(resample(x, jnp.full(8, -700.0)), x)


def test_data_on_a_sphere_are_not_tilted_by_round_noise(toys):
    x0, x1 = toys["normal"], toys["moons"]
    tilts = [weight_report(x0, x, epsilon=1.0).data_tilt for x in (jax.jit(fm.to_sphere)(x1), x1)]
    # No datum is preferred: what is left is the chance of 512 x0.
    assert tilts[0] < 0.02 < 0.2 < tilts[1]


def test_a_tilt_above_the_coupling_is_warned_of(toys):
    with pytest.warns(UserWarning, match=r"1\.\d+ from the data, but 0\.\d+ from the pairing\. Set sinkhorn_sweeps"):
        fm.warn_if_tilted(weight_report(toys["normal"], toys["moons"], epsilon=1.0))
    with pytest.warns(UserWarning, match="from the noise"):
        fm.warn_if_tilted(weight_report(toys["moons"], toys["normal"], epsilon=1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fm.warn_if_tilted(weight_report(toys["normal"], toys["ring"], epsilon=1.0))
        fm.warn_if_tilted(weight_report(toys["normal"], jax.jit(fm.to_sphere)(toys["moons"]), epsilon=1.0))


def test_epsilon_is_fitted_to_the_couplings_own_target_weights_and_cost(toys):
    x0, x1 = toys["ring"][:64], toys["moons"][:64]
    couplings = [
        fm.GibbsWeights(ess=0.3, cost="sqeuclidean"),
        fm.GibbsWeights(ess=0.4, sinkhorn_sweeps=5, normalize="none"),
        fm.GibbsWeights(tilt=0.05),
    ]
    fitted = [fm.fit_epsilon(coupling, x0, x1) for coupling in couplings]
    # Nothing else is changed, and an epsilon that is there stays.
    assert [dataclasses.replace(coupling, epsilon=None) for coupling in fitted] == couplings
    assert fm.fit_epsilon(fitted[0], X0, X1) is fitted[0]

    @jax.jit
    def reached():
        shares = [fm.effective_sample_size(coupling(jax.random.key(0), x0, x1).log_weight) for coupling in fitted[:2]]
        report = fm.weight_report(x0, x1, fitted[2].epsilon)
        return shares, jnp.maximum(report.noise_tilt, report.data_tilt)

    shares, tilt = reached()
    np.testing.assert_allclose(shares, [0.3, 0.4], atol=1e-3)  # bisection to float32's last digits
    np.testing.assert_allclose(tilt, 0.05, atol=1e-3)


def test_the_tilt_is_looked_at_on_a_block(monkeypatch):
    seen = []
    report = lambda x0, x1, **options: seen.append((len(x0), options)) or 1.0  # noqa: E731
    monkeypatch.setattr("flowgen.matching.diagnostics.choose_epsilon", report)
    x = jnp.zeros((5000, 1))
    for coupling in (fm.GibbsWeights(), fm.GibbsWeights(tilt=0.1), fm.GibbsWeights(sinkhorn_sweeps=2)):
        fm.fit_epsilon(coupling, x, x)
    assert [size for size, _ in seen] == [5000, 1024, 1024]
    assert [(options["ess"], options["tilt"]) for _, options in seen] == [(0.5, None), (None, 0.1), (0.5, None)]


def test_path_energy_of_straight_lines_and_of_circles():
    straight = lambda t, x, cond: jnp.broadcast_to(jnp.array([[3.0, 4.0]]), x.shape)  # noqa: E731
    turn = lambda t, x, cond: jnp.pi * jnp.stack([-x[:, 1], x[:, 0]], axis=1)  # noqa: E731
    line, half_circle = jax.jit(lambda: [fm.path_report(field, X0[1:]) for field in (straight, turn)])()
    assert_close(line.energy, 25, LAYER)
    assert_close(line.curvature, 0, FORMULA, scale=25)
    # Half a circle of radius r: |v|² = π² r², and the chord of length 2r is taken off: π² r² - 4 r².
    square = float(jnp.square(X0[1:]).sum(1).mean())
    np.testing.assert_allclose(half_circle.energy, np.pi**2 * square, rtol=1e-4)
    np.testing.assert_allclose(half_circle.curvature, (np.pi**2 - 4) * square, rtol=1e-3)  # 100 steps of trapezium
    assert fm.signed_path_energy(20.0, 25.0) == pytest.approx(-0.2)


REFUSED = {
    "two targets": (lambda: fm.choose_epsilon(X0, X1, ess=0.5, tilt=0.1), "exactly one target"),
    "no target": (lambda: fm.choose_epsilon(X0, X1, ess=None), "exactly one target"),
    "share of two": (lambda: fm.choose_epsilon(X0, X1, ess=2.0), "ess is 2.0"),
    "negative tilt": (lambda: fm.choose_epsilon(X0, X1, ess=None, tilt=-0.1), "tilt is -0.1"),
    "batches that differ": (lambda: fm.choose_epsilon(X0, X1[:2]), "must have the same shape"),
    "samples that differ": (lambda: fm.wasserstein(X0, X1[:2]), "must have the same shape"),
    "cost of NaN": (lambda: fm.choose_epsilon(X0, X1 * jnp.nan), "3 of 3 costs are NaN"),
    "infinite cost": (
        lambda: fm.choose_epsilon(X0, X1, cost=lambda a, b: jnp.where(a[:, 0] > 0, jnp.inf, 1.0)),
        "the mean cost is inf",
    ),
    "report without epsilon": (lambda: fm.weight_report(X0, X1, 0.0), "epsilon is 0.0"),
    "paths from nowhere": (lambda: fm.path_report(lambda t, x, cond: x, X0[:0]), "x0 contains no samples; give at"),
    "nothing to resample": (lambda: fm.resample(X0[:0], jnp.zeros(0)), "log_weight has shape (0,) for 0 samples"),
    "weights of others": (lambda: fm.resample(X0, jnp.zeros(2)), "log_weight has shape (2,) for 3 samples"),
    "epsilon of text": (lambda: fm.weight_report(X0, X1, "2"), "epsilon is '2'"),
    "distances without epsilon": (lambda: fm.tilted_wasserstein(X0, X1, -1.0), "epsilon is -1.0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what, untyped):
    call, part = REFUSED[what]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert part in str(error.value)
