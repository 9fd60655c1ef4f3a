"""Flow-score matching: the loss of the flow, and the score as the target of its denoiser, by one backward pass."""

from functools import partial

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from conftest import rows
from tolerances import LAYER, NETWORK, assert_close, assert_trees_close

from flowgen.data import Batch, Moments
from flowgen.flows import (
    ClipDenoiser,
    STARFlowV,
    STARFlowVConfig,
    denoiser_variables,
    flow_score_objective,
    score_matching_loss,
    score_target,
)
from flowgen.flows.batches import batch_condition, noisy_batch
from flowgen.flows.objective import nll_objective
from flowgen.nn import init
from flowgen.training import OptimConfig
from flowgen.training.step import init_state, make_step

CLIP = STARFlowVConfig(
    image_size=(2, 3),
    frames=4,
    channels=2,
    width=40,
    head_dim=20,
    layers_per_block=(1, 1),
    num_classes=3,
    denoiser_layers=1,
    denoiser_past_frames=2,
)
FLOW = STARFlowV(CLIP)
SCALE = 1.7


@pytest.fixture(scope="module")
def params():
    return laws.drawn(init, FLOW, jax.random.key(0), scale=0.1)


def batch(frames=4):
    random = np.random.default_rng(1)
    mean, std = random.standard_normal((2, 5, frames, 2, 3, 2)).astype(np.float32)
    return Batch(Moments(mean, 0.1 * np.abs(std)), np.array([0, 1, 2, -1, 0], np.int32))


def gradients(objective, params, data):
    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    return run(params, data, jax.random.key(1))


@pytest.mark.slow  # a run of clips trains both
@pytest.mark.parametrize("frames", rows([4, 1], (4,)))
def test_the_flow_is_trained_as_without_a_denoiser(params, frames):
    data = batch(frames)
    (loss, metrics), gradient = gradients(flow_score_objective(FLOW, loss_scale=SCALE), params, data)
    plain = nll_objective(FLOW, loss_scale=SCALE)
    (alone, metrics_alone), expected = gradients(plain, params, data)
    assert_close(metrics["flow_loss"], alone, LAYER)
    assert_close(loss, alone + metrics["denoiser_loss"], LAYER)
    assert_close(metrics["nats_per_dim"], metrics_alone["nats_per_dim"], LAYER)
    for name in ("blocks_0", "blocks_1"):
        assert_trees_close(gradient["params"][name], expected["params"][name], NETWORK)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(expected["params"]["denoiser"]))


@pytest.mark.slow  # a run of clips trains both
def test_the_denoiser_is_trained_on_the_score_alone(params):
    data = batch()
    (_, metrics), gradient = gradients(flow_score_objective(FLOW, loss_scale=SCALE), params, data)
    x, labels = jax.jit(partial(noisy_batch, FLOW, batch_condition(FLOW, 0.0, None)))(data, jax.random.key(1))
    target = jax.jit(partial(score_target, FLOW))(params, x, labels)
    assert_close(metrics["score_square"], jnp.square(target).mean(), LAYER)

    def loss(variables):
        return score_matching_loss(ClipDenoiser(CLIP), variables, x, target, labels)

    value, expected = jax.jit(jax.value_and_grad(loss))(denoiser_variables(params))
    assert_close(metrics["denoiser_loss"], value, LAYER)
    assert_trees_close(gradient["params"]["denoiser"], expected["params"], NETWORK)


@pytest.mark.slow
def test_each_part_has_its_optimizer(params):
    fast, slow = OptimConfig(lr=1e-2, clip_norm=0.0, weight_decay=0.0), OptimConfig(lr=1e-4, weight_decay=0.0)
    objective = flow_score_objective(FLOW)
    data = jax.tree.map(lambda x: x[None], batch())

    def one_step(optim, others):
        state = jax.tree.map(lambda x: jnp.asarray(x)[None], init_state(params, optim, 10, others))
        step = jax.pmap(make_step(objective, optim, steps=10, others=others), axis_name="data")
        state, metrics = step(state, data, jax.random.key(2)[None])
        changed = jax.tree.map(lambda new, old: np.abs(new[0] - old).max(), state.params, params["params"])
        return {name: max(jax.tree.leaves(part)) for name, part in changed.items()}, metrics

    changed, metrics = one_step(slow, {"denoiser": fast})
    # Adam's first step is the learning rate, whatever the gradient.
    assert changed["denoiser"] == pytest.approx(1e-2, rel=0.01)
    assert changed["blocks_0"] == pytest.approx(1e-4, rel=0.01)
    assert float(metrics["lr"][0]) == pytest.approx(1e-4)
    skipping = OptimConfig(lr=1e-4, weight_decay=0.0, skip_norm=1e-6, skip_after=0)
    changed, metrics = one_step(skipping, {"denoiser": fast})
    assert changed["blocks_0"] == 0
    assert changed["denoiser"] == pytest.approx(1e-2, rel=0.01)
    assert float(metrics["skipped"][0]) == 1


def test_a_flow_without_a_denoiser_is_refused():
    with pytest.raises(ValueError, match=r"model.denoiser_layers is 0, so there is no denoiser to train"):
        flow_score_objective(STARFlowV(STARFlowVConfig(image_size=2, width=40, head_dim=20, layers_per_block=(1, 1))))
