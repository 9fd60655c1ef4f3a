"""Objectives: known divergences, gradients against finite differences, one compiled program for training."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from tolerances import FORMULA, NETWORK, assert_close, assert_trees_close

import flowgen
from flowgen import inference
from flowgen.inference import ManyWell

CONFIG = flowgen.TARFlowConfig(
    image_size=2, patch_size=1, channels=1, width=8, head_dim=8, num_blocks=2, layers_per_block=1
)
EXACT = flowgen.TARFlowConfig(**{**vars(CONFIG), "dtype": "float64"})
NUM = 6


@cache
def perturbed(config=CONFIG):
    return laws.perturbed(config, jax.random.key(0), scale=0.1)


def log_gaussian(x, mean=0.5, std=0.8):
    """The log-density of N(mean, std²) in each pixel, times 10."""
    log_p = -0.5 * jnp.square((x - mean) / std) - math.log(std * math.sqrt(2 * math.pi))
    return log_p.sum(axis=(1, 2, 3)) + math.log(10)


def reverse(flow, params, gradient="total", log_target=log_gaussian, num=NUM):
    return inference.reverse_kl(flow, params, jax.random.key(3), num, log_target, gradient=gradient)


def test_the_gradient_of_the_reverse_divergence_is_that_of_finite_differences(x64):
    flow, params = perturbed(EXACT)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
    leaves, tree = jax.tree.flatten(params)
    random = np.random.default_rng(0)
    direction = tree.unflatten([jnp.asarray(random.standard_normal(leaf.shape)) for leaf in leaves])
    many_well = ManyWell(4).log_density

    @jax.jit
    def value(step):
        moved = jax.tree.map(lambda leaf, change: leaf + step * change, params, direction)
        return reverse(flow, moved, log_target=many_well)[0]

    @jax.jit
    def slopes(params):
        """The directional derivatives of both estimates, and of the density at fixed samples."""
        total, path = (
            jax.grad(lambda params, g=g: reverse(flow, params, g, many_well)[0])(params) for g in ("total", "path")
        )
        x = flowgen.decoding.sample(flow, params, jax.random.key(3), NUM, denoise=False).x
        fixed = jax.grad(lambda params: flow.apply(params, x, method="log_prob").mean())(params)
        return [sum(jax.tree.leaves(jax.tree.map(jnp.vdot, tree, direction))) for tree in (total, path, fixed)]

    total, path, fixed = slopes(params)
    assert_close(total, (value(1e-6) - value(-1e-6)) / 2e-6, FORMULA)
    assert_close(total, path + fixed, 1e-10)  # What the path leaves out is the term whose mean is 0.


@pytest.mark.slow
def test_the_path_gradient_vanishes_at_the_target():
    flow, params = perturbed()

    def log_target(x):
        return flow.apply(params, x, method="log_prob") + 3

    @jax.jit
    def largest(params):
        slopes = [
            jax.grad(lambda params, g=g: reverse(flow, params, g, log_target)[0])(params) for g in ("total", "path")
        ]
        return [jnp.stack([jnp.abs(leaf).max() for leaf in jax.tree.leaves(slope)]).max() for slope in slopes]

    total, path = largest(params)
    assert_close(path, 0, NETWORK, scale=total)


def test_divergences_of_the_standard_normal_are_the_known_ones():
    """A flow of zeros is N(0, I). Its divergences from N(0.5, 0.8²) in four pixels follow from means and variances."""
    flow = CONFIG.build()
    params = jax.tree.map(jnp.zeros_like, perturbed()[1])
    num, mean, std = 4_000, 0.5, 0.8
    per_pixel = math.log(std) + (1 + mean**2) / (2 * std**2) - 0.5
    loss, metrics = jax.jit(lambda params: reverse(flow, params, num=num))(params)
    # In a pixel, log q - log p is a quadratic of a normal: its variance is 2 a² + b².
    a, b = 0.5 / std**2 - 0.5, mean / std**2
    error = math.sqrt(4 * (2 * a**2 + b**2) / num)
    assert abs(float(loss) - (4 * per_pixel - math.log(10))) < 4 * error
    assert float(metrics["elbo"]) == -float(loss) < float(metrics["log_normaliser"])
    assert abs(float(metrics["log_normaliser"]) - math.log(10)) < 0.2
    x = mean + std * jax.random.normal(jax.random.key(4), (num, *CONFIG.event_shape))
    entropy_and_divergence = 4 * (0.5 * math.log(2 * math.pi) + (mean**2 + std**2) / 2)
    error = math.sqrt(4 * (std**4 / 2 + mean**2 * std**2) / num)
    assert abs(float(inference.maximum_likelihood(flow, params, x)[0]) - entropy_and_divergence) < 4 * error


def test_weights_in_the_forward_divergence_count_like_copies():
    flow, params = perturbed()
    x = laws.images(CONFIG, jax.random.key(5), batch=3)
    log_weight = jnp.log(jnp.array([2.0, 0.0, 1.0])) + 40
    copies = x[jnp.array([0, 0, 2])]

    @jax.jit
    def both(params):
        weighted = jax.value_and_grad(lambda p: inference.forward_kl(flow, p, x, log_weight)[0])(params)
        return weighted, jax.value_and_grad(lambda p: inference.maximum_likelihood(flow, p, copies)[0])(params)

    assert_trees_close(*both(params), NETWORK)
    with_nan = x.at[1].set(jnp.nan)
    slopes = jax.grad(lambda p: inference.forward_kl(flow, p, with_nan, log_weight)[0])(params)
    assert_trees_close(slopes, both(params)[0][1], NETWORK)  # a sample of weight 0, whatever its value
    to_data = jax.grad(lambda parts: inference.forward_kl(flow, params, *parts)[0])((x, log_weight))
    assert all((part == 0).all() for part in to_data)


def test_a_weighted_sum_adds_losses_and_keeps_metrics():
    three, one, share = jnp.array(3.0), jnp.array(1.0), jnp.array(0.25)
    parts = {"data": (0.5, (three, {"loss": three})), "energy": (2, (one, {"ess": share}))}
    loss, metrics = inference.weighted_sum(parts)
    assert float(loss) == 3.5
    assert metrics == {"loss": loss, "data/loss": three, "energy/ess": share}
    with pytest.raises(ValueError, match="outcomes is empty"):
        inference.weighted_sum({})
    with pytest.raises(ValueError, match="the factor of 'data' is -1"):
        inference.weighted_sum({"data": (-1, parts["data"][1])})


def test_an_unknown_gradient_is_refused(untyped):
    with pytest.raises(ValueError, match="gradient is 'stl'"):
        reverse(*perturbed(), gradient="stl")


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["total", "path"])
def test_a_flow_learns_a_gaussian_from_its_density_in_one_program(gradient):
    flow = CONFIG.build()
    optimizer, traces = optax.adam(1e-2), []

    @jax.jit
    def train(params, keys):
        traces.append(1)

        def step(state, key):
            params, moments = state
            slope, metrics = jax.grad(
                lambda params: inference.reverse_kl(flow, params, key, 64, log_gaussian, gradient=gradient),
                has_aux=True,
            )(params)
            updates, moments = optimizer.update(slope, moments)
            return (optax.apply_updates(params, updates), moments), metrics

        (params, _), metrics = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return params, metrics

    params, metrics = train(flowgen.init(flow, jax.random.key(0)), jax.random.split(jax.random.key(1), 100))
    _, later = train(params, jax.random.split(jax.random.key(2), 100))
    assert len(traces) == 1
    assert metrics["elbo"][:5].mean() < math.log(10) - 0.5
    # The bound is tight, and the weights are equal, for a flow that is the target.
    assert abs(float(later["elbo"][-20:].mean()) - math.log(10)) < 0.05
    assert later["ess"][-20:].mean() > 0.95
