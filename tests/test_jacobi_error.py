"""The penalty that trains a flow for parallel decoding: its value, its gradient, and what it does to decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from tolerances import LAYER, NETWORK, assert_close, assert_trees_close

import flowgen
from flowgen.backend import shards
from flowgen.decoding import Jacobi, invert
from flowgen.experiments import FlowExperiment, LikelihoodConfig
from flowgen.flows import AutoregressiveBlock, block_parameters, flow_score_objective
from flowgen.flows.batches import batch_condition, noisy_batch
from flowgen.flows.jacobi_error import DIVERGED, SOLVED, JacobiPenalty, jacobi_error, jacobi_penalty
from flowgen.flows.objective import nll, nll_objective
from flowgen.training import OptimConfig
from flowgen.training.fsdp import FullySharded
from flowgen.training.parallel import DataParallel
from flowgen.training.step import init_state, make_step

SWEEPS = 3
# A perturbation with which tokens depend strongly on the tokens before them.
STRONG = 0.08
ROWS = [
    "classes",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("volume preserving", "starflow text", "starflow video")),
]


def penalised(flow, params, x, cond, penalty):
    states, _ = flow.apply(params, x, cond, method="trajectory")
    return jacobi_penalty(flow, params, x, states, cond, penalty)


def test_the_error_is_that_of_the_decoder():
    flow, params = laws.perturbed(laws.FLOWS["one block"], jax.random.key(0), scale=STRONG)
    x, cond = laws.images(flow.config, jax.random.key(1)), None
    z, _ = jax.jit(lambda params, x: flow.apply(params, x, cond, method="forward"))(params, x)
    decoded = invert(flow, params, z, cond, plan=Jacobi(tol=0.0, max_sweeps=SWEEPS)).x
    error = flow.config.to_tokens(decoded - x)
    expected = np.sqrt(np.square(error).mean(axis=(1, 2)) + SOLVED**2)
    _, metrics = jax.jit(lambda *args: penalised(flow, *args, JacobiPenalty(1.0, SWEEPS)))(params, x, cond)
    assert_close(metrics["jacobi_error/0"], expected.mean(), NETWORK)
    assert expected.min() > 10 * SOLVED  # The case is not solved yet.
    _, solved = jax.jit(lambda *args: penalised(flow, *args, JacobiPenalty(1.0, 9)))(params, x, cond)
    assert_close(solved["jacobi_error/0"], SOLVED, NETWORK)  # Nine sweeps are exact for nine tokens.


@pytest.mark.parametrize("name", ROWS)
def test_the_gradient_is_that_of_the_last_sweep_from_a_fixed_iterate(name):
    flow, params, x, cond = laws.case(name)
    states, _ = jax.jit(lambda params: flow.apply(params, x, cond, method="trajectory"))(params)
    states = [flow.config.to_tokens(x), *states]
    cond_of_blocks = flow.config.check_cond(cond, len(x))

    def sweep(params, index, y):
        block = AutoregressiveBlock(flow.config.blocks[index])
        maps = block.apply(block_parameters(params, index), y, cond_of_blocks, method="parameters")
        return maps.to_data(states[index + 1])

    iterates = list(states[1:])
    for _ in range(SWEEPS - 1):
        iterates = [jax.jit(sweep, static_argnums=1)(params, index, y) for index, y in enumerate(iterates)]

    def expected(params):
        total = 0.0
        for index, y in enumerate(iterates):
            square = jnp.square(sweep(params, index, y) - states[index]).mean(axis=(1, 2))
            total += jnp.log(jnp.sqrt(square + SOLVED**2)).mean() / len(iterates)
        return 0.25 * total

    def actual(params):
        return penalised(flow, params, x, cond, JacobiPenalty(0.25, SWEEPS))[0]

    value, gradient = jax.jit(jax.value_and_grad(actual))(params)
    expected_value, expected_gradient = jax.jit(jax.value_and_grad(expected))(params)
    assert_close(value, expected_value, NETWORK)
    assert_trees_close(gradient["params"], expected_gradient["params"], NETWORK)


@pytest.mark.parametrize("name", ["classes", pytest.param("starflow video", marks=pytest.mark.slow)])
def test_the_objective_adds_the_penalty_to_the_loss(key, name):
    flow, params, x, cond = laws.case(name)
    batch = laws.batch_of(x, cond)
    penalty = JacobiPenalty(0.5, SWEEPS)
    plain, without = jax.jit(nll_objective(flow))(params, batch, jax.random.clone(key))[:2]
    loss, metrics = jax.jit(nll_objective(flow, jacobi=penalty))(params, batch, jax.random.clone(key))[:2]
    noisy, _ = noisy_batch(flow, batch_condition(flow, 0.0, None), batch, key)
    expected, errors = jax.jit(lambda *args: penalised(flow, *args, penalty))(params, noisy, cond)
    assert_close(loss - plain, expected, NETWORK, scale=abs(loss))
    assert metrics.keys() == without.keys() | errors.keys()
    assert_close(metrics["bits_per_dim"], without["bits_per_dim"], LAYER)


@pytest.mark.slow
def test_the_penalty_does_not_change_the_score_that_a_denoiser_learns(key):
    config = dataclasses.replace(laws.FLOWS["starflow video"], denoiser_layers=1, noise_std=0.3)
    flow, params = laws.perturbed(config, jax.random.key(0))
    batch = laws.batch_of(laws.images(config, jax.random.key(1)), laws.labels(config))
    plain, without = jax.jit(flow_score_objective(flow))(params, batch, jax.random.clone(key))
    penalty = JacobiPenalty(0.5, SWEEPS)
    loss, metrics = jax.jit(flow_score_objective(flow, jacobi=penalty))(params, batch, jax.random.clone(key))
    noisy, cond = noisy_batch(flow, batch_condition(flow, 0.0, None), batch, key)
    expected, errors = jax.jit(lambda *args: penalised(flow, *args, penalty))(params, noisy, cond)
    assert_close(loss - plain, expected, NETWORK, scale=abs(loss))
    assert metrics.keys() == without.keys() | errors.keys()
    for name in ("flow_loss", "denoiser_loss", "score_square"):
        assert_close(metrics[name], without[name], NETWORK)


def test_a_sweep_that_overflows_has_a_finite_gradient():
    flow, params, x, _ = laws.case("one block")
    of_block = block_parameters(params, 0)
    bias = 200.0  # exp of this overflows, for shifts and log scales alike
    of_block["params"]["proj_out"]["bias"] = jnp.full_like(of_block["params"]["proj_out"]["bias"], bias)
    tokens = flow.config.to_tokens(x)

    def error_of(variables):
        return jacobi_error(flow.config.blocks[0], variables, tokens, tokens, None, 1).sum()

    error, gradient = jax.jit(jax.value_and_grad(error_of))(of_block)
    assert error > DIVERGED / 2
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_only_the_chosen_blocks_are_penalised():
    flow, params, x, cond = laws.case("classes")
    penalty = JacobiPenalty(1.0, SWEEPS, blocks=(1,))
    gradient, metrics = jax.jit(jax.grad(lambda p: penalised(flow, p, x, cond, penalty), has_aux=True))(params)
    assert metrics.keys() == {"jacobi_error/1"}
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient["params"]["blocks_0"]))
    assert any(leaf.any() for leaf in jax.tree.leaves(gradient["params"]["blocks_1"]))
    likelihood = LikelihoodConfig(jacobi=JacobiPenalty(blocks=(0, 2)))
    with pytest.raises(ValueError, match=r"^likelihood.jacobi.blocks contains 2, but this flow has blocks 0 to 1; "):
        FlowExperiment(name="own", model=flow.config, likelihood=likelihood)
    digits = flowgen.load_config("tarflow_digits")  # four blocks, and two with --debug
    small = dataclasses.replace(digits, likelihood=LikelihoodConfig(jacobi=JacobiPenalty(2.0, blocks=(3,)))).debug()
    assert small.likelihood.jacobi == JacobiPenalty(2.0)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data", "fsdp"])
def test_devices_share_the_penalty(layout, monkeypatch):
    monkeypatch.setattr(shards, "MIN_SIZE", 1)  # All arrays are divided.
    flow, params, x, cond = laws.case("classes")
    objective = nll_objective(flow, jacobi=JacobiPenalty(0.5, SWEEPS))
    optim = OptimConfig(lr=1e-2, warmup_steps=0)

    def metrics_of(parallel):
        state = parallel.place(init_state(params, optim, 2))
        update = parallel.compile(make_step(objective, optim, steps=2, axis_name=parallel.axis_name))
        key = parallel.replicate_key(jax.random.key(3))
        return parallel.to_host(update(state, parallel.shard(laws.batch_of(x, cond)), key)[1])

    expected = metrics_of(DataParallel(jax.local_devices()[:1]))
    metrics = metrics_of(FullySharded() if layout == "fsdp" else DataParallel(jax.local_devices()[:2]))
    assert "jacobi_error/1" in metrics
    for name, value in expected.items():
        assert_close(metrics[name], value, NETWORK, err_msg=name)


@pytest.mark.slow
def test_fine_tuning_with_the_penalty_makes_new_samples_converge_faster():
    config = dataclasses.replace(laws.FLOWS["one block"], image_size=8)
    flow, params = laws.perturbed(config, jax.random.key(0), scale=STRONG)
    draw = jax.random.normal(jax.random.key(1), (192, config.num_tokens, config.token_dim))
    x = invert(flow, params, draw[64:], plan="sequential").x  # The flow itself is the best model of these data.
    tx = optax.adam(1e-3)

    @jax.jit
    def fine_tuned(weight):
        def loss_of(params):
            loss, _, states = nll(flow, params, x, None)
            return loss + weight * jacobi_penalty(flow, params, x, states, None, JacobiPenalty(1.0, SWEEPS))[0]

        def step(state, _):
            params, moments = state
            updates, moments = tx.update(jax.grad(loss_of)(params), moments)
            return (optax.apply_updates(params, updates), moments), None

        return jax.lax.scan(step, (params, tx.init(params)), length=60)[0][0]

    def error_after_few_sweeps(params):
        few, exact = (
            invert(flow, params, draw[:64], plan=plan).x
            for plan in (Jacobi(tol=0.0, max_sweeps=SWEEPS), Jacobi(tol=0.0))
        )
        return float(jnp.abs(few - exact).mean())

    control, tuned = (error_after_few_sweeps(fine_tuned(jnp.asarray(weight))) for weight in (0.0, 1.0))
    assert tuned < 0.7 * control
