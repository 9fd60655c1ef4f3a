"""Fused softmax attention: when it is chosen, the TPU kernel interpreted against XLA, lowering for accelerators."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import succeed
from conftest import rows
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tolerances import LAYER, assert_close

import flowgen
from flowgen import backend
from flowgen.attention import attention_plan, softmax_attention
from flowgen.experiments.attention import warn_of_dtype
from flowgen.matching import DiT, DiTConfig, UNetConfig, divergence, mean_flow_loss

# The kernel rounds the scaled queries, the weights and the results, each by at most half of bfloat16's eps.
BFLOAT16 = 2 * float(jnp.finfo(jnp.bfloat16).eps)  # 1.6e-2
RNG = np.random.default_rng(0)


def shapes(n=1023, m=None, heads=12, groups=None, width=64, dtype="bfloat16"):
    m, groups = n if m is None else m, heads if groups is None else groups
    return [
        jax.ShapeDtypeStruct((8, tokens, count, width), jnp.dtype(dtype))
        for tokens, count in ((n, heads), (m, groups), (m, groups))
    ]


# name: inputs, options, and the implementation on a CPU, a GPU and a TPU with a word of the reason on the GPU.
PLANS = {
    "causal": (shapes(), {"is_causal": True}, "xla cudnn tpu", "cuDNN"),
    "float16": (shapes(dtype="float16"), {}, "xla cudnn xla", "cuDNN"),
    "float32": (shapes(dtype="float32"), {}, "xla xla xla", "dtype is float32"),
    "two dtypes": ([*shapes()[:2], shapes(dtype="float32")[2]], {}, "xla xla xla", "one dtype"),
    "fewer key heads": (shapes(groups=4), {}, "xla cudnn tpu", "cuDNN"),
    "cross": (shapes(m=77), {}, "xla cudnn tpu", "cuDNN"),
    "key mask": (shapes(), {"mask": "keys"}, "xla cudnn tpu", "cuDNN"),
    "causal key mask": (shapes(), {"mask": "keys", "is_causal": True}, "xla xla tpu", "causal"),
    "mask of pairs": (shapes(), {"mask": "pairs"}, "xla xla xla", "queries or heads"),
    "wide heads": (shapes(width=256), {}, "xla xla tpu", "up to 128"),
    "odd heads": (shapes(width=36), {}, "xla xla tpu", "multiples of 8"),
    "wider values": ([*shapes()[:2], shapes(width=96)[2]], {}, "xla xla xla", "one width"),
    "nothing": (shapes(n=0, m=5), {}, "xla xla xla", "empty"),
    "few queries": (shapes(n=48), {}, "xla xla xla", "there are 48"),
    "xla": (shapes(), {"implementation": "xla"}, "xla xla xla", "requested"),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_plan_is_a_function_of_shapes_and_platform(name):
    inputs, options, expected, reason = PLANS[name]
    plans = [attention_plan(*inputs, **options, platform=platform) for platform in ("cpu", "gpu", "tpu")]
    assert " ".join(plan.implementation for plan in plans) == expected
    assert reason in plans[1].reason


@pytest.mark.parametrize(
    ("asked", "inputs", "platform", "problem"),
    [
        ("cudnn", shapes(), "cpu", "needs an NVIDIA GPU .* device is a cpu"),
        ("cudnn", shapes(), "tpu", "needs an NVIDIA GPU"),
        ("cudnn", shapes(dtype="float32"), "gpu", "dtype is float32"),
        ("tpu", shapes(), "gpu", "needs a TPU"),
        ("tpu", shapes(dtype="float16"), "tpu", "dtype is float16"),
        ("flash", shapes(), "gpu", "auto, xla, cudnn, tpu"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(asked, inputs, platform, problem, untyped):
    with pytest.raises(ValueError, match=rf"implementation .*{problem}"):
        attention_plan(*inputs, implementation=asked, platform=platform)


@pytest.mark.parametrize("asked", ["cudnn", "tpu", "flash"])
def test_attention_and_models_refuse_before_compute(asked, key, untyped):
    x = jnp.zeros((1, 4, 2, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match=f"implementation .*{asked}"):
        softmax_attention(x, x, x, implementation=asked)
    if asked != "flash":
        flow = flowgen.TARFlow(toy_tarflow(attention_implementation=asked))
        with pytest.raises(ValueError, match=f"implementation '{asked}' cannot run"):
            jax.eval_shape(lambda: flowgen.init(flow, key))
    with pytest.raises(ValueError, match="attention_implementation is 'xla'"):
        toy_tarflow(attention="nala", attention_implementation="xla")


@pytest.fixture
def on_tpu(monkeypatch):
    """Attention is planned as on a machine with one TPU, whose kernels the CPU interprets."""
    monkeypatch.setattr(backend, "attention_platform", lambda: "tpu")
    monkeypatch.setattr(backend, "interpret_kernels", lambda: True)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.fixture
def on_gpu(monkeypatch):
    """Attention is planned as on a GPU, and JAX computes in XLA what it would ask of cuDNN."""

    def in_xla(q, k, v, lengths, is_causal):
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=is_causal, key_value_seq_lengths=lengths, implementation="xla"
        )

    monkeypatch.setattr(backend, "attention_platform", lambda: "gpu")
    monkeypatch.setattr(backend, "cudnn_attention", in_xla)


KEYS = RNG.random((2, 1, 1, 150)) < 0.5
KEYS[0, ..., :5] = False  # In causal order, the first queries see nothing.
NOTHING = KEYS & np.array([True, False])[:, None, None, None]
# name: numbers of queries and keys, mask, whether causal, dtype.
CASES = {
    "causal": (150, 150, None, True, "float32"),
    "padded": (130, 150, None, False, "float32"),
    "key mask": (130, 150, NOTHING, False, "float32"),
    "causal key mask": (150, 150, KEYS, True, "float32"),
    "bfloat16 causal": (150, 150, None, True, "bfloat16"),
    "bfloat16 padded": (130, 150, None, False, "bfloat16"),
    "bfloat16 key mask": (130, 150, NOTHING, False, "bfloat16"),
}


def check_kernel(case, implementation):
    n, m, mask, is_causal, dtype = CASES[case]
    rounded = [
        jnp.asarray(RNG.normal(size=(2, tokens, heads, 16)), dtype) for tokens, heads in ((n, 4), (m, 2), (m, 2))
    ]

    def both(implementation, dtype):
        def total(*qkv):
            options = {"is_causal": is_causal, "implementation": implementation}
            out = softmax_attention(*qkv, mask=None if mask is None else jnp.asarray(mask), **options)
            return jnp.sin(out.astype(jnp.float32)).sum(), out

        inputs = [x.astype(dtype) for x in rounded]
        (_, out), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs)
        return [out, *gradients]

    tolerance = LAYER if dtype == "float32" else BFLOAT16
    for ours, expected in zip(both(implementation, dtype), both("xla", "float32"), strict=True):
        assert ours.dtype == dtype
        assert_close(ours.astype(jnp.float32), expected, tolerance)


@pytest.mark.parametrize("case", rows(CASES, rare=("padded", "key mask", "bfloat16 padded", "bfloat16 key mask")))
def test_the_tpu_kernel_is_xla_in_float32(case, on_tpu):
    check_kernel(case, "tpu")


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("bfloat16")])
def test_what_cudnn_is_asked_is_the_attention(case, on_gpu):
    check_kernel(case, "cudnn")


def attend(t, x, cond=None, interval=None, implementation="auto"):
    """A user's velocity network: samples `b 128 8` attend to themselves."""
    heads = x[:, :, None].astype(jnp.bfloat16)
    return softmax_attention(heads, heads, heads, implementation=implementation)[:, :, 0].astype(x.dtype)


def test_only_reverse_mode_works_and_says_so(on_tpu):
    x = jnp.asarray(RNG.normal(size=(1, 128, 8)), jnp.float32)
    with pytest.raises(TypeError, match="forward-mode derivative; pass implementation='xla'"):
        jax.jvp(lambda x: attend(None, x), (x,), (x,))
    with pytest.raises(TypeError, match="forward-mode"):  # JAX's own sentence, from where it compiles the program.
        jax.jvp(jax.jit(lambda x: attend(None, x)), (x,), (x,))


def test_divergences_and_mean_flow_ask_for_xla(on_tpu):
    x, t = jnp.asarray(RNG.normal(size=(2, 128, 8)), jnp.float32), jnp.full(2, 0.5)
    velocity = jax.jit(attend)
    velocity(t, x)  # This program has the fused kernel, and must not be taken from the cache below.

    def by_xla(t, x, cond=None, interval=None):
        return attend(t, x, cond, interval, implementation="xla")

    ours, expected = (divergence(field, t, x, probe=jnp.ones_like(x)) for field in (velocity, by_xla))
    for value, other in zip(ours, expected, strict=True):
        assert_close(value, other, LAYER)
    losses = [mean_flow_loss()(field, {"x1": x}, jax.random.key(0))[0] for field in (velocity, by_xla)]
    assert_close(losses[0], losses[1], LAYER)
    with pytest.raises(ValueError, match="'tpu' cannot run: fused kernels have no forward-mode derivative"):
        divergence(lambda t, x, cond: attend(t, x, implementation="tpu"), t, x, probe=x)


def toy_tarflow(**options):
    sizes = {"image_size": 20, "channels": 1, "patch_size": 1, "width": 32, "head_dim": 16, "expansion": 1}
    return flowgen.TARFlowConfig(**sizes, num_blocks=1, layers_per_block=1, dtype="bfloat16", **options)


def toy_starflow(**options):
    sizes = {"image_size": 20, "channels": 1, "width": 48, "head_dim": 24, "expansion": 1, "layers_per_block": (1,)}
    return flowgen.STARFlowConfig(**sizes, num_classes=3, num_kv_heads=1, dtype="bfloat16", **options)


def toy_dit(**options):
    sizes = {"image_size": 20, "channels": 1, "patch_size": 1, "width": 32, "head_dim": 16, "expansion": 1}
    return DiTConfig(**sizes, num_layers=1, dtype="bfloat16", **options)


MODELS = {"tarflow": toy_tarflow, "starflow, shared heads": toy_starflow, "dit": toy_dit}
TARGETS = {"cudnn": ("gpu", "cuda", "__cudnn$fmhaSoftmax"), "tpu": ("tpu", "tpu", "tpu_custom_call")}

# The other kernel of each.
LIKE_THEM = (("tarflow", "tpu"), ("starflow, shared heads", "cudnn"), ("dit", "tpu"))


def lowered(model, target):
    """The programs of a model's output and gradient."""
    network = model.build()
    params = jax.eval_shape(lambda: flowgen.init(network, jax.random.key(0)))
    x, t = jax.ShapeDtypeStruct((2, 20, 20, 1), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)

    def total(params, t, x):
        if isinstance(network, DiT):
            return network.apply(params, t, x).sum()
        return network.apply(params, x, method="log_prob").sum()

    programs = (total, jax.grad(total))
    return [jax.jit(fn).trace(params, t, x).lower(lowering_platforms=(target,)).as_text() for fn in programs]


def has_logits(program):
    """Whether an array has two axes of tokens: of 400, in up to four slices. The kernel for TPUs has 128 lanes."""
    shapes = ([int(size) for size in shape.split("x")] for shape in re.findall(r"tensor<(\d+(?:x\d+)*)x", program))
    return any(sum(size >= 100 and size != 128 for size in shape) > 1 for shape in shapes)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *(("tarflow", "cudnn"), ("starflow, shared heads", "tpu"), ("dit", "cudnn")),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in LIKE_THEM),
    ],
)
def test_models_lower_to_the_kernel_without_logits(name, implementation, monkeypatch):
    platform, target, call = TARGETS[implementation]
    assert all(has_logits(program) and call not in program for program in lowered(MODELS[name](), target))
    monkeypatch.setattr(backend, "attention_platform", lambda: platform)
    # The only question that jax asks about the device before it lowers.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91002)
    forward, gradient = lowered(MODELS[name](attention_implementation=implementation), target)
    assert call in forward
    assert gradient.count(call) > forward.count(call)
    assert not has_logits(forward)
    assert not has_logits(gradient)


@pytest.mark.parametrize("implementation", TARGETS)
@pytest.mark.parametrize("axis", ["batch", "tokens", "heads"])
def test_on_explicit_axes_each_device_runs_the_kernel_on_its_part(axis, implementation, monkeypatch):
    platform, target, call = TARGETS[implementation]
    monkeypatch.setattr(backend, "attention_platform", lambda: platform)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91002)
    spec = PartitionSpec(*["data" if name == axis else None for name in ("batch", "tokens", "heads")])
    sharding = NamedSharding(jax.make_mesh((4,), ("data",)), spec)
    arrays = [jax.ShapeDtypeStruct((4, 160, heads, 16), jnp.bfloat16, sharding=sharding) for heads in (8, 4, 4)]
    gradient = jax.grad(lambda *qkv: softmax_attention(*qkv, is_causal=True).astype(jnp.float32).sum(), (0, 1, 2))
    program = jax.jit(gradient).trace(*arrays).lower(lowering_platforms=(target,)).as_text()
    # Over divided tokens, XLA computes attention, and the devices communicate.
    assert (program.count(call) > 1) == (axis != "tokens")
    assert ("manual" in program) == (axis != "tokens")


def test_automatic_axes_keep_tpus_from_the_kernel(monkeypatch):
    monkeypatch.setattr(backend, "attention_platform", lambda: "tpu")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((4, 150, 2, 16), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("data")))

    def calls(fn):
        return jax.jit(fn).trace(x).lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")

    def attend(x):
        return softmax_attention(x, x, x)

    specs = {"in_specs": PartitionSpec("data"), "out_specs": PartitionSpec("data")}
    assert calls(attend) == 0
    assert calls(jax.shard_map(attend, mesh=mesh, **specs)) == 0  # Its checks refuse the kernel.
    assert calls(jax.shard_map(attend, mesh=mesh, check_vma=False, **specs)) == 1


@pytest.mark.parametrize(
    ("config", "platform", "warns"),
    [
        (flowgen.TARFlowConfig(image_size=32, patch_size=2), "gpu", True),
        (flowgen.TARFlowConfig(image_size=32, patch_size=2), "tpu", False),
        (flowgen.TARFlowConfig(image_size=32, patch_size=2, dtype="bfloat16"), "gpu", False),
        (flowgen.TARFlowConfig(image_size=32, patch_size=2, attention_implementation="xla"), "gpu", False),
        (flowgen.TARFlowConfig(image_size=8, patch_size=2), "gpu", False),  # too few tokens in any dtype
        (flowgen.TARFlowConfig(image_size=32, patch_size=2, attention="nala"), "gpu", False),
        (flowgen.STARFlowConfig(image_size=16), "gpu", True),
        (DiTConfig(image_size=32), "gpu", True),
        (UNetConfig(image_size=32), "gpu", True),
    ],
)
def test_a_dtype_that_keeps_a_gpu_from_the_kernel_is_told(config, platform, warns, recwarn):
    warn_of_dtype(config, platform=platform)
    assert [str(warning.message).partition(",")[0] for warning in recwarn] == ["model.dtype is 'float32'"] * warns


def test_a_run_may_resume_with_another_implementation():
    experiment = flowgen.load_config("tarflow_digits")
    model = dataclasses.replace(experiment.model, attention_implementation="xla")
    dataclasses.replace(experiment, model=model).check_resumable(experiment.to_json())


@pytest.mark.slow
def test_info_prints_the_plan():
    out = succeed("info --config tarflow_afhq256 --model.dtype bfloat16")
    for line in ("cpu: xla (there is no fused kernel for a cpu)", "gpu: cudnn (", "tpu: tpu ("):
        assert f"attention on {line}" in out
    out = succeed("info --config tarflow_afhq256 --model.attention_implementation cudnn")
    assert "attention on cpu: implementation 'cudnn' cannot run" in out
    assert "attention on gpu: cudnn (it was requested)" in out


def test_an_array_is_no_kind_of_mask(untyped):
    q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="mask must be one of none, keys, pairs"):
        attention_plan(q, q, q, mask="key", platform="gpu")
