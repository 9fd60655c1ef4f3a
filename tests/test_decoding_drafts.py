"""Drafts: what they cannot change, what they save, and what is refused."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from conftest import rows
from tolerances import NETWORK, assert_close

from flowgen.decoding import Draft, Jacobi, SlidingWindow, invert, sample

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


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("value", rows(GARBAGE, ("infinite",)))
def test_no_draft_changes_the_solution_at_tolerance_0(plan, value):
    flow, params, tokens, cond, z = encoded("classes")
    draft = Draft(filled, (jnp.asarray(GARBAGE[value]),) * flow.config.num_blocks)
    r = invert(flow, params, z, cond, plan=PLANS[plan], draft=draft)
    assert_close(r.x, flow.to_images(tokens[0]), NETWORK)
    assert jnp.all(r.residual == 0)
    assert not r.unsolved.any()


@pytest.mark.parametrize("name", rows(("classes", "starflow text", "starflow video"), ("starflow text",)))
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


def test_derivatives_do_not_depend_on_the_draft():
    flow, params, tokens, cond, z = encoded("classes")

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
    ],
)
def test_drafts_that_do_not_fit_are_refused(draft, message):
    flow, params, _, cond = laws.case("classes")
    with pytest.raises(ValueError, match=message):
        sample(flow, params, jax.random.key(0), len(cond), cond, plan=PLANS["jacobi"], draft=draft)


