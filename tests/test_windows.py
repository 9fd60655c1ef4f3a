"""Windows that start from the frame before them, and a window that slides on by what is solved."""

import dataclasses

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from conftest import rows
from tolerances import LAYER, NETWORK, assert_close

import flowgen
from flowgen.attention import causal_kernel
from flowgen.conditioning import TextCondition
from flowgen.decoding import Guidance, Jacobi, Sequential, SlidingWindow, invert
from flowgen.decoding.jacobi import Conditioner, PreviousFrame, solve
from flowgen.decoding.sliding import solve_sliding
from flowgen.flows import AutoregressiveBlock, STARFlowVConfig
from flowgen.flows.affine import Affine

NAMES = ("classes", "rectangular", "starflow text", "starflow options", "starflow video")
CLIP = STARFlowVConfig(
    image_size=(2, 3), frames=4, channels=2, width=40, head_dim=20, layers_per_block=(1, 2), text_dim=5, text_length=3
)


@pytest.fixture(params=rows(NAMES, ("rectangular", "starflow options", "starflow text")))
def case(request):
    flow, params, x, cond = laws.case(request.param)
    return flow, params, x, cond, laws.apply(flow, params, x, cond)[0]


def free_tokens(flow):
    return AutoregressiveBlock(flow.config.blocks[0]).num_passthrough


def mixture(n, channels=2, seed=0):
    """A conditioner whose cache is the tokens themselves, slot by slot, so that a stale slot shows."""
    weights = jnp.asarray(np.tril(np.random.default_rng(seed).standard_normal((3 * n, 3 * n))) * 0.3, jnp.float32)

    def window(previous, start, cache):
        rows = jnp.broadcast_to(start, 3)[:, None] + jnp.arange(previous.shape[1])[None]
        cache = cache.at[jnp.arange(3)[:, None], rows].set(jnp.tanh(previous))
        mixed = jnp.einsum("btm,bmc->btc", weights[rows, : cache.shape[1]], cache)
        return Affine(mixed, 0.3 * jnp.tanh(mixed)), cache

    return Conditioner(
        window,
        lambda before, after: after,
        begin_cache=lambda length: jnp.zeros((3, length, channels)),
        first=jnp.ones((3, 1, channels)),
    )


# -- the frame before --------------------------------------------------------------------------------------


def test_a_guess_is_the_token_whole_frames_earlier():
    noise = -jnp.ones((1, 7, 1))
    previous_frame = PreviousFrame(jnp.zeros((1, 3, 1)), jnp.zeros((), jnp.int32))
    np.testing.assert_array_equal(previous_frame.guess(noise), noise)
    previous_frame = previous_frame.then(jnp.array([10.0, 11.0])[None, :, None])
    # Tokens 2 to 8, in frames of 3 of which 0 and 1 are solved: token 2 is in frame 0.
    np.testing.assert_array_equal(previous_frame.guess(noise)[0, :, 0], [-1, 10, 11, -1, 10, 11, -1])
    previous_frame = previous_frame.then(jnp.array([12.0, 13.0])[None, :, None])
    np.testing.assert_array_equal(previous_frame.guess(noise)[0, :, 0], [11, 12, 13, 11, 12, 13, 11])
    each = PreviousFrame(jnp.tile(previous_frame.tokens, (2, 1, 1)), jnp.array([1, 3], jnp.int32))
    np.testing.assert_array_equal(each.guess(-jnp.ones((2, 4, 1)))[:, :, 0], [[-1, -1, 13, -1], [11, 12, 13, 11]])


@pytest.mark.parametrize("window", rows([5, None], (None,)), ids=str)
@pytest.mark.parametrize("plan", rows([Jacobi, SlidingWindow], (Jacobi,)))
def test_from_the_frame_before_the_solution_is_the_same(plan, window):
    flow, params = laws.perturbed(CLIP, jax.random.key(0))
    clip, text = laws.images(CLIP, jax.random.key(1)), laws.labels(CLIP)
    z, _ = laws.apply(flow, params, clip, text)
    r = invert(flow, params, z, text, plan=plan(window=window, tol=0.0, init="previous_frame"))
    assert_close(r.x, clip, NETWORK)


@pytest.mark.slow
def test_a_clip_that_hardly_changes_takes_fewer_sweeps_from_the_frame_before():
    flow, params = laws.perturbed(CLIP, jax.random.key(0))
    text = laws.labels(CLIP, batch=2)
    still = jnp.tile(laws.images(CLIP, jax.random.key(1), batch=2)[:, :1], (1, 4, 1, 1, 1))
    clip = still + 1e-3 * laws.images(CLIP, jax.random.key(2), batch=2)
    z, _ = laws.apply(flow, params, clip, text)

    def sweeps(plan, init):
        r = invert(flow, params, z, text, plan=plan(window=6, tol=1e-2, init=init))
        np.testing.assert_allclose(r.x, clip, atol=0.02)
        return r.sweeps

    frame, noise = sweeps(Jacobi, "previous_frame"), sweeps(Jacobi, "noise")
    np.testing.assert_array_equal(frame[0], noise[0])  # the frames of a shallow block have none before them
    assert frame[1, 0] == noise[1, 0]  # and frame 0 has none
    assert jnp.all(2 * frame[1, 1:] <= noise[1, 1:])
    assert 2 * sweeps(SlidingWindow, "previous_frame")[1].sum() < sweeps(SlidingWindow, "noise")[1].sum() + 6


# -- the sliding window -------------------------------------------------------------------------------------


def mates(z):
    """The same noise with other samples beside sample 0, which take more sweeps."""
    return jnp.concatenate([z[:1], 2 * z[:0:-1]])


@pytest.mark.parametrize(
    ("name", "init", "guided"),
    [
        ("classes", "noise", True),
        pytest.param("starflow nala", "noise", False, marks=pytest.mark.slow),
        ("starflow video", "previous_frame", True),
        pytest.param("starflow options", "zeros", False, marks=pytest.mark.slow),
        pytest.param("starflow text", "noise", True, marks=pytest.mark.slow),
    ],
)
def test_a_sample_does_not_depend_on_those_beside_it(name, init, guided):
    flow, params, x, cond = laws.case(name)
    z, _ = laws.apply(flow, params, x, cond)
    null = TextCondition(jnp.ones((1, 3, 5)), jnp.ones((1, 3), bool)) if flow.config.text_dim else None
    guidance = Guidance(scale=1.5, anneal=True, null=null) if guided else None

    def decode(z, rows):
        own = jax.tree.map(lambda part: part[np.array(rows)], cond)
        return invert(flow, params, z, own, plan=SlidingWindow(window=4, tol=1e-3, init=init), guidance=guidance)

    every = range(4)
    together, beside = decode(z, every), decode(mates(z), every)
    for first, second in zip(together, beside, strict=True):  # every report that has one row per sample
        if first is not None and first.shape[0] == 4:
            np.testing.assert_array_equal(first[0], second[0])
    assert jnp.abs(together.x[1:] - beside.x[1:]).max() > 0.1
    order = [2, 0, 3, 1]
    assert_close(decode(z[np.array(order)], order).x, together.x[np.array(order)], NETWORK)
    for index in (0, 3):
        alone = decode(z[index : index + 1], [index])
        assert_close(alone.x[0], together.x[index], NETWORK)
        assert jnp.all(alone.sweeps <= together.sweeps)


@pytest.mark.parametrize("window", rows([1, 4, None], (1, None)), ids=str)
def test_at_tolerance_0_the_sliding_window_is_exact_in_as_many_passes_as_tokens_at_most(case, window):
    flow, params, x, cond, z = case
    r = invert(flow, params, z, cond, plan=SlidingWindow(window=window, tol=0.0), certify=True)
    assert_close(r.x, x, NETWORK)
    assert_close(r.x, invert(flow, params, z, cond, plan=Sequential()).x, NETWORK)
    assert r.sweeps.shape == (flow.config.num_blocks, 1)
    assert r.sweeps.max() <= flow.config.num_tokens - free_tokens(flow)
    assert jnp.all(r.residual == 0)
    assert r.error.max() < NETWORK


@pytest.mark.slow
def test_every_token_is_within_tolerance_of_what_those_before_it_make_of_it(case):
    flow, params, x, cond, z = case
    together = invert(flow, params, z, cond, plan=SlidingWindow(window=4, tol=1e-3))
    fixed = invert(flow, params, z, cond, plan=Jacobi(window=4, tol=1e-3))
    saved = 0 if flow.config.num_tokens == 8 else 1  # the 8 tokens of the clip take 8 sweeps in either way
    assert together.sweeps.sum() <= fixed.sweeps.sum() - saved
    assert jnp.all(together.residual <= 1e-3)
    np.testing.assert_allclose(together.x, x, atol=2e-2)  # a tolerance's growth through two blocks


@pytest.mark.parametrize("tol", [0.0, 1e-2, 0.3])
def test_the_cache_is_that_of_the_tokens_that_are_returned(tol):
    n, z = 11, jnp.asarray(np.random.default_rng(1).standard_normal((3, 11, 2)), jnp.float32)
    conditioner = mixture(n)
    solution = solve_sliding(conditioner, z, SlidingWindow(window=4, tol=tol))
    previous = jnp.concatenate([conditioner.first, solution.x[:, :-1]], axis=1)
    (shift, log_scale), _ = conditioner.window(previous, 0, conditioner.begin_cache(n))
    change = jnp.abs(shift + jnp.exp(log_scale) * z - solution.x).max(axis=(1, 2))
    assert_close(solution.residual, change, LAYER, scale=1)
    assert jnp.all(change <= tol + LAYER)
    exact = solve(conditioner, z, Jacobi(window=1, tol=0.0)).x
    assert_close(solution.x[:, 0], exact[:, 0], max(tol, LAYER))
    assert solution.sweeps[0] <= n


@pytest.mark.slow
def test_guidance_through_a_sliding_window():
    flow, params, x, cond = laws.case("starflow video")
    z, _ = laws.apply(flow, params, x, cond)
    null = TextCondition(jnp.ones((1, 3, 5)), jnp.ones((1, 3), bool))
    options = {"guidance": Guidance(scale=1.5, rule="product", null=null)}
    expected = invert(flow, params, z, cond, plan=Sequential(), **options)
    r = invert(flow, params, z, cond, plan=SlidingWindow(window=4, tol=0.0), certify=True, **options)
    assert_close(r.x, expected.x, NETWORK)
    assert r.error.max() < NETWORK


@pytest.mark.slow
def test_what_is_not_finite_is_reported_for_its_sample_alone():
    flow, params, x, cond = laws.case("starflow video")
    z = laws.apply(flow, params, x, cond)[0].at[1, 3, 0].set(jnp.inf)
    r = invert(flow, params, z, cond, plan=SlidingWindow(window=3))
    np.testing.assert_array_equal(r.finite, [True, False, True, True])
    np.testing.assert_array_equal(jnp.isinf(r.residual), [False, True, False, False])
    np.testing.assert_array_equal(r.overflows > 0, [False, True, False, False])
    assert_close(r.x[0], x[0], NETWORK)


def test_a_kernel_that_cannot_add_a_part_of_a_window_is_refused():
    flow, params, x, cond = laws.case("classes")
    z, _ = laws.apply(flow, params, x, cond)
    whole = causal_kernel("softmax")._replace(accept=None, has_slots=False)
    flow = flowgen.TARFlow(dataclasses.replace(flow.config, attention=whole))
    with pytest.raises(ValueError, match="attention has no `accept`, which adds a part of a window to the cache"):
        invert(flow, params, z, cond, plan=SlidingWindow())


def test_plans_that_cannot_be_are_refused(untyped):
    with pytest.raises(ValueError, match="window is 0"):
        SlidingWindow(window=0)
    with pytest.raises(ValueError, match="init is 'frames'; it must be 'noise' or 'zeros' or 'previous_frame'"):
        Jacobi(init="frames")


@pytest.mark.slow
def test_under_x64():
    flow, params, x, cond = laws.case("starflow video")
    with jax.enable_x64(True):
        z, _ = laws.apply(flow, params, x, cond)
        r = invert(flow, params, z, cond, plan=SlidingWindow(window=4, tol=0.0, init="previous_frame"))
        assert_close(r.x, x, NETWORK)
