"""STARFlow: exact sizes of the published shapes, positions, conditions, and what is refused."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from conftest import rows
from laws import FLOWS, STAR, apply, images, perturbed
from tolerances import FORMULA, LAYER, NETWORK, assert_close

import flowgen
from flowgen import experiments
from flowgen.attention.rotary import rotary_axes, turn
from flowgen.conditioning import TextCondition, drop_texts
from flowgen.data import Batch, Moments
from flowgen.decoding import Denoiser, Guidance, Sequential, invert, sample
from flowgen.flows import STARFLOW_PRESETS, density
from flowgen.flows.affine import SOFTPLUS_OFFSET, log_softplus, soft_clip
from flowgen.flows.batches import batch_condition, noisy_batch
from flowgen.flows.objective import nll_objective
from flowgen.flows.positions import GridPositions, rotary_pairs
from flowgen.nn.layers import RMSNorm

# Trainable parameters alone. The published state dict of "t2i_3b" holds beside these var (32² · 4), six attn_mask
# (1152² each) and feat_rope.* (2 · 1152 · 64), which are buffers: nothing reads them, and they are not counted.
PARAMETERS = {
    "t2i_3b": 3_858_281_544,
    "xl_1": 1_412_255_816,
    "xlv2_1": 1_412_255_816,
    "xl_2": 1_412_698_400,
    "xxl_1": 3_855_065_160,
    "xxlv2_1": 3_855_065_160,
}


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", STARFLOW_PRESETS)
def test_presets_have_exactly_the_published_numbers_of_parameters(name):
    flow = flowgen.STARFlow(STARFLOW_PRESETS[name])
    params = jax.eval_shape(lambda key: flowgen.init(flow, key), jax.random.key(0))["params"]
    assert count(params) == PARAMETERS[name]
    if name == "t2i_3b":
        assert [count(params[f"blocks_{i}"]) for i in range(6)] == [226_615_308] * 5 + [2_725_205_004]


def test_the_released_shape_runs_abstractly_from_latents_to_log_prob():
    flow = flowgen.STARFlow(STARFLOW_PRESETS["t2i_3b"])
    params = jax.eval_shape(lambda key: flowgen.init(flow, key), jax.random.key(0))
    text = TextCondition(jnp.zeros((1, 128, 2048)), jnp.ones((1, 128), bool))
    x = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32)
    log_prob = jax.eval_shape(lambda p, x: flow.apply(p, x, text, method="log_prob"), params, x)
    assert log_prob.shape == (1,)


def test_blocks_of_equal_shape_share_one_compiled_initialiser(caplog):
    flow = flowgen.STARFlow(
        flowgen.STARFlowConfig(image_size=4, width=24, head_dim=24, layers_per_block=(1, 1, 1, 2), channels=1)
    )
    with jax.log_compiles():
        flowgen.init(flow, jax.random.key(0))
    compiled = [record for record in caplog.records if re.match(r"Compiling .*init_block", record.getMessage())]
    assert len(compiled) == 2


# -- positions -------------------------------------------------------------------------------------------------


def test_rotary_angles_of_text_and_grid():
    assert rotary_pairs(64, third_axis=True) == (12, 12, 8)
    assert rotary_pairs(64, third_axis=False) == (16, 16)
    rows, columns, length, side = 3, 5, 4, 8.0
    cos, sin = GridPositions(rows, columns, side, (12, 12, 8)).rotary(length)
    assert cos.shape == (length + rows * columns, 32)
    for k in range(length):
        expected = np.r_[np.zeros(24), k / length * side * 10000.0 ** (-np.arange(8) / 8)]
        np.testing.assert_allclose(cos[k], np.cos(expected), atol=1e-12)
    for i, j in ((0, 0), (1, 3), (2, 4)):
        frequencies = 10000.0 ** (-2 * np.arange(12) / 24)
        scale = side / math.sqrt(rows * columns)
        expected = np.r_[i * scale * frequencies, j * scale * frequencies, np.zeros(8)]
        np.testing.assert_allclose(sin[length + i * columns + j], np.sin(expected), atol=1e-12)


def test_turning_is_multiplication_of_adjacent_pairs_by_a_complex_phase(key):
    angles = np.random.default_rng(0).uniform(-3, 3, (5, 4))
    x = jax.random.normal(key, (2, 5, 3, 8))
    turned = turn(x, jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32))
    pairs = np.asarray(x)[..., 0::2] + 1j * np.asarray(x)[..., 1::2]
    expected = pairs * np.exp(1j * angles)[None, :, None]
    assert_close(turned[..., 0::2], expected.real, FORMULA)
    assert_close(turned[..., 1::2], expected.imag, FORMULA)


def test_positions_of_another_number_of_axes_are_refused():
    with pytest.raises(ValueError, match="positions have 2 coordinates, but pairs has 3 entries"):
        rotary_axes(np.zeros((4, 2)), (2, 2, 2))


# -- pure parts ------------------------------------------------------------------------------------------------


def test_softplus_scales_and_soft_clip():
    assert_close(log_softplus(jnp.float32(SOFTPLUS_OFFSET)), 0, FORMULA, scale=1)
    x = jnp.array([-1e4, -100.0, -39.0, -1.0, 0.0, 5.0, 100.0])
    expected = [-1e4, -100.0, -39.0, *np.log(np.log1p(np.exp([-1.0, 0.0, 5.0, 100.0])))]
    np.testing.assert_allclose(log_softplus(x), expected, rtol=1e-5)
    assert jnp.all(jnp.isfinite(jax.vmap(jax.grad(log_softplus))(x)))
    np.testing.assert_allclose(soft_clip(jnp.array([-100.0, 0.1, 100.0]), 4.0), [-4, 4 * np.tanh(0.025), 4], FORMULA)
    np.testing.assert_array_equal(soft_clip(x, 0.0), x)


def test_rms_norm_is_its_formula_with_the_weight_as_an_offset_from_1(key):
    x = 3 * jax.random.normal(key, (2, 5, 6))
    weight = jnp.arange(6) / 10
    y = RMSNorm("float32").apply({"params": {"weight": weight}}, x)
    x64 = np.asarray(x, np.float64)
    expected = x64 / np.sqrt(np.square(x64).mean(axis=-1, keepdims=True) + 1e-6) * (1 + np.asarray(weight))
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    rounded = RMSNorm("bfloat16").apply({"params": {"weight": weight}}, x.astype(jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16


# -- conditions ------------------------------------------------------------------------------------------------


def test_none_and_minus_one_are_the_last_row_of_a_class_prefix():
    flow, params, x, _ = laws.case("starflow class prefix")
    minus_one = jnp.full(len(x), -1, jnp.int32)
    z, _ = apply(flow, params, x, minus_one)
    assert_close(apply(flow, params, x)[0], z, NETWORK)
    kernel = params["params"]["blocks_1"]["proj_prefix"]["kernel"]
    assert kernel.shape == (4, 40)
    last = {**params["params"]["blocks_1"]["proj_prefix"], "kernel": kernel.at[0].set(kernel[3])}
    changed = {"params": {**params["params"], "blocks_1": {**params["params"]["blocks_1"], "proj_prefix": last}}}
    assert_close(apply(flow, changed, x, jnp.zeros(len(x), jnp.int32))[0], z, NETWORK)
    traced = jax.jit(lambda cond: apply(flow, params, x, cond, method="log_prob"))(jnp.array([0, 3, 1, -1]))
    np.testing.assert_array_equal(jnp.isfinite(traced), [True, False, True, True])


def test_the_condition_reaches_the_deep_block_alone_and_padding_hides_what_it_holds():
    flow, params, x, text = laws.case("starflow text")
    states, _ = apply(flow, params, x, text, method="trajectory")
    other = text._replace(embeddings=text.embeddings + 1)
    changed, _ = apply(flow, params, x, other, method="trajectory")
    np.testing.assert_array_equal(states[0], changed[0])
    assert jnp.all(jnp.abs(states[1] - changed[1]).max(axis=(1, 2)) > 1e-3)
    hidden = text._replace(embeddings=jnp.where(text.mask[:, :, None], text.embeddings, 7.0))
    assert_close(apply(flow, params, x, hidden)[0], states[1], NETWORK)


def test_guidance_of_texts_needs_a_null_and_leads_nowhere_from_the_condition_itself():
    flow, params, x, text = laws.case("starflow text")
    z, _ = apply(flow, params, x, text)
    guidance = Guidance(scale=2.0, rule="product")
    same = invert(flow, params, z, text, guidance=dataclasses.replace(guidance, null=text))
    assert_close(same.x, x, NETWORK)
    null = TextCondition(jnp.ones((1, 3, 5)), jnp.ones((1, 3), bool))
    towards = dataclasses.replace(guidance, null=null)
    guided = invert(flow, params, z, text, guidance=towards)
    assert jnp.abs(guided.x - x).max() > 1e-3
    deep = invert(flow, params, z, text, guidance=dataclasses.replace(towards, blocks=(1,)))
    assert_close(deep.x, guided.x, NETWORK)  # the shallow block has no condition to guide by
    with pytest.raises(ValueError, match=r"guidance\.null is missing; this flow is conditioned on text"):
        invert(flow, params, z, text, guidance=guidance)
    labelled, params, x, cond = laws.case("starflow class prefix")
    z, _ = apply(labelled, params, x, cond)
    with pytest.raises(ValueError, match=r"guidance\.null is only for flows conditioned on text"):
        invert(labelled, params, z, cond, guidance=towards)


@pytest.mark.slow
def test_samples_of_texts_depend_on_key_and_index_alone():
    flow, params, _, text = laws.case("starflow text")
    together = sample(flow, params, jax.random.key(3), 4, text, plan=Sequential())
    rest = TextCondition(*(part[2:] for part in text))
    tail = sample(flow, params, jax.random.key(3), range(2, 4), rest, plan=Sequential())
    assert_close(tail.x, together.x[2:], NETWORK)


def test_dropped_texts_are_the_null_text(key):
    texts = TextCondition(jnp.ones((1000, 2, 3)), jnp.ones((1000, 2), bool))
    null = TextCondition(jnp.zeros((1, 2, 3)), jnp.zeros((1, 2), bool))
    dropped = drop_texts(key, texts, null, 0.1)
    gone = dropped.embeddings[:, 0, 0] == 0
    np.testing.assert_allclose(gone.mean(), 0.1, atol=0.03)
    np.testing.assert_array_equal(dropped.mask, jnp.broadcast_to(~gone[:, None], (1000, 2)))


# -- refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers_per_block": (2, 0)}, r"layers_per_block is \(2, 0\)"),
        ({"width": 30}, "width is 30, which is not a multiple of head_dim 20"),
        ({"deep_width": 50}, "deep_width is 50, which is not a multiple of head_dim 20"),
        ({"width": 60, "deep_width": 60, "num_kv_heads": 2}, "num_kv_heads is 2, which does not divide the 3 heads"),
        (
            {"num_kv_heads": 1, "attention": "nala"},
            "num_kv_heads is 1, but 'nala' attention cannot share key-value heads",
        ),
        ({"soft_clip": -1.0}, "soft_clip is -1.0"),
        ({"text_dim": 5}, "text_dim is 5 and text_length is 0; set both, or leave"),
        ({"text_dim": 5, "text_length": 2, "num_classes": 3}, "set one of them to 0"),
        ({"head_dim": 8, "num_classes": 3}, "head_dim is 8; rotary positions need a multiple of 4 that is at least 20"),
        ({"order": "L2R"}, "order is 'L2R'; it must be 'raster' or 'reversed'"),
        ({"rope_base_grid": 0.0}, "rope_base_grid is 0.0"),
        ({"noise_std": -0.3}, "noise_std is -0.3"),
    ],
)
def test_a_config_that_cannot_work_is_refused(change, message, untyped):
    with pytest.raises(ValueError, match=message):
        flowgen.STARFlowConfig(**{"image_size": 6, **STAR, **change})


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        (None, "cond is NoneType; it must be a flowgen.conditioning.TextCondition"),
        (TextCondition(np.zeros((2, 4, 5)), np.ones((2, 3), bool)), r"of shape \(2, 3, 5\); got float64 of shape"),
        (TextCondition(np.zeros((2, 3, 5)), np.ones((2, 3))), r"mask must be bool of shape \(2, 3\)"),
    ],
)
def test_texts_that_do_not_fit_are_refused(cond, message, untyped):
    flow, params = perturbed(FLOWS["starflow text"], jax.random.key(0))
    x = images(flow.config, jax.random.key(1), batch=2)
    with pytest.raises(ValueError, match=message):
        flow.apply(params, x, cond, method="forward")


def test_an_experiment_shrinks():
    small = experiments.FlowExperiment(name="star", model=FLOWS["starflow options"]).debug()
    assert small.model.layers_per_block == (1, 1)
    assert small.model.num_kv_heads == 1


# -- other sizes, precision, training, denoisers ---------------------------------------------------------------


def test_one_set_of_parameters_serves_grids_of_other_sizes():
    flow, params, _, text = laws.case("starflow text")
    wide = flow.with_image_size(4, 10)
    assert wide.config.image_hw == (4, 10)
    assert flow.with_image_size(6, 6) is flow
    assert wide.with_image_size(6, 6).config == dataclasses.replace(flow.config, image_size=(6, 6))
    x = np.random.default_rng(0).normal(size=(len(text.mask), 4, 10, 2)).astype(np.float32)
    z, _ = apply(wide, params, x, text, method="forward")
    back = invert(wide, params, z, text, plan=Sequential())
    assert_close(back.x, x, NETWORK)
    tar, _, _, _ = laws.case("affine")
    with pytest.raises(ValueError, match=r"images are 4 x 10; this model accepts only \(6, 6\)"):
        tar.with_image_size(4, 10)


def test_a_grid_without_a_base_grid_keeps_the_one_it_was_made_on():
    config = flowgen.STARFlowConfig(image_size=8, **{**STAR, "patch_size": 1})
    assert config.with_image_size(4, 16).rope_base_grid == 8.0
    assert config.with_image_size(16, 16).with_image_size(8, 8).rope_base_grid == 8.0


# Eight bits of mantissa in matrix products of width 40, whose sums are float32, and densities in float32 throughout:
# about 1e-2 of tokens of order 1, and less of their mean.
HALF = 4e-2


@pytest.mark.parametrize(
    "name",
    rows(["starflow class prefix", "starflow text", "starflow options"], ("starflow text", "starflow class prefix")),
)
def test_bfloat16_networks_are_near_those_in_float32(name):
    flow, params, x, cond = laws.case(name)
    half = type(flow)(dataclasses.replace(flow.config, dtype="bfloat16"))
    z, logdet = apply(flow, params, x, cond, method="forward")
    z_half, logdet_half = apply(half, params, x, cond, method="forward")
    assert z_half.dtype == logdet_half.dtype == jnp.float32
    assert_close(z_half, z, HALF)
    assert_close(logdet_half / flow.config.num_dims, logdet / flow.config.num_dims, HALF)
    assert float(jnp.abs(z_half - z).max()) > 1e-5
    back = invert(half, params, z_half, cond, plan=Sequential())
    # Density and decoding round alike only up to the order of sums, and each token is rounded after those before it.
    assert_close(back.x, x, 3 * HALF)


def test_parameters_kept_in_bfloat16_work_like_their_float32_values():
    flow, params, x, cond = laws.case("starflow class prefix")
    kept = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), kept)
    z, _ = apply(flow, kept, x, cond, method="forward")
    expected, _ = apply(flow, widened, x, cond, method="forward")
    assert_close(z, expected, NETWORK)


def test_the_norm_penalty_is_of_the_tokens_that_enter_blocks(key):
    flow, params, _, _ = laws.case("starflow class prefix")
    mean = np.random.default_rng(1).normal(size=(4, *flow.config.image_shape)).astype(np.float32)
    batch = Batch(Moments(mean, np.full_like(mean, 0.1)), np.array([0, 1, 2, -1], np.int32))
    plain, metrics = jax.jit(nll_objective(flow))(params, batch, jax.random.clone(key))
    weigh = jax.jit(nll_objective(flow, norm_penalty=0.5, loss_scale=2.0))
    weighed, with_penalty = weigh(params, batch, jax.random.clone(key))
    # The latents that enter have variance 1 of the draw, 0.1² of the posterior, and σ² of the noise.
    entering = (float(weighed) - 2 * float(plain)) / 0.5 - float(metrics["mean_square/0"])
    x, _ = noisy_batch(flow, batch_condition(flow, 0.0, None), batch, key)
    assert_close(entering, float(jnp.square(x).mean()), NETWORK)
    assert entering == pytest.approx(np.square(mean).mean() + 0.01 + 0.09, rel=0.1)
    assert_close(with_penalty["nats_per_dim"], metrics["nats_per_dim"], LAYER)
    assert "bits_per_dim" not in metrics


def test_dropping_texts_needs_the_empty_one():
    flow, _, _, _ = laws.case("starflow text")
    with pytest.raises(ValueError, match=r"label_dropout is 0.1, but null_text is None"):
        nll_objective(flow, label_dropout=0.1)


@pytest.mark.slow
def test_a_learned_denoiser_takes_the_place_of_the_tweedie_step():
    flow, params, _, text = laws.case("starflow text")
    key, num = jax.random.key(5), len(text.mask)
    expected = sample(flow, params, key, num, text, plan=Sequential(), denoise=0.5)

    def half_a_tweedie_step(variables, x, cond):
        return density.tweedie_step(flow, variables, x, cond, strength=0.5)

    learned = sample(flow, params, key, num, text, plan=Sequential(), denoise=Denoiser(half_a_tweedie_step, params))
    assert_close(learned.x, expected.x, NETWORK)
    raw = sample(flow, params, key, num, text, plan=Sequential(), denoise=False)
    assert float(jnp.abs(raw.x - expected.x).max()) > 1e-3
