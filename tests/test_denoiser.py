"""The causal denoiser of clips: its window, that it learns a score, and clips longer than it saw."""

import dataclasses

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from tolerances import LAYER, NETWORK, assert_close

import flowgen
from flowgen.attention import FrameWindow, softmax_attention
from flowgen.conditioning import TextCondition
from flowgen.decoding import Denoiser, sample
from flowgen.flows import (
    ClipDenoiser,
    DenoiserStep,
    STARFlowVConfig,
    density,
    init_denoiser,
    score_matching_loss,
    score_target,
)

CLIP = STARFlowVConfig(
    image_size=(2, 3),
    frames=6,
    channels=2,
    width=40,
    head_dim=20,
    layers_per_block=(1, 1),
    text_dim=5,
    text_length=3,
    denoiser_layers=1,
    denoiser_past_frames=2,
)


def perturbed(config):
    """The denoiser with noise on every parameter, a clip and a text."""
    denoiser = ClipDenoiser(config)
    clip, text = laws.images(config, jax.random.key(1), batch=2), laws.labels(config, batch=2)
    return denoiser, laws.drawn(init_denoiser, denoiser, jax.random.key(0), scale=0.1), clip, text


@pytest.mark.parametrize("shape", [(3, 5, 2, 1), (0, 4, 1, 0), (2, 1, 9, 1), (1, 3, 0, 2)])
def test_windows_are_attention_under_the_mask_of_their_definition(shape):
    (prefix, frames, back, ahead), tokens = shape, 4
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, prefix + frames * tokens, 2, 8)).astype(np.float32)
    frame = np.repeat(np.arange(frames), tokens)
    mask = np.ones((len(q[0]), len(q[0])), bool)
    mask[prefix:, prefix:] = (frame[None] >= frame[:, None] - back) & (frame[None] <= frame[:, None] + ahead)
    mask[:prefix, prefix:] = frame[None] <= ahead
    out = jax.jit(FrameWindow(prefix, tokens, back, ahead).attend)(q, k, v)
    expected = jax.jit(softmax_attention)(q, k, v, jnp.asarray(mask)[None, None])
    assert_close(out, expected, LAYER)


def test_a_layer_sees_its_window_of_frames_alone():
    denoiser, variables, clip, text = perturbed(CLIP)
    per_frame = lambda clip: denoiser.apply(variables, clip, text)[0].reshape(6, -1)  # noqa: E731
    jacobian = jax.jit(jax.jacfwd(per_frame))(clip)[:, :, 0].reshape(6, 12, 6, 12)
    seen = np.abs(jacobian).max(axis=(1, 3)) > 0
    query, key = np.mgrid[:6, :6]
    np.testing.assert_array_equal(seen, (key >= query - 2) & (key <= query + 1))


def test_frames_and_texts_matter():
    denoiser, variables, clip, text = perturbed(CLIP)
    out = denoiser.apply(variables, clip, text)
    other = denoiser.apply(variables, clip, TextCondition(2 * text.embeddings, text.mask))
    assert float(jnp.abs(out - other).max()) > 1e-3
    # Where all frames are alike, their positions alone tell the middle ones apart.
    still = jnp.tile(clip[:, :1], (1, 6, 1, 1, 1))
    shifted = denoiser.apply(variables, still, text)
    assert float(jnp.abs(shifted[:, 2] - shifted[:, 3]).max()) > 1e-4


@pytest.mark.slow
def test_it_learns_the_score_of_the_flow():
    flow, random = CLIP.build(), np.random.default_rng(0)
    # A fresh flow with a little noise has a score that is easy to learn.
    params = flowgen.init(flow, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + laws.PERTURBATION * random.standard_normal(leaf.shape), params)
    denoiser = ClipDenoiser(dataclasses.replace(CLIP, denoiser_past_frames=9))
    text = laws.labels(CLIP, batch=8)
    optimizer = optax.adam(5e-3)

    def draw(key):
        return jax.random.normal(key, (8, *CLIP.event_shape))

    @jax.jit
    def train(variables, key):
        def step(state, key):
            variables, moments = state
            x = draw(key)
            target = score_target(flow, params, x, text)
            loss, gradient = jax.value_and_grad(lambda v: score_matching_loss(denoiser, v, x, target, text))(variables)
            updates, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(variables, updates), moments), (loss, jnp.square(target).mean())

        (variables, _), losses = jax.lax.scan(step, (variables, optimizer.init(variables)), jax.random.split(key, 150))
        return variables, losses

    variables = init_denoiser(denoiser, jax.random.key(1))
    variables, (losses, squares) = train(variables, jax.random.key(3))
    # Most of the target is explained after 150 steps.
    assert losses[-20:].mean() < 0.3 * squares[-20:].mean()
    x = draw(jax.random.key(4))
    target = score_target(flow, params, x, text)
    step = DenoiserStep(denoiser, noise_std=CLIP.noise_std)
    clean = density.tweedie_step(flow, params, x, text)
    assert_close(x - CLIP.noise_std * target, clean, NETWORK)
    assert jnp.square(step(variables, x, text) - clean).mean() < 0.3 * jnp.square(x - clean).mean()


@pytest.mark.slow
def test_long_clips_are_denoised_in_chunks_of_noisy_frames():
    denoiser, variables, _, text = perturbed(CLIP)
    clip = laws.images(CLIP.with_num_frames(11), jax.random.key(3), batch=2)
    whole = DenoiserStep(denoiser, noise_std=0.5)(variables, clip, text)
    alone = ClipDenoiser(CLIP.with_num_frames(11))
    assert_close(whole, clip - 0.5 * alone.apply(variables, clip, text), NETWORK)
    chunked = DenoiserStep(denoiser, noise_std=0.5, chunk=6)(variables, clip, text)
    assert chunked.shape == clip.shape
    # One layer sees two frames back and one ahead, all of which chunks have; frames have other numbers in each.
    network = lambda x: ClipDenoiser(CLIP).apply(variables, x, text)  # noqa: E731
    first, second, third = (clip[:, i : i + 6] - 0.5 * network(clip[:, i : i + 6]) for i in (0, 3, 5))
    expected = jnp.concatenate([first[:, :5], second[:, 2:5], third[:, 3:]], axis=1)
    assert_close(chunked, expected, NETWORK)


@pytest.mark.slow
@pytest.mark.parametrize(("back", "ahead", "size"), [(9, 1, 4), (2, 5, 3)])
def test_chunks_shorter_than_the_window_answer_for_one_frame_each(back, ahead, size):
    config = dataclasses.replace(CLIP, denoiser_past_frames=back, denoiser_lookahead_frames=ahead)
    denoiser, variables, _, text = perturbed(config)
    clip = laws.images(CLIP.with_num_frames(6), jax.random.key(3), batch=2)
    chunked = DenoiserStep(denoiser, noise_std=0.5, chunk=size)(variables, clip, text)
    network = ClipDenoiser(config.with_num_frames(size))
    chunks = [clip[:, i : i + size] for i in range(7 - size)]
    first, *rest = (chunk - 0.5 * network.apply(variables, chunk, text) for chunk in chunks)
    answering = size - 1 - min(ahead, size - 1)
    expected = [first[:, : answering + 1], *(chunk[:, answering, None] for chunk in rest[:-1]), rest[-1][:, answering:]]
    assert_close(chunked, jnp.concatenate(expected, axis=1), NETWORK)


def test_the_program_of_a_denoiser_does_not_grow_with_the_clip():
    denoiser, variables, _, text = perturbed(CLIP)
    step = DenoiserStep(denoiser, noise_std=0.5, chunk=6)
    lengths = (jax.ShapeDtypeStruct((2, *CLIP.with_num_frames(frames).event_shape), jnp.float32) for frames in (7, 30))
    short, long = (jax.make_jaxpr(lambda x: step(variables, x, text))(x).pretty_print() for x in lengths)
    assert short.count("dot_general") == long.count("dot_general")


@pytest.mark.slow
def test_a_learned_step_takes_the_place_of_the_score_in_sampling():
    flow, params = laws.perturbed(CLIP, jax.random.key(0))
    denoiser, variables, _, text = perturbed(CLIP)
    noisy = sample(flow, params, jax.random.key(0), 2, text, denoise=False)
    step = DenoiserStep(denoiser, noise_std=CLIP.noise_std)
    clean = sample(flow, params, jax.random.key(0), 2, text, denoise=Denoiser(step, variables))
    assert_close(clean.x, step(variables, noisy.x, text), NETWORK)


REFUSED = {
    "no layers": (
        lambda: init_denoiser(ClipDenoiser(dataclasses.replace(CLIP, denoiser_layers=0)), jax.random.key(0)),
        "model.denoiser_layers is 0, so there is no denoiser",
    ),
    "negative window": (lambda: dataclasses.replace(CLIP, denoiser_past_frames=-1), "denoiser_past_frames is -1"),
    "added classes": (
        lambda: dataclasses.replace(CLIP, text_dim=0, text_length=0, num_classes=3, class_conditioning="add"),
        "use 'prefix'",
    ),
    "no chunk": (lambda: DenoiserStep(ClipDenoiser(CLIP), 0.5, chunk=0), "chunk is 0; it must be at least 1"),
    "half a frame": (
        lambda: FrameWindow(1, 4, 1, 1).attend(*jnp.zeros((3, 1, 7, 1, 2))),
        "tokens after the prefix of 1 must form frames of 4",
    ),
    "no tokens": (lambda: FrameWindow(1, 0, 1, 1), "tokens is 0, but must be at least 1"),
    "image": (
        lambda: ClipDenoiser(CLIP).init(jax.random.key(0), jnp.zeros((1, 2, 3, 2)), laws.labels(CLIP, batch=1)),
        "its shape must be (batch, 6, 2, 3, 2)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what, untyped):
    call, part = REFUSED[what]
    with pytest.raises(ValueError, match=r"\w") as error:
        call()
    assert part in str(error.value)
