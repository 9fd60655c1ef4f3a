"""Attention inside programs of every kind: divided over devices in four ways, called eagerly in a loop, exported.

One table of calls; each gives the same numbers and gradients however its program is run, compiles nothing when it is
called again, and is exported with a symbolic batch and length, unless a table below says why it cannot be.
"""

from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from laws import drawn

import flowgen.attention as attention
from flowgen.attention import KERNELS, Causal, make_attention_fn

# float32, relative to the largest value: sums run in another order on several devices. SOFT solves a system whose
# condition number is about 100.
ROUNDING, SOLVED = 1e-5, 1e-4
BATCH, LENGTH, HEADS, WIDTH, DEVICES = 4, 12, 4, 4, 4
CHUNKS = Causal(chunk_size=4)
LANDMARKS = jnp.asarray(np.random.default_rng(9).normal(size=(HEADS, 3, WIDTH)), jnp.float32)
GRID = (3, 4)


@dataclass(frozen=True)
class Inputs:
    """Arrays whose first axis is the batch; gate is at most 0, segment ids are contiguous, two keys are masked."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    gate: jax.Array
    segments: jax.Array
    valid: jax.Array
    x: jax.Array


jax.tree_util.register_dataclass(Inputs, ["q", "k", "v", "gate", "segments", "valid", "x"], [])


def draw(batch=BATCH, n=LENGTH):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(batch, n, HEADS, WIDTH)).astype(np.float32) for _ in range(3))
    gate = -rng.uniform(0.1, 1, size=(batch, n, HEADS)).astype(np.float32)
    valid = np.ones((batch, 1, 1, n), bool)
    valid[..., -2:] = False
    x = rng.normal(size=(batch, n, HEADS * WIDTH)).astype(np.float32)
    return Inputs(q, k, v, gate, np.tile(np.arange(n) // 5, (batch, 1)), valid, x)


def of_kernel(name, **options):
    def call(a):
        given = {"mask": a.valid, "segment_ids": a.segments}
        return KERNELS[name].attend(a.q, a.k, a.v, **{key: given.get(key, x) for key, x in options.items()})

    return call


def of_features(features):
    return lambda a: attention.linear_attention(a.q, a.k, a.v, features, is_causal=CHUNKS)


def of_module(module, **options):
    @cache
    def variables():
        return drawn(partial(module.init, **options), jax.random.key(0), jnp.zeros((1, LENGTH, 16)))

    return lambda a: module.apply(variables(), a.x, **options)


def causal_steps(a):
    _, state = attention.prefill(a.q[:, :7], a.k[:, :7], a.v[:, :7], "nala", chunk_size=4)
    out, state = attention.step(state, a.q[:, 7], a.k[:, 7], a.v[:, 7], "nala")
    return out, state.kv, state.length


def grouped(a):
    return attention.nala_attention(a.q, a.k[:, :, ::2], a.v[:, :, ::2], is_causal=CHUNKS)


def delta(a):
    options = {"chunk_size": 4, "mask": a.valid}
    return attention.gated_delta_rule(a.q, a.k, a.v, jnp.exp(a.gate), a.gate, **options)


def delta_step(a):
    state = attention.init_delta_state(a.q.shape[0], HEADS, WIDTH, WIDTH)
    return attention.gated_delta_step(state, *(x[:, 0] for x in (a.q, a.k, a.v)), jnp.exp(a.gate[:, 0]))


def soft(**options):
    options = {"num_landmarks": 3, "ridge": 0.1, **options}
    return lambda a: attention.soft_attention(a.q, a.q, a.v, mask=a.valid if "grid" not in options else None, **options)


def near_pairs(a):
    ago = jnp.arange(a.q.shape[1])[:, None] - jnp.arange(a.q.shape[1])[None, :]
    return KERNELS["retention"].attend(a.q, a.k, a.v, mask=(ago < 4)[None, None], is_causal=True)


def cached(a):
    cache = attention.init_kv_cache(a.q.shape[0], LENGTH, HEADS, WIDTH, jnp.float32)
    return attention.attend_kv_window(a.q[:, :5], a.k[:, :5], a.v[:, :5], cache, 3)


CALLS = {
    **{f"{name} causal": of_kernel(name, is_causal=True if name == "retention" else CHUNKS) for name in KERNELS},
    **{name: of_kernel(name, mask=None) for name in KERNELS if name != "retention"},
    "prefill and step": causal_steps,
    "packed": of_kernel("nala", segment_ids=None),
    "packed causal": of_kernel("retention", segment_ids=None, is_causal=CHUNKS),
    "retention of pairs": near_pairs,
    "fewer key heads": grouped,
    "cosformer": of_features(attention.cosformer_features(99)),
    "rotary": of_features(attention.nala_features(rotary=attention.rotary_line(99, WIDTH))),
    "power per head": of_features(attention.nala_features(jnp.linspace(2, 3, HEADS))),
    "landmarks": lambda a: attention.gaussian_landmark_attention(a.q, a.k, a.v, LANDMARKS, is_causal=CHUNKS),
    "landmarks, whitened": lambda a: attention.gaussian_landmark_attention(a.q, a.k, a.v, LANDMARKS, whiten=True),
    "pallas": lambda a: attention.linear_attention(
        a.q, a.k, a.v, is_causal=Causal(chunk_size=16, implementation="pallas")
    ),
    "simple GLA": lambda a: attention.gated_linear_attention(a.q, a.k, a.v, a.gate, mask=a.valid, chunk_size=4),
    "gated delta": delta,
    "delta step": delta_step,
    "soft": soft(),
    "soft on a grid": soft(grid=GRID, normalize="symmetric", solver="cholesky"),
    "soft rows": soft(normalize="row"),
    "softmax": lambda a: attention.softmax_attention(a.q, a.k, a.v, a.valid),
    "softmax causal": lambda a: attention.softmax_attention(a.q, a.k, a.v, is_causal=True),
    "frames": lambda a: attention.FrameWindow(prefix=2, tokens=5, past_frames=1, lookahead_frames=0).attend(
        a.q, a.k, a.v
    ),
    "cache": cached,
    "linear layer": of_module(attention.LinearAttention(16, HEADS, is_causal=CHUNKS)),
    "nala layer": of_module(attention.NaLaAttention(16, HEADS, is_causal=True)),
    "nala layer on a grid": of_module(attention.NaLaAttention(16, HEADS, learnable=True), grid=GRID),
    "soft layer": of_module(attention.SOFTAttention(16, HEADS, num_landmarks=3, ridge=0.1)),
    "soft layer on a grid": of_module(
        attention.SOFTAttention(16, HEADS, landmarks="conv_norm_gelu", stride=2, value_conv=3, ridge=0.1),
        grid=(2, 6),
    ),
    "Flax's layer": of_module(
        nn.MultiHeadDotProductAttention(HEADS, attention_fn=make_attention_fn("focused", is_causal=CHUNKS))
    ),
}
MODULES = [name for name in CALLS if "layer" in name]
# Those that show little beside the others are slow.
SHOWN = ("nala causal",)
each_call = pytest.mark.parametrize("name", rows(CALLS, [name for name in CALLS if name not in SHOWN]))


def test_every_kernel_has_its_calls():
    assert set(KERNELS) <= {name.removesuffix(" causal") for name in CALLS}


def run(name):
    """The outputs of a call, and the gradients of a nonlinear function of them with respect to every float input."""

    def loss(floats, a):
        a = Inputs(*floats[:4], a.segments, a.valid, floats[4])
        out = CALLS[name](a)
        return sum(jnp.sin(x.astype(jnp.float32)).sum() for x in jax.tree.leaves(out)), out

    def both(a):
        return jax.grad(loss, has_aux=True)((a.q, a.k, a.v, a.gate, a.x), a)

    return both


def put(a, mesh, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), a, specs)


def divided(by_axis):
    """What divides each input of `Inputs`; heads are the third axis of q, k, v and the gate."""
    if by_axis == "batch":
        return Inputs(*[P("data")] * 7)
    if by_axis == "heads":
        heads = P(None, None, "data")
        return Inputs(heads, heads, heads, heads, P(), P(), P())
    return Inputs(*[P(None, "data")] * 4, P(None, "data"), P(None, None, None, "data"), P(None, "data"))


def mesh(kind, devices=DEVICES):
    return jax.make_mesh((devices,), ("data",), axis_types=(kind,), devices=jax.devices()[:devices])


def explicit(by_axis):
    return lambda fn, a: jax.jit(fn)(put(a, mesh(AxisType.Explicit), divided(by_axis)))


def in_context(fn, a):
    with jax.set_mesh(mesh(AxisType.Explicit)):
        return jax.jit(fn)(put(a, mesh(AxisType.Explicit), divided("batch")))


def shard_mapped(fn, a):
    return jax.jit(jax.shard_map(fn, mesh=mesh(AxisType.Auto), in_specs=P("data"), out_specs=P("data")))(a)


def pmapped(fn, a):
    apart = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), a)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.pmap(fn)(apart))


PROGRAMS = {
    "explicit mesh, batch": explicit("batch"),
    "explicit mesh, heads": explicit("heads"),
    "explicit mesh, tokens": explicit("tokens"),
    "explicit mesh as context": in_context,
    "automatic mesh": lambda fn, a: jax.jit(fn)(put(a, mesh(AxisType.Auto), divided("batch"))),
    "shard_map": shard_mapped,
    "pmap": pmapped,
}


@each_call
def test_every_program_gives_the_numbers_of_one_device(name):
    a = draw()
    expected = jax.jit(run(name))(a)
    tolerance = SOLVED if "soft " in f"{name} " or "whitened" in name else ROUNDING
    for label, program in PROGRAMS.items():
        if label in ("explicit mesh, heads", "explicit mesh, tokens") and name in (*MODULES, "delta step"):
            continue  # Flax's projections make heads of the width; a step has one token
        if label == "explicit mesh, tokens" and name in ("prefill and step", "cache"):
            continue  # slices of tokens, which are not divided evenly
        if label == "explicit mesh, heads" and name == "fewer key heads":
            continue  # two of four heads on four devices
        results = program(run(name), a)
        for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
            size = float(np.abs(y).max())
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * size, err_msg=label)


def test_results_stay_divided_as_the_inputs_are():
    a = put(draw(), mesh(AxisType.Explicit), divided("batch"))
    for out in (CALLS["nala causal"](a), CALLS["soft"](a), CALLS["gated delta"](a)[0], CALLS["pallas"](a)):
        assert jax.typeof(out).sharding.spec[0] == "data"
    heads = put(draw(), mesh(AxisType.Explicit), divided("heads"))
    state = CALLS["gated delta"](heads)[1]
    assert jax.typeof(state.kv).sharding.spec[1] == "data"


@pytest.mark.slow
@pytest.mark.parametrize("first", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("second", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("name", ["nala causal", "fewer key heads", "pallas", "soft", "gated delta", "softmax causal"])
def test_meshes_of_two_axes_in_whole_and_partly_mapped_programs(name, first, second):
    both = jax.make_mesh((2, 2), ("data", "model"), axis_types=(first, second))
    heads = P("data", None, "model")
    a = put(draw(), both, Inputs(heads, heads, heads, heads, P("data"), P("data"), P("data")))
    expected = jax.tree.leaves(jax.jit(CALLS[name])(draw()))
    mapped = jax.shard_map(CALLS[name], mesh=both, in_specs=P("data"), out_specs=P("data"), axis_names={"data"})
    for program in (CALLS[name], mapped):
        for x, y in zip(jax.tree.leaves(jax.jit(program)(a)), expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=SOLVED, atol=SOLVED * float(np.abs(y).max()))


COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILED.append(event) if "backend_compile" in event else None
)


@each_call
def test_calling_again_compiles_nothing(name):
    a = jax.tree.map(jnp.asarray, draw())
    for _ in range(2):
        jax.block_until_ready(CALLS[name](a))
    COMPILED.clear()
    jax.block_until_ready(CALLS[name](jax.tree.map(lambda x: x, a)))
    assert not COMPILED


NOT_EXPORTED = {
    "frames": "whole frames can only be counted in a known number of tokens",
    "cache": "the window of the example has a known length",
    "soft on a grid": "a grid has known sides",
    "nala layer on a grid": "a grid has known sides",
    "soft layer on a grid": "a grid has known sides",
    "pallas": "a kernel's blocks have known sizes",
}


@pytest.mark.parametrize(
    "name", rows([name for name in CALLS if name not in NOT_EXPORTED], [name for name in CALLS if name not in SHOWN])
)
def test_a_symbolic_batch_and_length_are_exported(name, untyped):
    symbols = jax.export.SymbolicScope(["n >= 8"])
    example = draw(batch=3, n=11)
    shapes = {3: "b", 11: "n"}
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            jax.export.symbolic_shape(",".join(shapes.get(s, str(s)) for s in x.shape), scope=symbols), x.dtype
        ),
        example,
    )
    leaves, tree = jax.tree.flatten(abstract)
    exported = jax.export.export(jax.jit(lambda *xs: jax.tree.leaves(CALLS[name](tree.unflatten(xs)))))(*leaves)
    for batch, n in ((2, 8), (1, 75)):
        a = draw(batch, n)
        for x, y in zip(exported.call(*jax.tree.leaves(a)), jax.tree.leaves(CALLS[name](a)), strict=True):
            np.testing.assert_allclose(x, y, rtol=SOLVED, atol=SOLVED * float(np.abs(y).max()))
