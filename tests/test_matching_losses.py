"""Losses: weights and their running mean, what is minimised in closed form, and what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from matching_cases import MEAN, STD, X0, X1, T, gaussian_pairs, gaussian_score, gaussian_velocity, labelled_pairs
from tolerances import LAYER, assert_close

from flowgen import matching as fm
from flowgen.matching import velocity_field
from flowgen.matching.mean_flow import PUBLISHED_TIME


@pytest.fixture(scope="module")
def batch():
    return labelled_pairs()


def affine(params):
    """A field with a parameter per kind of term, in one dimension: enough for what is asked of it here."""
    return lambda t, x, cond: params[0] + params[1] * t[:, None] + params[2] * x + params[3] * t[:, None] * x


PARAMS = jnp.array([0.3, -0.2, 0.5, 0.1])


def test_losses_weigh_pairs_and_follow_the_mean_of_the_weights(batch):
    couplings = {
        "plain": fm.Independent(),
        "limit": fm.GibbsWeights(1e9),
        "running": fm.GibbsWeights(1.0),
        "batch": fm.GibbsWeights(1.0, normalize="batch"),
        "none": fm.GibbsWeights(1.0, normalize="none"),
    }

    @jax.jit
    def run(key, log_mean):
        def loss(coupling, log_mean):
            # Every loss is to draw the same times.
            return fm.flow_matching_loss(coupling=coupling)(affine(PARAMS), batch, jax.random.clone(key), log_mean)

        return {name: loss(coupling, log_mean) for name, coupling in couplings.items()}, loss(
            couplings["running"], None
        )

    first, without = run(jax.random.key(0), -jnp.inf)
    log_weight = -np.abs(np.float64(batch["x0"]) - np.float64(batch["x1"]))[:, 0]
    mean = np.log(np.exp(log_weight).mean())
    # The same sums in another order.
    assert_close(first["limit"][0], first["plain"][0], LAYER)
    assert_close(first["running"][2], mean, LAYER)
    assert_close(without[2], mean, LAYER)
    assert_close(first["running"][0], first["batch"][0], LAYER)
    assert_close(first["none"][0], first["batch"][0] * np.exp(mean), LAYER)
    assert abs(float(first["batch"][0] / first["plain"][0]) - 1) > 0.05
    share = np.exp(log_weight).sum() ** 2 / (128 * np.exp(2 * log_weight).sum())
    assert_close(first["running"][1]["ess"], share, LAYER)
    assert first["plain"][1]["ess"] == 1
    assert_close(first["running"][1]["unweighted_loss"], first["plain"][0], LAYER)
    # The running mean moves by a hundredth, and divides the weights.
    later, _ = run(jax.random.key(0), jnp.float32(mean + 1))
    assert_close(later["running"][2], mean + 0.99, LAYER)
    assert_close(later["running"][0], first["running"][0] * np.exp(-0.99), LAYER)


def exact_predictions(path):
    """What networks of each kind are to predict for a Gaussian pair, given (t, x)."""
    velocity = partial(gaussian_velocity, path)
    return {
        "velocity": velocity,
        "x1": lambda t, x: fm.velocity_to_x1(path, t, x, velocity(t, x)),
        "noise": lambda t, x: fm.velocity_to_noise(path, t, x, velocity(t, x)),
        "score": lambda t, x: gaussian_score(path, t, x),
    }


@pytest.mark.parametrize("kind", ["velocity", "x1", "noise", "score"])
def test_the_loss_is_least_at_the_exact_prediction_and_of_order_one_to_the_ends(kind):
    loss_fn = fm.flow_matching_loss(prediction=kind)

    @jax.jit
    def run(key, params):
        def loss(params, key, x0, x1):
            exact = exact_predictions(fm.CondOT())[kind]
            return loss_fn(lambda t, x, cond: params[0] * exact(t, x) + params[1], {"x0": x0, "x1": x1}, key)[0]

        return jax.value_and_grad(loss)(params, key, *gaussian_pairs())

    loss, slopes = run(jax.random.key(0), jnp.array([1.0, 0.0]))
    assert loss < 2
    # Four standard errors of 10,000 pairs, whose errors are of order one.
    np.testing.assert_allclose(slopes, 0, atol=0.08)
    assert abs(run(jax.random.key(0), jnp.array([1.3, 0.0]))[1][0]) > 0.15
    assert abs(run(jax.random.key(0), jnp.array([1.0, 0.5]))[1][1]) > 0.2


@pytest.mark.parametrize(
    "path", [fm.CondOT(), fm.Trigonometric(), fm.Polynomial(3.0), fm.VariancePreserving()], ids=str
)
def test_networks_of_every_prediction_sample_well_with_solvers_that_evaluate_at_the_ends(path):
    class Network:
        """Answers exactly, but for an error of a hundredth such as networks make."""

        def apply(self, kind, t, x, cond):
            wrong = 0.01 * jnp.sin(40 * x + 7 * t[:, None])
            return exact_predictions(path)[kind](t, x) + wrong

    kinds = ("x1", "noise", "score")
    x0 = jax.scipy.stats.norm.ppf((jnp.arange(1000) + 0.5) / 1000)[:, None]

    @jax.jit
    def run():
        fields = {k: velocity_field(Network(), k, fm.MatchingConfig(fm.FlowMatching(k), path)) for k in kinds}
        return {kind: fm.integrate(field, x0, method="heun", num_steps=40)[0] for kind, field in fields.items()}

    for name, x1 in run().items():
        # The errors of the predictions, and what the diffusion path keeps of the data at t = 0.
        np.testing.assert_allclose([x1.mean(), x1.std()], [MEAN, STD], atol=0.03, err_msg=name)


def test_labels_are_dropped_at_the_rate_asked_and_reach_the_network(batch):
    many = {name: jnp.repeat(value, 8, axis=0) for name, value in batch.items()}
    many["cond"] = many["cond"].astype(jnp.uint8)  # which has no -1

    def labels_seen(loss_fn, key):
        seen = []

        def velocity(t, x, cond, interval=None):
            seen.append(cond)
            return x

        loss_fn(velocity, many, key)
        return seen[0]

    losses = [fm.flow_matching_loss(label_dropout=0.3), fm.flow_matching_loss(), fm.mean_flow_loss()]
    run = jax.jit(lambda keys: [labels_seen(loss, key) for loss, key in zip(losses, keys, strict=True)])
    for labels, rate in zip(run([jax.random.key(i) for i in range(3)]), (0.3, 0.0, 0.1), strict=True):
        dropped = np.asarray(labels, np.int64) == -1
        # Four standard errors of 1,024 labels; none where none are to be dropped.
        assert abs(dropped.mean() - rate) <= 0.2 * np.sqrt(rate) * np.sqrt(1 - rate)
        np.testing.assert_array_equal(np.asarray(labels)[~dropped], np.asarray(many["cond"])[~dropped])


def test_times_are_distributed_as_asked():
    @jax.jit
    def draw(key):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        shifted = fm.Shifted(3.0)(k3, 4000).mean()
        published = PUBLISHED_TIME(k4, 4000)
        return fm.Uniform(stratified=True)(k1, 100), fm.LogitNormal(1.2, 0.5)(k2, 4000), shifted, published

    strata, normal, shifted, published = draw(jax.random.key(0))
    np.testing.assert_array_equal(np.sort(np.floor(np.asarray(strata) * 100)), np.arange(100))
    # Four standard errors of 4,000 draws, here and below.
    logits = scipy.special.logit(normal)
    np.testing.assert_allclose([logits.mean(), logits.std()], [1.2, 0.5], atol=0.03)
    # E[1 - 3s/(1 + 2s)] for uniform s, by quadrature.
    s = (np.arange(100_000) + 0.5) / 100_000
    np.testing.assert_allclose(shifted, (1 - 3 * s / (1 + 2 * s)).mean(), atol=0.02)
    # Published as -0.4, with noise at t = 1.
    np.testing.assert_allclose(scipy.special.logit(published).mean(), 0.4, atol=0.07)


SIGMA = 0.8


def bridge_moments(t):
    """Mean and variance of the bridge of independent N(0, 1) and N(MEAN, STD²): the spread adds sigma² t (1-t)."""
    return t * MEAN, (1 - t) ** 2 + t**2 * STD**2 + SIGMA**2 * t * (1 - t)


def bridge_fields(t, x, cond):
    """The velocity and sigma²/2 times the score of that bridge, exact."""
    mean, variance = (number[:, None] for number in bridge_moments(t))
    rate = (-(1 - t) + t * STD**2 + SIGMA**2 * (1 - 2 * t) / 2)[:, None]
    return MEAN + rate / variance * (x - mean), SIGMA**2 / 2 * -(x - mean) / variance


def test_the_bridge_loss_is_least_at_velocity_and_scaled_score():
    # The gradient of the loss in multiples and offsets of both exact fields vanishes, and not elsewhere.
    loss_fn = fm.score_and_flow_matching_loss(bridge=fm.SchroedingerBridge(SIGMA))

    @jax.jit
    def run(key, params):
        def loss(params, key, x0, x1):
            def network(t, x, cond):
                v, s = bridge_fields(t, x, cond)
                return params[0] * v + params[1], params[2] * s + params[3]

            return loss_fn(network, {"x0": x0, "x1": x1}, key)[0]

        return jax.grad(loss)(params, key, *gaussian_pairs())

    best = jnp.array([1.0, 0.0, 1.0, 0.0])
    # Four standard errors of 10,000 pairs, whose errors are of order one.
    np.testing.assert_allclose(run(jax.random.key(0), best), 0, atol=0.08)
    # Twice the scaled score is the score at this sigma times sigma²: a wrong constant is seen.
    assert jnp.abs(run(jax.random.key(0), best.at[2].set(2.0)))[2] > 0.3
    assert jnp.abs(run(jax.random.key(0), best.at[0].set(1.2)))[0] > 0.3


def test_the_bridge_loss_weighs_both_terms(batch):
    @jax.jit
    def run(key):
        network = lambda t, x, cond: (jnp.zeros_like(x), jnp.ones_like(x))  # noqa: E731
        losses = [
            fm.score_and_flow_matching_loss(coupling=c)(network, batch, jax.random.clone(key))
            for c in (fm.Independent(), fm.GibbsWeights(1.0, cost=lambda a, b: jnp.full(len(a), 2.0), normalize="none"))
        ]
        return losses, fm.score_and_flow_matching_loss(coupling=fm.GibbsWeights(0.5))(network, batch, key)

    (plain, halved), weighted = run(jax.random.key(0))
    assert_close(halved[0], plain[0] * np.exp(-2), LAYER)
    metrics = plain[1]
    assert_close(plain[0], metrics["flow_loss"] + metrics["score_loss"], LAYER)
    assert_close(weighted[1]["unweighted_loss"], plain[0], LAYER)
    assert weighted[1]["ess"] < 0.9


def test_the_process_of_the_bridge_ends_in_the_data():
    # As the docstring says it: dX = (v + s) dt + sigma dW.
    @jax.jit
    def run(key):
        k0, key = jax.random.split(key)
        x0 = jax.random.normal(k0, (10_000, 1))
        velocity = lambda *a: bridge_fields(*a)[0]  # noqa: E731
        score = lambda *a: 2 / SIGMA**2 * bridge_fields(*a)[1]  # noqa: E731
        x1, _ = fm.integrate_sde(velocity, score, x0, key, diffusion=lambda t: SIGMA, num_steps=100)
        return x1.mean(), x1.std()

    # Three standard errors of 10,000 samples, and the bias of 100 steps: the noise of the last one, of variance
    # sigma²/100, is left out.
    np.testing.assert_allclose(run(jax.random.key(0)), [MEAN, STD], atol=0.02)


def test_bfloat16_errors_are_summed_in_float32(batch):
    half = {name: batch[name].astype(jnp.bfloat16) for name in ("x0", "x1")}
    run = jax.jit(lambda key: fm.flow_matching_loss()(lambda t, x, cond: 0 * x, half, key))
    loss, metrics, _ = run(jax.random.key(0))
    assert (loss.dtype, metrics["unweighted_loss"].dtype) == (jnp.float32, jnp.float32)


@pytest.mark.parametrize("time", [fm.Uniform(), fm.Uniform(stratified=True), fm.LogitNormal(), fm.Shifted()], ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_losses_and_their_times_have_the_type_of_the_data_or_float32(dtype, time, x64):
    seen = set()

    def velocity(t, x, cond, interval=0):
        seen.add(jnp.result_type(t, interval))
        return x * t[:, None].astype(x.dtype)

    networks = {
        fm.flow_matching_loss: velocity,
        fm.mean_flow_loss: velocity,
        fm.score_and_flow_matching_loss: lambda t, x, cond: (velocity(t, x, cond),) * 2,
    }
    wide = jnp.promote_types(dtype, jnp.float32)
    for kind, network in networks.items():
        loss = kind(time=time, coupling=fm.GibbsWeights(1.0))
        found = jax.eval_shape(
            lambda x, key, loss=loss, network=network: loss(network, {"x1": x}, key),
            X1.astype(dtype),
            jax.random.key(0),
        )
        assert {x.dtype for x in jax.tree.leaves(found)} == {wide}
    assert seen == {wide}


def loss_of(batch, **settings):
    return fm.flow_matching_loss(**settings)(lambda t, x, cond: x, batch, jax.random.key(0))


def test_bridges_in_bfloat16_are_finite_to_the_end():
    point = fm.SchroedingerBridge().sample(
        jax.random.key(0), jnp.array([0.0, 0.999, 1.0]), *(X.astype(jnp.bfloat16) for X in (X0, X1))
    )
    assert all(jnp.isfinite(part).all() for part in point)


WIDE = {"x1": X1[:, :1], "x0": X0[:, :1]}
REFUSED = {
    "output of one number": (
        lambda: fm.flow_matching_loss()(lambda t, x, cond: x[:, 0], WIDE, jax.random.key(0)),
        "the velocity has shape (3,), but x has shape (3, 1)",
    ),
    "output of one channel": (
        lambda: fm.flow_matching_loss()(lambda t, x, cond: x[:, :1], {"x1": X1}, jax.random.key(0)),
        "they must have the same shape",
    ),
    "average of one channel": (
        lambda: fm.mean_flow_loss()(lambda t, x, cond, interval: x[:, :1], {"x1": X1}, jax.random.key(0)),
        "they must have the same shape",
    ),
    "bridge of one channel": (
        lambda: fm.score_and_flow_matching_loss()(lambda t, x, cond: (x, x[:, :1]), {"x1": X1}, jax.random.key(0)),
        "they must have the same shape",
    ),
    "labels in a list": (
        lambda: loss_of({"x1": X1, "cond": [0, 1, 2]}, label_dropout=0.1),
        "give arrays with one row per sample",
    ),
    "batch of other names": (lambda: loss_of({"x1": X1, "labels": T}), "'cond' (labels)"),
    "no data": (lambda: loss_of({"x0": X0}), "it needs 'x1' (data)"),
    "images as bytes": (lambda: loss_of({"x1": jnp.zeros((3, 2), jnp.uint8)}), "x1 is uint8"),
    "noise of integers": (lambda: loss_of({"x1": X1, "x0": jnp.zeros((3, 2), jnp.int32)}), "x0 is int32"),
    "empty batch": (lambda: loss_of({"x1": X1[:0]}), "the batch is empty"),
    "labels too few": (
        lambda: loss_of({"x1": X1, "cond": jnp.zeros(2, jnp.int32)}),
        "cond has shape (2,) for 3 samples",
    ),
    "labels to drop": (
        lambda: loss_of({"x1": X1, "cond": jnp.zeros(3)}, label_dropout=0.1),
        "label_dropout is 0.1, but cond is float32 of shape (3,); to be dropped or guided",
    ),
    "x1 of a path with spread": (lambda: fm.flow_matching_loss(path=fm.CondOT(0.1), prediction="x1"), "sigma 0.1"),
    "noise of a bridge": (
        lambda: fm.MatchingConfig(fm.FlowMatching("noise"), fm.SchroedingerBridge(0.5)),
        "set sigma to 0, or predict the velocity",
    ),
    "prediction of a config": (lambda: fm.FlowMatching("eps"), "prediction is 'eps'"),
    "power of a config": (lambda: fm.MeanFlow(power=-1.0), "power is -1.0"),
    "mean of times": (lambda: fm.LogitNormal(mean=float("nan")), "mean is nan"),
    "shift of infinity": (lambda: fm.Shifted(float("inf")), "shift is inf"),
    "dropout of one": (lambda: fm.flow_matching_loss(label_dropout=1.0), "label_dropout is 1.0"),
    "power of text": (lambda: fm.mean_flow_loss(power="1"), "power is '1'; it must be a finite number"),
    "dropout of text": (lambda: fm.flow_matching_loss(label_dropout="0.1"), "label_dropout is '0.1'"),
    "dropout of the bridge": (lambda: fm.score_and_flow_matching_loss(label_dropout=-0.1), "label_dropout is -0.1"),
    "dropout of mean flow": (lambda: fm.mean_flow_loss(label_dropout=2.0), "label_dropout is 2.0"),
    "prediction": (lambda: fm.flow_matching_loss(prediction="eps"), "prediction is 'eps'"),
    "share": (lambda: fm.mean_flow_loss(instantaneous=1.5), "instantaneous is 1.5"),
    "power": (lambda: fm.mean_flow_loss(power=-1.0), "power is -1.0"),
    "guidance": (lambda: fm.mean_flow_loss(guidance_weight=-0.5), "guidance_weight is -0.5"),
    "no steps": (lambda: fm.integrate_mean(lambda t, x, cond, interval: x, X0, num_steps=0), "num_steps is 0"),
    "std of times": (lambda: fm.LogitNormal(std=0.0), "std is 0.0; it must be positive"),
    "shift": (lambda: fm.Shifted(0.0), "shift is 0.0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what, untyped):
    call, part = REFUSED[what]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert part in str(error.value)
