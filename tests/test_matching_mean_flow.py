"""The loss of MeanFlow: its identity, its target, its weights, guidance, and samples in one step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matching_cases import MEAN, STD, X0, X1, T, gaussian_pairs, gaussian_velocity, labelled_pairs
from tolerances import FORMULA, LAYER, NETWORK, assert_close

from flowgen import matching as fm
from flowgen.matching.mean_flow import average_and_target, guided_target


@pytest.fixture(scope="module")
def batch():
    return labelled_pairs()


def average_velocity(t, x, cond, interval):
    """The exact average velocity of the straight path between N(0, 1) and N(MEAN, STD²): its flow is affine.

    With s(t)² the variance at t, X(t + h) = (t + h) m + s(t + h)/s(t) (x - t m), and s(t + h)² - s(t)² is a polynomial:
    nothing is divided by h.
    """
    s = lambda t: jnp.sqrt((1 - t) ** 2 + t**2 * STD**2)  # noqa: E731
    slope = (-2 + (1 + STD**2) * (2 * t + interval)) / ((s(t + interval) + s(t)) * s(t))
    return MEAN + slope[:, None] * (x - t[:, None] * MEAN)


def test_the_exact_average_velocity_satisfies_the_identity_and_samples_in_one_step(x64):
    random = np.random.default_rng(0)
    t = jnp.asarray(random.uniform(0, 0.8, 64))
    interval = jnp.asarray(random.uniform(0, 1, 64)) * (1 - t)
    x = jnp.asarray(random.standard_normal((64, 1)))

    @jax.jit
    def run(t, x, interval):
        v = gaussian_velocity(fm.CondOT(), t, x)
        now = average_velocity(t, x, None, jnp.zeros_like(t))
        field = lambda t, x, cond: gaussian_velocity(fm.CondOT(), t, x)  # noqa: E731
        flow, _ = fm.integrate(field, x, method="rk4", num_steps=100)
        steps = [fm.integrate_mean(average_velocity, x, num_steps=num) for num in (1, 3)]
        return v, now, average_and_target(average_velocity, t, x, None, interval, v), flow, steps

    v, now, (u, target), flow, steps = run(t, x, interval)
    np.testing.assert_allclose(now, v, rtol=1e-12)
    np.testing.assert_allclose(target, u, rtol=1e-9, atol=1e-9)  # roundings of float64
    assert jnp.abs(u - v).max() > 0.1
    for (x1, nfe), num in zip(steps, (1, 3), strict=True):
        np.testing.assert_allclose(x1, flow, atol=1e-7)  # 100 steps of rk4
        assert nfe == num


def test_the_mean_flow_loss_is_stationary_at_the_exact_average_velocity():
    # In expectation over pairs: the identity holds for E[u_t | x_t], and the target is affine in u_t.
    loss_fn = fm.mean_flow_loss(instantaneous=0.25, power=0.0)

    @jax.jit
    def run(key, params):
        def loss(params, key, x0, x1):
            def field(t, x, cond, interval):
                h = interval[:, None]
                return (
                    average_velocity(t, x, cond, interval)
                    + params[0]
                    + params[1] * x
                    + params[2] * h
                    + params[3] * h * x
                )

            return loss_fn(field, {"x0": x0, "x1": x1}, key)[0]

        return jax.grad(loss)(params, key, *gaussian_pairs())

    # Four standard errors of 10,000 pairs: the targets' scatter is about 1.2.
    np.testing.assert_allclose(run(jax.random.key(0), jnp.zeros(4)), 0, atol=0.1)
    for index in range(4):
        assert jnp.abs(run(jax.random.key(0), jnp.zeros(4).at[index].set(1.0))).max() > 0.3


def test_the_mean_flow_loss_is_adaptive_weighted_and_partly_instantaneous(batch):
    # Zero has no derivatives: the target is u_t, and the losses are of the same x1 - x0.
    zero = lambda t, x, cond, interval: 0 * x  # noqa: E731
    plain = {power: fm.mean_flow_loss(power=power) for power in (0.5, 1.0)}
    weighted = fm.mean_flow_loss(coupling=fm.GibbsWeights(1.0))
    # Of this field the identity makes u_t + interval, since the interval falls along the path: where u_t is 0 the
    # squared error is (1 + 2 interval)².
    twice = lambda t, x, cond, interval: -1 - interval[:, None] + 0 * x  # noqa: E731
    still = {"x0": batch["x0"], "x1": batch["x0"]}

    @jax.jit
    def run(key):
        loss = lambda fn, field, batch: fn(field, batch, jax.random.clone(key))  # noqa: E731
        shares = [fm.mean_flow_loss(instantaneous=share, power=0.0) for share in (1.0, 0.75, 0.0)]
        losses = {power: loss(fn, zero, batch)[0] for power, fn in plain.items()}
        return losses, loss(weighted, zero, batch), [loss(fn, twice, still)[0] for fn in shares]

    losses, (loss, metrics, log_mean), shares = run(jax.random.key(0))
    square = np.square(np.float64(batch["x1"]) - np.float64(batch["x0"]))[:, 0]
    w = np.exp(-np.sqrt(square))
    for power, value in losses.items():
        assert_close(value, (square / (square + 0.01) ** power).mean(), LAYER)
    assert_close(loss, (w / w.mean() * square / (square + 0.01)).mean(), LAYER)
    assert_close(metrics["unweighted_loss"], square.mean(), LAYER)
    assert_close(log_mean, np.log(w.mean()), LAYER)
    assert_close(shares[0], 1, LAYER)
    rest = (shares[1] - 1) / (shares[2] - 1)
    assert abs(rest - 0.25) < 0.16  # four standard errors of 128 pairs


def test_only_the_average_velocity_itself_is_differentiated(batch):
    # u = p x has du/dt = p v: the target v + interval p v and the adaptive weight are constants to the gradient.
    p, t, interval = 0.7, 0.25, 0.5

    def loss(p):
        times = iter((t + interval, t))
        fixed = fm.mean_flow_loss(instantaneous=0.0, time=lambda key, num: jnp.full(num, next(times)))
        return fixed(lambda t, x, cond, interval: p * x, batch, jax.random.key(0))[0]

    value, slope = jax.jit(jax.value_and_grad(loss))(p)
    x0, x1 = np.float64(batch["x0"]), np.float64(batch["x1"])
    x, v = (1 - t) * x0 + t * x1, x1 - x0
    error = p * x - (v + interval * p * v)
    assert_close(value, (error**2 / (error**2 + 0.01)).mean(), LAYER)
    assert_close(slope, (2 * error * x / (error**2 + 0.01)).mean(), NETWORK)  # terms of both signs


def test_guidance_of_mean_flow_extrapolates_labelled_rows_only():
    seen = []

    def field(t, x, cond, interval):
        seen.append((cond, interval))
        return jnp.full_like(x, 0.5)

    cond = jnp.array([0, -1, 2])
    v = guided_target(field, T, X0, cond, X1, 2.0)
    assert_close(v, jnp.stack([3 * X1[0] - 1, X1[1], 3 * X1[2] - 1]), FORMULA)
    np.testing.assert_array_equal(seen[0][0], [-1, -1, -1])
    np.testing.assert_array_equal(seen[0][1], [0, 0, 0])
    with pytest.raises(ValueError, match="guidance_weight needs a condition, but cond is None"):
        guided_target(field, T, X0, None, X1, 2.0)


def test_guidance_of_unsigned_labels_knows_no_class():
    field = lambda t, x, cond, interval: x * 0 + cond[:, None].astype(x.dtype)  # noqa: E731
    v = guided_target(field, T, X0, jnp.array([0, 1, 2], jnp.uint8), X1, 1.0)
    assert_close(v, 2 * X1 + 1, FORMULA)


def small_network(key, inputs, width=32):
    """Parameters of two tanh layers, and the function of columns that they make."""
    k1, k2, k3 = jax.random.split(key, 3)
    shapes = ((k1, (inputs, width)), (k2, (width, width)), (k3, (width, 1)))
    params = [jax.random.normal(k, shape) / np.sqrt(shape[0]) for k, shape in shapes]

    def apply(params, *columns):
        h = jnp.concatenate(columns, axis=1)
        for weights in params[:-1]:
            h = jnp.tanh(h @ weights)
        return h @ params[-1]

    return params, apply


def test_a_small_network_learns_to_sample_in_one_step():
    # Two Gaussians far apart, which no affine map of x0 makes. In one dimension power 0 is right.
    loss_fn = fm.mean_flow_loss(instantaneous=0.5, power=0.0)

    @jax.jit
    def train(key):
        k0, k1, key = jax.random.split(key, 3)
        params, apply = small_network(k0, 4)

        def field(params):
            return lambda t, x, cond, interval: apply(params, x, t[:, None], interval[:, None], jnp.ones_like(x))

        optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 400))

        def step(state, key):
            params, opt_state = state
            k0, k1, key = jax.random.split(key, 3)
            x1 = jax.random.rademacher(k0, (128, 1)) * 1.5 + 0.3 * jax.random.normal(k1, (128, 1))
            loss, gradient = jax.value_and_grad(lambda p: loss_fn(field(p), {"x1": x1}, key)[0])(params)
            updates, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(params, updates), opt_state), loss

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, 400))
        x0 = jax.random.normal(k1, (4096, 1))
        one, nfe = fm.integrate_mean(field(params), x0)
        velocity = lambda t, x, cond: field(params)(t, x, cond, jnp.zeros_like(t))  # noqa: E731
        euler, _ = fm.integrate(velocity, x0, method="euler", num_steps=1)
        return one, nfe, euler

    one, nfe, euler = train(jax.random.key(0))
    assert nfe == 1
    inside = lambda x: (np.abs(np.abs(x) - 1.5) < 0.9).mean()  # noqa: E731
    # Mean 0 and std √(1.5² + 0.3²) within what 400 steps leave. One Euler step of its velocity stays in the middle.
    np.testing.assert_allclose([one.mean(), one.std()], [0, 1.53], atol=0.15)
    assert inside(one) > 0.9 > 0.5 > inside(euler)
