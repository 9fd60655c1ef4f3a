"""STARFlow-V beside the published PyTorch code: the same weights through our importer, the same numbers out.

The recorded side is written by fixtures/record_starflow_v.py, the weights of both by fixtures/starflow_v_weights.py.
Published clips are `b t c h w`, ours `b t h w c`.
"""

import dataclasses
import functools
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import starflow_v_weights as sv
import starflow_weights as sw
from tolerances import NETWORK, assert_close

from flowgen import convert
from flowgen.attention import FrameWindow
from flowgen.conditioning import TextCondition
from flowgen.decoding import Guidance, Jacobi, Sequential, invert, product_rule
from flowgen.flows import (
    AutoregressiveBlock,
    ClipDenoiser,
    DenoiserStep,
    STARFlowV,
    block_parameters,
    denoiser_variables,
)

FIXTURES = Path(__file__).parent / "fixtures"

RECORDED = dict(np.load(FIXTURES / "starflow_v_reference.npz", allow_pickle=False))
# Values up to 10. float64 on both sides, apart from what the order of sums rounds; float32 on both sides.
TOLERANCE = {"float64": 1e-10, "float32": NETWORK}
GUIDANCE = Guidance(scale=2.5, rule="product")


@pytest.fixture(params=["float32", pytest.param("float64", marks=pytest.mark.slow)])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@functools.cache
def ours(case, dtype):
    """Returns the imported flow on the recorded grid, its variables, a text or labels, and the null of guidance."""
    shape = sv.CASES[case]
    flow, variables = convert.starflow(sv.state_dict(shape), shape.arguments())
    rows, columns = (side * shape.patch_size for side in shape.grid)
    flow = STARFlowV(dataclasses.replace(flow.config, dtype=dtype, image_size=(rows, columns)))
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), variables)
    if shape.num_classes:
        return flow, variables, jnp.asarray(sw.labels(shape), jnp.int32), None
    text, null = (
        TextCondition(jnp.asarray(features, dtype), jnp.asarray(mask))
        for features, mask in (sw.text(shape), sw.null_text(shape))
    )
    return flow, variables, text, null


@functools.cache
def trajectory(case, dtype, frames):
    """Returns the latents of so many frames, tokens after each block, and logdet."""
    flow, variables, cond, _ = ours(case, dtype)
    latents = clips(sv.latents(sv.CASES[case], frames), dtype)
    apply = jax.jit(functools.partial(STARFlowV(flow.config.with_num_frames(frames)).apply, method="trajectory"))
    return latents, *apply(variables, latents, cond)


@functools.partial(jax.jit, static_argnums=0)
def block_logdet(config, variables, tokens, cond):
    return AutoregressiveBlock(config).apply(variables, tokens, cond)[1]


def clips(x, dtype):
    return jnp.asarray(np.moveaxis(x, 2, -1), dtype)


def check(case, name, actual, dtype):
    """Asserts that `actual`, with channels last, is the recorded array in the same precision."""
    expected = RECORDED[f"{case}/{name}/{dtype}"]
    if expected.ndim > 3:
        expected = np.moveaxis(expected, -3, -1)
    assert_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("case", sv.CASES)
def test_the_recorded_file_was_made_with_these_weights(case):
    crc = 0
    for value in sv.state_dict(sv.CASES[case]).values():
        crc = zlib.crc32(value.tobytes(), crc)
    assert crc == RECORDED[f"{case}/weights_crc32"]


@pytest.mark.parametrize("case", sv.CASES)
def test_tokens_after_every_block(case, dtype):
    flow, *_ = ours(case, dtype)
    _, states, logdet = trajectory(case, dtype, flow.config.frames)
    for index, state in enumerate(states):
        check(case, f"block/{index}", state, dtype)
    total = sum(RECORDED[f"{case}/logdet/{index}/{dtype}"] for index in range(len(states)))
    assert_close(logdet, total, TOLERANCE[dtype])
    check(case, "z", flow.to_images(states[-1]), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("case", sv.CASES)
def test_the_logdet_of_each_block(case, dtype):
    flow, variables, cond, _ = ours(case, dtype)
    latents, states, _ = trajectory(case, dtype, flow.config.frames)
    entering = [flow.config.to_tokens(latents), *states[:-1]]
    for index, (tokens, block) in enumerate(zip(entering, flow.config.blocks, strict=True)):
        own = block_logdet(block, block_parameters(variables, index), tokens, cond)
        check(case, f"logdet/{index}", own, dtype)


@pytest.mark.parametrize("case", ["text", pytest.param("options", marks=pytest.mark.slow)])
def test_a_image_is_a_clip_of_one_frame(case, dtype):
    flow, _, _, _ = ours(case, dtype)
    _, states, _ = trajectory(case, dtype, 1)
    check(case, "image/z", flow.config.with_num_frames(1).to_images(states[-1])[:, 0], dtype)


SAMPLED = [
    ("text", "plain", Sequential()),
    ("text", "guided", Sequential()),
    # Recorded with windows that start from the frame before: where nothing can change any more, no start is left.
    ("text", "jacobi", Sequential()),
    pytest.param("text", "jacobi", Jacobi(window=8, tol=0.0), marks=pytest.mark.slow),
    pytest.param("options", "guided", Sequential(), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("case", "name", "plan"), SAMPLED)
def test_sampling_from_given_noise(case, name, plan, dtype):
    flow, variables, cond, null = ours(case, dtype)
    z = flow.config.to_tokens(clips(sv.noise(sv.CASES[case]), dtype))
    guided = {} if name == "plain" else {"guidance": dataclasses.replace(GUIDANCE, null=null)}
    check(case, f"reverse/{name}", invert(flow, variables, z, cond, plan=plan, **guided).x, dtype)


@pytest.mark.parametrize("name", ["plain", "guided"])
@pytest.mark.slow
def test_a_clip_continued_from_its_first_frame_is_one_whose_noise_begins_with_that_frames(name, dtype):
    flow, variables, cond, null = ours("text", dtype)
    _, (*_, local, z_first), _ = trajectory("text", dtype, 1)
    guided = {}
    if name == "guided":
        # Guidance has no forward pass of its own: the noise under which the guided deep block makes this frame.
        guided = {"guidance": dataclasses.replace(GUIDANCE, null=null)}
        null = TextCondition(*(jnp.repeat(part, len(local), axis=0) for part in null))
        z_first = guided_noise(flow.config.with_num_frames(1).blocks[-1], variables, local, cond, null)
    noise = flow.config.to_tokens(clips(sv.noise(sv.CASES["text"]), dtype))
    z = jnp.concatenate([z_first, noise[:, z_first.shape[1] :]], axis=1)
    check("text", f"continued/{name}", invert(flow, variables, z, cond, **guided).x, dtype)


def guided_noise(config, variables, tokens, cond, null):
    block = AutoregressiveBlock(config)
    params = block_parameters(variables, len(sv.CASES["text"].layers_per_block) - 1)

    @jax.jit
    def branch(text):
        previous = block.apply(params, tokens, method="previous")
        return block.apply(params, previous, text, method="conditioner")[0]

    shift, log_scale = product_rule(branch(cond), branch(null), GUIDANCE.scale)
    return (tokens - shift) * jnp.exp(-log_scale)


DENOISED = [(case, frames) for case in sv.CASES for frames in sv.CASES[case].denoised_frames]


@pytest.mark.parametrize(("case", "frames"), DENOISED)
def test_the_denoisers_step(case, frames, dtype):
    flow, variables, cond, _ = ours(case, dtype)
    step = DenoiserStep(ClipDenoiser(flow.config), noise_std=flow.config.noise_std)
    noisy = clips(sv.latents(sv.CASES[case], frames), dtype)
    clean = jax.jit(step)(denoiser_variables(variables), noisy, cond)
    check(case, f"denoised/{frames}", clean, dtype)
    if frames == 1:
        check(case, "denoised/image", clean[:, 0], dtype)


@pytest.mark.parametrize(("case", "frames"), DENOISED)
def test_the_frames_that_a_denoisers_query_sees(case, frames):
    shape = sv.CASES[case]
    config = ours(case, "float32")[0].config
    window = FrameWindow(
        shape.txt_size, config.tokens_per_image, config.denoiser_past_frames, config.denoiser_lookahead_frames
    )
    length = shape.txt_size + frames * config.tokens_per_image
    # With equal logits every key that is seen has an equal share of what comes out, and its value names it.
    equal, names = jnp.zeros((1, length, 1, 4)), jnp.eye(length)[None, :, None]
    shares = jax.jit(window.attend)(equal, equal, names)
    np.testing.assert_array_equal(shares[0, :, 0] > 0, RECORDED[f"{case}/seen/{frames}"])
