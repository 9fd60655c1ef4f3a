"""Every flow: inverse, log-determinant, causality, density, and what is exact about class conditioning."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from conftest import rows
from laws import FLOWS, SMALL, apply, images, labels, perturbed
from tolerances import FORMULA, LAYER, NETWORK, assert_close

import flowgen
from flowgen.conditioning import drop_labels
from flowgen.data import from_uint8
from flowgen.decoding import Sequential, invert
from flowgen.flows import AutoregressiveBlock, block_parameters, decoding_block, density
from flowgen.flows.batches import batch_condition, dequantise, noisy_batch
from flowgen.flows.block import BlockState
from flowgen.flows.objective import nll_objective
from flowgen.gaussian import gaussian_log_density

EXACT = 1e-10  # float64
BFLOAT16 = 0.05  # 8 bits of mantissa


ALIKE = (
    *("affine", "nala", "no remat", "one block", "rectangular", "volume preserving"),
    *("starflow class prefix", "starflow added class", "starflow nala", "starflow rectangular", "starflow text"),
)


@pytest.fixture(params=rows(FLOWS, ALIKE))
def case(request):
    return laws.case(request.param)


def test_inverse_round_trip(case):
    flow, params, x, cond = case
    z, _ = apply(flow, params, x, cond)
    assert jnp.abs(z.reshape(x.shape) - x).max() > 0.1  # the perturbed flow is far from the identity
    assert_close(invert(flow, params, z, cond, plan=Sequential()).x, x, NETWORK)


def test_logdet_is_slogdet_of_the_jacobian_in_float64(case):
    flow, params, x, cond = case
    with jax.enable_x64(True):
        wide = type(flow)(dataclasses.replace(flow.config, dtype="float64"))
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        x = x[:1].astype(jnp.float64)
        cond = jax.tree.map(lambda part: part[1:2], cond)

        def noise(x):
            return wide.apply(params, x[None], cond, method="forward")[0].reshape(-1)

        jacobian = jax.jit(jax.jacfwd(noise))(x[0]).reshape(x.size, x.size)
        _, logdet = apply(wide, params, x, cond)
        sign, expected = jnp.linalg.slogdet(jacobian)
        assert abs(float(sign)) == 1
        np.testing.assert_allclose(logdet[0], expected, atol=EXACT)


def test_log_prob_is_the_change_of_variables_formula(case):
    flow, params, x, cond = case
    z, logdet = apply(flow, params, x, cond)
    variance = np.asarray(params["prior"]["variance"]) if "prior" in params else np.ones(z.shape[1:])
    gaussian = -0.5 * (np.square(np.asarray(z)) / variance + np.log(2 * np.pi * variance)).sum(axis=(1, 2))
    log_prob = apply(flow, params, x, cond, method="log_prob")
    assert_close(log_prob, gaussian + np.asarray(logdet), LAYER)


def test_a_bound_module_offers_the_same_methods():
    flow, params, x, cond = laws.case("classes")
    bound = jax.jit(lambda params: flow.bind(params).log_prob(x, cond))(params)
    assert_close(bound, apply(flow, params, x, cond, method="log_prob"), LAYER)


def test_a_block_is_strictly_causal_in_its_own_order(case):
    flow, params, x, cond = case
    index = flow.config.num_blocks - 1
    block = AutoregressiveBlock(flow.config.blocks[index])
    tokens = x.reshape(len(x), flow.config.num_tokens, flow.config.token_dim)
    variables = block_parameters(params, index)

    def parameters(tokens):
        previous = block.apply(variables, tokens, method="previous")
        (shift, log_scale), _ = block.apply(variables, previous, cond, method="conditioner")
        return shift + log_scale

    jacobian = jnp.abs(jax.jit(jax.jacrev(lambda t: parameters(t).sum(axis=(0, 2))))(tokens)).sum(axis=(1, 3))
    # Row t holds the parameters of token t + num_passthrough, which see the tokens before it.
    assert jacobian.shape == (flow.config.num_tokens - block.num_passthrough, flow.config.num_tokens)
    future = np.triu(np.ones(jacobian.shape), k=block.num_passthrough).astype(bool)
    assert np.all(np.asarray(jacobian)[future] == 0)
    assert np.all(np.asarray(jacobian)[~future] > 0)


def test_samples_of_a_batch_do_not_see_each_other(case):
    flow, params, x, cond = case

    def first(x):
        z, logdet = apply(flow, params, x, cond)
        return jnp.square(z[0]).sum() + logdet[0]

    gradient = jax.jit(jax.grad(first))(x)
    assert jnp.all(gradient[1:] == 0)
    assert jnp.any(gradient[0] != 0)


def test_every_parameter_receives_gradient(case):
    flow, params, x, cond = case
    objective = nll_objective(flow)
    batch = laws.batch_of(x, cond)
    loss = jax.jit(jax.grad(lambda p, key: objective({**params, "params": p}, batch, key)[0]))
    gradient = loss(params["params"], jax.random.key(1))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        if flow.config.num_classes and "class_embed" in str(path):
            assert jnp.any(leaf != 0), path
            continue
        # A key's bias shifts all logits of a query equally, so only its q and v thirds matter.
        assert jnp.mean(leaf != 0) > 0.5, path


def test_the_objective_is_bits_per_dim_of_the_noised_images(case):
    flow, params, x, cond = case
    flow = type(flow)(dataclasses.replace(flow.config, noise_std=0.1))
    batch = laws.batch_of(x, cond)
    loss, metrics, *state = jax.jit(nll_objective(flow))(params, batch, jax.random.key(1))
    noised, _ = noisy_batch(flow, batch_condition(flow, 0.0, None), batch, jax.random.key(1))
    # Within five standard errors.
    spread = (noised - from_uint8(batch.x)) / 0.1
    np.testing.assert_allclose([spread.mean(), spread.std()], [0, 1], atol=5 / np.sqrt(spread.size))
    z, logdet = apply(flow, params, noised, cond)
    variance = params["prior"]["variance"] if "prior" in params else jnp.ones(z.shape[1:])
    log_prob = gaussian_log_density(z, variance[None]).sum(axis=(1, 2)) + logdet
    assert_close(metrics["bits_per_dim"], density.bits_per_dim(log_prob, flow.config.num_dims).mean(), LAYER)
    assert_close(loss, 0.5 * jnp.square(z).mean() - logdet.mean() / flow.config.num_dims, NETWORK)
    if variance is None:  # the published formula, with its standard normal prior
        assert_close(metrics["bits_per_dim"], loss / math.log(2) + 8.32575, LAYER)
    if flow.config.scale_parameterisation == "volume_preserving":
        tracked = 0.9 * params["prior"]["variance"] + 0.1 * jnp.square(z).mean(axis=0)
        assert_close(state[0]["prior"]["variance"], tracked, NETWORK)
    else:
        assert state == []


def test_unconditional_means_the_mean_class_everywhere(key):
    config = FLOWS["classes"]
    k1, k2 = jax.random.split(key)
    flow, params = perturbed(config, k1)
    x = images(config, k2)
    minus_one = jnp.full(len(x), -1, jnp.int32)
    z, logdet = apply(flow, params, x, minus_one)
    z_none, logdet_none = apply(flow, params, x)
    assert_close(z_none, z, NETWORK)
    assert_close(logdet_none, logdet, NETWORK)
    averaged = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jnp.broadcast_to(leaf.mean(axis=0, keepdims=True), leaf.shape) if "class_embed" in str(path) else leaf
        ),
        params,
    )
    assert_close(apply(flow, averaged, x, jnp.zeros(len(x), jnp.int32))[0], z, NETWORK)
    assert_close(invert(flow, params, z, minus_one).x, x, NETWORK)
    assert_close(invert(flow, params, z, None).x, x, NETWORK)


def test_a_class_that_does_not_exist_is_refused_or_gives_nan(key):
    config = FLOWS["classes"]
    k1, k2 = jax.random.split(key)
    flow, params = perturbed(config, k1)
    x = images(config, k2, batch=2)
    with pytest.raises(ValueError, match=r"label 3 is out of range; use 0 to 2, or -1"):
        flow.apply(params, x, jnp.array([0, 3]), method="forward")
    log_prob = jax.jit(lambda cond: apply(flow, params, x, cond, method="log_prob"))(jnp.array([0, 3]))
    assert jnp.isfinite(log_prob[0])
    assert jnp.isnan(log_prob[1])
    unconditional, params = perturbed(FLOWS["affine"], jax.random.key(1))
    with pytest.raises(ValueError, match="num_classes is 0"):
        unconditional.apply(params, x, jnp.array([0, 1]), method="forward")


def test_bfloat16_keeps_parameters_and_density_in_float32(key):
    config = dataclasses.replace(FLOWS["classes"], dtype="bfloat16")
    k1, k2 = jax.random.split(key)
    flow, params = perturbed(config, k1, scale=0.05)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    x = images(config, k2)
    z, logdet = apply(flow, params, x, labels(config))
    assert z.dtype == logdet.dtype == jnp.float32
    exact = flowgen.TARFlow(dataclasses.replace(config, dtype="float32"))
    z32, logdet32 = apply(exact, params, x, labels(config))
    assert_close(z, z32, BFLOAT16)
    assert_close(logdet, logdet32, BFLOAT16)


def test_parallel_and_cached_forms_agree(case):
    flow, params, x, cond = case
    index = 1 % flow.config.num_blocks
    block, variables = decoding_block(flow.config.blocks[index], block_parameters(params, index))
    tokens = x.reshape(len(x), flow.config.num_tokens, flow.config.token_dim)

    @jax.jit
    def conditioner(window, start, caches):
        state = BlockState(start, caches)
        (shift, log_scale), seen = block.apply(variables, window, cond, state, method="conditioner")
        return shift, log_scale, None if caches is None else block.accept(caches, seen)

    previous = jax.jit(partial(block.apply, variables, method="previous"))(tokens)
    shift, log_scale, _ = conditioner(previous, 0, None)
    caches = jax.jit(lambda: block.apply(variables, len(x), len(previous[0]), cond, method="prefill"))()
    for start in range(0, len(previous[0]), 2):
        window = previous[:, start : start + 2]
        shift_w, log_scale_w, caches = conditioner(window, start, caches)
        stop = start + window.shape[1]
        assert_close(shift_w, shift[:, start:stop], NETWORK)
        assert_close(log_scale_w, log_scale[:, start:stop], NETWORK)


def test_compile_time_shape_of_the_program_does_not_depend_on_depth():
    def program(layers):
        config = flowgen.TARFlowConfig(image_size=6, **{**SMALL, "layers_per_block": layers})
        flow = flowgen.TARFlow(config)
        params = jax.eval_shape(lambda: flow.init(jax.random.key(0), jnp.zeros((1, *config.event_shape))))
        lowered = jax.jit(lambda p, x: flow.apply(p, x, method="forward")).lower(
            params, jax.ShapeDtypeStruct((1, *config.event_shape), jnp.float32)
        )
        return len(lowered.as_text().splitlines())

    assert program(2) == program(12)


def test_dequantisation_covers_each_level_once_and_density_constants():
    levels = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    x = dequantise(jax.random.key(0), levels)
    assert x.min() >= -1
    assert x.max() < 1
    np.testing.assert_array_equal(jnp.floor((x + 1) * 128).astype(jnp.uint8), levels)
    # A uniform density over [-1, 1) is worth exactly 8 bits per dimension.
    assert_close(density.bits_per_dim(jnp.array(-math.log(2) * 10), 10), 8.0, FORMULA)


def test_score_denoising_and_bayes(key):
    config = dataclasses.replace(FLOWS["classes"], noise_std=0.3)
    k1, k2 = jax.random.split(key)
    flow, params = perturbed(config, k1)
    x, cond = images(config, k2), labels(config)

    def log_prob(x, cond=cond):
        return apply(flow, params, x, cond, method="log_prob")

    direction = jax.random.normal(jax.random.key(5), x.shape)
    step = 1e-2
    slope = (log_prob(x + step * direction) - log_prob(x - step * direction)) / (2 * step)
    score = jax.jit(partial(density.score, flow))(params, x, cond)
    np.testing.assert_allclose((score * direction).sum(axis=tuple(range(1, x.ndim))), slope, rtol=2e-2, atol=1e-2)
    assert_close(
        jax.jit(partial(density.tweedie_step, flow, strength=0.5))(params, x, cond),
        x + 0.5 * 0.09 * score,
        NETWORK,
    )
    bayes = jax.jit(partial(density.class_posterior, flow))
    posterior = bayes(params, x)
    joint = jnp.stack([log_prob(x, jnp.full(len(x), c, jnp.int32)) for c in range(3)], axis=-1)
    assert_close(posterior, jax.nn.softmax(joint, axis=-1), FORMULA, scale=joint.max())
    certain = bayes(params, x, jnp.array([0.0, -1e9, -1e9]))
    assert_close(certain[:, 0], 1.0, FORMULA)


def test_label_dropout_drops_that_share(key):
    dropped = drop_labels(key, jnp.arange(20000, dtype=jnp.int32) % 10, 0.1)
    np.testing.assert_allclose(jnp.mean(dropped == -1), 0.1, atol=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 7}, r"image_size has height 7 and width 7, which patch_size 2 does not divide"),
        ({"width": 40}, r"width is 40, which is not a multiple of head_dim 16"),
        ({"num_blocks": 0}, r"num_blocks is 0; it must be at least 1"),
        ({"patch_size": 6}, r"makes the whole image one token"),
        ({"noise_std": -0.1}, r"noise_std is -0.1"),
        ({"attention": "sofmax"}, r"attention is 'sofmax'; choose one of softmax"),
    ],
)
def test_a_config_that_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        flowgen.TARFlowConfig(**{"image_size": 6, **SMALL, **change})


def test_images_of_another_shape_are_refused(key):
    flow, params = perturbed(FLOWS["rectangular"], key)
    with pytest.raises(ValueError, match=r"x has shape \(2, 10, 4, 2\); its shape must be \(batch, 4, 10, 2\)"):
        flow.apply(params, jnp.zeros((2, 10, 4, 2)), method="forward")
