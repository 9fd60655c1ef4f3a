"""STARFlow-V: causality over frames, frames on their own, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from tolerances import NETWORK, assert_close

from flowgen.conditioning import TextCondition
from flowgen.flows import STARFlow, STARFlowConfig, STARFlowV, STARFlowVConfig

TEXT = STARFlowVConfig(
    image_size=(2, 3),
    frames=3,
    channels=2,
    width=40,
    head_dim=20,
    layers_per_block=(1, 1, 1, 2),
    text_dim=5,
    text_length=3,
)


def test_nothing_sees_later_frames_and_shallow_blocks_no_other_frame():
    flow, params = laws.perturbed(TEXT, jax.random.key(0))
    clip, text = laws.images(TEXT, jax.random.key(1), batch=1), laws.labels(TEXT, batch=1)

    @jax.jit
    def jacobians(clip):
        def states(clip):
            (*_, local, z), _ = flow.apply(params, clip, text, method="trajectory")
            return [tokens.reshape(3, -1) for tokens in (local, z)]

        return [x.reshape(3, -1, 3, clip[0, 0].size) for x in jax.jacfwd(states)(clip)]

    local, z = (np.abs(jacobian).max(axis=(1, 3)) for jacobian in jacobians(clip))
    np.testing.assert_array_equal(local > 0, np.eye(3, dtype=bool))
    np.testing.assert_array_equal(z > 0, np.tri(3, dtype=bool))


def test_a_clip_of_one_frame_is_an_image_to_the_same_parameters():
    plain = {field.name: getattr(TEXT, field.name) for field in dataclasses.fields(STARFlowConfig)}
    flow, params = laws.perturbed(TEXT.with_num_frames(1), jax.random.key(0))
    clip, text = laws.images(flow.config, jax.random.key(1)), laws.labels(TEXT)
    z, logdet = laws.apply(flow, params, clip, text)
    expected, expected_logdet = laws.apply(STARFlow(STARFlowConfig(**plain)), params, clip[:, 0], text)
    assert_close(z, expected, NETWORK)
    assert_close(logdet, expected_logdet, NETWORK)


def test_the_noise_of_a_clip_begins_with_that_of_its_beginning():
    flow, params = laws.perturbed(TEXT, jax.random.key(0))
    clip, text = laws.images(TEXT, jax.random.key(1)), laws.labels(TEXT)
    z, _ = laws.apply(flow, params, clip, text)
    beginning, _ = laws.apply(STARFlowV(TEXT.with_num_frames(2)), params, clip[:, :2], text)
    assert_close(z[:, : beginning.shape[1]], beginning, NETWORK)


def test_frames_and_the_text_are_told_apart_by_position():
    # Two equal frames have different noise, and so has a clip with the text elsewhere in its prefix.
    flow, params = laws.perturbed(TEXT, jax.random.key(0), scale=0.3)
    frame = laws.images(TEXT, jax.random.key(1), batch=1)[:, :1]
    clip, text = jnp.tile(frame, (1, 3, 1, 1, 1)), laws.labels(TEXT, batch=1)
    z = laws.apply(flow, params, clip, text)[0].reshape(3, -1)
    assert np.abs(z[1] - z[2]).max() > 1e-3
    moved = TextCondition(text.embeddings[:, ::-1], text.mask[:, ::-1])
    assert np.abs(laws.apply(flow, params, clip, moved)[0].reshape(3, -1) - z).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 0}, "frames is 0; it must be at least 1"),
        ({"conditioned_blocks": "all"}, "conditioned_blocks is 'all', but blocks that map single frames"),
        ({"layers_per_block": (1, 1, 2)}, "the deep block runs backwards in time"),
        ({"order": "raster"}, "order is 'raster', so the deep block runs"),
        ({"head_dim": 16, "width": 32}, "head_dim is 16; rotary positions need"),
    ],
)
def test_what_is_no_video_model_is_refused(changes, message):
    with pytest.raises(ValueError, match=r"\w") as error:
        dataclasses.replace(TEXT, **changes)
    assert message in str(error.value)


def test_images_are_refused_as_clips():
    flow, params = laws.perturbed(TEXT, jax.random.key(0))
    with pytest.raises(ValueError, match=r"x has shape \(4, 2, 3, 2\); its shape must be \(batch, 3, 2, 3, 2\)"):
        flow.apply(params, jnp.zeros((4, 2, 3, 2)), laws.labels(TEXT), method="forward")
