"""Decoding with rounded weights: what rounding keeps, the polish that repairs the tokens, and what programs read."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tolerances import FORMULA, NETWORK, assert_close

import flowgen
from flowgen.decoding import DecodePlan, Guidance, Jacobi, LowPrecision, Sequential, SlidingWindow, invert
from flowgen.decoding.block import Order, guided_block, inverse
from flowgen.decoding.request import decode_request
from flowgen.decoding.weights import decoding_weights, rounded_weights
from flowgen.experiments import FlowExperiment, SamplingConfig, from_json
from flowgen.experiments.estimates import weight_bytes
from flowgen.flows import AutoregressiveBlock, block_parameters
from flowgen.flows.decoding_form import decoding_config
from flowgen.nn.int8 import int8_product, to_int8

SLOW = pytest.mark.slow
ONE = flowgen.TARFlowConfig(
    image_size=4, patch_size=1, channels=1, width=16, head_dim=8, num_blocks=1, layers_per_block=1, num_classes=3
)


def from_int8(kernel):
    """The weights for which a rounded kernel stands."""
    return (kernel.values * kernel.scale[None]).at[kernel.outliers].set(kernel.exact.astype(kernel.scale.dtype))


def kernel(name):
    normal = np.random.default_rng(0).standard_normal((128, 24)).astype(np.float32)
    if name == "large rows":
        normal[[5, 77]] *= 100
    elif name == "empty columns":
        normal[:, ::3] = 0
    elif name == "tiny":
        normal *= 1e-20
    return jnp.asarray(normal if name != "constant" else np.full_like(normal, 0.3))


@pytest.mark.parametrize("name", ["normal", "large rows", "empty columns", "tiny", "constant"])
def test_rounded_weights_are_within_half_a_step(name):
    original = kernel(name)
    small = to_int8(original, "float32")
    error = np.abs(np.asarray(from_int8(small) - original))
    # The quotient and the product round too, by less than a thousandth of a step.
    assert (error <= 0.501 * np.asarray(small.scale)).all()
    np.testing.assert_array_equal(from_int8(small)[small.outliers], original[small.outliers])
    x = jax.random.normal(jax.random.key(0), (3, 2, 128))
    assert_close(int8_product(x, small), x @ from_int8(small), FORMULA, scale=jnp.abs(original).max())


def test_large_inputs_are_kept_at_full_precision():
    original = kernel("large rows")
    others = np.delete(np.arange(128), [5, 77])
    kept, without = to_int8(original, "float32"), to_int8(original, "float32", num_outliers=0)
    np.testing.assert_array_equal(kept.outliers, [5, 77])
    errors = [np.abs(np.asarray(from_int8(small) - original))[others].max() for small in (kept, without)]
    assert errors[1] > 20 * errors[0]  # their scale is that of weights 100 times as large


ROWS = {
    "classes": (None, LowPrecision("int8", polish=Jacobi(tol=0.0))),
    "nala": (None, LowPrecision("int8", polish=SlidingWindow(window=3, tol=0.0))),
    "starflow text": (None, LowPrecision("bfloat16", polish=Jacobi(window=4, tol=0.0))),
    "starflow options": (None, LowPrecision("int8", plan=Jacobi(tol=1e-2), polish=Jacobi(tol=0.0))),
    "starflow nala": (None, LowPrecision("bfloat16", polish=Jacobi(tol=0.0))),
    "starflow video": (None, LowPrecision("int8", plan=SlidingWindow(window=3), polish=Jacobi(tol=0.0))),
    "starflow class prefix": (1.0, LowPrecision("bfloat16", polish=SlidingWindow(window=3, tol=0.0))),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in ("nala",) else SLOW) for name in ROWS])
def test_a_polished_result_is_that_of_sequential_decoding(name):
    scale, plan = ROWS[name]
    guidance = None if scale is None else Guidance(scale=scale)
    flow, params, x, cond = laws.case(name)
    z, _ = laws.apply(flow, params, x, cond)
    expected = x if guidance is None else invert(flow, params, z, cond, guidance=guidance).x
    r = invert(flow, params, z, cond, plan=plan, guidance=guidance)
    assert_close(r.x, expected, NETWORK)
    assert not r.residual.any()
    assert not r.unsolved.any()
    rounded = invert(flow, params, z, cond, plan=dataclasses.replace(plan, polish=None), guidance=guidance)
    assert jnp.abs(rounded.x - expected).max() > 10 * NETWORK  # there was something to repair


def one_case():
    flow, params = laws.perturbed(ONE, jax.random.key(0))
    cond = jnp.array([0, -1], jnp.int32)
    z, _ = laws.apply(flow, params, laws.images(ONE, jax.random.key(1), batch=2), cond)
    return flow, params, z, cond


@pytest.mark.parametrize("dtype", ["int8", pytest.param("bfloat16", marks=SLOW)])
def test_the_error_of_a_rounded_block_is_certified_at_full_precision(dtype):
    flow, params, z, cond = one_case()
    r = invert(flow, params, z, cond, plan=LowPrecision(dtype, polish=None), certify=True)
    with jax.enable_x64(True):
        wide = dataclasses.replace(ONE, dtype="float64").build()
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), params)
        block = AutoregressiveBlock(wide.config.blocks[0])
        tokens = wide.config.to_tokens(jnp.asarray(np.asarray(r.x, np.float64)))
        found, _ = block.apply(block_parameters(params, 0), tokens, cond)
        expected = np.abs(np.asarray(found) - np.asarray(z, np.float64)).max(axis=(1, 2))
    assert expected.min() > 1e-4
    np.testing.assert_allclose(r.error, expected, rtol=1e-2)


def test_a_program_reads_weights_of_8_bits_in_each_pass():
    flow, params, z, cond = one_case()
    request, (config,) = decode_request(flow, params, z, cond, "sequential"), flow.config.blocks
    (rounded,) = rounded_weights(flow.config, params, ("int8",))
    block = guided_block(request, decoding_config(config), 0, rounded)
    leaves, tree = jax.tree.flatten((block, z, Order()))  # Shapes alone are no arrays to the type checker.

    @jax.jit
    def run(leaves):
        return inverse(*tree.unflatten(leaves), plan=Sequential(), layers=1)

    lowered = run.lower(leaves)
    (signature,) = re.findall(r"func.func public @main\((.*?)\) ->", lowered.as_text())
    program = lowered.compile().as_text()
    loops = "".join(line for line in program.splitlines() if " while(" in line)
    for rows, columns in ((16, 48), (16, 64), (64, 16)):
        assert f"tensor<{rows}x{columns}xi8>" in signature
        assert f"tensor<{rows}x{columns}xf32>" not in signature
        assert f"s8[{rows},{columns}]" in loops
        assert f"f32[{rows},{columns}]" not in loops  # XLA moves other conversions out of loops


@pytest.mark.parametrize("plan", [LowPrecision(polish=None), pytest.param(LowPrecision(), marks=SLOW)], ids=str)
def test_full_weights_are_made_only_for_a_polish(plan):
    flow, params = laws.perturbed(dataclasses.replace(ONE, width=24), jax.random.key(0))  # a width of its own
    invert(flow, params, jnp.zeros((1, 16, 1)), plan=plan)
    alive = {(x.shape, x.dtype.name) for x in jax.live_arrays()}
    assert ((24, 72), "int8") in alive
    assert (((24, 72), "float32") in alive) == (plan.polish is not None)


def test_rounding_happens_once_for_the_same_parameters():
    flow, params, *_ = one_case()
    first, again = (jax.tree.leaves(rounded_weights(flow.config, params, ("int8",))) for _ in range(2))
    assert all(x is y for x, y in zip(first, again, strict=True))
    assert rounded_weights(flow.config, params, (None,)) == (None,)


@SLOW
def test_decoding_inside_jit_and_on_several_devices_gives_the_same():
    flow, params, z, cond = one_case()
    z, cond = jnp.concatenate([z, z]), jnp.concatenate([cond, cond])
    plan = LowPrecision(polish=Jacobi(tol=0.0))
    expected = invert(flow, params, z, cond, plan=plan).x
    assert_close(jax.jit(lambda params, z: invert(flow, params, z, cond, plan=plan).x)(params, z), expected, NETWORK)
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    rows = jax.device_put(z, NamedSharding(mesh, P("rows")))
    assert_close(invert(flow, params, rows, cond, plan=plan).x, expected, NETWORK)

    def put(leaf):
        divides = leaf.ndim and leaf.shape[-1] % 4 == 0
        return jax.device_put(leaf, NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), "rows") if divides else P()))

    assert_close(invert(flow, jax.tree.map(put, params), z, cond, plan=plan).x, expected, NETWORK)


@SLOW
def test_gradients_are_those_of_the_weights_themselves():
    flow, params, z, cond = one_case()

    def gradient(plan):
        return jax.jit(jax.grad(lambda params: jnp.square(invert(flow, params, z, cond, plan=plan).x).sum()))(params)

    found, expected = gradient(LowPrecision(polish=Jacobi(tol=0.0))), gradient(Sequential())
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(x, y, NETWORK)


def test_a_config_may_name_it():
    plan = (LowPrecision("bfloat16", polish=None), LowPrecision(plan=Jacobi(window=2), polish=SlidingWindow(tol=1e-3)))
    experiment = FlowExperiment(
        name="flow", model=dataclasses.replace(ONE, num_blocks=2), sampling=SamplingConfig(num=4, plan=plan)
    )
    assert experiment.sampling.to_plan() == DecodePlan(plan)
    assert from_json(json.loads(json.dumps(experiment.to_json()))) == experiment


def test_contradictory_plans_are_refused():
    with pytest.raises(ValueError, match=r"polish\.init is 'zeros', but a polish starts from the decoded tokens"):
        LowPrecision(polish=Jacobi(init="zeros"))
    flow, params = laws.perturbed(dataclasses.replace(ONE, dtype="bfloat16"), jax.random.key(0))
    with pytest.raises(ValueError, match=r"plan\.dtype is 'bfloat16', in which this flow computes anyway"):
        invert(flow, params, jnp.zeros((1, 16, 1)), plan=LowPrecision("bfloat16"))


def test_configs_refuse_plans_that_no_sampling_can_run():
    with pytest.raises(ValueError, match=r"sampling\.plan has init=.draft."):
        SamplingConfig(plan=(LowPrecision(plan=Jacobi(init="draft")),))
    wide = dataclasses.replace(ONE, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"sampling\.plan has dtype 'bfloat16'"):
        FlowExperiment(name="flow", model=wide, sampling=SamplingConfig(plan=(LowPrecision("bfloat16"),)))


def test_the_bytes_of_weights_are_counted():
    config = dataclasses.replace(ONE, width=128, head_dim=32)
    _, params = laws.perturbed(config, jax.random.key(0))
    sizes = weight_bytes(config, params)
    assert sizes["float32"] == sum(x.nbytes for x in jax.tree.leaves(decoding_weights(config, params)))
    for dtype in ("int8", "bfloat16"):
        assert sizes[dtype] == sum(x.nbytes for x in jax.tree.leaves(rounded_weights(config, params, (dtype,))))
    assert sizes["int8"] < 0.35 * sizes["float32"]
    assert sizes["bfloat16"] < 0.6 * sizes["float32"]
