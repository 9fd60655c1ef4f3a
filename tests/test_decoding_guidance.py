"""Guidance: its definition by hand, the product of Gaussians, what costs nothing, and what is refused."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from laws import apply
from tolerances import LAYER, NETWORK, assert_close

from flowgen.decoding import (
    Guidance,
    Jacobi,
    Sequential,
    invert,
    linear_rule,
    product_rule,
)
from flowgen.decoding.request import decode_request
from flowgen.flows import AutoregressiveBlock, block_parameters
from flowgen.flows.block import BlockState


def reference_reverse(flow, params, z, cond, weight, parts, anneal, temperature=1.0):
    """Guided sampling by its definition: full prefix recomputed for every token, two separate passes."""
    config = flow.config
    tokens = z
    for index in reversed(range(config.num_blocks)):
        block = AutoregressiveBlock(config.blocks[index])
        flip = config.blocks[index].order == "reversed"
        u = tokens[:, ::-1] if flip else tokens

        @jax.jit
        def parameters(u, cond, inverse_temperature, block=block, index=index):
            variables = block_parameters(params, index)
            state = BlockState(inverse_temperature=inverse_temperature)
            return block.apply(variables, u[:, :-1], cond, state, method="conditioner")[0]

        for t in range(1, config.num_tokens):
            cold = jnp.full(len(z), 1 / temperature)
            m_c, a_c = (p[:, t - 1] for p in parameters(u, cond, jnp.ones(len(z))))
            m_u, a_u = (p[:, t - 1] for p in parameters(u, None, cold))
            w = weight * t / (config.num_tokens - 1) if anneal else weight
            a = a_c + w * (a_c - a_u) if parts in ("both", "log_scale") else a_c
            m = m_c + w * (m_c - m_u) if parts in ("both", "shift") else m_c
            u = u.at[:, t].set(u[:, t] * jnp.exp(a) + m)
        tokens = u[:, ::-1] if flip else u
    return flow.to_images(tokens)


@pytest.mark.parametrize(
    ("parts", "anneal", "temperature"),
    [
        pytest.param("both", False, 1.0, marks=pytest.mark.slow),
        ("shift", True, 1.0),
        pytest.param("log_scale", False, 0.5, marks=pytest.mark.slow),
    ],
)
def test_linear_guidance_is_its_definition(parts, anneal, temperature):
    flow, params, x, _ = laws.case("classes")
    cond = jnp.array([0, 1, 2, 0], jnp.int32)
    z, _ = apply(flow, params, x, cond)
    expected = reference_reverse(flow, params, z, cond, 1.5, parts, anneal, temperature)
    guidance = Guidance(scale=1.5, parts=parts, anneal=anneal, temperature=temperature)
    for plan in (Sequential(), Jacobi(window=3, tol=0.0)):
        assert_close(invert(flow, params, z, cond, plan=plan, guidance=guidance).x, expected, NETWORK)
    assert jnp.abs(expected - x).max() > 0.01


def test_attention_temperature_guides_a_model_without_classes():
    flow, params, x, _ = laws.case("affine")
    z, _ = apply(flow, params, x)
    expected = reference_reverse(flow, params, z, None, 2.0, "both", False, 0.5)
    guidance = Guidance(scale=2.0, temperature=0.5)
    assert_close(invert(flow, params, z, guidance=guidance).x, expected, NETWORK)
    assert jnp.abs(expected - x).max() > 1e-3


def test_guidance_that_changes_nothing_costs_nothing():
    flow, params, x, cond = laws.case("classes")
    z, _ = apply(flow, params, x, cond)
    plain = invert(flow, params, z, cond)
    for guidance in (Guidance(scale=0.0, temperature=0.5), Guidance(scale=2.0, blocks=())):
        np.testing.assert_array_equal(invert(flow, params, z, cond, guidance=guidance).x, plain.x)
    assert decode_request(flow, params, z, cond, "auto", Guidance(scale=0.0)).guidance is None
    assert decode_request(flow, params, z, None, "auto", Guidance(scale=1.0)).guidance is None


def test_blocks_that_are_not_guided_are_not(key):
    flow, params, x, cond = laws.case("classes")
    z, _ = apply(flow, params, x, cond)
    only_first = invert(flow, params, z, cond, guidance=Guidance(scale=1.0, blocks=(1,))).x
    both = invert(flow, params, z, cond, guidance=Guidance(scale=1.0)).x
    none = invert(flow, params, z, cond).x
    assert jnp.abs(only_first - both).max() > 1e-4
    assert jnp.abs(only_first - none).max() > 1e-4
    with pytest.raises(ValueError, match=r"guidance\.blocks contains 2, but this flow has blocks 0 to 1"):
        invert(flow, params, z, cond, guidance=Guidance(scale=1.0, blocks=(2,)))


def test_product_rule_is_the_product_of_gaussians():
    random = np.random.default_rng(0)
    m_c, m_u, a_u = random.standard_normal((3, 5, 4, 3)).astype(np.float32)
    a_c = a_u - np.abs(random.standard_normal((5, 4, 3))).astype(np.float32)  # σ_c < σ_u: the ratio is not clipped
    w = 1.7
    shift, log_scale = product_rule((jnp.asarray(m_c), jnp.asarray(a_c)), (jnp.asarray(m_u), jnp.asarray(a_u)), w)
    # p_c^(1+w) / p_u^w: precisions and precision-weighted means add up with exponents (1 + w) and -w.
    precision = (1 + w) * np.exp(-2 * a_c) - w * np.exp(-2 * a_u)
    mean = ((1 + w) * m_c * np.exp(-2 * a_c) - w * m_u * np.exp(-2 * a_u)) / precision
    assert_close(log_scale, -0.5 * np.log(precision), LAYER)
    assert_close(shift, mean, LAYER)
    # Equal scales: ordinary linear guidance of the mean.
    equal = product_rule((jnp.asarray(m_c), jnp.asarray(a_u)), (jnp.asarray(m_u), jnp.asarray(a_u)), w)
    assert_close(equal[0], linear_rule(jnp.asarray(m_c), jnp.asarray(m_u), w), LAYER)
    assert_close(equal[1], a_u, LAYER)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": -1.0}, "scale is -1.0"),
        ({"scale": float("nan")}, "scale is nan, which is not finite; give a finite number"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"rule": "product", "parts": "shift"}, "the product rule always guides both"),
    ],
)
def test_guidance_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**arguments)


def test_guidance_may_change_inside_a_jit_of_yours():
    flow, params, x, cond = laws.case("classes")
    z, _ = apply(flow, params, x, cond)
    traces = []

    @jax.jit
    def argument(guidance):
        traces.append(guidance)
        return invert(flow, params, z, cond, guidance=guidance).x

    @jax.jit
    def built(scale, temperature):
        return invert(flow, params, z, cond, guidance=Guidance(scale=scale, temperature=temperature)).x

    for scale, temperature in ((1.5, 1.0), (0.5, 0.8), (0.0, 1.0)):
        guidance = Guidance(scale=scale, temperature=temperature)
        expected = invert(flow, params, z, cond, guidance=guidance).x
        assert_close(argument(guidance), expected, NETWORK)
        assert_close(built(scale, temperature), expected, NETWORK)
    assert len(traces) == 1
    with pytest.raises(ValueError, match=r"scale has shape \(4,\); it must be a scalar"):
        built(jnp.ones(4), 1.0)


def test_product_rule_does_not_cancel():
    one = jnp.ones((1, 1, 1))
    _, log_scale = product_rule((one, -1e-6 * one), (one, 0 * one), 1e4)
    np.testing.assert_allclose(log_scale[0, 0, 0], -1e-6 - 0.5 * np.log1p(1e4 * -np.expm1(-2e-6)), rtol=1e-4)
