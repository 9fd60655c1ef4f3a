"""Clips behind given frames and clips longer than a flow: exact against plain inversion, window by window."""

import dataclasses

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from conftest import rows
from tolerances import LAYER, NETWORK, assert_close

from flowgen.conditioning import TextCondition
from flowgen.decoding import (
    Clip,
    DecodePlan,
    Denoiser,
    Guidance,
    Jacobi,
    SlidingWindow,
    invert,
    product_rule,
    sample,
)
from flowgen.flows import AutoregressiveBlock, STARFlow, STARFlowConfig, STARFlowV, block_parameters

TEXT = dataclasses.replace(laws.FLOWS["starflow video"], frames=3)  # of 2 tokens each
CLASSES = dataclasses.replace(TEXT, text_dim=0, text_length=0, num_classes=3)
NALA = dataclasses.replace(TEXT, attention="nala")
PER_FRAME = 2
SIZE = 3  # of what is drawn
KEY = jax.random.key(5)


def flow_of(config):
    flow, params = laws.perturbed(config, jax.random.key(0))
    return flow, params, laws.labels(config, batch=2)


def frames_of(config, count, batch=2):
    """Frames as a caller gives them."""
    return laws.images(config.with_num_frames(count), jax.random.key(1), batch)


def noise(config, count, indices=(0, 1)):
    """Noise tokens of `count` frames by definition: those of `sample`, and a key for each frame beyond them."""
    samples = []
    for index in indices:
        key = jax.random.fold_in(KEY, index)
        later = [jax.random.fold_in(key, frame) for frame in range(config.frames, count)]
        first = jax.random.normal(jax.random.clone(key), (config.num_tokens, config.token_dim))
        parts = [first, *(jax.random.normal(k, (PER_FRAME, config.token_dim)) for k in later)]
        samples.append(jnp.concatenate(parts)[: count * PER_FRAME])
    return jnp.stack(samples)


def behind(flow, params, cond, known, z):
    """The clip that begins with known frames: their own noise, then z, through plain inversion."""
    beginning = STARFlowV(flow.config.with_num_frames(known.shape[1]))
    own, _ = laws.apply(beginning, params, known, cond)
    whole = STARFlowV(flow.config.with_num_frames(known.shape[1] + z.shape[1] // PER_FRAME))
    return invert(whole, params, jnp.concatenate([own, z], axis=1), cond).x


def restarted(flow, params, cond, x, z, context):
    """x made longer by clips that begin with its last `context` frames, until the noise z of all frames is used."""
    while (used := x.shape[1] * PER_FRAME) < z.shape[1]:
        new = z[:, used : used + (flow.config.frames - context) * PER_FRAME]
        clip = behind(flow, params, cond, x[:, -context:], new)
        x = jnp.concatenate([x, clip[:, context:]], axis=1)
    return x


@pytest.mark.parametrize(
    ("config", "count"), [(TEXT, 2), pytest.param(NALA, 1, marks=pytest.mark.slow)], ids=["softmax", "nala"]
)
def test_given_frames_come_back_and_the_rest_is_plain_inversion(config, count):
    flow, params, cond = flow_of(config)
    given = frames_of(config, count)
    r = sample(flow, params, KEY, 2, cond, clip=Clip(given=given), denoise=False, certify=True)
    np.testing.assert_array_equal(r.x[:, :count], given)
    expected = behind(flow, params, cond, given, noise(config, 3)[:, count * PER_FRAME :])
    assert_close(r.x, expected, NETWORK)
    assert r.error.max() < NETWORK * SIZE
    np.testing.assert_array_equal((r.sweeps > 0).sum(axis=1), [PER_FRAME, (3 - count) * PER_FRAME])


@pytest.mark.parametrize("config", rows([TEXT, CLASSES], (CLASSES,)), ids=["text", "classes"])
@pytest.mark.slow  # beside guidance alone and given frames alone
def test_guidance_behind_given_frames_is_its_definition(config):
    flow, params, _ = flow_of(config)
    given = frames_of(config, 1)
    null = TextCondition(jnp.ones((1, 3, 5)), jnp.ones((1, 3), bool)) if config.text_dim else None
    cond = laws.labels(config, batch=2) if config.text_dim else jnp.array([0, 2], jnp.int32)
    other = TextCondition(jnp.ones((2, 3, 5)), jnp.ones((2, 3), bool)) if config.text_dim else None
    guidance = Guidance(scale=1.5, rule="product", null=null)
    r = sample(flow, params, KEY, 2, cond, clip=Clip(given=given), guidance=guidance, denoise=False, certify=True)
    assert r.error.max() < NETWORK * SIZE
    np.testing.assert_array_equal(r.x[:, :1], given)

    @jax.jit
    def guided_noise(x):
        u = flow.apply(params, x, cond, method="trajectory")[0][-2]
        block, variables = AutoregressiveBlock(config.blocks[-1]), block_parameters(params, 1)
        previous = block.apply(variables, u, method="previous")
        branches = [block.apply(variables, previous, c, method="conditioner")[0] for c in (cond, other)]
        shift, log_scale = product_rule(*branches, 1.5)
        return (u - shift) * jnp.exp(-log_scale)

    assert_close(guided_noise(r.x)[:, PER_FRAME:], noise(config, 3)[:, PER_FRAME:], NETWORK)


@pytest.mark.slow  # beside restarts with a condition of their own
@pytest.mark.parametrize(("total", "context"), [(6, 1), (5, None)])
def test_a_long_clip_is_clip_after_clip_behind_the_last_frames(total, context):
    flow, params, cond = flow_of(TEXT)
    r = sample(
        flow, params, KEY, 2, cond, clip=Clip(frames=total, context=context), denoise=False, certify=context == 1
    )
    z = noise(TEXT, 7 if context == 1 else 5)  # the last restart adds two frames, of which one is too much
    first = invert(flow, params, z[:, : 3 * PER_FRAME], cond).x
    expected = restarted(flow, params, cond, first, z, context=context or 2)
    assert r.x.shape == (2, total, 4, 2, 2)
    assert_close(r.x, expected[:, :total], NETWORK)
    assert context != 1 or r.error.max() < NETWORK * SIZE
    assert int(r.sweeps[1].sum()) == len(z[0])


@pytest.mark.slow
def test_a_longer_clip_begins_with_the_shorter_one():
    flow, params, cond = flow_of(TEXT)
    longer = sample(flow, params, KEY, 2, cond, clip=Clip(frames=5), denoise=False).x
    assert_close(longer[:, :3], sample(flow, params, KEY, 2, cond, denoise=False).x, NETWORK)
    shorter = sample(flow, params, KEY, 2, cond, clip=Clip(frames=2), denoise=False)
    assert_close(shorter.x, longer[:, :2], NETWORK)
    swapped = jax.tree.map(lambda c: c[::-1], cond)  # the second clip beside a third one
    other = sample(flow, params, KEY, range(1, 3), swapped, clip=Clip(frames=5), denoise=False)
    assert_close(other.x[0], longer[1], NETWORK)


@pytest.mark.slow
def test_a_clip_is_continued_from_its_last_frames_alone():
    flow, params, cond = flow_of(TEXT)
    given = frames_of(TEXT, 4)
    r = sample(flow, params, KEY, 2, cond, clip=Clip(frames=6, given=given, context=2), denoise=False, certify=True)
    expected = restarted(flow, params, cond, given, noise(TEXT, 6), context=2)
    assert_close(r.x, expected, NETWORK)
    assert r.error.max() < NETWORK * SIZE
    other = given.at[:, :2].add(1.0)
    moved = sample(flow, params, KEY, 2, cond, clip=Clip(frames=6, given=other, context=2), denoise=False, certify=True)
    np.testing.assert_array_equal(moved.x[:, 4:], r.x[:, 4:])


@pytest.mark.slow
def test_any_plan_gives_the_same_clip_and_one_program_serves_all_keys_and_scales():
    flow, params, cond = flow_of(TEXT)
    null = TextCondition(jnp.ones((1, 3, 5)), jnp.ones((1, 3), bool))
    given = frames_of(TEXT, 1)

    traces = []

    def count(variables, x, cond):
        traces.append(x.shape)
        return x

    def clip(plan, key=KEY, scale=1.0):
        options = {"guidance": Guidance(scale=scale, null=null), "denoise": Denoiser(count, None)}
        return sample(flow, params, key, 2, cond, plan=plan, clip=Clip(frames=4, given=given), **options)

    plan = DecodePlan((Jacobi(tol=0.0), SlidingWindow(window=3, tol=0.0, init="previous_frame")))
    sliding = clip(plan)
    assert_close(sliding.x, clip("sequential").x, NETWORK)
    assert len(traces) == 1  # The denoiser's program does not depend on the plan.
    clip(plan, jax.random.key(6), scale=2.0)
    assert len(traces) == 1


@pytest.mark.slow
def test_a_tweedie_step_follows_the_density_of_the_clip():
    flow, params, cond = flow_of(TEXT)
    fits = sample(flow, params, KEY, 2, cond)
    assert_close(fits.x, sample(flow, params, KEY, 2, cond).x, NETWORK)
    noisy = sample(flow, params, KEY, 2, cond, clip=Clip(frames=5), denoise=False).x
    clean = sample(flow, params, KEY, 2, cond, clip=Clip(frames=5), denoise=0.5).x

    @jax.jit
    @jax.grad
    def score(x):
        def log_prob(x):
            return STARFlowV(TEXT.with_num_frames(x.shape[1])).apply(params, x, cond, method="log_prob").sum()

        # Of a restart, the clip less what it began with.
        added = (log_prob(x[:, begin : begin + 3]) - log_prob(x[:, begin : begin + 2]) for begin in (1, 2))
        return log_prob(x[:, :3]) + sum(added)

    assert_close(clean, noisy + 0.5 * TEXT.noise_std**2 * score(noisy), NETWORK)


@pytest.mark.slow
def test_a_denoiser_gets_all_frames_still_noisy():
    flow, params, cond = flow_of(TEXT)
    noisy = sample(flow, params, KEY, 2, cond, clip=Clip(frames=5), denoise=False)
    half = Denoiser(lambda factor, x, cond: factor * x + cond.mask.sum(), 0.5)
    clean = sample(flow, params, KEY, 2, cond, clip=Clip(frames=5), denoise=half)
    assert_close(clean.x, 0.5 * noisy.x + cond.mask.sum(), LAYER)


REFUSED = {
    "no frames": ({"frames": 0}, "frames is 0"),
    "no clips": ({"num": 0}, "num is 0"),
    "an image": ({"given": jnp.zeros((2, 4, 2, 2))}, "given has shape (2, 4, 2, 2); its shape must be (2, frames"),
    "another size": ({"given": jnp.zeros((2, 1, 2, 4, 2))}, "frames, 4, 2, 2)"),
    "another batch": ({"given": jnp.zeros((3, 1, 4, 2, 2))}, "given has shape (3, 1, 4, 2, 2)"),
    "all given": ({"given": jnp.zeros((2, 3, 4, 2, 2))}, "given has 3 frames, but the clip has 3"),
    "none given": ({"given": jnp.zeros((2, 0, 4, 2, 2))}, "given has 0 frames"),
    "no context": ({"frames": 9, "context": 0}, "context is 0; it must be from 1 to 2"),
    "all context": ({"frames": 9, "context": 3}, "context is 3; it must be from 1 to 2"),
    "one frame": ({"config": TEXT.with_num_frames(1), "frames": 2}, "a flow that models single frames cannot continue"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what, untyped):
    arguments, part = REFUSED[what]
    config, num = arguments.get("config", TEXT), arguments.get("num", 2)
    clip = {name: value for name, value in arguments.items() if name not in ("config", "num")}
    with pytest.raises(ValueError, match=r"\w") as error:
        sample(STARFlowV(config), {"params": {}}, KEY, num, laws.labels(TEXT, batch=2), clip=Clip(**clip))
    assert part in str(error.value)


@pytest.mark.slow
def test_restarts_have_a_condition_of_their_own():
    flow, params, cond = flow_of(CLASSES)
    other = (cond + 1) % 3
    clip, options = Clip(frames=5, context=2), {"denoise": False, "certify": True}
    told = sample(flow, params, KEY, 2, cond, clip=dataclasses.replace(clip, restart_cond=other), **options)
    plain = sample(flow, params, KEY, 2, cond, clip=clip, **options)
    np.testing.assert_array_equal(told.x[:, :3], plain.x[:, :3])
    assert told.error.max() < NETWORK * SIZE
    expected = restarted(flow, params, other, plain.x[:, :3], noise(CLASSES, 5), context=2)
    assert_close(told.x, expected, NETWORK)
    assert jnp.abs(told.x - plain.x).max() > 1e-3
    with pytest.raises(ValueError, match=r"clip\.restart_cond is given, but cond is None"):
        sample(flow, params, KEY, 2, clip=Clip(restart_cond=other))


@pytest.mark.parametrize(
    "deep",
    [Jacobi(window=3), pytest.param(SlidingWindow(window=3, tol=0.0), marks=pytest.mark.slow)],
    ids=["fixed", "sliding"],
)
def test_progress_counts_every_token_of_the_deep_block_once(deep):
    flow, params, cond = flow_of(CLASSES)
    told = []
    clip = Clip(frames=6, given=frames_of(CLASSES, 1), context=1, progress=lambda *now: told.append(now))
    r = sample(flow, params, KEY, 2, cond, clip=clip, plan=DecodePlan((Jacobi(), deep)), denoise=False)
    jax.block_until_ready(r.x)
    jax.effects_barrier()
    # The first clip of three frames, and two restarts that add two frames each, less the frame that is given.
    assert {total for _, total in told} == {6 * PER_FRAME}
    assert sum(solved for solved, _ in told) == 6 * PER_FRAME
    assert len(told) > 3


def test_a_flow_of_images_is_refused(untyped):
    plain = STARFlow(STARFlowConfig(image_size=4, width=64, layers_per_block=(1, 1)))
    with pytest.raises(
        ValueError, match="clip is only for a STARFlowV, but this flow generates no clips; leave clip out"
    ):
        sample(plain, {"params": {}}, KEY, 2, clip=Clip(frames=1))
