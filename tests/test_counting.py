"""FLOP and memory are counted from the traced program, and agree with counts by hand and with the compiler's plan."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import flowgen
from flowgen import backend
from flowgen.batch import Batch
from flowgen.counting import bytes_of, flop_of, peak_of
from flowgen.flows.objective import nll_objective


def flop(fn, *args):
    return flop_of(jax.make_jaxpr(fn)(*args).jaxpr)


X, W = jnp.zeros((4, 8)), jnp.zeros((8, 8))
ONE = 2.0 * 4 * 8 * 8  # x @ w
IMAGE, KERNEL = jnp.zeros((2, 6, 6, 3)), jnp.zeros((3, 3, 3, 5))


def layer(x, w):
    return jnp.tanh(x @ w)


def scanned(x, w):
    return jax.lax.scan(lambda x, _: (layer(x, w), None), x, None, length=7)[0]


def one_by_one(x, w):
    for _ in range(7):
        x = layer(x, w)
    return x


def convolve(stride, x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def of_gradient(fn):
    return jax.grad(lambda *args: fn(*args).sum(), argnums=(0, 1))


COUNTS = {
    "product": (layer, (X, W), ONE),
    "batched": (lambda x, w: jnp.einsum("bnd,bdm->bnm", x, w), (jnp.zeros((3, 4, 8)), jnp.zeros((3, 8, 8))), 3 * ONE),
    "scan": (scanned, (X, W), 7 * ONE),
    "one by one": (one_by_one, (X, W), 7 * ONE),
    "jit": (jax.jit(scanned), (X, W), 7 * ONE),
    "vmap": (jax.vmap(layer, in_axes=(0, None)), (jnp.zeros((3, 4, 8)), W), 3 * ONE),
    "gradient": (of_gradient(scanned), (X, W), 3 * 7 * ONE),
    "recomputed": (of_gradient(jax.checkpoint(one_by_one)), (X, W), 3 * 7 * ONE),
    "recomputed in a scan": (
        of_gradient(lambda x, w: jax.lax.scan(jax.checkpoint(lambda x, _: (layer(x, w), None)), x, None, length=7)[0]),
        (X, W),
        3 * 7 * ONE,
    ),
    "branches": (lambda x, w: jax.lax.cond(x.sum() > 0, one_by_one, layer, x, w), (X, W), 7 * ONE),
    "loop of unknown length": (
        lambda x, w: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: layer(x, w), x),
        (X, W),
        ONE,
    ),
    "convolution": (lambda x, k: convolve(1, x, k), (IMAGE, KERNEL), 2.0 * (2 * 4 * 4 * 5) * 27),
    "its gradient": (of_gradient(lambda x, k: convolve(1, x, k)), (IMAGE, KERNEL), None),
    "with a stride": (lambda x, k: convolve(2, x, k), (IMAGE, KERNEL), 2.0 * (2 * 2 * 2 * 5) * 27),
    "no product": (jnp.add, (X, X), 0.0),
}


@pytest.mark.parametrize("name", COUNTS)
def test_flop_of_programs(name):
    fn, args, expected = COUNTS[name]
    found = sum(flop(fn, *args).values())
    if expected is None:  # The gradient by the input is taken with a border of zeros, which counts.
        forward = COUNTS["convolution"][2]
        assert 3 * forward - forward <= found <= 5 * forward
    else:
        assert found == expected


def test_flop_are_told_apart_by_dtype():
    both = flop(lambda x, w: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32) @ w, X, W)
    assert both == {"bfloat16": ONE, "float32": ONE}


def training_flop(width, layers, remat, blocks=2):
    """The FLOP of a training step of a small flow on 3 images of 4 x 4 tokens, and its parameters."""
    flow = flowgen.TARFlow(
        flowgen.TARFlowConfig(
            image_size=8,
            channels=3,
            patch_size=2,
            width=width,
            head_dim=16,
            num_blocks=blocks,
            layers_per_block=layers,
            remat=remat,
        )
    )
    objective, key = nll_objective(flow), jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(lambda: flowgen.init(flow, jax.random.key(0)))

    def gradient(params, batch, key):
        return jax.grad(lambda params: objective({"params": params}, batch, key)[0])(params)

    batch = jax.eval_shape(lambda: Batch(jnp.zeros((3, 8, 8, 3), jnp.uint8)))
    return jax.make_jaxpr(gradient)(variables["params"], batch, key).jaxpr, variables["params"]


@pytest.mark.parametrize("remat", [False, True])
def test_flop_of_a_flow_are_those_of_its_layers(remat):
    width, layers, blocks, samples, n, c = 32, 3, 2, 3, 15, 12  # The last token is never fed to the network.
    found = sum(flop_of(training_flop(width, layers, remat, blocks)[0]).values())
    of_layer = 2 * n * 12 * width**2 + 4 * n**2 * width
    forward = samples * blocks * (2 * n * c * width + layers * of_layer + 2 * n * width * 2 * c)
    # The images need no gradient, so the first block's input projection computes one product fewer.
    assert found == 3 * forward - samples * 2 * n * c * width


def test_flop_of_a_wide_flow_follow_the_rule_of_six():
    jaxpr, params = training_flop(width=768, layers=2, remat=True)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sum(flop_of(jaxpr).values()) == pytest.approx(6 * count * 3 * 15, rel=0.02)


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_memory_is_about_what_the_compiler_plans(remat, record_property):
    jaxpr, params = training_flop(width=64, layers=4, remat=remat)
    program = jax.jit(jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(jaxpr, ())))
    shapes = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in jaxpr.invars]
    plan = program.lower(*shapes).compile().memory_analysis()
    planned, counted = plan.temp_size_in_bytes + plan.output_size_in_bytes, peak_of(jaxpr)
    record_property("counted / planned by XLA for CPUs", f"{counted / planned:.2f}")
    assert bytes_of(params) < counted
    assert planned / 3 < counted < 3 * planned


def test_recomputation_saves_memory_and_no_flop():
    stored, recomputed = (training_flop(width=64, layers=6, remat=remat)[0] for remat in (False, True))
    assert peak_of(recomputed) < peak_of(stored)
    assert flop_of(recomputed) == flop_of(stored)


def test_results_take_the_place_of_operands():
    size = X.size * X.dtype.itemsize
    assert peak_of(jax.make_jaxpr(lambda x: jnp.sin(jnp.cos(jnp.exp(x))))(X).jaxpr) == size
    assert peak_of(jax.make_jaxpr(lambda x: jnp.cos(x) @ jnp.sin(x).T)(X).jaxpr) == 2 * size + 4 * 16


def device(**stats):
    return SimpleNamespace(memory_stats=lambda: stats or None)


def test_machines():
    h100, tpu = "NVIDIA H100 80GB HBM3", "TPU v5 lite"
    assert backend.seconds_at_peak({"bfloat16": 989.4e12, "float32": 494.7e12}, h100) == pytest.approx(2)
    assert backend.seconds_at_peak({"bfloat16": 197e12}, tpu) == pytest.approx(1)
    assert backend.seconds_at_peak({"float64": 1.0}, h100) is None
    assert backend.seconds_at_peak({"float32": 1.0}, "cpu") is None
    assert backend.machine_of("cpu") is None
    assert all(machine.source and machine.bfloat16 >= machine.float32 > 0 for machine in backend.MACHINES)
    kinds = [kind for machine in backend.MACHINES for kind in machine.kinds]
    assert len(set(kinds)) == len(kinds)
    assert backend.peak_memory(jax.local_devices()) is None  # CPUs do not tell.
    assert backend.peak_memory([device(peak_bytes_in_use=5), device(peak_bytes_in_use=7), device()]) == 7


def test_causal_share_is_that_of_the_slices():
    q = jnp.zeros((1, 300, 1, 8))
    full = flop(lambda q: flowgen.attention.softmax_attention(q, q, q), q)["float32"]
    causal = flop(lambda q: flowgen.attention.softmax_attention(q, q, q, is_causal=True), q)["float32"]
    assert causal == pytest.approx(backend.causal_share(300) * full)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_fused_kernel_of_tpus_has_the_flop_of_the_sliced_form(is_causal):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    n, heads = 256, 2
    mask = (masks.CausalMask if is_causal else masks.FullMask)((n, n))
    kernel = splash.make_splash_mha(masks.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1)

    def fused(q, k, v):
        return jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)

    def sliced(q, k, v):
        return flowgen.attention.softmax_attention(q, k, v, is_causal=is_causal)

    q = jax.ShapeDtypeStruct((2, n, heads, 64), jnp.bfloat16)
    for transformed in (lambda attend: attend, of_loss):
        found, expected = (sum(flop(transformed(attend), q, q, q).values()) for attend in (fused, sliced))
        assert found == pytest.approx(expected, rel=0.01)


def of_loss(attend):
    return jax.grad(lambda *args: attend(*args).astype(jnp.float32).sum(), argnums=(0, 1, 2))
