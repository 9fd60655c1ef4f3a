"""Annealing against known normalisers: exact identities, unbiased estimates, invariant moves, schedules."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import FORMULA, LAYER, assert_close

from flowgen import inference
from flowgen.inference import MALA

# q = N(0, I) and p̃ = exp(-|x - 1|² / (2 · 0.5²)) in the plane, so that Z = 2π · 0.5².
LOG_Z = math.log(2 * math.pi * 0.25)


def log_q(x):
    return -0.5 * jnp.square(x).sum(axis=-1) - math.log(2 * math.pi)


def log_target(x):
    return -2 * jnp.square(x - 1).sum(axis=-1)


def half(x):
    """q on one side of the plane: Z = ½."""
    return jnp.where(x[:, 0] > 0, log_q(x), -jnp.inf)


def stay(key, x, log_density):
    return x, 1.0


def draws(key, num):
    return jax.random.normal(key, (num, 2))


def test_without_moves_weights_telescope_to_importance_weights(key):
    x = draws(key, 50)
    betas = jnp.array([0.0, 0.1, 0.5, 1.0])
    r = inference.anneal(jax.random.key(1), x, log_q, log_target, stay, betas=betas, resample_below=0.0)
    expected = inference.log_weights(log_target(x), log_q(x))
    assert_close(r.log_weight, expected, FORMULA)
    np.testing.assert_array_equal(r.x, x)
    assert_close(r.ess[-1], inference.effective_sample_size(expected), LAYER)
    r = inference.anneal(jax.random.key(1), x, log_q, log_target, stay, betas=jnp.array([0.0, 1.0]), resample_below=1.0)
    assert_close(r.log_weight, jnp.full(50, inference.log_normaliser(expected).value), FORMULA)
    assert set(np.asarray(r.x[:, 0]).tolist()) < set(np.asarray(x[:, 0]).tolist())


RUNS = 1_000


@pytest.mark.parametrize(
    "resample_below", [0.5, pytest.param(0.0, marks=pytest.mark.slow), pytest.param(1.0, marks=pytest.mark.slow)]
)
def test_the_mean_weight_is_unbiased(resample_below):
    @jax.jit
    @jax.vmap
    def ratio(key):
        draw_key, key = jax.random.split(key)
        betas = jnp.array([0.0, 0.1, 0.4, 1.0])
        r = inference.anneal(
            key, draws(draw_key, 16), log_q, log_target, MALA(0.1), betas=betas, resample_below=resample_below
        )
        return jnp.exp(r.log_weight - LOG_Z).mean()

    with jax.debug_key_reuse(False):  # It takes the keys of nested scans under vmap for used ones (jax 0.10).
        found = np.asarray(ratio(jax.random.split(jax.random.key(0), RUNS)), np.float64)
    error = found.std() / math.sqrt(RUNS)
    assert error < 0.05
    assert abs(found.mean() - 1) < 4 * error


def test_langevin_moves_leave_the_density_invariant(key):
    """Without the correction, steps of 0.5 would widen a standard normal to a variance of 1 / (1 - 0.25)."""
    x = draws(key, 20_000)
    moved, acceptance = jax.jit(lambda key, x: MALA(0.5, num_steps=20)(key, x, log_q))(jax.random.key(1), x)
    assert 0.5 < acceptance < 0.95
    np.testing.assert_allclose(jnp.square(moved).mean(), 1, atol=5 * math.sqrt(2 / 40_000))
    np.testing.assert_allclose((moved**4).mean(), 3, atol=5 * math.sqrt(96 / 40_000))
    assert abs(jnp.corrcoef(moved[:, 0], x[:, 0])[0, 1]) < 0.2


def test_moves_do_not_leave_the_support(key):
    x = jnp.abs(draws(key, 500))
    moved, _ = MALA(0.5, num_steps=5)(jax.random.key(1), x, half)
    assert (moved[:, 0] > 0).all()
    assert (moved != x).any(axis=1).mean() > 0.5


@pytest.mark.parametrize("resample_below", [0.0, 1.0])
def test_samples_outside_the_target_lose_their_weight(key, resample_below):
    r = inference.anneal(
        key, draws(jax.random.key(1), 4_000), log_q, half, MALA(0.2), betas=jnp.linspace(0, 1, 4),
        resample_below=resample_below,
    )  # fmt: skip
    assert_close(jnp.exp(inference.log_normaliser(r.log_weight).value), 0.5, 4 * 0.5 / math.sqrt(4_000), scale=1)
    assert (r.x[jnp.isfinite(r.log_weight), 0] > 0).all()
    assert not jnp.isnan(r.log_weight).any()


@pytest.mark.parametrize("resample_below", [0.0, 1.0])
def test_without_a_sample_in_the_support_annealing_is_refused(key, resample_below):
    """Inside jit, samples stay, and their weights are 0."""
    x = -jnp.abs(draws(key, 8))

    def run(key, x):
        options = {"betas": jnp.linspace(0, 1, 3), "resample_below": resample_below}
        return inference.anneal(key, x, log_q, half, stay, **options)

    with pytest.raises(ValueError, match="all weights are 0; no sample lies in the support"):
        run(jax.random.key(1), x)
    r = jax.jit(run)(jax.random.key(1), x)
    np.testing.assert_array_equal(r.x, x)
    assert jnp.isneginf(r.log_weight).all()
    assert float(r.log_normaliser) == -math.inf


def test_the_schedule_of_an_adaptive_run_repeats_its_stages(key):
    """The documented recipe for an unbiased estimate."""
    r = inference.anneal_adaptively(key, draws(jax.random.key(1), 500), log_q, log_target, MALA(0.1), max_stages=20)
    assert jnp.isnan(r.betas).any()
    again = inference.anneal(
        jax.random.key(2), draws(jax.random.key(3), 500), log_q, log_target, MALA(0.1), betas=r.schedule
    )
    np.testing.assert_array_equal(again.betas, r.betas[~jnp.isnan(r.betas)])
    np.testing.assert_array_equal(again.schedule, r.schedule)
    assert_close(again.log_normaliser, LOG_Z, 0.3, scale=1)
    with pytest.raises(ValueError, match="betas is traced"):
        jax.jit(lambda r: r.schedule)(r)


def test_weights_and_stages_of_16_bit_samples_are_float32(key):
    x = draws(key, 100).astype(jnp.bfloat16)
    betas = jnp.array([0.0, 0.9985, 1.0])  # In bfloat16, the last two are equal.
    r = inference.anneal(jax.random.key(1), x, log_q, log_target, stay, betas=betas, resample_below=0.0)
    np.testing.assert_array_equal(r.betas, betas[1:])
    assert r.x.dtype == jnp.bfloat16
    assert r.log_weight.dtype == r.ess.dtype == jnp.float32


def test_the_next_beta_keeps_the_share_exactly(key):
    x = draws(key, 1_000)
    log_ratio, log_weight = log_target(x) - log_q(x), jnp.zeros(1_000)
    beta = inference.next_beta(log_ratio, log_weight, 0.0, ess=0.6)
    assert 0 < beta < 1
    assert_close(inference.effective_sample_size(beta * log_ratio), 0.6, LAYER)
    log_weight = beta * log_ratio
    after = inference.next_beta(log_ratio, log_weight, beta, ess=0.6)
    assert_close(inference.effective_sample_size(log_weight + (after - beta) * log_ratio), 0.36, LAYER)
    assert float(inference.next_beta(0.01 * log_ratio, jnp.zeros(1_000), 0.0, ess=0.6)) == 1


def test_an_adaptive_schedule_ends_at_1_in_one_program(key):
    traces = []

    @jax.jit
    def run(key, x):
        traces.append(1)
        return inference.anneal_adaptively(key, x, log_q, log_target, MALA(0.1), ess=0.8, max_stages=20)

    r = run(key, draws(jax.random.key(1), 1_000))
    run(jax.random.key(2), draws(jax.random.key(3), 1_000))
    assert len(traces) == 1
    count = int(jnp.isfinite(r.betas).sum())
    assert 2 < count < 20
    assert r.betas[count - 1] == 1
    assert (jnp.diff(r.betas[:count]) > 0).all()
    assert_close(inference.log_normaliser(r.log_weight).value, LOG_Z, 0.2, scale=1)
    mean = inference.self_normalised(r.x, r.log_weight).value
    assert_close(mean, jnp.ones(2), 0.1)


def test_the_last_stage_goes_to_1_if_stages_run_out(key):
    x = draws(jax.random.key(1), 100)
    r = inference.anneal_adaptively(key, x, log_q, log_target, stay, ess=0.99, max_stages=3, resample_below=0.0)
    assert r.betas[-1] == 1
    assert_close(r.log_weight, inference.log_weights(log_target(x), log_q(x)), FORMULA)


def test_tempered_densities_join_the_two(key):
    x = draws(key, 10)
    for beta in (0.0, 0.3, 1.0):
        expected = (1 - beta) * np.asarray(log_q(x)) + beta * np.asarray(log_target(x))
        assert_close(inference.tempered(log_q, log_target, beta)(x), expected, FORMULA)
    np.testing.assert_array_equal(inference.tempered(log_q, half, 0.0)(x), log_q(x))


REFUSED = {
    "a schedule that ends early": ({"betas": jnp.array([0.0, 0.5])}, "betas run from 0.0 to 0.5"),
    "a schedule back and forth": ({"betas": jnp.array([0.0, 0.7, 0.5, 1.0])}, "they must ascend"),
    "a single beta": ({"betas": jnp.array([1.0])}, "betas is"),
    "a number of samples": ({"betas": jnp.array([0.0, 1.0]), "resample_below": 5}, "resample_below is 5"),
    "a density per dimension": ({"betas": jnp.array([0.0, 1.0]), "log_target": jnp.square}, r"log_target\(x\) has"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_do_not_fit_are_told(untyped, key, name):
    options, problem = REFUSED[name]
    arguments = {"key": key, "x": jnp.zeros((4, 2)), "log_q": log_q, "log_target": log_target, "move": stay}
    with pytest.raises(ValueError, match=problem):
        inference.anneal(**(arguments | options))


def test_steps_that_are_not_positive_are_refused(untyped):
    with pytest.raises(ValueError, match="step_size is -1"):
        MALA(np.float32(-1))
    with pytest.raises(ValueError, match="num_steps is 0"):
        MALA(0.1, num_steps=0)
    with pytest.raises(ValueError, match="ess is 1"):
        inference.next_beta(jnp.zeros(3), jnp.zeros(3), 0.0, ess=1)
