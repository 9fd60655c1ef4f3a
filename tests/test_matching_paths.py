"""Paths against numbers of the published code, closed forms and derivatives; conversions, inverses and retiming."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matching_cases import (
    MEAN,
    NOISE,
    PATHS,
    STD,
    X0,
    X1,
    T,
    gaussian_score,
    gaussian_velocity,
)
from tolerances import FORMULA, LAYER, NETWORK, assert_close

from flowgen import matching as fm

each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


@pytest.fixture
def fixed_noise(monkeypatch):
    monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype=None: NOISE)


# Recorded from torchcfm 1.0.7 on X0, X1, T, NOISE: (path, x_t, u_t).
RECORDED = [
    (fm.CondOT(sigma=0.1), [[0.35, 0.4], [0.05, -0.5], [0.7, -1.3]], [[1, 2], [-2, 1], [-1.5, -2.5]]),
    (
        fm.SchroedingerBridge(sigma=0.5),
        [[0.466506, 0.283494], [0.125, -0.5], [0.6, -1.1]],
        [[1.288675, 1.711325], [-2, 1], [-1.125, -3.25]],
    ),
    (
        fm.Trigonometric(sigma=0.1),
        [[0.482683, 0.665367], [0.05, -0.707107], [0.993562, -1.547605]],
        [[1.451227, 2.902453], [-2.221442, 1.110721], [-2.745131, -1.717764]],
    ),
]


@pytest.mark.parametrize(("path", "x_t", "u_t"), RECORDED, ids=lambda value: type(value).__name__)
def test_paths_are_the_published_ones(path, x_t, u_t, fixed_noise, key):
    point = path.sample(key, T, X0, X1)
    assert_close(point.x_t, x_t, FORMULA)
    assert_close(point.u_t, u_t, FORMULA)


def test_the_target_path_is_the_published_one_with_the_noise_as_x0(key):
    point = fm.Target(sigma_min=0.1).sample(key, T, NOISE, X1)
    assert_close(point.x_t, [[1.025, -0.275], [-0.225, 0], [0.12, -1.04]], FORMULA)
    assert_close(point.u_t, [[0.1, 2.9], [-1.45, 0], [1.4, -3.8]], FORMULA)
    assert_close(fm.SchroedingerBridge(0.5).score_scale(T), [1.732051, 2.0, 1.6], FORMULA)


# Recorded from Meta's flow_matching 1.0.10 at t = 0.1, 0.5, 0.9: alpha, beta and their derivatives.
SCHEDULES = {
    "polynomial": ((0.001, 0.125, 0.729), (0.999, 0.875, 0.271), (0.03, 0.75, 2.43), (-0.03, -0.75, -2.43)),
    "variance preserving": (
        (0.016996, 0.281183, 0.946722),
        (0.999856, 0.959654, 0.322053),
        (0.153053, 1.412944, 0.989324),
        (-0.002602, -0.413999, -2.908267),
    ),
    "linear variance preserving": (
        (0.1, 0.5, 0.9),
        (0.994987, 0.866025, 0.43589),
        (1.0, 1.0, 1.0),
        (-0.100504, -0.57735, -2.064742),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_the_recorded_ones(name):
    for ours, expected in zip(PATHS[name].schedule(jnp.array([0.1, 0.5, 0.9])), SCHEDULES[name], strict=True):
        assert_close(ours, expected, LAYER)  # β' of the diffusion path divides by a small beta


# As torchcfm's tests: a path, and x_t and u_t by its closed formulas, on arrays of float64.
FORMULAS = {
    "cond_ot, int 0": (lambda: fm.CondOT(sigma=0), lambda t, a, b, e: ((1 - t) * a + t * b, b - a)),
    "cond_ot, int 1": (lambda: fm.CondOT(sigma=1), lambda t, a, b, e: ((1 - t) * a + t * b + e, b - a)),
    "cond_ot, 1.5": (lambda: fm.CondOT(sigma=1.5), lambda t, a, b, e: ((1 - t) * a + t * b + 1.5 * e, b - a)),
    "trigonometric, 5e-4": (
        lambda: fm.Trigonometric(sigma=5e-4),
        lambda t, a, b, e: (
            np.cos(np.pi / 2 * t) * a + np.sin(np.pi / 2 * t) * b + 5e-4 * e,
            np.pi / 2 * (np.cos(np.pi / 2 * t) * b - np.sin(np.pi / 2 * t) * a),
        ),
    ),
    "bridge, int 1": (
        lambda: fm.SchroedingerBridge(sigma=1),
        lambda t, a, b, e: (
            (1 - t) * a + t * b + np.sqrt(t * (1 - t)) * e,
            (1 - 2 * t) / (2 * t * (1 - t)) * np.sqrt(t * (1 - t)) * e + b - a,
        ),
    ),
}


@pytest.mark.parametrize("shape", [(1,), (2,), (1, 2), (3, 4, 5)], ids=str)
def test_samples_follow_the_closed_formulas_in_any_shape(shape, untyped):
    random = np.random.default_rng(len(shape))
    x0, x1 = random.standard_normal((2, 16, *shape)).astype(np.float32)
    t = random.uniform(0.05, 0.95, 16).astype(np.float32)

    @jax.jit
    def sample(key):
        points = {name: make().sample(jax.random.clone(key), t, x0, x1) for name, (make, _) in FORMULAS.items()}
        return jax.random.normal(key, x0.shape), points

    noise, points = sample(jax.random.key(0))
    wide = np.float64(t).reshape(-1, *(1,) * len(shape))
    for name, (make, formula) in FORMULAS.items():
        if make().sigma:
            np.testing.assert_array_equal(points[name].noise, noise, err_msg=name)
        x_t, u_t = formula(wide, np.float64(x0), np.float64(x1), np.float64(noise) * bool(make().sigma))
        assert_close(points[name].x_t, x_t, FORMULA, err_msg=name)
        assert_close(points[name].u_t, u_t, FORMULA, err_msg=name)


@each_path
def test_velocity_is_the_derivative_of_the_path_and_its_ends_are_the_pair(path, key):
    @jax.jit
    def sample(t):
        x_of = lambda t: path.sample(key, t, X0, X1).x_t  # noqa: E731
        return path.sample(key, t, X0, X1), jax.jvp(x_of, (t,), (jnp.ones(3),))[1]

    point, moved = sample(T)
    assert_close(point.u_t, moved, LAYER)
    for t, end in ((0.0, X0), (1.0, X1)):
        at_end, _ = sample(np.full(3, t, np.float32))
        assert np.isfinite(at_end.u_t).all()
        # What these two paths leave of the noise at t = 1 (0.1 of up to 2), and of the data at t = 0 (0.0066).
        slack = {fm.Target: 0.25, fm.VariancePreserving: 0.02}.get(type(path), 2 * FORMULA)
        np.testing.assert_allclose(at_end.x_t, end, atol=slack)


@each_path
def test_predictions_convert_into_each_other_and_are_finite_at_the_ends(path, x64):
    random = np.random.default_rng(1)
    x0, x1 = random.standard_normal((2, 16, 2))

    @jax.jit
    def round_trips(t):
        point = path.sample(jax.random.key(0), t, jnp.asarray(x0), jnp.asarray(x1))
        score = -x0 / path.schedule(t).beta[:, None]
        predictions = {"velocity": point.u_t, "x1": jnp.asarray(x1), "noise": jnp.asarray(x0), "score": score}
        velocities = {
            kind: fm.prediction_to_velocity(path, t, point.x_t, value, kind) for kind, value in predictions.items()
        }
        back = [
            convert(path, t, point.x_t, point.u_t)
            for convert in (fm.velocity_to_x1, fm.velocity_to_noise, fm.velocity_to_score)
        ]
        return point.u_t, velocities, back, score

    velocity, velocities, back, score = round_trips(random.uniform(0.05, 0.95, 16))
    # Roundings of float64, enlarged by divisors down to 1e-4 (0.05³, of the polynomial path).
    for kind, value in velocities.items():
        np.testing.assert_allclose(value, velocity, rtol=1e-9, atol=1e-9, err_msg=kind)
    for ours, theirs in zip(back, (x1, x0, score), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)
    _, velocities, back, _ = round_trips(np.arange(16) % 2.0)
    # All but the velocity from a score that is infinite itself at t = 1.
    assert all(np.isfinite(velocities[kind]).all() for kind in ("x1", "noise"))
    assert np.isfinite(velocities["score"][::2]).all()
    assert np.isfinite(back).all()


@each_path
def test_at_the_ends_conversions_are_those_of_a_time_close_by(path, x64):
    t, x = jnp.array([0.0, 0.0, 1.0, 1.0]), jnp.array([[-1.0], [0.5], [0.5], [2.0]])

    @jax.jit
    def run():
        inner = fm.clip_times(path, t)
        v = gaussian_velocity(path, inner, x)
        exact = {
            "x1": fm.velocity_to_x1(path, t, x, v),
            "noise": fm.velocity_to_noise(path, t, x, v),
            "score": fm.velocity_to_score(path, t, x, v),
        }
        return inner, v, {kind: fm.prediction_to_velocity(path, t, x, value, kind) for kind, value in exact.items()}

    inner, v, velocities = run()
    # The polynomial path of degree 3 has alpha/beta = 1e-5 at t = 0.0215.
    assert np.abs(inner - t).max() < (0.022 if isinstance(path, fm.Polynomial) else 2e-5)
    for kind, value in velocities.items():
        np.testing.assert_allclose(value, v, rtol=1e-6, atol=1e-6, err_msg=kind)  # float64, divided by 1e-5 and again


def test_conversions_within_a_path_are_not_touched(key):
    # alpha = t^10 is 1e-5 at 0.32: from there on conversions are exact, with what float32 leaves of x_t - x0.
    path, t = fm.Polynomial(10.0), jnp.array([0.4, 0.7, 0.9])
    point = path.sample(key, t, X0, X1)
    np.testing.assert_array_equal(fm.clip_times(path, t), t)
    np.testing.assert_allclose(
        fm.prediction_to_velocity(path, t, point.x_t, X0, "noise"), point.u_t, rtol=0.02, atol=0.02
    )
    assert_close(fm.prediction_to_velocity(path, t, point.x_t, X1, "x1"), point.u_t, NETWORK)


def test_the_score_of_the_exact_velocity_is_the_exact_score():
    path, x = fm.CondOT(), X0[:, :1]
    run = jax.jit(lambda t, x: (gaussian_velocity(path, t, x), gaussian_score(path, t, x)))
    v, score = run(T, x)
    assert_close(jax.jit(lambda t, x, v: fm.velocity_to_score(path, t, x, v))(T, x, v), score, LAYER)


@each_path
def test_times_are_recovered_from_the_ratio_of_signal_to_noise(path):
    t = np.float32([0.1, 0.5, 0.9])

    @jax.jit
    def recovered(t):
        schedule = path.schedule(t)
        return fm.time_of_ratio(path, schedule.alpha, schedule.beta)

    assert_close(recovered(t), t, LAYER)


@each_path
def test_fields_on_another_path_are_those_of_the_new_path(path, x64):
    # The exact velocity of a Gaussian pair along either path, turned into that of the other.
    directions = ((fm.CondOT(), path), (path, fm.CondOT()))
    x = np.linspace(-1.0, 2.0, 5)[:, None]

    @jax.jit
    def run(t):
        exact = lambda path: lambda t, x, cond: gaussian_velocity(path, t, x)  # noqa: E731
        ones = lambda t, x, cond: jnp.ones_like(x)  # noqa: E731
        changed = lambda field, a, b: fm.change_path(field, a, b)(t, jnp.asarray(x), None)  # noqa: E731
        fields = [(changed(exact(a), a, b), gaussian_velocity(b, t, x)) for a, b in directions]
        return fields, [changed(ones, a, b) for a, b in directions]

    fields, _ = run(np.linspace(0.1, 0.9, 5))
    for field, expected in fields:
        # The bisection leaves 1e-12 in t. Times are within the ratios that both paths reach: Target's end at 10, those
        # of the diffusion path begin at 0.007.
        np.testing.assert_allclose(field, expected, rtol=1e-8, atol=1e-8)
    fields, errors = run(np.array([0.0, 0.0, 0.0, 1.0, 1.0]))
    assert np.isfinite(fields).all()
    # What a network gets wrong is enlarged by t' = 1/(3 t²) at most, with t = 1e-5^(1/3) for the polynomial.
    assert np.abs(errors).max() < 1e3


def test_a_field_on_another_path_ends_where_the_field_ends():
    velocity = lambda t, x, cond: x * t[:, None] ** 2  # noqa: E731
    cosine = fm.change_path(velocity, fm.CondOT(), fm.Trigonometric())
    x0 = jnp.array([[1.0, 2.0]])

    @jax.jit
    def run():
        path = lambda v: fm.trajectory(v, x0, method="euler", num_steps=1000)[0]  # noqa: E731
        return path(velocity), path(cosine)

    straight, curved = run()
    np.testing.assert_allclose(straight[-1], x0 * np.exp(1 / 3), atol=1e-2)  # Euler's error at 1,000 steps
    np.testing.assert_allclose(curved[-1], straight[-1], atol=1e-2)
    # On the way they differ, so that the test is not of one field with itself.
    assert np.abs(curved - straight).max() > 0.05


def test_closed_forms_of_the_cases_are_right():
    # By the moments of x_t and E[u_t | x_t] over many pairs, for one path.
    random = np.random.default_rng(0)
    x0, x1 = random.standard_normal(400_000), MEAN + STD * random.standard_normal(400_000)
    x, u = 0.4 * x0 + 0.6 * x1, x1 - x0
    slope = np.cov(x, u)[0, 1] / x.var()
    exact = jax.jit(lambda t, x: gaussian_velocity(fm.CondOT(), t, x))(jnp.full(2, 0.6), jnp.array([[0.0], [1.0]]))[
        :, 0
    ]
    # Standard error of the fit: 1/√400,000 / std(x).
    np.testing.assert_allclose([u.mean() - slope * x.mean(), slope], [exact[0], exact[1] - exact[0]], atol=0.01)


REFUSED = {
    "conversion through a spread": (
        lambda: fm.prediction_to_velocity(fm.CondOT(0.5), T, X0, X1, "x1"),
        "prediction is 'x1', but the path adds noise (sigma 0.5)",
    ),
    "score of a bridge": (
        lambda: fm.velocity_to_score(fm.SchroedingerBridge(), T, X0, X1),
        "the path adds noise",
    ),
    "changing the path of a bridge": (
        lambda: fm.change_path(lambda t, x, cond: x, fm.SchroedingerBridge(), fm.CondOT()),
        "set sigma to 0.",
    ),
    "bridge without noise": (lambda: fm.SchroedingerBridge(0.0), "sigma is 0.0"),
    "bridge of int 0": (lambda: fm.SchroedingerBridge(0), "sigma is 0"),
    "degree": (lambda: fm.Polynomial(0.5), "degree is 0.5"),
    "batches that differ": (lambda: fm.CondOT().sample(None, T, X0, X1[:2]), "must have the same shape"),
    "one time for all": (lambda: fm.CondOT().sample(None, T[:1], X0, X1), "one time per sample"),
    "time after the data": (lambda: fm.CondOT().sample(None, T + 0.5, X0, X1), "t runs from 0.75 to 1.29"),
    "time before the noise": (lambda: fm.SchroedingerBridge().sample(None, T - 1, X0, X1), "within [0, 1]"),
    "time of NaN": (lambda: fm.Trigonometric().sample(None, T * jnp.nan, X0, X1), "within [0, 1]"),
    "prediction": (lambda: fm.prediction_to_velocity(fm.CondOT(), T, X0, X1, "eps"), "prediction is 'eps'"),
    "conversion after the data": (
        lambda: fm.prediction_to_velocity(fm.CondOT(), T + 0.5, X0, X1, "x1"),
        "within [0, 1]",
    ),
    "spread": (lambda: fm.CondOT(-0.1), "sigma is -0.1; it must be 0 or more"),
    "spread of NaN": (lambda: fm.Trigonometric(float("nan")), "sigma is nan"),
    "wide end": (lambda: fm.Target(1.0), "sigma_min is 1.0"),
    "noise of the diffusion": (lambda: fm.VariancePreserving(beta_min=20.0, beta_max=1.0), "above beta_max"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what, untyped):
    call, part = REFUSED[what]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert part in str(error.value)
