"""Solvers, likelihood and guidance against exact solutions, recorded numbers and counted calls."""

import itertools
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from matching_cases import MEAN, STD, X0, T, gaussian_score, gaussian_velocity
from tolerances import FORMULA, LAYER, NETWORK, assert_close

from flowgen import matching as fm

METHODS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}
each_method = pytest.mark.parametrize("method", METHODS)


def growing(t, x, cond):
    """x' = x t²: the flow multiplies by e^(1/3)."""
    return x * t[:, None] ** 2


@each_method
def test_solvers_converge_with_their_order_and_go_back(method, x64):
    x0 = jnp.array([[1.0, 2.0]])

    @jax.jit
    def run(x0):
        runs = [fm.integrate(growing, x0, method=method, num_steps=steps) for steps in (8, 16)]
        back, _ = fm.integrate(growing, runs[1][0], method=method, num_steps=16, reverse=True)
        recorded, _ = fm.integrate(growing, x0, method=method, num_steps=10)
        return runs, back, recorded

    runs, back, recorded = run(x0)
    errors = [float(jnp.abs(x1 - x0 * np.exp(1 / 3)).max()) for x1, _ in runs]
    # Halving the step divides the error by 2^order; the next term of the error moves that by less than a half.
    assert abs(np.log2(errors[0] / errors[1]) - METHODS[method]) < 0.5
    assert [int(nfe) for _, nfe in runs] == [steps * {"euler": 1, "rk4": 4}.get(method, 2) for steps in (8, 16)]
    # There and back, errors of both directions add up to less than twice the larger.
    np.testing.assert_allclose(back, x0, atol=4 * errors[1])
    # Recorded from torchdiffeq at step 0.1.
    expected = {"euler": 1.320015, "midpoint": 1.392574}
    if method in expected:
        np.testing.assert_allclose(recorded, x0 * expected[method], rtol=1e-6)


def test_a_field_of_time_and_the_gradient_through_the_solver(x64):
    # As Meta's tests: v = 3t² takes (1, 0) to (2, 1), and Σ x1 of a constant field a has the derivative 2 in a.
    x0 = jnp.array([[1.0, 0.0]])
    cubic = lambda t, x, cond: jnp.broadcast_to(3 * t[:, None] ** 2, x.shape)  # noqa: E731

    constant = lambda a: lambda t, x, cond: jnp.full_like(x, a)  # noqa: E731
    ends = jax.jit(lambda: {m: fm.integrate(cubic, x0, method=m, num_steps=1000)[0] for m in METHODS})()
    for method, end in ends.items():
        # Euler's error at 1,000 steps is 1.5e-3; the others' is 1e-6 and less.
        np.testing.assert_allclose(end, [[2.0, 1.0]], atol=2e-3 if method == "euler" else 1e-6, err_msg=method)
    total = lambda a, m: fm.integrate(constant(a), x0, method=m, num_steps=10)[0].sum()  # noqa: E731
    slopes = jax.jit(jax.jacrev(lambda a: {m: total(a, m) for m in METHODS}))(1.0)
    for method, slope in slopes.items():
        np.testing.assert_allclose(slope, 2.0, rtol=1e-9, err_msg=method)


def test_dopri5_is_within_its_tolerance_and_counts_its_calls():
    # The phase 20 t makes steps be rejected. ∫ t² cos 20t over [0, 1] in closed form.
    change = (20 * 2 * np.cos(20) + (20**2 - 2) * np.sin(20)) / 20**3
    x0 = jnp.array([[1.0, 2.0], [-3.0, 0.5]])
    calls = []

    def velocity(t, x, cond):
        jax.debug.callback(lambda t: calls.append(float(t)), t[0])
        return x * t[:, None] ** 2 * jnp.cos(20 * t[:, None])

    @partial(jax.jit, static_argnames=("tolerance", "reverse", "max_steps"))
    def run(x, tolerance, reverse, max_steps):
        options = {"reverse": reverse, "max_steps": max_steps, "rtol": tolerance, "atol": tolerance}
        return fm.integrate(velocity, x, method="dopri5", **options)

    for tolerance, reverse, max_steps in ((1e-5, False, 60), (1e-6, True, 7)):
        calls.clear()
        x1, nfe = run(x0, tolerance, reverse, max_steps)
        jax.effects_barrier()
        assert nfe.dtype == jnp.int32
        assert nfe == len(calls)
        assert calls[0] == float(reverse)
        if max_steps == 60:
            # The sum of a few dozen local errors, each below the tolerance times values up to 3.
            np.testing.assert_allclose(x1, x0 * np.exp(change), atol=30 * tolerance)
        else:
            assert nfe == 6 * max_steps + 1
            assert np.isnan(x1).all()


def test_dopri5_says_outside_jit_that_it_did_not_arrive():
    with pytest.raises(RuntimeError, match="did not finish within max_steps=1"):
        fm.integrate(growing, X0, method="dopri5", max_steps=1)


def test_without_diffrax_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ModuleNotFoundError, match="pip install diffrax"):
        fm.integrate(growing, X0, method="dopri5")


def test_edm_times_are_the_published_grid():
    times = fm.edm_times(4)
    # Evenly spaced in sigma^(1/7) from 80 to 0.002, then 0.
    sigma = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 4) ** 7
    np.testing.assert_allclose(times, [*(1 - sigma / (1 + sigma)), 1], rtol=1e-9)
    np.testing.assert_allclose(times[0], 1 / 81, rtol=1e-9)
    x1, nfe = jax.jit(lambda x: fm.integrate(growing, x, method="euler", times=times))(X0)
    factor = np.prod([1 + (b - a) * a**2 for a, b in itertools.pairwise(times)])
    assert_close(x1, X0 * factor, LAYER)
    assert nfe == 4
    # Increasing in float32 as well, for any number of steps in use.
    assert (np.diff(np.float32(fm.edm_times(1000))) > 0).all()


@pytest.fixture(scope="module")
def affine():
    """The field x' = A x, and log p1 of it at two points by the covariance of the image of a standard normal."""
    a = np.array([[0.3, -0.5], [0.2, 0.4]])
    x1 = np.array([[1.0, 2.0], [-0.5, 0.3]])

    def exact(a):
        transport = scipy.linalg.expm(a)
        return scipy.stats.multivariate_normal(cov=transport @ transport.T).logpdf(x1)

    moves = 1e-5 * np.eye(4).reshape(4, 2, 2)
    slope = np.array([(exact(a + move) - exact(a - move)).sum() / 2e-5 for move in moves]).reshape(2, 2)
    return jnp.float32(a), jnp.float32(x1), exact(a), slope


def log_prob(a, x1, method):
    """Σ log p1 and log p1 of the affine field."""
    value = fm.log_prob(lambda t, x, cond: x @ a.T, x1, method=method, num_steps=20)
    return value.sum(), value


# 20 steps of rk4 are exact to 1e-7; dopri5 to a few times its tolerance of 1e-5.
LIKELIHOOD = {"rk4": LAYER, "dopri5": NETWORK}


@pytest.mark.parametrize("method", LIKELIHOOD)
def test_likelihood_is_exact_for_affine_flows(method, affine):
    a, x1, expected, _ = affine
    _, value = jax.jit(log_prob, static_argnames="method")(a, x1, method)
    assert_close(value, expected, LIKELIHOOD[method])


@pytest.mark.parametrize("method", ["rk4", pytest.param("dopri5", marks=pytest.mark.slow)])
def test_likelihood_has_gradients(method, affine):
    a, x1, _, slope = affine
    gradient, _ = jax.jit(jax.grad(log_prob, has_aux=True), static_argnames="method")(a, x1, method)
    assert_close(gradient, slope, LIKELIHOOD[method])  # sums over two points and a path


def test_hutchinsons_estimate_has_the_exact_mean_and_keeps_its_probe(affine):
    a, x1, expected, _ = affine
    run = jax.jit(jax.vmap(lambda k: fm.log_prob(lambda t, x, cond: x @ a.T, x1, key=k, num_steps=10)))
    estimates = np.asarray(run(jax.random.split(jax.random.key(0), 256)))
    # Rademacher probes see the trace, ± the off-diagonal sum: two values, 0.3 apart on either side.
    assert_close(np.abs(estimates - expected), 0.3, NETWORK, scale=5)
    np.testing.assert_allclose(estimates.mean(0), expected, atol=0.08)  # four standard errors


def test_likelihood_of_a_constant_field_and_its_gradient():
    # x0 = x1 - 1 and log p = log p0(x1 - 1): the gradient in x1 is 1 - x1, in the field Σ (x1 - 1).
    x1 = jnp.array([[1.0, 2.0], [0.0, -1.0]])
    log_p = lambda a, x: fm.log_prob(lambda t, x, cond: jnp.full_like(x, a), x, num_steps=4).sum()  # noqa: E731
    value, (in_a, in_x) = jax.jit(jax.value_and_grad(log_p, argnums=(0, 1)))(1.0, x1)
    assert_close(value, -0.5 * (0 + 1 + 1 + 4) - 2 * np.log(2 * np.pi), LAYER)
    assert_close(in_x, 1 - x1, LAYER)
    assert_close(in_a, (x1 - 1).sum(), LAYER)


def test_likelihood_of_the_recorded_case_and_of_images():
    # (1, 2) under x' = x t²: recorded from torchdiffeq's dopri5, and analytic -3.788087.
    x1 = jnp.array([[1.0, 2.0]])
    log_p0 = lambda x: jax.scipy.stats.norm.logpdf(x).sum(axis=(1, 2, 3))  # noqa: E731

    @jax.jit
    def run(x1):
        image = x1.reshape(1, 1, 1, 2)
        scaled = lambda t, x, cond: x * t[:, None, None, None] ** 2  # noqa: E731
        return fm.log_prob(growing, x1, num_steps=20), fm.log_prob(scaled, image, log_p0=log_p0, num_steps=20)

    for value in run(x1):
        assert_close(value, -3.788087, LAYER)


@pytest.mark.parametrize("options", [{}, {"key": jax.random.key(0)}, {"method": "dopri5"}], ids=str)
def test_likelihood_of_no_samples_is_empty(options):
    value = jax.jit(lambda x: fm.log_prob(growing, x, **{"num_steps": 2, **options}))(X0[:0])
    assert (value.shape, value.dtype) == ((0,), jnp.float32)


def test_the_divergence_is_the_trace_of_the_jacobian(key):
    field = lambda t, x, cond: jnp.sin(x) * x.sum(axis=1, keepdims=True) + t[:, None]  # noqa: E731

    @jax.jit
    def run(x):
        v, exact = fm.divergence(field, T, x)
        jacobian = jax.vmap(jax.jacfwd(lambda t, x: field(t[None], x[None], None)[0], argnums=1))(T, x)
        return v, exact, field(T, x, None), jnp.trace(jacobian, axis1=1, axis2=2)

    v, exact, expected_v, trace = run(X0)
    assert_close(v, expected_v, FORMULA)
    assert_close(exact, trace, LAYER)


def test_the_sde_has_the_marginals_of_the_ode():
    straight = fm.CondOT()
    velocity = lambda t, x, cond: gaussian_velocity(straight, t, x)  # noqa: E731
    score = lambda t, x, cond: gaussian_score(straight, t, x)  # noqa: E731

    @jax.jit
    def run(key):
        draw, walk = jax.random.split(key)
        x0 = jax.random.normal(draw, (10_000, 1))
        ode, _ = fm.integrate(velocity, x0, num_steps=50)
        sde, nfe = fm.integrate_sde(velocity, score, x0, walk, num_steps=100)
        return [(x.mean(), x.std(), jnp.corrcoef(x[:, 0], x0[:, 0])[0, 1]) for x in (ode, sde)], nfe

    (ode, sde), nfe = run(jax.random.key(0))
    assert nfe == 200
    for mean, std, _ in (ode, sde):
        # Three standard errors of 10,000 samples, and the bias of 100 Euler steps.
        np.testing.assert_allclose([mean, std], [MEAN, STD], atol=0.02)
    # The flow is monotone in one dimension, the process forgets where it came from.
    assert ode[2] > 0.999 > 0.9 > sde[2]


def test_guidance_is_named_by_its_convention():
    velocity = lambda t, x, cond: x * cond[:, None]  # noqa: E731
    cond, none = jnp.array([1.0, 2.0, 3.0]), jnp.full(3, 0.5)
    v_c, v_u = np.asarray(X0) * [[1], [2], [3]], np.asarray(X0) * 0.5
    fields = {
        "scale 1": (fm.guided(velocity, none, scale=1.0), v_c),
        "weight 0": (fm.guided(velocity, none, weight=0.0), v_c),
        "scale 2": (fm.guided(velocity, none, scale=2.0), v_u + 2 * (v_c - v_u)),
        "weight 1": (fm.guided(velocity, none, weight=1.0), 2 * v_c - v_u),
        "scale 0": (fm.guided(velocity, none, scale=0.0), v_u),
        "partly": (
            fm.guided(velocity, none, weight=1.0, interval=(0.4, 0.6)),
            np.stack([v_c[0], (2 * v_c - v_u)[1], v_c[2]]),
        ),
    }
    found = jax.jit(lambda: {name: field(T, X0, cond) for name, (field, _) in fields.items()})()
    for name, (_, expected) in fields.items():
        assert_close(found[name], expected, FORMULA, err_msg=name)


def test_guidance_takes_one_condition_for_all_and_unsigned_labels():
    velocity = lambda t, x, cond: x * cond[:, None].astype(x.dtype)  # noqa: E731
    labels = jnp.array([1, 2, 3], jnp.uint8)
    field = jax.jit(lambda x: fm.guided(velocity, -1, weight=1.0)(T, x, labels))
    assert_close(field(X0), 2 * X0 * labels[:, None].astype(jnp.float32) + X0, FORMULA)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_times_have_the_type_in_which_the_state_is_accumulated(dtype, x64):
    seen = set()

    def velocity(t, x, cond, interval=0):
        seen.add((t.dtype, jnp.result_type(t, interval)))
        return x * t[:, None].astype(x.dtype)

    def run(x0):
        grid = {"times": [0.0, 0.3, 1.0]}
        ends = [fm.integrate(velocity, x0, num_steps=2), fm.integrate(velocity, x0, **grid)]
        ends += [
            fm.integrate_mean(velocity, x0),
            fm.integrate_sde(velocity, velocity, x0, jax.random.key(0), num_steps=2),
        ]
        return [x for x, _ in ends], fm.path_report(velocity, x0, num_steps=2), fm.log_prob(velocity, x0, num_steps=2)

    ends, *reports = jax.eval_shape(run, X0.astype(dtype))
    wide = jnp.promote_types(dtype, jnp.float32)
    assert {x.dtype for x in ends} == {jnp.dtype(dtype)}
    assert {x.dtype for x in jax.tree.leaves(reports)} == {wide}
    assert seen == {(wide, wide)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_the_sde_and_likelihood_keep_to_the_type_of_the_state(dtype, x64):
    velocity = lambda t, x, cond: x * t[:, None].astype(x.dtype)  # noqa: E731
    x, _ = fm.integrate_sde(velocity, velocity, X0.astype(dtype), jax.random.key(0), num_steps=3)
    assert x.dtype == dtype
    wide = jnp.zeros((2, 300), dtype)
    value = jax.jit(lambda x: fm.log_prob(lambda t, x, cond: x, x, num_steps=3))(wide)
    assert value.dtype == jnp.promote_types(dtype, jnp.float32)
    # More terms than bfloat16 can count: the divergence is 300.
    assert_close(value, -300 - 150 * np.log(2 * np.pi), LAYER)
    # And more steps than it can tell apart.
    four = jnp.full((1, 1), 4, dtype)
    ones = lambda t, x, cond: jnp.ones_like(x)  # noqa: E731
    assert_close(fm.integrate(ones, four, num_steps=200)[0], 5, LAYER)
    moved, _ = fm.integrate_sde(ones, ones, four, jax.random.key(0), num_steps=200, diffusion=lambda t: 0 * t)
    assert_close(moved, 5, LAYER)


REFUSED = {
    "field of one channel": (
        lambda: fm.integrate(lambda t, x, cond: x[:, :1], X0),
        "the velocity has shape (3, 1), but x has shape (3, 2)",
    ),
    "adaptive field of one channel": (
        lambda: fm.integrate(lambda t, x, cond: x[:, :1], X0, method="dopri5"),
        "they must have the same shape",
    ),
    "states of integers": (lambda: fm.integrate(growing, jnp.array([[1, 2]])), "x0 is int32"),
    "adaptive integers": (lambda: fm.integrate(growing, jnp.array([[1, 2]]), method="dopri5"), "x0 is int32"),
    "likelihood of integers": (lambda: fm.log_prob(growing, jnp.array([[1, 2]])), "x1 is int32"),
    "half a step": (lambda: fm.integrate(growing, X0, num_steps=2.5), "num_steps is 2.5"),
    "half a step of edm": (lambda: fm.edm_times(2.5), "num_steps is 2.5"),
    "guidance of NaN": (lambda: fm.guided(growing, -1, weight=float("nan")), "weight is nan; it must be a finite"),
    "guidance of text": (lambda: fm.guided(growing, -1, scale="2"), "scale is '2'; it must be a finite number"),
    "guidance to nothing": (lambda: fm.guided(growing, -1, weight=1.0)(T, X0, None), "guidance needs a condition"),
    "unknown solver": (lambda: fm.integrate(growing, X0, method="rk5"), "method is 'rk5'"),
    "no step": (lambda: fm.integrate(growing, X0, num_steps=0), "num_steps is 0"),
    "times outside": (lambda: fm.integrate(growing, X0, times=[0.0, 1.5]), "must increase within"),
    "times falling": (lambda: fm.integrate(growing, X0, times=[0.5, 0.2]), "must increase within"),
    "times of NaN": (lambda: fm.integrate(growing, X0, times=[0.0, float("nan")]), "must increase within"),
    "one time": (lambda: fm.integrate(growing, X0, times=[0.5]), "at least two times"),
    "adaptive on a grid": (
        lambda: fm.integrate(growing, X0, method="dopri5", times=[0.0, 1.0]),
        "dopri5 chooses its own times",
    ),
    "adaptive trajectory": (lambda: fm.trajectory(growing, X0, method="dopri5"), "dopri5 in integrate"),
    "no tolerance": (lambda: fm.integrate(growing, X0, method="dopri5", rtol=0.0, atol=0.0), "one must be positive"),
    "no steps allowed": (lambda: fm.integrate(growing, X0, method="dopri5", max_steps=0), "max_steps is 0"),
    "short edm grid": (lambda: fm.edm_times(1), "num_steps is 1"),
    "interval": (lambda: fm.guided(growing, None, scale=1.0, interval=(0.6, 0.2)), "interval is (0.6, 0.2)"),
    "both conventions": (lambda: fm.guided(growing, None, scale=1.0, weight=0.0), "give exactly one"),
    "no convention": (lambda: fm.guided(growing, None), "scale is None and weight is None"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what, untyped):
    call, part = REFUSED[what]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert part in str(error.value)
