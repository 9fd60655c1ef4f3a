"""Transforms of bounded variables: inverse, log-determinant, densities against SciPy, borders, bounds as arrays."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import stats
from tolerances import EPS, FORMULA, LAYER, assert_close

from flowgen.transforms import Box, Chain, Positive, Simplex, Standardise, Transform, transformed_log_prob

EXACT = 1e-10  # float64
INF = math.inf

MIXED = Box([0.0, -1.0, -INF, -INF], [2.0, INF, 3.0, INF])
SCALED = Standardise([1.0, -2.0, 0.5, 0.0], [2.0, 0.5, 1.0, 3.0])
SCALED_ONE = Standardise(1.0, 2.0)
# Transforms and the shape of an event of u.
CASES = {
    "interval": (Box(-0.5, 2.0), (4,)),
    "lower bound": (Box(-0.5, INF), (4,)),
    "upper bound": (Box(-INF, 2.0), (4,)),
    "no bound": (Box(-INF, INF), (4,)),
    "mixed bounds": (MIXED, (4,)),
    "a box for sequences": (Box(0.0, [1.0, INF], event_ndim=2), (3, 2)),
    "positive": (Positive(), (4,)),
    "simplex": (Simplex(), (4,)),
    "simplices of a sequence": (Simplex(event_ndim=2), (3, 2)),
    "standardise": (SCALED, (4,)),
    "box, then standardise": (Chain((MIXED, SCALED)), (4,)),
    "positive, then standardise": (Chain((Positive(), SCALED)), (4,)),
}


@pytest.fixture(params=CASES)
def case(request):
    transform, event = CASES[request.param]
    return transform, np.random.default_rng(0).normal(scale=1.5, size=(5, *event))


def free(transform, x):
    """The entries of x that determine the others."""
    return x[..., :-1] if isinstance(transform, Simplex) else x


def completed(transform, x):
    """Bounded events from their free entries."""
    return jnp.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) if isinstance(transform, Simplex) else x


@pytest.mark.usefixtures("x64")
def test_forward_inverts_inverse_with_the_same_logdet(case):
    transform, u = case
    assert isinstance(transform, Transform)
    x, logdet = transform.inverse(jnp.asarray(u))
    back, same = transform.forward(x)
    assert_close(back, u, EXACT)
    assert logdet.shape == (5,)
    assert_close(same, logdet, EXACT, scale=np.abs(logdet).max() + 1)


@pytest.mark.usefixtures("x64")
def test_logdet_is_slogdet_of_the_jacobian_in_float64(case):
    transform, u = case
    x = transform.inverse(jnp.asarray(u[0]))[0]

    def forward(x):
        return transform.forward(completed(transform, x))[0]

    def inverse(u):
        return free(transform, transform.inverse(u)[0])

    logdet = transform.forward(x)[1]
    for map_, at, sign in ((forward, free(transform, x), 1), (inverse, jnp.asarray(u[0]), -1)):
        jacobian = np.asarray(jax.jacfwd(map_)(at))
        # Simplices of a sequence are independent, so their Jacobian is square too.
        expected = sign * np.linalg.slogdet(jacobian.reshape(at.size, at.size))[1]
        assert_close(logdet, expected, EXACT, scale=abs(expected) + 1)


def test_float32_keeps_its_precision(case):
    """Of u, not only of x: an x near a border determines u to as many digits as its distance to the border has."""
    transform, u = case
    with jax.enable_x64(True):
        exact, expected = transform.inverse(jnp.asarray(u))
    x, logdet = transform.inverse(jnp.asarray(u, jnp.float32))
    assert x.dtype == logdet.dtype == jnp.float32
    assert_close(x, exact, FORMULA)
    assert_close(logdet, expected, FORMULA, scale=np.abs(expected).max() + 1)
    slope = 8  # x = 2 - 0.02 determines u to 2 / 0.02 rounding errors, of which x has a few
    assert_close(transform.forward(x)[0], u, slope * FORMULA)


def test_programs_are_traced_once_for_new_values_of_all_arrays(case):
    transform, u = case
    count = 0

    @jax.jit
    def inverse(transform, u):
        nonlocal count
        count += 1
        return transform.inverse(u)

    u = jnp.asarray(u, jnp.float32)
    moved = jax.tree.map(lambda leaf: leaf - 0.125, transform)
    for one in (transform, moved):
        x, logdet = inverse(one, u)
        assert_close(x, one.inverse(u)[0], FORMULA)
    assert count == 1
    rowwise = jax.vmap(transform.inverse)(u)
    assert_close(rowwise[1], transform.inverse(u)[1], FORMULA, scale=np.abs(logdet).max() + 1)


@pytest.mark.parametrize("size", [20.0, 80.0, 1e4, 1e30])
def test_no_finite_u_leaves_the_bounds(case, size):
    """Values, log-determinants and gradients stay finite, and `forward` takes what `inverse` returns."""
    transform, u = case
    u = size * jnp.sign(jnp.asarray(u, jnp.float32))
    x, logdet = transform.inverse(u)
    assert jnp.isfinite(x).all()
    assert jnp.isfinite(logdet).all()
    for part in range(2):
        assert jnp.isfinite(jax.grad(lambda u, part=part: transform.inverse(u)[part].sum())(u)).all()
    if size < 1e30:  # Of -1e30, the scale makes numbers that are too large for float32's last digit.
        back, logdet = transform.forward(x)
        assert jnp.isfinite(back).all()
        assert jnp.isfinite(logdet).all()
        assert jnp.isfinite(jax.grad(lambda x: transform.forward(x)[1].sum())(x)).all()


def test_distances_to_borders_are_exact():
    """x at 1e-30 above a border of 0 has u = log 1e-30; a box below 1 has the spacing of float32 there."""
    u, logdet = Box(0.0, 1.0).forward(jnp.asarray([1e-30]))
    assert_close(u, [math.log(1e-30)], FORMULA)
    assert_close(logdet, -math.log(1e-30), FORMULA)
    assert_close(Box(0.0, INF).forward(jnp.asarray([1e-30]))[0], [math.log(1e-30)], FORMULA)
    assert Box(0.0, INF).forward(jnp.asarray([1e30]))[0] == 1e30
    x, _ = Box(0.0, 1.0).inverse(jnp.asarray([-50.0, 50.0]))
    assert_close(x[0], math.exp(-50), FORMULA)
    assert x[1] == 1 - EPS / 2


@pytest.mark.parametrize(("low", "high"), [(1.0, 1 + 2e-5), (1e8, 1e8 + 2000), (-1.0, -1 + 2e-5), (0.0, 1e-35)])
def test_the_narrowest_intervals_keep_their_width_and_their_bounds(low, high):
    """Rounding of the bounds may change the width by a hundredth."""
    box = Box(low, high)
    x, logdet = box.inverse(jnp.asarray([[-1e4], [-30.0], [0.0], [30.0], [1e4]]))
    assert np.all((np.float64(x) > np.float32(low)) & (np.float64(x) < np.float32(high)))
    assert abs(logdet[2] - math.log(4 / (high - low))) < 0.011
    assert jnp.isfinite(box.forward(x)[1]).all()


@pytest.mark.usefixtures("x64")
def test_bounds_too_close_for_float32_can_be_far_enough_apart_for_float64():
    x, logdet = Box(1e8, 1e8 + 1).inverse(jnp.asarray([-50.0, 0.0, 50.0]))
    assert jnp.all((x > 1e8) & (x < 1e8 + 1))
    assert_close(x[1], 1e8 + 0.5, EXACT)
    assert_close(logdet, 2 * math.log(2) + 100, 1e-8)  # both sigmoids at 0, and one of each pair at -50


@pytest.mark.usefixtures("x64")
def test_densities_are_scipys():
    random = np.random.default_rng(0)
    positive = jnp.asarray(random.lognormal(size=(6, 1)))
    normal = jax.scipy.stats.norm.logpdf

    def summed(log_density):
        return lambda u: log_density(u).sum(axis=-1)

    log_prob = transformed_log_prob(Positive(), summed(normal))
    assert_close(log_prob(positive), stats.lognorm.logpdf(positive[:, 0], 1), EXACT)
    inside = jnp.asarray(random.uniform(-3, 5, size=(6, 1)))
    log_prob = transformed_log_prob(Box(-3.0, 5.0), summed(jax.scipy.stats.logistic.logpdf))
    assert_close(log_prob(inside), np.full(6, -math.log(8)), EXACT)
    log_prob = transformed_log_prob(Standardise(2.0, 3.0), lambda u, shift, *, scale: normal(u, shift, scale).sum(-1))
    assert_close(log_prob(inside, 1.0, scale=2.0), stats.norm.logpdf(inside[:, 0], 5, 6), EXACT)


@pytest.mark.usefixtures("x64")
def test_a_dirichlet_density_of_u_integrates_to_one():
    """The trapezoidal rule converges exponentially for densities that decay on the whole plane."""
    concentration = np.array([0.7, 2.0, 3.5])
    grid = np.linspace(-60, 30, 601)
    u = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    x, logdet = jax.jit(Simplex().inverse)(jnp.asarray(u))
    density = np.exp(stats.dirichlet.logpdf(np.asarray(x).T, concentration) - np.asarray(logdet))
    assert abs(density.sum() * (grid[1] - grid[0]) ** 2 - 1) < 1e-8


def test_bounds_can_be_learned_and_mapped():
    x = jnp.asarray([0.3, 0.6])

    def nll(box):
        u, logdet = box.forward(x)
        return 0.5 * jnp.square(u).sum() - logdet

    slopes = jax.grad(nll)(Box(jnp.zeros(2), jnp.ones(2)))
    with jax.enable_x64(True):
        x = x.astype(jnp.float64)
        step = 1e-6 * np.eye(2)
        numeric = [(nll(Box(d, np.ones(2))) - nll(Box(-d, np.ones(2)))) / 2e-6 for d in step]
    assert_close(slopes.low, np.asarray(numeric), 1e-5)
    boxes = jax.vmap(Box)(jnp.asarray([0.0, -1.0]), jnp.asarray([1.0, 1.0]))
    mapped, _ = jax.vmap(lambda box: box.forward(jnp.asarray([0.25, 0.5])))(boxes)
    assert_close(mapped[1], Box(-1.0, 1.0).forward(jnp.asarray([0.25, 0.5]))[0], FORMULA)


BOUNDS = {"interval": (-0.5, 2.0), "lower": (-0.5, INF), "upper": (-INF, 2.0)}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", BOUNDS)
def test_samples_are_differentiable_in_their_bounds(name):
    """In both modes, inside and outside jit, through a chain, and at values that rounding brings to a bound."""
    low, high = BOUNDS[name]
    u = np.array([-60.0, -2.0, 0.3, 1.5, 60.0])

    def sample(low, high, transform=lambda x: x):
        return Chain((Box(low, high), SCALED_ONE)).inverse(transform(jnp.asarray(u)))[0]

    def formula(low, high):  # x = low + width · sigmoid((u · 2) + 1), or one softplus
        v = 2 * u + 1
        both = low + (high - low) / (1 + np.exp(-v)) if name == "interval" else None
        return {"interval": both, "lower": low + np.logaddexp(v, 0), "upper": high - np.logaddexp(-v, 0)}[name]

    assert_close(sample(low, high), formula(low, high), EXACT)
    finite = [i for i, bound in enumerate((low, high)) if math.isfinite(bound)]
    bounds = jnp.asarray(low), jnp.asarray(high)
    for i in finite:
        moved = [np.array([low, high]) + sign * 1e-6 * np.eye(2)[i] for sign in (1, -1)]
        numeric = (formula(*moved[0]) - formula(*moved[1])) / 2e-6
        for mode in (jax.jacfwd, jax.jacrev):
            slopes = mode(sample, argnums=i)
            assert_close(slopes(*bounds), numeric, 1e-8)
            assert_close(jax.jit(slopes)(*bounds), numeric, 1e-8)
    mapped = jax.vmap(lambda shift: sample(low + shift, high + shift))(jnp.arange(2.0))
    assert_close(mapped[1], formula(low + 1, high + 1), EXACT)


@pytest.mark.parametrize("jitted", [False, True])
def test_events_may_be_divided_over_explicit_axes(case, jitted):
    transform, u = case
    u = jnp.asarray(u[:4], jnp.float32)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])

    def both(u):
        x, logdet = transform.inverse(u)
        return x, logdet, *transform.forward(x)

    expected = both(u)
    with jax.set_mesh(mesh):
        given = jax.device_put(u, NamedSharding(mesh, PartitionSpec("data")))
        results = (jax.jit(both) if jitted else both)(given)
    for x, y in zip(results, expected, strict=True):
        assert jax.typeof(x).sharding.spec[0] == "data"
        assert_close(x, y, LAYER, scale=np.abs(y).max() + 1)


def test_standardise_takes_its_arrays_from_data():
    x = np.random.default_rng(0).normal([5.0, -3.0], [0.1, 20.0], size=(7, 40, 2))
    u, _ = Standardise.from_data(x).forward(jnp.asarray(x, jnp.float32))
    assert_close(u.mean(axis=(0, 1)), [0, 0], 16 * FORMULA, scale=50)  # x has 50 standard deviations at most
    assert_close(u.std(axis=(0, 1)), [1, 1], 16 * FORMULA)
    assert Standardise.from_data(x, event_ndim=2).mean.shape == (40, 2)
    with pytest.raises(ValueError, match=r"standard deviation of x is 0\.0 at entry \(1,\)"):
        Standardise.from_data(np.asarray([[1.0, 2.0], [3.0, 2.0]]))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Box(1.0, 1.0), r"low is 1\.0 and high is 1\.0"),
        (lambda: Box([0.0, math.nan], 1.0), "low is nan"),
        (lambda: Box(INF, INF), "low is inf"),
        (lambda: Box(0.0, "wide"), "high is 'wide'"),
        (lambda: Box(np.zeros(2), np.ones(3)), "low has shape"),
        (lambda: Box(0.0, 1.0, event_ndim=0), "event_ndim is 0"),
        (lambda: Box(np.zeros(2), 1.0).forward(jnp.ones(3)), "low has shape"),
        (lambda: Box(0.0, 1.0, event_ndim=2).forward(jnp.ones(3)), r"x has shape \(3,\)"),
        (lambda: Box(0.0, 1.0).forward(jnp.ones((1, 3), jnp.int32)), "x is int32"),
        (
            lambda: Box(1.0, 1.0 + 1e-9).inverse(jnp.zeros(1)),
            r"low is 1\.0 and high is 1\.0.*too close together for float32",
        ),
        (lambda: Box(1e8, 1e8 + 1).forward(jnp.full(1, 1e8)), "high is 100000001.0, which are too close together"),
        (lambda: jax.jit(Box([0.0, -1e-38], [1.0, 1e-38]).inverse)(jnp.zeros(2)), "low is -1e-38 and high is 1e-38"),
        (lambda: Box(0.0, 1e39).inverse(jnp.zeros(1)), r"high is 1e\+39, which are too large for float32; divide"),
        (lambda: Box(-3e38, 3e38).inverse(jnp.zeros(1)), r"low is -3e\+38 and high is 3e\+38, which are too large"),
        (lambda: Box(0.0, 1.0).forward(jnp.asarray([0.5, 1.0])), r"x has the value 1\.0 at index \(1,\)"),
        (lambda: Box(0.0, 1.0).forward(jnp.asarray([math.nan])), "x has the value nan"),
        (lambda: Positive().forward(jnp.asarray([0.0])), "x has the value 0"),
        (lambda: Simplex().forward(jnp.asarray([0.5, 0.6])), "the sum of x has the value 1.1"),
        (lambda: Simplex().forward(jnp.asarray([1.0])), "at least two shares"),
        (lambda: Simplex().forward(jnp.asarray([1.5, -0.5])), "x has the value -0.5"),
        (lambda: Standardise(0.0, [1.0, 0.0]), r"scale has the entry 0\.0"),
        (lambda: Standardise(INF, 1.0), "mean has entries"),
        (lambda: Chain(()), "transforms is a tuple"),
        (lambda: Chain((Positive(), "Box")), "transforms contains 'Box'"),
        (lambda: Chain((Positive(), Positive(event_ndim=2))), "event_ndim"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
