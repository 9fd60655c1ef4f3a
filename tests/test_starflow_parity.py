"""STARFlow beside the published PyTorch code: the same weights through our importer, the same numbers out.

The recorded side is written by fixtures/record_starflow.py, the weights of both by fixtures/starflow_weights.py.
Published latents are `b c h w`, ours `b h w c`.
"""

import dataclasses
import functools
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import starflow_weights as sw
from conftest import rows
from tolerances import NETWORK, assert_close

from flowgen import convert
from flowgen.conditioning import TextCondition
from flowgen.decoding import Guidance, Jacobi, Sequential, invert
from flowgen.flows import AutoregressiveBlock, block_parameters, density
from flowgen.nn.layers import patchify

FIXTURES = Path(__file__).parent / "fixtures"

RECORDED = dict(np.load(FIXTURES / "starflow_reference.npz", allow_pickle=False))
# Values up to 10. float64 on both sides, apart from what the order of sums rounds; float32 on both sides.
TOLERANCE = {"float64": 1e-10, "float32": NETWORK}
DTYPES = tuple(TOLERANCE)
GUIDANCE = Guidance(scale=2.5, rule="product")
PLANS = {"sequential": Sequential(), "jacobi": Jacobi(window=5, tol=0.0)}


@pytest.fixture(params=rows(DTYPES, ("float32",)))
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@functools.cache
def ours(case, dtype):
    """Returns the imported flow on the recorded grid, its variables and its compiled `apply`, computing in `dtype`."""
    shape = sw.CASES[case]
    flow, variables = convert.starflow(sw.state_dict(shape), shape.arguments())
    grid = tuple(side * shape.patch_size for side in shape.grid)
    flow = type(flow)(dataclasses.replace(flow.config, dtype=dtype, image_size=grid))
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), variables)
    return flow, variables, jax.jit(flow.apply, static_argnames="method")


@functools.partial(jax.jit, static_argnums=0)
def block_logdet(config, variables, tokens, cond):
    return AutoregressiveBlock(config).apply(variables, tokens, cond)[1]


def condition(parts, shape, dtype):
    return TextCondition(jnp.asarray(parts[0], dtype), jnp.asarray(parts[1]))


def inputs(case, dtype):
    """Returns (latents, cond, null) in our layout."""
    shape = sw.CASES[case]
    latents = jnp.asarray(np.moveaxis(sw.latents(shape), 1, -1), dtype)
    if shape.num_classes:
        return latents, jnp.asarray(sw.labels(shape), jnp.int32), None
    text, null = (condition(parts, shape, dtype) for parts in (sw.text(shape), sw.null_text(shape)))
    return latents, text, null


def check(case, name, actual, dtype):
    """Asserts that `actual` is the recorded array in the same precision."""
    assert_close(actual, RECORDED[f"{case}/{name}/{dtype}"], TOLERANCE[dtype])


@pytest.mark.parametrize("case", sw.CASES)
def test_the_recorded_file_was_made_with_these_weights(case):
    crc = 0
    for value in sw.state_dict(sw.CASES[case]).values():
        crc = zlib.crc32(value.tobytes(), crc)
    assert crc == RECORDED[f"{case}/weights_crc32"]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, marks=[] if dtype == "float64" and case != "wide" else [pytest.mark.slow])
        for case in sw.CASES
        for dtype in DTYPES
    ],
    indirect=["dtype"],
)
def test_tokens_after_every_block_and_each_logdet(case, dtype):
    flow, variables, apply = ours(case, dtype)
    latents, cond, _ = inputs(case, dtype)
    states, logdet = apply(variables, latents, cond, method="trajectory")
    built = [index for index, layers in enumerate(sw.CASES[case].layers_per_block) if layers]
    tokens = patchify(latents, flow.config.patch_size, "channel_last")
    for index, state, block in zip(built, states, flow.config.blocks, strict=True):
        check(case, f"block/{index}", state, dtype)
        own = block_logdet(block, block_parameters(variables, built.index(index)), tokens, cond)
        check(case, f"logdet/{index}", own, dtype)
        tokens = state
    total = sum(RECORDED[f"{case}/logdet/{index}/{dtype}"] for index in built)
    assert_close(logdet, total, TOLERANCE[dtype])
    check(case, "z", np.moveaxis(flow.to_images(states[-1]), -1, 1), dtype)
    loss = 0.5 * jnp.square(states[-1]).mean() - logdet.mean() / flow.config.num_dims
    check(case, "loss", loss, dtype)


# Sampling without guidance is part of every guided run, and compiling is what takes time here.
SAMPLED = [
    *((case, "guided", "sequential") for case in sw.CASES if case != "wide"),
    pytest.param("wide", "guided", "sequential", marks=pytest.mark.slow),
    pytest.param("text", "plain", "sequential", marks=pytest.mark.slow),
    ("text", "guided", "jacobi"),
]


@pytest.mark.parametrize(("case", "name", "plan"), SAMPLED)
def test_sampling_from_given_noise(case, name, plan, dtype):
    flow, variables, _ = ours(case, dtype)
    _, cond, null = inputs(case, dtype)
    noise = jnp.asarray(np.moveaxis(sw.noise(sw.CASES[case]), 1, -1), dtype)
    z = patchify(noise, flow.config.patch_size, "channel_last")
    guided = {"guidance": dataclasses.replace(GUIDANCE, null=null)} if name == "guided" else {}
    result = invert(flow, variables, z, cond, plan=PLANS[plan], **guided)
    check(case, f"reverse/{name}", np.moveaxis(result.x, -1, 1), dtype)


@pytest.mark.parametrize("case", rows(sw.CASES, ("wide",)))
def test_tweedie_step(case, dtype):
    """The published step descends the loss at rate σ² times the number of dimensions of the whole batch."""
    flow, variables, _ = ours(case, dtype)
    latents, cond, _ = inputs(case, dtype)
    assert flow.config.noise_std == 0.3
    clean = jax.jit(functools.partial(density.tweedie_step, flow))(variables, latents, cond)
    check(case, "denoised", np.moveaxis(clean, -1, 1), dtype)
