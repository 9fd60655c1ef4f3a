"""Drafts: what they cannot change, what they save, and what is refused."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from conftest import rows
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tolerances import NETWORK, assert_close

from flowgen.decoding import (
    Draft,
    Jacobi,
    SlidingWindow,
    fit_affine_draft,
    invert,
    measure_plans,
    sample,
    sample_and_log_prob,
)

PLANS = {
    "jacobi": Jacobi(tol=0.0, init="draft"),
    "windows": Jacobi(window=4, tol=0.0, init="draft"),
    "sliding": SlidingWindow(window=4, tol=0.0, init="draft"),
}
GARBAGE = {"nan": jnp.nan, "infinite": jnp.inf, "huge": 1e30}


def filled(value, noise, cond):
    """Tokens that all have one value."""
    return jnp.full_like(noise, value)


def known(tokens, noise, cond):
    """Tokens that are known beforehand."""
    return tokens


def encoded(name):
    """Returns a flow, its params, tokens of every block, labels and the noise."""
    flow, params, x, cond = laws.case(name)
    later, _ = laws.apply(flow, params, x, cond, method="trajectory")
    return flow, params, [flow.config.to_tokens(x), *later[:-1]], cond, later[-1]


@cache
def fitted(name):
    """Returns a flow, its params, samples, their labels and the affine draft that is fitted to them."""
    flow, params = laws.perturbed(laws.FLOWS[name], jax.random.key(0))
    x, labels = laws.images(flow.config, jax.random.key(1), 512), laws.labels(flow.config, 512)
    return flow, params, x, labels, fit_affine_draft(flow, params, x, labels)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("value", rows(GARBAGE, ("infinite",)))
def test_no_draft_changes_the_solution_at_tolerance_0(plan, value):
    flow, params, tokens, cond, z = encoded("classes")
    draft = Draft(filled, (jnp.asarray(GARBAGE[value]),) * flow.config.num_blocks)
    r = invert(flow, params, z, cond, plan=PLANS[plan], draft=draft)
    assert_close(r.x, flow.to_images(tokens[0]), NETWORK)
    assert jnp.all(r.residual == 0)
    assert not r.unsolved.any()


@pytest.mark.parametrize(
    "name", rows(("classes", "starflow text", "starflow video"), ("starflow text", "starflow video"))
)
def test_a_draft_of_the_solution_takes_one_sweep(name):
    flow, params, tokens, cond, z = encoded(name)
    draft = Draft(known, tuple(tokens))
    whole = invert(flow, params, z, cond, plan=Jacobi(tol=1e-3, init="draft"), draft=draft)
    assert jnp.all(whole.sweeps == 1)
    sliding = invert(flow, params, z, cond, plan=SlidingWindow(window=4, tol=1e-3, init="draft"), draft=draft)
    free = flow.config.blocks[0].shift == "output"
    fewest = [-(-(block.num_tokens - free) // 4) for block in flow.config.blocks]
    np.testing.assert_array_equal(sliding.sweeps[:, 0], fewest)


def test_blocks_without_a_draft_begin_with_their_noise():
    flow, params, tokens, cond, z = encoded("classes")
    draft = Draft(known, (None, tokens[1]))
    r = invert(flow, params, z, cond, plan=Jacobi(tol=1e-3, init="draft"), draft=draft)
    noise = invert(flow, params, z, cond, plan=Jacobi(tol=1e-3))
    assert r.sweeps[1, 0] == 1
    assert r.sweeps[0, 0] == noise.sweeps[0, 0] > 1


@pytest.mark.slow
def test_derivatives_do_not_depend_on_the_draft():
    flow, params, _, cond, z = encoded("classes")

    def loss(z, draft):
        return jnp.square(invert(flow, params, z, cond, plan=PLANS["sliding"], draft=draft).x).sum()

    scaled = Draft(lambda scale, noise, cond: scale * noise, (jnp.asarray(0.5),) * 2)
    gradient, of_draft = jax.grad(loss, argnums=(0, 1))(z, scaled)
    plain = jax.grad(lambda z: jnp.square(invert(flow, params, z, cond, plan="sequential").x).sum())(z)
    assert_close(gradient, plain, NETWORK)
    assert all(part == 0 for part in of_draft.variables)


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        (None, "draft is missing"),
        (Draft(known, (None,)), "variables has 1 entries"),
        (Draft(lambda variables, noise, cond: noise[:1], (1.0, 1.0)), "returned shape"),
        (Draft(lambda variables, noise, cond: (noise,), (1.0, 1.0)), "returned shape tuple"),
    ],
)
def test_drafts_that_do_not_fit_are_refused(draft, message):
    flow, params, _, cond = laws.case("classes")
    with pytest.raises(ValueError, match=message):
        sample(flow, params, jax.random.key(0), len(cond), cond, plan=PLANS["jacobi"], draft=draft)


@pytest.mark.slow
def test_samples_with_densities_may_begin_with_a_draft():
    flow, params, _, labels, draft = fitted("classes")
    r, log_prob = sample_and_log_prob(flow, params, jax.random.key(2), 2, labels[:2], plan=PLANS["jacobi"], draft=draft)
    _, expected = sample_and_log_prob(flow, params, jax.random.key(2), 2, labels[:2], plan="sequential")
    assert_close(log_prob, expected, NETWORK, scale=abs(expected).max())
    assert not r.unsolved.any()


@pytest.mark.parametrize("name", rows(("classes", "starflow class prefix", "starflow video"), ("starflow video",)))
def test_an_affine_draft_is_the_best_causal_affine_function_of_the_noise(name):
    flow, params, x, labels, draft = fitted(name)
    config = flow.config
    later, _ = laws.apply(flow, params, x, labels, method="trajectory")
    states = [config.to_tokens(x), *later]
    for index, block in enumerate(config.blocks):
        tokens, noise = states[index], states[index + 1]
        cond = labels if block.is_conditional else None
        error = draft.function(draft.variables[index], noise, cond) - tokens
        assert jnp.square(error).mean() < 0.5 * jnp.square(noise - tokens).mean(), index
        # No token depends on the noise of later tokens of its frame, in the block's order.
        moved = draft.function(draft.variables[index], noise.at[:, 1].add(1.0), cond) - tokens - error
        unmoved = slice(0, 1) if block.order == "raster" else slice(2, block.num_tokens)
        assert not moved[:, unmoved].any()
        assert moved[:, 1].any()


def test_an_affine_draft_saves_sweeps():
    flow, params, x, labels, draft = fitted("classes")
    z = laws.apply(flow, params, x[:4], labels[:4])[0]
    noise = invert(flow, params, z, labels[:4], plan=Jacobi(tol=1e-3))
    r = invert(flow, params, z, labels[:4], plan=Jacobi(tol=1e-3, init="draft"), draft=draft)
    assert r.sweeps.sum() < noise.sweeps.sum()
    assert_close(r.x, x[:4], 1e-2)


@pytest.mark.slow
def test_each_device_drafts_its_own_samples():
    flow, params, _, labels, draft = fitted("classes")
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    numbers = np.arange(4)
    sharded = jax.device_put(numbers, NamedSharding(mesh, PartitionSpec("rows")))
    plan = PLANS["sliding"]
    one, two = (
        sample(flow, params, jax.random.key(3), num, labels[:4], plan=plan, draft=draft) for num in (numbers, sharded)
    )
    assert_close(two.x, one.x, NETWORK)


def test_flows_that_are_too_large_for_an_affine_draft_are_refused():
    config = dataclasses.replace(laws.FLOWS["affine"], image_size=64)
    flow = config.build()
    with pytest.raises(ValueError, match="block 0 maps 8192 values"):
        fit_affine_draft(flow, {"params": {}}, jnp.zeros((1, 64, 64, 2)))


def test_tuning_measures_the_best_parallel_plan_from_the_draft():
    flow, params, tokens, cond, _ = encoded("classes")
    x, options = flow.to_images(tokens[0]), {"windows": (4,), "tol": 1e-3, "cost": lambda block, plan: 1.0}
    measured = measure_plans(flow, params, x, cond, draft=Draft(known, (None, tokens[1])), **options)
    plans = measured.plan.blocks
    assert plans[1].init == "draft"
    assert plans[0].init != "draft"
    assert measured.chosen[1].passes == 2  # eight tokens in windows of four
