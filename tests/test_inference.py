"""Weights, estimates, resampling, mixtures and targets, against exact values and float64 sums."""

import math

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from scipy import integrate, special, stats
from tolerances import EPS, FORMULA, LAYER, NETWORK, assert_close

import flowgen
from flowgen import inference
from flowgen.conditioning import Padded
from flowgen.contexts import VectorContext
from flowgen.evaluation import mean_of
from flowgen.flows import TokenFlowConfig
from flowgen.inference import Component, ManyWell

INF, NAN = math.inf, math.nan


def gaussian_weights(shift, num=100_000, of_target=False):
    """Log weights of N(shift, 1) against N(0, 1) at evenly spaced quantiles: sums are nearly integrals."""
    x = stats.norm.ppf((np.arange(num) + 0.5) / num, loc=shift if of_target else 0)
    return jnp.asarray(shift * x - shift**2 / 2, jnp.float32)


@pytest.mark.parametrize("shift", [0.3, 0.8])
def test_estimates_of_two_gaussians_are_the_known_ones(shift):
    # E_q[w²] = exp(shift²) if q and p differ by a shift; the quantiles leave out a share of 1e-5 in the tails.
    share = math.exp(-(shift**2))
    log_weight = gaussian_weights(shift)
    assert_close(inference.effective_sample_size(log_weight), share, 5e-3)
    forward = inference.forward_effective_sample_size(gaussian_weights(shift, of_target=True) + 7)
    assert_close(forward, share, 5e-3)
    value, error = inference.log_normaliser(log_weight + 7)
    assert_close(value, 7, 1e-3, scale=1)
    assert_close(error, math.sqrt((1 / share - 1) / len(log_weight)), 1e-2)


def float64_estimates(values, log_weight):
    """(share, log Z, its error, mean, its error) by their definitions."""
    w = np.exp(np.asarray(log_weight, np.float64) + 300)
    count, mean = len(w), (w @ values) / w.sum()
    return (
        w.sum() ** 2 / (count * (w**2).sum()),
        np.log(w.mean()) - 300,
        w.std(ddof=1) / w.mean() / math.sqrt(count),
        mean,
        math.sqrt(count / (count - 1) * (w**2 @ (values - mean) ** 2)) / w.sum(),
    )


@pytest.mark.parametrize("num", [7, 1_000_000])
@pytest.mark.parametrize("scale", [0.01, 2.0])
def test_estimates_in_float32_are_those_in_float64(num, scale):
    random = np.random.default_rng(0)
    values = random.standard_normal(num).astype(np.float32)
    log_weight = np.float32(scale * random.standard_normal(num) - 300)
    log_weight[::5] = -INF

    @jax.jit
    def estimates(values, log_weight):
        share = inference.effective_sample_size(log_weight)
        return share, *inference.log_normaliser(log_weight), *inference.self_normalised(values, log_weight)

    found = estimates(jnp.asarray(values), jnp.asarray(log_weight))
    expected = float64_estimates(values, log_weight)
    # Log weights near -300 are rounded by 300 EPS / 2 each; sums of many terms of one sign add no more.
    for one, other, size in zip(found, expected, (1, 300, 1, 1, 1), strict=True):
        assert_close(one, other, 150 * EPS, scale=size)


def test_equal_weights_give_the_plain_mean_and_its_error():
    values = np.random.default_rng(1).standard_normal((50, 3)).astype(np.float32)
    found = inference.self_normalised(jnp.asarray(values), jnp.full(50, -700.0))
    plain = [mean_of(column) for column in values.T]
    assert_close(found.value, [one.value for one in plain], FORMULA, scale=1)
    assert_close(found.standard_error, [one.standard_error for one in plain], FORMULA)
    value, error = inference.log_normaliser(jnp.full(50, -700.0))
    assert float(value) == -700
    assert math.isnan(error)  # Equal weights, such as those after resampling, do not show the error.


def test_samples_of_weight_0_do_not_count_whatever_their_value():
    log_weight = jnp.array([0.0, -INF, 0.0])
    assert_close(inference.self_normalised(jnp.array([1.0, NAN, 2.0]), log_weight).value, 1.5, FORMULA)
    assert_close(inference.effective_sample_size(log_weight), 2 / 3, FORMULA)
    assert float(inference.effective_sample_size(jnp.full(3, -INF))) == 0
    assert float(inference.forward_effective_sample_size(jnp.array([0.0, INF]))) == 0


def test_standard_errors_are_the_scatter_of_estimates():
    """Of 2,000 sets of 400 samples, the scatter of an estimate is known to 2 %, and the mean error better."""

    def estimates(key):
        x = jax.random.normal(key, (400,))
        log_weight = 0.5 * x - 0.125
        return inference.log_normaliser(log_weight), inference.self_normalised(x, log_weight)

    for value, error in jax.jit(jax.vmap(estimates))(jax.random.split(jax.random.key(0), 2_000)):
        np.testing.assert_allclose(np.std(value), np.mean(error), rtol=0.08)


def test_estimates_reduce_the_given_axis():
    log_weight = jnp.asarray(np.random.default_rng(2).standard_normal((5, 2)), jnp.float32)
    for estimate in (
        inference.effective_sample_size,
        inference.forward_effective_sample_size,
        lambda x, axis=-1: jnp.stack(inference.log_normaliser(x, axis)),
    ):
        expected = jnp.stack([estimate(column) for column in log_weight.T], axis=-1)
        assert_close(estimate(log_weight, axis=0), expected, FORMULA)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_16_bit_weights_are_summed_in_float32(dtype):
    """In 16 bits, 100,000 overflows, and cumulative weights do not reach the last samples."""
    log_weight, x = jnp.zeros(100_000, dtype), jnp.arange(100_000)
    assert_close(inference.effective_sample_size(log_weight), 1, LAYER)
    assert_close(inference.log_normaliser(log_weight).value, 0, LAYER, scale=1)
    assert_close(inference.forward_effective_sample_size(log_weight), 1, LAYER)
    assert_close(inference.self_normalised(x / 100_000, log_weight).value, 0.5, 1e-3)
    assert_close(inference.mixture_log_prob(jnp.zeros((100_000, 1), dtype), log_weight), jnp.zeros(1), FORMULA, scale=1)
    found = np.unique(inference.resample(jax.random.key(0), x, log_weight))
    assert len(found) > 97_000  # float32 rounds the cumulative weights of so many samples.


NOTHING = jnp.full(4, -INF)
ALL_ZERO = {
    "self_normalised": lambda w: inference.self_normalised(jnp.ones(4), w).value,
    "resample": lambda w: inference.resample(jax.random.key(0), jnp.ones(4), w),
    "mixture_log_prob": lambda w: inference.mixture_log_prob(jnp.zeros((4, 2)), w),
    "forward_kl": lambda w: inference.forward_kl(*laws.case("affine")[:3], w)[0],
}


@pytest.mark.parametrize("name", ALL_ZERO)
def test_weights_that_are_all_0_are_refused_and_are_nan_inside_jit(name):
    with pytest.raises(ValueError, match="all weights are 0; no sample lies in the support"):
        ALL_ZERO[name](NOTHING)
    assert jnp.isnan(jax.jit(ALL_ZERO[name])(NOTHING)).all()


GOOD = jnp.array([0.0, -1.0])
CHECKED = {
    "effective_sample_size": (inference.effective_sample_size, "log_weight"),
    "forward_effective_sample_size": (inference.forward_effective_sample_size, "-log_weight"),
    "log_normaliser": (inference.log_normaliser, "log_weight"),
    "self_normalised": (lambda w: inference.self_normalised(GOOD, w), "log_weight"),
    "resample": (lambda w: inference.resample(jax.random.key(0), GOOD, w), "log_weight"),
    "log_weights": (lambda w: inference.log_weights(w, GOOD), "log_target"),
    "log_weights of samples": (lambda w: inference.log_weights(GOOD, w), "log_prob"),
}


@pytest.mark.parametrize("name", CHECKED)
def test_weights_that_are_no_numbers_are_told_outside_jit(name):
    function, field = CHECKED[name]
    with pytest.raises(ValueError, match=f"^{field} contains 1 × NaN among 2 values"):
        function(jnp.array([0.0, NAN]))
    with pytest.raises(ValueError, match=f"^{field} contains 1 × \\+inf among 2 values"):
        function(jnp.array([0.0, -INF if field.startswith("-") else INF]))
    jax.jit(function)(jnp.array([0.0, NAN]))


def test_a_sample_outside_its_own_density_is_told():
    with pytest.raises(ValueError, match=r"log_target - log_prob contains 1 × \+inf"):
        inference.log_weights(GOOD, jnp.array([0.0, -INF]))
    np.testing.assert_array_equal(inference.log_weights(jnp.array([0.0, -INF]), GOOD), [0, -INF])


def test_resampling_rounds_the_expected_numbers_and_is_unbiased():
    weights = np.array([0.0, 4.0, 0.3, 1.0, 2.2, 0.0])
    expected = 10 * weights / weights.sum()

    @jax.jit
    def counts(key):
        chosen = inference.resample(key, jnp.arange(6), jnp.log(jnp.asarray(weights, jnp.float32)), 10)
        return jnp.bincount(chosen, length=6)

    found = np.stack([counts(jax.random.key(seed)) for seed in range(400)])
    assert (found >= np.floor(expected)).all()
    assert (found <= np.ceil(expected)).all()
    # A count that rounds to one of two numbers has a standard deviation of at most ½: 4 standard errors.
    np.testing.assert_allclose(found.mean(axis=0), expected, atol=4 * 0.5 / 20)


def test_resampling_a_million_float32_weights_keeps_their_mean():
    x = jnp.asarray(np.random.default_rng(3).standard_normal(1_000_000), jnp.float32)
    found = jax.jit(inference.resample)(jax.random.key(0), {"x": x}, 0.5 * x)["x"]
    expected = float64_estimates(np.asarray(x, np.float64), 0.5 * np.asarray(x, np.float64) - 300)[3]
    # Independent draws would scatter by 1e-3. Systematic ones in the order of x, of which ranks round, by less.
    np.testing.assert_allclose(np.asarray(found, np.float64).mean(), expected, atol=1e-3)
    assert len(found) == len(x)


def test_a_flow_weighted_for_its_own_density_has_equal_weights():
    flow, params, *_ = laws.case("affine")

    def log_target(x):
        return laws.apply(flow, params, x, method="log_prob") + 5

    s = inference.importance_sample(flow, params, jax.random.key(0), 6, log_target)
    scale = float(jnp.abs(log_target(s.x)).max())
    assert_close(s.log_weight, jnp.full(6, 5.0), NETWORK, scale=scale)
    assert_close(inference.log_normaliser(s.log_weight).value, 5, NETWORK, scale=scale)


@pytest.mark.parametrize(
    ("log_target", "problem"),
    [
        (lambda x: jnp.square(x), "log_target\\(x\\) has shape"),
        (lambda x: jnp.zeros(len(x), int), "log_target\\(x\\) is int32"),
        (3.0, "log_target is 3.0"),
    ],
    ids=["per dimension", "integers", "no function"],
)
def test_a_target_that_is_not_one_number_per_sample_is_refused(untyped, log_target, problem):
    flow, params, *_ = laws.case("affine")
    with pytest.raises(ValueError, match=problem):
        inference.importance_sample(flow, params, jax.random.key(0), 6, log_target)


def test_a_mixture_is_normalised_and_is_the_weighted_sum():
    x = np.linspace(-12, 12, 2_001)
    log_probs = np.stack([stats.norm.logpdf(x, mean, 1) for mean in (-3, 0, 2)])
    log_probs[1, x < 0] = -INF
    log_weight = np.array([0.2, 1.0, -INF]) + 50
    found = inference.mixture_log_prob(jnp.asarray(log_probs, jnp.float32), jnp.asarray(log_weight, jnp.float32))
    expected = special.logsumexp(special.log_softmax(log_weight)[:, None] + log_probs, axis=0)
    assert_close(np.exp(found), np.exp(expected), LAYER)


@pytest.mark.parametrize(
    ("shares", "num", "counts"),
    [([0.5, 0.25, 0.25], 10, (5, 3, 2)), ([0, 3, 1], 2, (0, 2, 0)), ([1, 1, 1], 2, (1, 1, 0)), ([2], 7, (7,))],
)
def test_strata_are_rounded_to_the_total(shares, num, counts):
    assert inference.stratified_counts(shares, num) == counts


def test_a_mixture_of_classes_gives_samples_with_their_density():
    flow, params, *_ = laws.case("classes")
    components = [Component(flow, params, label) for label in (0, np.int64(1), jnp.asarray(2))]
    x, log_prob = inference.sample_mixture(components, jax.random.key(0), 5, [2, 0, 1])
    of_class = [laws.apply(flow, params, x, jnp.full(5, label), method="log_prob") for label in (0, 2)]
    expected = special.logsumexp(np.stack(of_class), axis=0, b=np.array([[3 / 5], [2 / 5]]))
    assert x.shape == (5, *flow.config.event_shape)
    assert_close(log_prob, expected, NETWORK)


TOKENS = {"shape": (3, 1), "width": 8, "head_dim": 8, "num_blocks": 2, "layers_per_block": 1}


def test_a_mixture_of_contexts_gives_samples_with_their_density():
    config = TokenFlowConfig(context=VectorContext(2), **TOKENS)
    flow, params = laws.perturbed(config, jax.random.key(0), scale=0.3)
    contexts = [jnp.array([[3.0, -1.0]]), jnp.array([[-2.0, 4.0]])]
    components = [Component(flow, params, context) for context in contexts]
    x, log_prob = inference.sample_mixture(components, jax.random.key(1), 6)
    of_context = [
        laws.apply(flow, params, x, jnp.broadcast_to(context, (6, 2)), method="log_prob") for context in contexts
    ]
    assert np.abs(of_context[0] - of_context[1]).max() > 0.1
    assert_close(log_prob, special.logsumexp(np.stack(of_context), axis=0) - math.log(2), NETWORK)
    with pytest.raises(ValueError, match=r"cond is float32 of shape \(6, 2\)"):
        inference.sample_mixture([Component(flow, params, jnp.zeros((6, 2)))], jax.random.key(1), 6)


def test_a_mixture_of_padded_samples_has_one_mask():
    config = TokenFlowConfig(padded=True, num_classes=2, **TOKENS)
    flow, params = laws.perturbed(config, jax.random.key(0), scale=0.3)
    mask = jnp.array([[True, False, True]])
    components = [Component(flow, params, Padded(mask, jnp.array([label]))) for label in (0, 1)]
    x, log_prob = inference.sample_mixture(components, jax.random.key(1), 4)
    assert (x[:, 1] == 0).all()
    of_class = [
        laws.apply(flow, params, x, Padded(jnp.repeat(mask, 4, axis=0), jnp.full(4, label)), method="log_prob")
        for label in (0, 1)
    ]
    assert_close(log_prob, special.logsumexp(np.stack(of_class), axis=0) - math.log(2), NETWORK)
    other = Component(flow, params, Padded(~mask, jnp.array([1])))
    with pytest.raises(ValueError, match=r"components\[1\] and components\[0\] have different masks"):
        inference.sample_mixture([components[0], other], jax.random.key(1), 4)
    with pytest.raises(ValueError, match="this model's samples are padded"):
        inference.sample_mixture([Component(flow, params)], jax.random.key(1), 4)


REFUSED = {
    "weights of a mixture": (lambda: inference.mixture_log_prob(jnp.zeros((3, 5)), jnp.zeros(2)), "log_weight has"),
    "negative shares": (lambda: inference.stratified_counts([1, -1], 3), "shares is"),
    "no component": (lambda: inference.sample_mixture([], jax.random.key(0), 3), "components is empty"),
    "a flow alone": (lambda: inference.sample_mixture([laws.case("affine")[:2]], jax.random.key(0), 3), "Component"),
    "flows of different shapes": (
        lambda: inference.sample_mixture(
            [Component(*laws.case(name)[:2]) for name in ("affine", "rectangular")], jax.random.key(0), 3
        ),
        r"components\[1\] has samples of shape",
    ),
    "lists of values": (lambda: inference.self_normalised([1.0, 2.0], GOOD), "values is a list"),
    "lists of weights": (lambda: inference.self_normalised(GOOD, [0.0, 0.0]), "log_weight is a list"),
    "weights of a mixture in a list": (lambda: inference.mixture_log_prob(GOOD, [0.0, 0.0]), "log_weight is a list"),
    "no weight": (lambda: inference.effective_sample_size(jnp.zeros(0)), "give at least one log weight"),
    "no weight in an axis": (lambda: inference.log_normaliser(jnp.zeros((3, 0))), "give at least one log weight"),
    "one number": (lambda: inference.effective_sample_size(jnp.zeros(())), "give at least one log weight"),
    "rows to resample": (lambda: inference.resample(jax.random.key(0), jnp.zeros(3), GOOD), "x contains float32"),
    "values and weights": (lambda: inference.self_normalised(jnp.zeros(3), jnp.zeros(2)), "values is"),
    "target and samples": (lambda: inference.log_weights(jnp.zeros(3), jnp.zeros(2)), "log_target has shape"),
    "none to draw": (lambda: inference.resample(jax.random.key(0), GOOD, GOOD, 0), "num is 0"),
    "an odd number": (lambda: ManyWell(3), "dim is 3"),
    "another width": (lambda: ManyWell(4).log_density(jnp.zeros((2, 6))), "4 coordinates"),
    "another shape": (lambda: ManyWell(4).sample(jax.random.key(0), 2, (3, 2)), "event_shape is"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_do_not_fit_are_told(untyped, name):
    call, problem = REFUSED[name]
    with pytest.raises(ValueError, match=problem):
        call()


def well(x):
    return np.exp(-(x**4 - 6 * x**2 - 0.5 * x))


def test_the_many_well_has_the_known_normaliser():
    one, _ = integrate.quad(well, -6, 6, points=[-1.7, 1.8], epsabs=0, epsrel=1e-12)
    assert_close(ManyWell(32).log_normaliser, 16 * (math.log(one) + 0.5 * math.log(2 * math.pi)), 1e-12)
    assert_close(ManyWell(32).log_normaliser, 164.69568, 1e-7)  # the value used with FAB


def test_samples_of_the_many_well_have_its_moments():
    num = 20_000
    x = np.asarray(ManyWell(4).sample(jax.random.key(0), num, (2, 2, 1)), np.float64).reshape(num, 2, 2)
    points = np.linspace(-5, 5, 4_001)

    def moment(power):
        return np.average(points**power, weights=well(points))

    for power in range(1, 5):
        # The two wells of a sample are independent: 2 num draws.
        error = math.sqrt((moment(2 * power) - moment(power) ** 2) / (2 * num))
        assert abs((x[..., 0] ** power).mean() - moment(power)) < 5 * error
    assert abs(np.square(x[..., 1]).mean() - 1) < 5 * math.sqrt(2 / (2 * num))
    log_p = ManyWell(4).log_density(jnp.asarray(x, jnp.float32))
    assert_close(log_p, (np.log(well(x[..., 0])) - x[..., 1] ** 2 / 2).sum(axis=1), FORMULA)
    assert flowgen.inference is inference
