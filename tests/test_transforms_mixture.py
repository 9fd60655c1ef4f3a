"""Mixture CDFs as elementwise maps: SciPy in float64, tails in float32, the inverse, derivatives, the identity."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import optimize, special, stats
from tolerances import EPS, FORMULA, assert_close

from flowgen.settings import from_plain, to_plain
from flowgen.transforms import ElementwiseMap, MixtureMap, mixture_forward, mixture_inverse, mixture_parameters
from flowgen.transforms.tails import TAILS, mills_ratio

EXACT = 1e-10  # float64
SHAPES = {"gaussian": stats.norm, "logistic": stats.logistic}
forward = jax.jit(mixture_forward, static_argnames="kind")
inverse = jax.jit(mixture_inverse, static_argnames="kind")


@pytest.fixture(params=SHAPES)
def kind(request):
    return request.param


def mixtures(count, components=4, spread=2.0, seed=0):
    """Logits, means and log-scales of mixtures with several modes."""
    draw = np.random.default_rng(seed).normal
    shape = (count, components)
    return draw(size=shape), draw(scale=spread, size=shape), draw(scale=0.5, size=shape)


def terms(kind, x, logits, means, log_scales):
    """The components' weights and standardised elements, and their distribution."""
    return special.softmax(logits, -1), (x[:, None] - means) / np.exp(log_scales), SHAPES[kind]


def log_tails(kind, x, logits, means, log_scales):
    """log F and log(1 - F) of the mixture, by SciPy."""
    weights, t, shape = terms(kind, x, logits, means, log_scales)
    return special.logsumexp(shape.logcdf(t), -1, b=weights), special.logsumexp(shape.logsf(t), -1, b=weights)


def from_log_tails(kind, log_below, log_above):
    """z from the smaller tail, by SciPy."""
    log_tail = np.minimum(log_below, log_above)
    z = special.ndtri_exp(log_tail) if kind == "gaussian" else log_tail - np.log(-np.expm1(log_tail))
    return np.where(log_below < log_above, z, -z)


def expected(kind, x, *parameters):
    """z and log dz/dx in float64, by SciPy."""
    weights, t, shape = terms(kind, x, *parameters)
    z = from_log_tails(kind, *log_tails(kind, x, *parameters))
    log_density = special.logsumexp(shape.logpdf(t) - parameters[-1], -1, b=weights)
    return z, log_density - shape.logpdf(z)


@pytest.mark.usefixtures("x64")
def test_the_map_and_its_derivative_are_scipys(kind):
    parameters = mixtures(40)
    x = np.linspace(-12, 12, 40)
    z, log_derivative = forward(x, *parameters, kind=kind)
    weights, t, shape = terms(kind, x, *parameters)
    assert_close(shape.cdf(z), (weights * shape.cdf(t)).sum(-1), EXACT)  # the definition, where it does not underflow
    by_scipy = expected(kind, x, *parameters)
    assert_close(z, by_scipy[0], EXACT)
    assert_close(log_derivative, by_scipy[1], EXACT)


@pytest.mark.usefixtures("x64")
def test_the_inverse_is_brents_root(kind):
    parameters = mixtures(12)
    z = np.linspace(-6, 6, 12)
    x = inverse(z, *parameters, kind=kind)
    for row, (level, *row_parameters) in enumerate(zip(z, *parameters, strict=True)):

        def error(x, level=level, row_parameters=row_parameters):
            return expected(kind, np.asarray([x]), *(part[None] for part in row_parameters))[0][0] - level

        root = optimize.brentq(error, -100, 100, xtol=1e-13)
        assert_close(x[row], root, EXACT, scale=abs(root) + 1)


def test_float32_is_exact_outside_of_the_mixture(kind):
    """Errors are a few roundings of z, x and log-derivatives, at up to 1,000 scales."""
    t = np.concatenate([-np.geomspace(1000, 0.01, 60), np.geomspace(0.01, 1000, 60)])
    logits, means, log_scales = (part.astype(np.float32) for part in mixtures(120, spread=1.0))
    x = t.astype(np.float32)
    wide = [part.astype(np.float64) for part in (x, logits, means, log_scales)]
    z, log_derivative = forward(x, logits, means, log_scales, kind=kind)
    exact, slope = expected(kind, *wide)
    np.testing.assert_allclose(z, exact, rtol=FORMULA, atol=FORMULA)
    far = np.abs(exact) < 40  # SciPy's difference of log-densities has no digits left at 10⁶
    np.testing.assert_allclose(log_derivative[far], slope[far], rtol=FORMULA, atol=2 * FORMULA)
    back = inverse(z, logits, means, log_scales, kind=kind)
    # z has a few roundings, which a flat part of the map multiplies.
    roundings = np.exp(-np.minimum(slope, 0)) * (1 + np.abs(exact)) + np.abs(x) + 1
    assert (np.abs(back - x) < 8 * EPS * roundings).all()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.usefixtures("x64")
def test_tails_are_scipys(name, dtype):
    tail, shape, eps = TAILS[name], SHAPES[name], np.finfo(dtype).eps
    t = np.linspace(-60, 60, 481).astype(dtype)
    wide = t.astype(np.float64)
    tolerance = {"rtol": 200 * eps, "atol": 200 * eps} if dtype == np.float64 else {"rtol": 8 * eps, "atol": 8 * eps}
    log_cdf = shape.logcdf(wide)
    log_hazard = shape.logpdf(wide) - log_cdf
    if name == "gaussian":  # without the difference of large numbers
        exact = -np.log(math.sqrt(math.pi / 2) * special.erfcx(-wide[t < 0] / math.sqrt(2)))
        log_hazard[t < 0] = exact
        np.testing.assert_allclose(-jnp.log(mills_ratio(jnp.asarray(-t[t < 0]))), exact, **tolerance)
    np.testing.assert_allclose(jax.jit(tail.log_cdf)(t), log_cdf, **tolerance)
    np.testing.assert_allclose(jax.jit(tail.log_hazard)(t), log_hazard, **tolerance)
    lower = t[t < 0]
    np.testing.assert_allclose(jax.jit(tail.quantile)(tail.log_cdf(jnp.asarray(lower))), lower, **tolerance)


@pytest.mark.usefixtures("x64")
def test_derivatives_are_finite_differences_in_both_modes_and_orders(kind):
    """Of the inverse, they follow from the implicit function theorem."""
    z, *parameters = jnp.asarray([-3.0, 0.2, 4.0]), *map(jnp.asarray, mixtures(3, components=2, spread=1.0))
    limits = {"rtol": 1e-5, "atol": 1e-5, "eps": 1e-5}  # central differences: eps² of third derivatives, and roundings
    check_grads(jax.jit(partial(mixture_forward, kind=kind)), (z, *parameters), order=1, modes=("rev",), **limits)
    solved = jax.jit(partial(mixture_inverse, kind=kind))
    check_grads(solved, (z, *parameters), order=1, modes=("fwd",), **limits)
    check_grads(solved, (z, *parameters), order=2, modes=("rev",), **limits)


def test_the_map_increases_and_its_gradients_are_finite(kind):
    """Also between distant narrow components, where the map is nearly flat, and on both sides of the median."""
    logits = jnp.asarray([[0.0, -2.0, 1.0]])
    means, log_scales = jnp.asarray([[-20.0, 0.0, 30.0]]), jnp.asarray([[-3.0, -4.0, 2.0]])
    x = jnp.linspace(-300, 300, 2001, dtype=jnp.float32)
    parameters = tuple(jnp.broadcast_to(part, (2001, 3)) for part in (logits, means, log_scales))
    z, _ = forward(x, *parameters, kind=kind)
    assert (jnp.diff(z) >= -4 * EPS * (1 + jnp.abs(z[1:]))).all()

    def loss(arguments):
        return sum(part.sum() for part in mixture_forward(*arguments, kind=kind))

    slopes = jax.jit(jax.grad(loss))((x, *parameters))
    assert all(jnp.isfinite(slope).all() for slope in slopes)
    levels = jnp.linspace(-30, 30, 2001, dtype=jnp.float32)
    roots = inverse(levels, *parameters, kind=kind)
    assert jnp.isfinite(roots).all()
    assert (jnp.diff(roots) >= -4 * EPS * (1 + jnp.abs(roots[1:]))).all()
    quantiles = means + jnp.exp(log_scales) * levels[:, None]
    assert ((roots >= quantiles.min(-1)) & (roots <= quantiles.max(-1))).all()
    slopes = jax.jit(jax.grad(lambda arguments: mixture_inverse(*arguments, kind=kind).sum()))((levels, *parameters))
    # A flat part of slope exp(-200) has an inverse whose derivative float32 does not hold.
    flat = expected(kind, np.asarray(roots, np.float64), *(np.asarray(part, np.float64) for part in parameters))[1]
    assert all(jnp.isfinite(slope[flat > -40]).all() for slope in slopes)


def test_an_element_is_solved_alone_and_nan_stays_with_it(kind):
    parameters = tuple(map(jnp.float32, mixtures(64, spread=6.0)))
    z = jnp.float32(np.random.default_rng(1).normal(size=64))
    x = inverse(z, *parameters, kind=kind)
    together = jax.jit(jax.vmap(partial(mixture_inverse, kind=kind)))(z, *parameters)
    assert_close(together, x, FORMULA)  # another program
    broken = (parameters[0].at[3, 0].set(jnp.nan), *parameters[1:])
    others = jnp.arange(64) != 3
    with_nan = inverse(z, *broken, kind=kind)
    assert jnp.isnan(with_nan[3])
    np.testing.assert_array_equal(with_nan[others], x[others])


@pytest.mark.usefixtures("x64")
def test_the_log_derivative_is_the_diagonal_of_the_jacobian(kind):
    map_ = MixtureMap(components=3, kind=kind)
    assert isinstance(map_, ElementwiseMap)
    draw = np.random.default_rng(0).normal
    x, raw = jnp.asarray(draw(size=(2, 3, 2))), jnp.asarray(draw(size=(2, 3, map_.num_outputs(2))))
    z, log_derivative = jax.jit(map_.to_noise)(x, raw)
    jacobian = jax.jit(jax.jacfwd(lambda x: map_.to_noise(x.reshape(2, 3, 2), raw)[0].reshape(-1)))(x.reshape(-1))
    assert_close(jnp.diag(jnp.exp(log_derivative.reshape(-1))), jacobian, EXACT)
    assert_close(log_derivative.sum(), np.linalg.slogdet(np.asarray(jacobian))[1], EXACT)
    assert_close(jax.jit(map_.to_data)(z, raw), x, EXACT)


@pytest.mark.parametrize(("kind", "error"), [("gaussian", 0.0055), ("logistic", 0.03)])
def test_raw_outputs_of_zero_are_nearly_the_identity_with_unequal_gradients(kind, error):
    map_ = MixtureMap(components=8, kind=kind)
    x = jnp.linspace(-3, 3, 101)[None, :, None]
    raw = jnp.zeros((1, 101, map_.num_outputs(1)))
    z, log_derivative = map_.to_noise(x, raw)
    assert jnp.abs(z - x).max() < error
    assert jnp.abs(log_derivative).max() < 2 * error
    slopes = jax.jit(jax.grad(lambda raw: map_.to_noise(x, raw)[1].sum()))(raw).sum(axis=(0, 1)).reshape(3, 8)
    means = np.asarray(slopes[1])
    assert_close(means, -means[::-1], 64 * FORMULA)  # mirrored components move apart
    assert np.abs(np.diff(means)).min() > 0.01 * np.abs(means).max()


def test_one_component_is_the_affine_map_within_bounds_of_its_scale(kind):
    map_ = MixtureMap(components=1, kind=kind)
    draw = np.random.default_rng(0).normal
    x, shift = (jnp.float32(draw(size=(2, 5, 1))) for _ in range(2))
    raw_scale = jnp.float32(draw(scale=3, size=(2, 5, 1)))
    raw = jnp.concatenate([jnp.zeros_like(x), shift, raw_scale], axis=-1)
    z, log_derivative = map_.to_noise(x, raw)
    log_scale = 4 * jnp.tanh(raw_scale / 4)
    assert_close(z, (x - shift) * jnp.exp(-log_scale), FORMULA)
    assert_close(log_derivative, -log_scale, FORMULA)
    assert_close(map_.to_data(z, raw), x, FORMULA)


def test_channels_keep_their_own_outputs():
    raw = jnp.arange(2 * 3 * 4, dtype=jnp.float32)[None]
    logits, means, log_scales = mixture_parameters(raw, 4)
    assert logits.shape == means.shape == log_scales.shape == (1, 2, 4)
    np.testing.assert_array_equal(logits[0], [[0, 1, 2, 3], [12, 13, 14, 15]])
    assert_close(means[0].mean(axis=-1), [5.5, 17.5], FORMULA)
    assert (jnp.abs(log_scales) <= 4.1).all()


def test_the_inverse_runs_in_a_token_loop_traced_once_and_differentiated():
    """As in decoding: each token's raw outputs depend on the token before."""
    map_, count = MixtureMap(components=2), 0
    weight = jnp.float32(np.random.default_rng(0).normal(scale=0.5, size=(2, map_.num_outputs(2))))

    @jax.jit
    def decode(weight, z):
        nonlocal count
        count += 1

        def token(previous, z):
            x = map_.to_data(z[:, None], (previous @ weight)[:, None])[:, 0]
            return x, x

        return jax.lax.scan(token, jnp.zeros_like(z[:, 0]), z.swapaxes(0, 1))[1].swapaxes(0, 1)

    z = jnp.float32(np.random.default_rng(1).normal(size=(3, 5, 2)))
    for noise in (z, z + 1):
        x = decode(weight, noise)
        previous = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        assert_close(map_.to_noise(x, previous @ weight)[0], noise, 4 * FORMULA)
    assert count == 1
    slope = jax.grad(lambda weight: jnp.square(decode(weight, z)).mean())(weight)
    assert jnp.isfinite(slope).all()
    assert jnp.abs(slope).max() > 0


def test_low_precision_becomes_float32():
    parameters = [jnp.bfloat16(part) for part in mixtures(4)]
    z, log_derivative = mixture_forward(jnp.ones(4, jnp.bfloat16), *parameters)
    assert z.dtype == log_derivative.dtype == mixture_inverse(z, *parameters).dtype == jnp.float32


def test_a_config_can_hold_the_map():
    map_ = MixtureMap(components=3, kind="logistic")
    assert hash(map_) == hash(MixtureMap(3, "logistic"))
    assert from_plain(MixtureMap, to_plain(map_)) == map_


ONES = jnp.ones((2, 3))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mixture_forward(jnp.ones(2), ONES, ONES, ONES, "cauchy"), "kind is 'cauchy'"),
        (lambda: mixture_forward(jnp.ones(2), ONES, ONES, ONES[:, :2]), "parameters of one shape"),
        (lambda: mixture_inverse(jnp.ones(3), ONES, ONES, ONES), r"elements have shape \(3,\)"),
        (lambda: mixture_inverse(jnp.ones(2), ONES[:, :0], ONES[:, :0], ONES[:, :0]), "with an axis of components"),
        (lambda: mixture_inverse(jnp.ones(2, jnp.int32), ONES, ONES, ONES), "the array of elements is int32"),
        (lambda: mixture_parameters(jnp.ones((1, 7)), 2), r"raw has shape \(1, 7\)"),
        (lambda: mixture_parameters(jnp.ones((1, 6)), 0), "components is 0"),
        (lambda: MixtureMap(components=0), "components is 0"),
        (lambda: MixtureMap(kind="cauchy"), "kind is 'cauchy'"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
