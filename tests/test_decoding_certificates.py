"""What decoding says about its errors: measured in noise, estimated in data, and unsolved windows by their names."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from tolerances import FORMULA, NETWORK, assert_close

import flowgen
from flowgen.decoding import Clip, Guidance, Jacobi, Sequential, SlidingWindow, invert, sample
from flowgen.experiments.decoding import decoded_by_all, decoding_line
from flowgen.flows import AutoregressiveBlock, STARFlowVConfig, block_parameters

SLOW = pytest.mark.slow
SCALE = 0.1  # perturbation of the parameters: errors grow, but decoding is still well conditioned
LONG = flowgen.TARFlowConfig(
    image_size=8, patch_size=1, channels=1, width=16, head_dim=8, num_blocks=2, layers_per_block=1, num_classes=3
)
CLIP = STARFlowVConfig(
    image_size=(4, 2), frames=4, channels=2, width=40, head_dim=20, layers_per_block=(1, 2), num_classes=3
)


def chain(tokens, gain):
    """A flow whose inverse is x_t = gain · x_{t-1} + z_t, because only its first and last linear maps are not 0."""
    config = dataclasses.replace(LONG, image_size=(1, tokens), num_blocks=1, num_classes=0)
    flow = config.build()
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(lambda: flowgen.init(flow, jax.random.key(0))))
    block = params["params"]["blocks_0"]
    block["proj_in"]["kernel"] = block["proj_in"]["kernel"].at[0, 0].set(1.0)
    block["proj_out"]["kernel"] = block["proj_out"]["kernel"].at[0, 1].set(gain)  # the scale precedes the shift
    return flow, params


@cache
def long_case():
    flow, params = laws.perturbed(LONG, jax.random.key(0), scale=SCALE)
    cond = jnp.arange(4, dtype=jnp.int32) % 3
    z, _ = laws.apply(flow, params, laws.images(LONG, jax.random.key(1)), cond)
    return flow, params, z, cond


def largest(x):
    return np.abs(np.asarray(x)).reshape(len(x), -1).max(axis=1)


@pytest.mark.parametrize("guided", [pytest.param(False, marks=SLOW), True], ids=["plain", "guided"])
def test_the_error_is_that_of_a_forward_pass_in_float64(guided):
    flow, params = laws.perturbed(dataclasses.replace(LONG, num_blocks=1), jax.random.key(0), scale=SCALE)
    _, _, z, cond = long_case()
    guidance = Guidance(scale=1.5) if guided else None
    r = invert(flow, params, z, cond, plan=Jacobi(tol=1e-2), guidance=guidance, certify=True)
    with jax.enable_x64(True):
        wide = dataclasses.replace(LONG, num_blocks=1, dtype="float64").build()
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), params)
        block, variables = AutoregressiveBlock(wide.config.blocks[0]), block_parameters(params, 0)
        tokens = wide.config.to_tokens(jnp.asarray(np.asarray(r.x, np.float64)))
        (m, a), (m_u, a_u) = (block.apply(variables, tokens, c, method="parameters") for c in (cond, None))
        if guided:
            m, a = m + 1.5 * (m - m_u), a + 1.5 * (a - a_u)
        expected = largest((tokens - m) * jnp.exp(-a) - np.asarray(z, np.float64))
    assert expected.min() > 1e-4
    np.testing.assert_allclose(r.error, expected, rtol=1e-2, atol=FORMULA * float(jnp.abs(z).max()))


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(Jacobi(tol=1e-2), marks=SLOW),
        pytest.param(Jacobi(tol=1e-4), marks=SLOW),
        Jacobi(window=16, tol=1e-3),
        pytest.param(SlidingWindow(window=16, tol=1e-3), marks=SLOW),
        pytest.param(Jacobi(tol=1e-3, stop="relative_mse"), marks=SLOW),
    ],
    ids=str,
)
@pytest.mark.parametrize("guidance", [None, pytest.param(Guidance(scale=1.0), marks=SLOW)], ids=["plain", "guided"])
def test_the_estimate_is_within_twofold_of_the_true_error(plan, guidance):
    flow, params, z, cond = long_case()
    r = invert(flow, params, z, cond, plan=plan, guidance=guidance, certify=True)
    true = largest(r.x - invert(flow, params, z, cond, guidance=guidance).x)
    assert true.min() > 1e-6
    ratio = r.error_estimate / true
    assert ratio.min() > 1 / 2, ratio
    assert ratio.max() < 2, ratio


@SLOW
@pytest.mark.parametrize("plan", [Jacobi(tol=3e-2), SlidingWindow(window=4, tol=3e-2)], ids=str)
def test_the_estimate_holds_for_clips_with_given_frames_and_restarts(plan):
    flow, params = laws.perturbed(CLIP, jax.random.key(0), scale=SCALE)
    cond, given = jnp.array([0, 2], jnp.int32), laws.images(CLIP, jax.random.key(2), batch=2)[:, :1]
    clip, options = Clip(frames=8, given=given, context=2), {"denoise": False, "guidance": Guidance(scale=1.0)}
    r = sample(flow, params, jax.random.key(1), 2, cond, plan=plan, clip=clip, certify=True, **options)
    true = largest(r.x - sample(flow, params, jax.random.key(1), 2, cond, plan="sequential", clip=clip, **options).x)
    assert true.min() > 1e-4
    np.testing.assert_array_less(np.abs(np.log2(r.error_estimate / true)), 1)


@pytest.mark.parametrize(
    ("tokens", "gain", "is_bounded"),
    [(24, 3.0, False), pytest.param(8, 3.0, True, marks=SLOW), pytest.param(24, 0.5, True, marks=SLOW)],
)
def test_a_long_expanding_chain_is_not_bounded(tokens, gain, is_bounded):
    flow, params = chain(tokens, gain)
    x = 0.7 * jax.random.uniform(jax.random.key(0), (2, 1, tokens, 1), minval=-1.0)
    z, _ = laws.apply(flow, params, x)
    assert_close(z[:, 1:, 0], x[:, 0, 1:, 0] - gain * x[:, 0, :-1, 0], FORMULA)
    r = invert(flow, params, z, plan=Jacobi(window=4, tol=1e-3), certify=True)
    assert np.isfinite(r.error_estimate).all() == is_bounded
    assert ("not bounded" in decoding_line(r)) != is_bounded
    if is_bounded:
        assert (largest(r.x - x) <= 2 * r.error_estimate + NETWORK * gain**tokens).all()
    else:
        assert largest(r.x - x).min() > 100 * r.error.max()


def test_the_published_stop_rule_is_fooled_by_a_slow_chain():
    tokens, gain = 64, 0.95
    flow, params = chain(tokens, gain)
    z = jnp.full((2, tokens, 1), 0.05).at[:, 0].set(0.0)
    exact = invert(flow, params, z).x
    published = invert(flow, params, z, plan=Jacobi(tol=1e-3, stop="relative_mse"), certify=True)
    ours = invert(flow, params, z, plan=Jacobi(tol=1e-3), certify=True)
    assert not published.unsolved.any()
    assert largest(published.x - exact).min() > 0.3  # of values up to 1
    assert largest(ours.x - exact).max() < 1e-5
    assert published.error.min() > 1e-2
    assert not np.isfinite(published.error_estimate).any()


def test_an_unsolved_window_is_named():
    flow, params, z, cond = long_case()
    plan = Jacobi(window=16, tol=1e-6, max_sweeps=2)
    r = invert(flow, params, z, cond, plan=plan)  # neither waits nor raises
    assert r.unsolved.shape == r.sweeps.shape
    assert r.unsolved.all()
    with pytest.raises(FloatingPointError, match=r"window 0 of block 1 unsolved after 2 sweeps, and 7 other windows"):
        invert(flow, params, z, cond, plan=plan, strict=True)
    for solved in (Jacobi(window=16, tol=1e-6), Sequential()):
        assert not invert(flow, params, z, cond, plan=solved, strict=True).unsolved.any()
    with pytest.raises(FloatingPointError, match="values overflowed"):
        invert(flow, params, z.at[1, 20].set(jnp.inf), cond, strict=True)
    with pytest.raises(ValueError, match="strict is True, but nothing can be raised inside jit"):
        jax.jit(lambda z: invert(flow, params, z, cond, plan=plan, strict=True).x)(z)
    with pytest.warns(UserWarning, match="window 0 of block 1 unsolved"):
        decoded_by_all(flow, params, jax.random.key(0), np.arange(4), cond, None, lambda _: 0.0, plan=plan)
