"""Decoders are equal to each other and to the inverse; what is exact about sweeps; overflow; sampling."""

import dataclasses

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from conftest import rows
from laws import FLOWS, apply, perturbed
from tolerances import FORMULA, NETWORK, assert_close

import flowgen
from flowgen.conditioning import TextCondition
from flowgen.decoding import (
    DecodePlan,
    Denoiser,
    Guidance,
    Jacobi,
    Sequential,
    invert,
    resolve_plan,
    sample,
)
from flowgen.decoding.jacobi import Conditioner, solve
from flowgen.decoding.request import decode_request
from flowgen.flows import AutoregressiveBlock, STARFlowV, density
from flowgen.flows.affine import Affine

NAMES = ("classes", "volume preserving", "rectangular", "starflow text", "starflow options")


@pytest.fixture(params=rows(NAMES, ("volume preserving", "rectangular", "starflow text", "starflow options")))
def case(request):
    flow, params, x, cond = laws.case(request.param)
    z, _ = apply(flow, params, x, cond)
    return flow, params, x, cond, z


@pytest.mark.parametrize("window", [1, 3, 4, None], ids=str)
@pytest.mark.parametrize("init", rows(["noise", "zeros"], ("zeros",)))
def test_every_window_at_tolerance_0_is_the_inverse(window, init):
    flow, params, x, cond = laws.case("rectangular")
    z, _ = apply(flow, params, x, cond)
    r = invert(flow, params, z, cond, plan=Jacobi(window=window, tol=0.0, init=init))
    assert_close(r.x, x, NETWORK)
    assert jnp.all(r.residual == 0)
    assert r.sweeps.max() <= (window or flow.config.num_tokens - 1)


def test_window_1_equals_sequential(case):
    flow, params, _, cond, z = case
    sequential = invert(flow, params, z, cond, plan=Sequential())
    assert_close(invert(flow, params, z, cond, plan=Jacobi(window=1)).x, sequential.x, NETWORK)
    free = AutoregressiveBlock(flow.config.blocks[0]).num_passthrough
    assert sequential.sweeps.shape == (flow.config.num_blocks, flow.config.num_tokens - free)
    assert jnp.all(sequential.sweeps == 1)


def chain(n, first, channels=2):
    """A conditioner x_t = 0.9 x_{t-1} + cumulative effects, as arrays, with no cache."""
    weights = jnp.asarray(np.tril(np.random.default_rng(0).standard_normal((n, n))) * 0.4, jnp.float32)

    def window(previous, start, cache):
        assert previous.shape[1] == n
        mixed = jnp.einsum("tm,bmc->btc", weights, jnp.tanh(previous))
        return Affine(mixed, 0.3 * jnp.tanh(mixed)), cache

    return without_cache(window, first)


def without_cache(window, first):
    return Conditioner(window, lambda before, after: after, begin_cache=lambda length: None, first=first)


def test_after_k_sweeps_the_first_k_tokens_are_exact():
    n = 8
    z = jnp.asarray(np.random.default_rng(1).standard_normal((3, n, 2)), jnp.float32)

    def run(max_sweeps):
        return solve(chain(n, jnp.ones((3, 1, 2))), z, Jacobi(tol=0.0, max_sweeps=max_sweeps))

    exact = run(n).x
    for k in range(1, n):
        x = run(k).x
        assert_close(x[:, :k], exact[:, :k], FORMULA)
        assert jnp.abs(x[:, -1] - exact[:, -1]).max() > 0


def test_residual_and_stopping_are_per_sample(case):
    flow, params, _, cond, z = case
    plan = Jacobi(window=5, tol=1e-2)
    together = invert(flow, params, z, cond, plan=plan)
    assert jnp.all(together.residual <= 1e-2)
    for index in range(len(z)):
        one = jax.tree.map(lambda part, index=index: part[index : index + 1], cond)
        alone = invert(flow, params, z[index : index + 1], one, plan=plan)
        assert_close(alone.x[0], together.x[index], NETWORK)


def test_certificate_is_the_error_of_a_forward_pass(case):
    flow, params, x, cond, z = case
    r = invert(flow, params, z, cond, plan=Sequential(), certify=True)
    assert r.error.max() < NETWORK
    loose = invert(flow, params, z, cond, plan=Jacobi(tol=0.3), certify=True)
    error = jnp.abs(loose.x - x).max(axis=tuple(range(1, x.ndim)))
    assert jnp.all((loose.error > 1e-3) == (error > 1e-3))
    null = TextCondition(jnp.ones((1, 3, 5)), jnp.ones((1, 3), bool)) if flow.config.text_dim else None
    guidance = Guidance(scale=1.5, rule="product", null=null)
    guided = invert(flow, params, z, cond, guidance=guidance, certify=True)
    assert guided.error.max() < NETWORK


def test_a_plan_per_block_and_plans_by_name(case):
    flow, params, x, cond, z = case
    plan = DecodePlan((Jacobi(window=3, tol=0.0), Sequential()))
    r = invert(flow, params, z, cond, plan=plan)
    assert_close(r.x, x, NETWORK)
    free = AutoregressiveBlock(flow.config.blocks[0]).num_passthrough
    windows = -(-(flow.config.num_tokens - free) // 3)
    assert jnp.all(r.sweeps[0, :windows] > 0)
    assert jnp.all(r.sweeps[0, windows:] == 0)
    with pytest.raises(ValueError, match="plan has 3 blocks, but the flow has 2"):
        invert(flow, params, z, cond, plan=DecodePlan((Sequential(),) * 3))
    with pytest.raises(ValueError, match="plan is 'jacobbi'; choose one of sequential, jacobi, sliding, auto"):
        invert(flow, params, z, cond, plan="jacobbi")
    assert resolve_plan("auto", rows=(8, 16)) == DecodePlan((Sequential(),) * 2)  # this is a CPU


def test_on_accelerators_a_pass_of_any_block_has_rows_that_cost_nothing(monkeypatch, untyped):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = laws.FLOWS["starflow video"]
    flow = STARFlowV(config.with_num_frames(20))
    noise = jnp.zeros((1, flow.config.num_tokens, config.token_dim))
    *shallow, deep = decode_request(flow, {"params": {}}, noise, laws.labels(config, 1), "auto").plan.blocks
    assert deep.window == 256
    assert {plan.window for plan in shallow} == {256 // 20}


# -- overflow -----------------------------------------------------------------------------------------------


def test_overflow_on_the_way_is_counted_and_does_not_spoil_the_solution():
    n = 6
    z = jnp.full((2, n, 1), 3.0)

    def window(previous, start, cache):
        # exp(40 x): astronomically large for the first guess x = 3, harmless at the solution.
        mixed = jnp.cumsum(previous, axis=1)
        return Affine(-3.0 * jnp.exp(jnp.clip(40 * mixed, -80, 300)), 40 * mixed), cache

    solution = solve(without_cache(window, jnp.full((2, 1, 1), -1.0)), z, Jacobi(tol=0.0))
    assert jnp.all(jnp.isfinite(solution.x))
    exact = np.full((2, 1), -1.0)
    for _ in range(n):
        mixed = exact.sum(axis=1, keepdims=True)
        exact = np.concatenate([exact, 3.0 * np.exp(40 * mixed) - 3.0 * np.exp(np.clip(40 * mixed, -80, 300))], axis=1)
    assert_close(solution.x[..., 0], exact[:, 1:], FORMULA, scale=1)
    assert jnp.all(solution.overflows > 0)


def test_a_result_that_is_not_finite_is_reported_for_its_sample_alone():
    flow, params, x, cond = laws.case("classes")
    z, _ = apply(flow, params, x, cond)
    z = z.at[1, 3, 0].set(jnp.inf)
    for plan in (Sequential(), Jacobi(window=4)):
        r = invert(flow, params, z, cond, plan=plan)
        np.testing.assert_array_equal(r.finite, [True, False, True, True])
        assert r.overflows[1] > 0
        assert jnp.all(r.overflows[jnp.array([0, 2, 3])] == 0)
        assert_close(r.x[0], x[0], NETWORK)


# -- sampling -----------------------------------------------------------------------------------------------


def test_a_sample_depends_on_key_and_index_alone():
    flow, params, _, _ = laws.case("classes")
    cond = jnp.array([0, 1, 2, 1, 0], jnp.int32)
    together = sample(flow, params, jax.random.key(3), 5, cond, guidance=Guidance(scale=1.0))
    tail = sample(flow, params, jax.random.key(3), range(3, 5), cond[3:], guidance=Guidance(scale=1.0))
    assert_close(tail.x, together.x[3:], NETWORK)
    other = sample(flow, params, jax.random.key(4), 5, cond, guidance=Guidance(scale=1.0))
    assert jnp.abs(other.x - together.x).max() > 0.1


def test_samples_are_drawn_from_the_tracked_prior():
    flow, params, _, _ = laws.case("volume preserving")
    r = sample(flow, params, jax.random.key(0), 400, None, denoise=False)
    z, _ = apply(flow, params, r.x)
    np.testing.assert_allclose(z.var(axis=0), params["prior"]["variance"], rtol=0.5)
    np.testing.assert_allclose((z.var(axis=0) / params["prior"]["variance"]).mean(), 1, atol=0.05)


@pytest.mark.slow
def test_denoising_is_one_tweedie_step_of_the_given_strength():
    config = dataclasses.replace(FLOWS["affine"], noise_std=0.2)
    flow, params = perturbed(config, jax.random.key(0))
    noisy = sample(flow, params, jax.random.key(1), 3, denoise=False)
    for denoise, strength in ((True, 1.0), (0.5, 0.5), (jnp.float32(0.5), 0.5), (np.array(0.5), 0.5)):
        clean = sample(flow, params, jax.random.key(1), 3, denoise=denoise)
        expected = jax.jit(lambda p, x: density.tweedie_step(flow, p, x))(params, noisy.x)
        assert_close(clean.x, noisy.x + strength * (expected - noisy.x), NETWORK)
    traced = jax.jit(lambda strength: sample(flow, params, jax.random.key(1), 3, denoise=strength).x)
    for strength in (0.5, 0.0):
        assert_close(traced(strength), noisy.x + strength * (expected - noisy.x), NETWORK)
    plain = flowgen.TARFlow(FLOWS["affine"])
    np.testing.assert_array_equal(
        sample(plain, params, jax.random.key(1), 3, denoise=True).x, sample(plain, params, jax.random.key(1), 3).x
    )


def test_one_compiled_program_per_call_signature():
    flow, params, _, cond = laws.case("classes")
    traces = []

    def count(variables, x, cond):
        traces.append(x.shape)
        return x

    def draw(flow, scale, temperature):
        guidance = Guidance(scale=scale, rule="product", temperature=temperature)
        sample(flow, params, jax.random.key(0), 4, cond, guidance=guidance, denoise=Denoiser(count, None))

    for scale, temperature in ((0.7, 1.0), (2.5, 1.0), (3.0, 1.0)):
        draw(flow, scale, temperature)
    draw(flowgen.TARFlow(dataclasses.replace(flow.config)), 0.7, 1.0)
    assert len(traces) == 1
    draw(flow, 1.0, 0.7)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num": 0}, "num is 0"),
        ({"denoise": -1.0}, "denoise is -1.0"),
        ({"denoise": jnp.ones(3)}, r"denoise is float32 of shape \(3,\)"),
        ({"cond": jnp.array([0, 1], jnp.int32)}, r"cond must be an integer array of shape \(3,\)"),
        ({"cond": jnp.array([0, 1, 3], jnp.int32)}, "label 3 is out of range"),
    ],
)
def test_a_call_that_cannot_work_is_refused(arguments, message):
    flow, params, _, _ = laws.case("classes")
    with pytest.raises(ValueError, match=message):
        sample(flow, params, jax.random.key(0), **{"num": 3, **arguments})


def test_sample_numbers_may_be_traced(untyped):
    flow, params, _, cond = laws.case("classes")
    traced = jax.jit(lambda num, cond: sample(flow, params, jax.random.key(0), num, cond).x)
    numbers = jnp.array([5, 0, 7, 2], jnp.uint8)
    assert_close(traced(numbers, cond), sample(flow, params, jax.random.key(0), np.asarray(numbers), cond).x, NETWORK)
    for num in (4, jnp.ones(4), jnp.zeros((2, 2), jnp.int32), jnp.zeros(0, jnp.int32)):
        with pytest.raises(ValueError, match=r"num is a traced .* inside jit, give a 1-D integer array"):
            traced(num, cond)


def test_z_of_another_shape_and_impossible_plans_are_refused():
    flow, params, _, _ = laws.case("classes")
    with pytest.raises(ValueError, match=r"z has shape \(1, 4, 8\); its shape must be \(batch, 9, 8\)"):
        invert(flow, params, jnp.zeros((1, 4, 8)))
    with pytest.raises(ValueError, match="window is 0"):
        Jacobi(window=0)
    with pytest.raises(ValueError, match="tol is -1"):
        Jacobi(tol=-1.0)


@pytest.mark.parametrize("dtype", rows(["float32", "float64"], ("float32",)))
@pytest.mark.parametrize(
    "plan",
    [Sequential(), *(pytest.param(plan, marks=pytest.mark.slow) for plan in (Jacobi(tol=0.0), Jacobi(window=4)))],
    ids=str,
)
def test_decoding_under_x64(dtype, plan):
    flow, params, x, cond = laws.case("classes")
    with jax.enable_x64(True):
        wide = flowgen.TARFlow(dataclasses.replace(flow.config, dtype=dtype))
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        z, _ = apply(wide, params, x.astype(dtype), cond)
        r = invert(wide, params, z, cond, plan=plan, certify=True)
        assert r.x.dtype == jnp.dtype(dtype)
        tolerance = getattr(plan, "tol", 0.0) * 10 + (1e-10 if dtype == "float64" else NETWORK)
        assert_close(r.x, x, tolerance)
        invert(wide, params, z, cond, plan=plan, guidance=Guidance(scale=1.0, anneal=True))


def test_labels_and_noise_of_any_integer_and_float_type():
    flow, params, x, cond = laws.case("classes")
    z, _ = apply(flow, params, x, jnp.array([0, 2, 1, 0], jnp.int32))
    for labels in (np.array([0, 2, 1, 0], np.uint8), [0, 2, 1, 0], np.array([0, 2, 1, 0])):
        assert_close(invert(flow, params, np.asarray(z), labels).x, x, NETWORK)
    rounded = invert(flow, params, z.astype(jnp.bfloat16), cond)
    assert rounded.x.dtype == jnp.float32


def test_tolerance_must_be_finite():
    with pytest.raises(ValueError, match="tol is inf"):
        Jacobi(tol=float("inf"))
