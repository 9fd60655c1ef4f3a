"""What decoding moves: weights that are made ready once, and caches that are read only as far as they are filled."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from conftest import rows
from tolerances import NETWORK, assert_close

import flowgen
from flowgen.attention import causal_kernel
from flowgen.backend import cache_stages
from flowgen.decoding import Jacobi, Sequential, SlidingWindow, invert
from flowgen.decoding.block import GuidedBlock, Order, inverse
from flowgen.decoding.weights import decoding_weights
from flowgen.flows import AutoregressiveBlock, block_parameters
from flowgen.flows.block import BlockState
from flowgen.flows.decoding_form import decoding_block, decoding_config
from flowgen.nn import unstack_layers

SMALL = {"channels": 1, "width": 16, "head_dim": 8}
TAR = flowgen.TARFlowConfig(image_size=(8, 32), patch_size=1, num_blocks=2, layers_per_block=1, num_classes=3, **SMALL)
STAR = flowgen.STARFlowConfig(
    image_size=(8, 32), layers_per_block=(1, 1), num_classes=3, channels=1, width=20, head_dim=20
)


def recording(lengths):
    """Softmax attention that appends the number of slots that each window reads, whenever it is traced."""
    softmax = causal_kernel("softmax")

    def attend_window(q, k, v, cache, start):
        lengths.append(cache.keys.shape[2])
        return softmax.attend_window(q, k, v, cache, start)

    return softmax._replace(attend_window=attend_window)


def weights_of(flow, params):
    return jax.tree.leaves(decoding_weights(flow.config, params))


@pytest.mark.parametrize(
    ("tokens", "layers", "stages"),
    [(63, 2, 1), (255, 2, 3), (1023, 8, 6), (1024, 24, 2), (1024, 64, 1), (1, 0, 1)],
)
def test_more_stages_for_more_tokens_and_fewer_for_more_layers(tokens, layers, stages):
    assert cache_stages(tokens, layers) == stages


def test_sequential_decoding_of_1024_tokens_reads_at_most_60_percent_of_the_slots():
    lengths = []
    config = flowgen.TARFlowConfig(
        image_size=32, patch_size=1, num_blocks=1, layers_per_block=1, attention=recording(lengths), **SMALL
    )
    flow = config.build()
    params = jax.eval_shape(lambda: flowgen.init(flow, jax.random.key(0)))
    lengths.clear()
    jax.eval_shape(lambda params, z: invert(flow, params, z), params, jax.ShapeDtypeStruct((1, 1024, 1), jnp.float32))
    slots = np.array(sorted(set(lengths)))
    assert slots[-1] == 1023  # the first token passes through
    assert (np.diff(slots, prepend=0) * slots).sum() <= 0.6 * slots[-1] ** 2


@pytest.mark.parametrize("config", rows([TAR, STAR], (STAR,)), ids=lambda config: type(config).__name__)
def test_every_plan_inverts_through_several_stages(config):
    flow, params = laws.perturbed(config, jax.random.key(0))
    x, labels = laws.images(config, jax.random.key(1), batch=2), jnp.array([1, -1], jnp.int32)
    z, _ = laws.apply(flow, params, x, labels)
    for plan in (Sequential(), Jacobi(window=30, tol=0.0), SlidingWindow(window=20, tol=0.0)):
        r = invert(flow, params, z, labels, plan=plan)
        assert_close(r.x, x, NETWORK)
        assert jnp.all(r.residual == 0)


def test_a_sample_that_is_ahead_of_the_others_waits_for_the_next_stage():
    flow, params = laws.perturbed(TAR, jax.random.key(0), scale=0.1)
    noise = jax.random.normal(jax.random.key(1), (3, flow.config.num_tokens, flow.config.token_dim))
    z, labels = noise * jnp.array([0.05, 0.3, 1.0])[:, None, None], jnp.array([1, -1, 0], jnp.int32)
    plan = SlidingWindow(window=20, tol=1e-3)
    together = invert(flow, params, z, labels, plan=plan, certify=True)
    sweeps = []
    for index in range(3):
        alone = invert(flow, params, z[index : index + 1], labels[index : index + 1], plan=plan)
        assert_close(alone.x[0], together.x[index], NETWORK)
        sweeps.append(alone.sweeps.sum())
    assert min(sweeps) < 0.9 * max(sweeps)
    assert jnp.all(together.residual <= 1e-3)
    assert together.error.max() < 0.01


def test_blocks_of_one_shape_are_compiled_once_and_a_kernel_that_cannot_grow_has_one_stage():
    for grows in (True, False):
        lengths = []
        kernel = recording(lengths) if grows else recording(lengths)._replace(grow=None)
        config = dataclasses.replace(TAR, num_classes=0, num_blocks=3, attention=kernel)
        flow, params = laws.perturbed(config, jax.random.key(0))
        z = jax.random.normal(jax.random.key(1), (2, 256, 1))
        lengths.clear()
        x = invert(flow, params, z).x
        assert sorted(set(lengths)) == ([85, 170, 255] if grows else [255])
        assert len(lengths) <= 2 * len(set(lengths))  # jax may trace a loop twice, but not once per block
        lengths.clear()
        np.testing.assert_array_equal(invert(flowgen.TARFlow(flow.config), params, z).x, x)
        assert not lengths


def test_the_program_holds_no_copy_of_the_weights():
    config = dataclasses.replace(TAR, image_size=4, width=256, head_dim=64, layers_per_block=4, num_classes=0)
    flow = config.build()
    params = flowgen.init(flow, jax.random.key(0))
    weights = decoding_weights(flow.config, params)[0]
    block = GuidedBlock(AutoregressiveBlock(decoding_config(flow.config.blocks[0])), weights, None, None)
    program = inverse.lower(block, jnp.zeros((1, 16, 1)), Order(), plan=Sequential(), layers=4).compile()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    assert program.memory_analysis().temp_size_in_bytes < size / 20


def test_weights_are_made_ready_once_for_as_long_as_the_parameters_live():
    flow, params = laws.perturbed(laws.FLOWS["classes"], jax.random.key(0))
    weights = weights_of(flow, params)
    again = weights_of(flow, {**params, "params": dict(params["params"])})
    assert all(x is y for x, y in zip(again, weights, strict=True))
    leaves, tree = jax.tree.flatten(params)
    changed = jax.tree.unflatten(tree, [leaves[0] + 1, *leaves[1:]])
    assert not any(x is y for x, y in zip(weights_of(flow, changed), weights, strict=True) if x.ndim > 3)
    layer = decoding_weights(flow.config, params)[0]["params"]["layers"]["layer_0"]["mlp"]["up"]["kernel"]
    alive = weakref.ref(layer)
    del layer, weights, again, leaves, changed, params
    gc.collect()
    assert alive() is None


def test_parameters_that_can_change_are_read_again():
    flow, params, x, cond = laws.case("classes")
    z, _ = laws.apply(flow, params, x, cond)
    own = jax.tree.map(np.array, params)
    assert_close(invert(flow, own, z, cond).x, x, NETWORK)
    jax.tree.map(lambda leaf: leaf.fill(0), own["params"])
    np.testing.assert_array_equal(invert(flow, own, z, cond).x, invert(flow, jax.tree.map(jnp.array, own), z, cond).x)
    donated = jax.tree.map(jnp.array, params)
    invert(flow, donated, z, cond)
    jax.tree.map(lambda leaf: leaf.delete(), donated)
    with pytest.raises(RuntimeError, match="deleted"):
        invert(flow, donated, z, cond)


def test_weights_cast_beforehand_give_the_same_numbers():
    config = dataclasses.replace(laws.FLOWS["starflow options"], dtype="bfloat16")
    flow, params = laws.perturbed(config, jax.random.key(0))
    block, cast = decoding_block(flow.config.blocks[-1], block_parameters(params, 1))
    stacked = block_parameters(params, 1)["params"]
    layers = unstack_layers(stacked["layers"], flow.config.blocks[-1].transformer.num_layers)
    plain = {"params": {**stacked, "layers": layers}}
    assert cast["params"]["layers"]["layer_0"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    assert cast["params"]["layers"]["layer_0"]["mlp_norm"]["weight"].dtype == jnp.float32
    tokens = jax.random.normal(jax.random.key(1), (4, flow.config.num_tokens, flow.config.token_dim))

    @jax.jit
    def parameters(variables):
        return block.apply(variables, tokens, laws.labels(config), BlockState(), method="conditioner")[0]

    for first, second in zip(parameters(cast), parameters(plain), strict=True):
        np.testing.assert_array_equal(first, second)
