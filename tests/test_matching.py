"""Flow matching against numbers of the published code, closed forms and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgen import matching as fm
from flowgen.matching.couplings import assignment, log_mean_exp, pairwise_cost

PUBLISHED = 2e-6  # the recorded numbers are float32, printed to six digits
X0 = jnp.array([[0.0, 0.0], [1.0, -1.0], [2.0, 0.5]])
X1 = jnp.array([[1.0, 2.0], [-1.0, 0.0], [0.5, -2.0]])
T = jnp.array([0.25, 0.5, 0.8])
NOISE = jnp.array([[1.0, -1.0], [0.5, 0.0], [-1.0, 2.0]])
PATHS = [
    fm.CondOT(),
    fm.Target(sigma_min=0.1),
    fm.Trigonometric(),
    fm.Polynomial(degree=3.0),
    fm.VariancePreserving(),
]


each_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)


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
    np.testing.assert_allclose(point.x_t, x_t, atol=PUBLISHED)
    np.testing.assert_allclose(point.u_t, u_t, atol=PUBLISHED)


def test_the_target_path_is_the_published_one_with_the_noise_as_source(key):
    point = fm.Target(sigma_min=0.1).sample(key, T, NOISE, X1)
    np.testing.assert_allclose(point.x_t, [[1.025, -0.275], [-0.225, 0], [0.12, -1.04]], atol=PUBLISHED)
    np.testing.assert_allclose(point.u_t, [[0.1, 2.9], [-1.45, 0], [1.4, -3.8]], atol=PUBLISHED)
    np.testing.assert_allclose(fm.SchroedingerBridge(0.5).score_scale(T), [1.732051, 2.0, 1.6], atol=PUBLISHED)


@pytest.mark.parametrize(
    ("path", "alpha", "beta", "d_alpha", "d_beta"),
    [
        (fm.Polynomial(3.0), (0.001, 0.125, 0.729), (0.999, 0.875, 0.271), (0.03, 0.75, 2.43), (-0.03, -0.75, -2.43)),
        (
            fm.VariancePreserving(),
            (0.016996, 0.281183, 0.946722),
            (0.999856, 0.959654, 0.322053),
            (0.153053, 1.412944, 0.989324),
            (-0.002602, -0.413999, -2.908267),
        ),
    ],
    ids=["polynomial", "variance preserving"],
)
def test_schedules_are_the_recorded_ones(path, alpha, beta, d_alpha, d_beta):
    for ours, expected in zip(path.schedule(jnp.array([0.1, 0.5, 0.9])), (alpha, beta, d_alpha, d_beta), strict=True):
        np.testing.assert_allclose(ours, expected, atol=5e-6)


@each_path
def test_velocity_is_the_derivative_of_the_path_and_its_ends_are_the_pair(path, key):
    point = path.sample(key, T, X0, X1)
    _, moved = jax.jvp(lambda t: path.sample(key, t, X0, X1).x_t, (T,), (jnp.ones(3),))
    np.testing.assert_allclose(point.u_t, moved, atol=1e-5)
    for t, end in ((0.0, X0), (1.0, X1)):
        at_end = path.sample(key, jnp.full(3, t), X0, X1)
        assert jnp.isfinite(at_end.u_t).all()
        slack = 0.25 if isinstance(path, fm.Target) else 0.02 if isinstance(path, fm.VariancePreserving) else 1e-6
        np.testing.assert_allclose(at_end.x_t, end, atol=slack)


@each_path
def test_predictions_convert_into_each_other_and_stay_finite_at_the_ends(path, key):
    point = path.sample(key, T, X0, X1)
    np.testing.assert_allclose(fm.x1_of(path, T, point.x_t, point.u_t), X1, atol=1e-4)
    np.testing.assert_allclose(fm.noise_of(path, T, point.x_t, point.u_t), X0, atol=1e-4)
    np.testing.assert_allclose(fm.velocity_of(path, T, point.x_t, X1, "x1"), point.u_t, atol=1e-3)
    np.testing.assert_allclose(fm.velocity_of(path, T, point.x_t, X0, "noise"), point.u_t, atol=1e-3)
    beta = path.schedule(T).beta[:, None]
    np.testing.assert_allclose(fm.score_of(path, T, point.x_t, point.u_t), -X0 / beta, rtol=1e-3, atol=1e-4)
    for t in (0.0, 1.0):
        ends = jnp.full(3, t)
        for kind in ("x1", "noise"):
            assert jnp.isfinite(fm.velocity_of(path, ends, X0, X1, kind)).all()
        assert jnp.isfinite(fm.score_of(path, ends, X0, X1)).all()


def test_assignment_and_sinkhorn_are_the_recorded_ones():
    cost = pairwise_cost(X0, X1, "sqeuclidean")
    np.testing.assert_allclose(cost, [[5, 1, 4.25], [9, 5, 1.25], [3.25, 9.25, 8.5]], atol=1e-5)
    np.testing.assert_array_equal(assignment(cost), [1, 2, 0])
    np.testing.assert_allclose(fm.wasserstein(X0, X1), 1.354006, atol=PUBLISHED)
    f, g = fm.sinkhorn_potentials(-cost / 2, 500)
    plan = [[0.091506, 0.787381, 0.121113], [0.018714, 0.161032, 0.820254], [0.88978, 0.051588, 0.058633]]
    np.testing.assert_allclose(jnp.exp(-cost / 2 + f[:, None] + g[None]) / 3, plan, atol=2e-6)
    f, g = fm.sinkhorn_potentials(jnp.array([[-1e4, 0.0], [-2e4, -3e4]]), 20)
    assert jnp.isfinite(f).all()
    assert jnp.isfinite(g).all()


def test_exact_transport_uses_every_source_once_and_sinkhorn_comes_near(key):
    k1, k2, k3 = jax.random.split(key, 3)
    x0, x1 = fm.toy.normal(k1, 64), fm.toy.gaussian_ring(k2, 64)
    exact = fm.MinibatchOT()(jax.random.clone(k3), x0, x1, jnp.arange(64))
    np.testing.assert_array_equal(exact.x1, x1)
    np.testing.assert_array_equal(np.sort(exact.x0, axis=0), np.sort(x0, axis=0))
    mean = lambda pairs: float(jnp.square(pairs.x0 - pairs.x1).sum(1).mean())  # noqa: E731
    entropic = fm.MinibatchOT(method="sinkhorn", epsilon=0.01, num_sweeps=200)(jax.random.clone(k3), x0, x1)
    assert mean(exact) < mean(fm.Independent()(jax.random.clone(k3), x0, x1))
    assert mean(entropic) < 1.3 * mean(exact)
    labels = jnp.arange(64) % 4
    for method in ("exact", "sinkhorn"):
        aware = jax.jit(fm.MinibatchOT(method=method, class_aware=True))(jax.random.clone(k3), x0, x1, labels)
        source = jnp.argmin(jnp.abs(aware.x0[:, None] - x0[None]).sum(-1), axis=1)
        np.testing.assert_array_equal(labels[source], labels)


def test_weighted_matching_has_the_minimiser_of_the_closed_form():
    # x ~ N(0, 1), y ~ N(2, 1/4), squared cost, epsilon 1: the best velocity at t = 1/2 is affine in x.
    k1, k2, k3 = jax.random.split(jax.random.key(3), 3)
    x0 = jax.random.normal(k1, (400_000, 1))
    x1 = 2 + 0.5 * jax.random.normal(k2, x0.shape)
    for epsilon, slope, value, centre, share in (
        (1.0, -0.461538, 0.571429, 1.428571, 0.26986),
        (4.0, -0.857143, 1.230769, 1.230769, None),
    ):
        weights = fm.GibbsWeights(epsilon=epsilon, cost="sqeuclidean", normalize="batch")
        _, _, _, log_weight = weights(k3, x0, x1)
        w, x, u = np.exp(log_weight), np.asarray(x0 + x1)[:, 0] / 2, np.asarray(x1 - x0)[:, 0]
        design = np.stack([np.ones_like(x), x - centre], axis=1)
        fitted = np.linalg.solve((design.T * w) @ design, (design.T * w) @ u)
        np.testing.assert_allclose(fitted, [value, slope], atol=0.01)  # sampling error of 400,000 pairs
        if share:
            np.testing.assert_allclose(fm.effective_sample_size(log_weight), share, atol=0.005)


def test_gibbs_weights_in_their_limits(key):
    k1, k2, k3 = jax.random.split(key, 3)
    x0, x1 = fm.toy.gaussian_ring(k1, 128), fm.toy.moons(k2, 128)
    flat = fm.GibbsWeights(epsilon=1e9, normalize="batch")(k3, x0, x1).log_weight
    np.testing.assert_allclose(flat, 0, atol=1e-6)
    shifted = fm.GibbsWeights(2.0, cost=lambda a, b: jnp.linalg.norm(a - b, axis=1) + 100, normalize="batch")
    plain = fm.GibbsWeights(2.0, normalize="batch")
    np.testing.assert_allclose(shifted(k3, x0, x1).log_weight, plain(k3, x0, x1).log_weight, atol=1e-4)
    extreme = fm.GibbsWeights(1e-4, normalize="batch", sinkhorn_sweeps=20)(k3, x0, x1).log_weight
    assert jnp.isfinite(extreme).all()
    corrected = fm.GibbsWeights(2.0, normalize="none", sinkhorn_sweeps=50)
    assert abs(float(log_mean_exp(corrected(k3, x0, x1).log_weight))) < 0.5
    # Data on a sphere and a round source: no datum is preferred.
    sphere = x1 / jnp.linalg.norm(x1, axis=1, keepdims=True)
    report = fm.weight_report(jax.random.normal(jax.random.key(7), (2048, 2)), sphere, 1.0)
    assert report.data_tilt < 0.01 < fm.weight_report(x0, x1, 1.0).data_tilt


def test_epsilon_is_chosen_to_the_target(key):
    k1, k2 = jax.random.split(key)
    x0, x1 = fm.toy.gaussian_ring(k1, 512), fm.toy.moons(k2, 512)
    epsilon = fm.choose_epsilon(x0, x1, ess=0.5)
    share = fm.effective_sample_size(fm.GibbsWeights(epsilon)(k1, x0, x1).log_weight)
    np.testing.assert_allclose(share, 0.5, atol=0.01)
    report = fm.weight_report(x0, x1, fm.choose_epsilon(x0, x1, ess=None, tilt=0.05))
    np.testing.assert_allclose(max(report.source_tilt, report.data_tilt), 0.05, atol=0.005)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_solvers_converge_with_their_order_and_go_back(method, order):
    velocity = lambda t, x, cond: x * t[:, None] ** 2  # noqa: E731
    x0 = jnp.array([[1.0, 2.0]])
    with jax.enable_x64(True):
        start = x0.astype(jnp.float64)
        errors = []
        for steps in (8, 16):
            x1, nfe = fm.integrate(velocity, start, method=method, num_steps=steps)
            errors.append(float(jnp.abs(x1 - start * np.exp(1 / 3)).max()))
            assert nfe == steps * {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}[method]
        assert abs(np.log2(errors[0] / errors[1]) - order) < 0.5
    x1, _ = fm.integrate(velocity, x0, method=method, num_steps=200)
    back, _ = fm.integrate(velocity, x1, method=method, num_steps=200, reverse=True)
    np.testing.assert_allclose(back, x0, atol=0.02)
    recorded = {"euler": 1.320015, "midpoint": 1.392574}
    if method in recorded:
        x1, _ = fm.integrate(velocity, x0, method=method, num_steps=10)
        np.testing.assert_allclose(x1, x0 * recorded[method], rtol=2e-6)


def test_likelihood_is_exact_for_affine_flows_and_has_gradients(key):
    a = jnp.array([[0.3, -0.5], [0.2, 0.4]])
    x1 = jnp.array([[1.0, 2.0], [-0.5, 0.3]])
    velocity = lambda matrix: lambda t, x, cond: x @ matrix.T  # noqa: E731
    transport = jax.scipy.linalg.expm(a)
    covariance = transport @ transport.T
    normal = jax.scipy.stats.multivariate_normal.logpdf
    expected = jax.vmap(lambda x: normal(x, jnp.zeros(2), covariance))(x1)
    np.testing.assert_allclose(fm.log_prob(velocity(a), x1), expected, atol=1e-4)
    estimates = jax.vmap(lambda k: fm.log_prob(velocity(a), x1, key=k))(jax.random.split(key, 256))
    np.testing.assert_allclose(estimates.mean(0), expected, atol=0.1)  # standard error of 256 probes
    gradient = jax.grad(lambda m: fm.log_prob(velocity(m), x1).sum())(a)
    step = 1e-3
    numeric = (fm.log_prob(velocity(a.at[0, 1].add(step)), x1) - fm.log_prob(velocity(a.at[0, 1].add(-step)), x1)).sum()
    np.testing.assert_allclose(gradient[0, 1], numeric / (2 * step), rtol=0.02)


def test_the_sde_has_the_marginals_of_the_ode(key):
    # Source N(0, 1), data N(1, 1/4): the exact velocity and score of the straight path are affine.
    def moments(t):
        return t, (1 - t) ** 2 + t**2 / 4

    def velocity(t, x, cond):
        mean, variance = (m[:, None] for m in moments(t))
        return 1 + (t[:, None] / 4 - (1 - t[:, None])) / variance * (x - mean)

    def score(t, x, cond):
        mean, variance = (m[:, None] for m in moments(t))
        return -(x - mean) / variance

    draw, walk = jax.random.split(key)
    x0 = jax.random.normal(draw, (20_000, 1))
    ode, _ = fm.integrate(velocity, x0, num_steps=50)
    sde, nfe = fm.integrate_sde(velocity, score, x0, walk, num_steps=200)
    assert nfe == 400
    for x in (ode, sde):
        np.testing.assert_allclose([x.mean(), x.std()], [1, 0.5], atol=0.02)
    with_score = fm.score_of(fm.CondOT(), jnp.full(3, 0.4), X0[:, :1], velocity(jnp.full(3, 0.4), X0[:, :1], None))
    np.testing.assert_allclose(with_score, score(jnp.full(3, 0.4), X0[:, :1], None), atol=1e-4)


def test_guidance_has_scale_one_for_the_conditional_field():
    velocity = lambda t, x, cond: x * cond[:, None]  # noqa: E731
    x, t, cond = X0, T, jnp.array([1.0, 2.0, 3.0])
    none = jnp.zeros(3)
    np.testing.assert_allclose(fm.guided(velocity, none, scale=1.0)(t, x, cond), x * cond[:, None], atol=1e-6)
    np.testing.assert_allclose(fm.guided(velocity, none, scale=2.0)(t, x, cond), 2 * x * cond[:, None], atol=1e-6)
    partly = fm.guided(velocity, none, scale=2.0, interval=(0.4, 0.6))(t, x, cond)
    np.testing.assert_allclose(partly, x * cond[:, None] * jnp.array([1, 2, 1])[:, None], atol=1e-6)


def test_losses_weigh_pairs_and_learn(key):
    network = fm.VelocityMLP(fm.MLPConfig(dim=2, num_classes=3))
    k1, k2, k3, k4 = jax.random.split(key, 4)
    batch = {"x0": fm.toy.normal(k1, 256), "x1": fm.toy.gaussian_ring(k2, 256), "cond": jnp.arange(256) % 3}
    params = network.init(k3, jnp.zeros(1), jnp.zeros((1, 2)))

    def run(loss_fn, **more):
        # Every loss is to draw the same times, hence the clone.
        again = jax.random.clone(k4)
        return loss_fn(lambda t, x, cond: network.apply(params, t, x, cond), batch, again, **more)

    plain = run(fm.flow_matching_loss())
    limit = run(fm.flow_matching_loss(coupling=fm.GibbsWeights(1e9)))
    np.testing.assert_allclose(plain[0], limit[0], rtol=1e-5)
    first = run(fm.flow_matching_loss(coupling=fm.GibbsWeights(1.0)))
    batchwise = run(fm.flow_matching_loss(coupling=fm.GibbsWeights(1.0, normalize="batch")))
    np.testing.assert_allclose(first[0], batchwise[0], rtol=1e-5)  # the first running mean is that of the batch
    later = run(fm.flow_matching_loss(coupling=fm.GibbsWeights(1.0)), log_mean=first[2] + 1.0)
    np.testing.assert_allclose(later[2], first[2] + 0.99, rtol=1e-5)
    for kind in ("x1", "noise"):
        assert jnp.isfinite(run(fm.flow_matching_loss(prediction=kind, time=fm.LogitNormal(), label_dropout=0.5))[0])
    gradient = jax.grad(lambda p: fm.flow_matching_loss()(lambda t, x, c: network.apply(p, t, x, c), batch, k4)[0])(
        params
    )
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_times_are_distributed_as_asked(key):
    strata = fm.Uniform(stratified=True)(key, 1000)
    np.testing.assert_array_equal(np.sort(np.floor(strata * 1000)), np.arange(1000))
    logits = jax.scipy.special.logit(fm.LogitNormal(1.2, 0.5)(jax.random.key(1), 20_000))
    np.testing.assert_allclose([logits.mean(), logits.std()], [1.2, 0.5], atol=0.02)
    assert fm.Shifted(3.0)(jax.random.key(2), 20_000).mean() < 0.4


def test_path_energy_of_straight_lines():
    velocity = lambda t, x, cond: jnp.broadcast_to(jnp.array([[3.0, 4.0]]), x.shape)  # noqa: E731
    report = fm.path_report(velocity, X0)
    np.testing.assert_allclose(report.energy, 25, rtol=1e-5)
    np.testing.assert_allclose(report.curvature, 0, atol=1e-5)
    assert fm.signed_path_energy(20.0, 25.0) == pytest.approx(-0.2)


REFUSED = {
    "negative epsilon": (lambda: fm.GibbsWeights(-1.0), "epsilon is -1.0; it must be positive"),
    "unknown solver": (lambda: fm.integrate(lambda t, x, c: x, X0, method="rk5"), "method is 'rk5'"),
    "no step": (lambda: fm.integrate(lambda t, x, c: x, X0, num_steps=0), "num_steps is 0"),
    "times outside": (lambda: fm.integrate(lambda t, x, c: x, X0, times=[0.0, 1.5]), "must increase within"),
    "times falling": (lambda: fm.integrate(lambda t, x, c: x, X0, times=[0.5, 0.2]), "must increase within"),
    "batches that differ": (lambda: fm.Independent()(None, X0, X1[:2]), "must have the same shape"),
    "no labels": (lambda: fm.MinibatchOT(class_aware=True)(None, X0, X1), "needs labels as cond"),
    "bridge without noise": (lambda: fm.SchroedingerBridge(0.0), "sigma is 0.0"),
    "dropout of one": (lambda: fm.flow_matching_loss(label_dropout=1.0), "label_dropout is 1.0"),
    "interval": (lambda: fm.guided(lambda t, x, c: x, None, scale=1.0, interval=(0.6, 0.2)), "interval is (0.6, 0.2)"),
    "two targets": (lambda: fm.choose_epsilon(X0, X1, ess=0.5, tilt=0.1), "exactly one target"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what, untyped):
    call, part = REFUSED[what]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert part in str(error.value)
