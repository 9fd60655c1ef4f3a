"""Video autoencoders against diffusers at random weights, causal, whole and in chunks; codecs of clips."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import video_weights as vw
from conftest import rows
from published_files import publish
from tolerances import NETWORK, assert_close

from flowgen import backend, codecs, convert
from flowgen.codecs import causal, video_codec
from flowgen.nn import init

# float32 sums in another order; latents and pixels are of order 1.
KINDS = tuple(vw.CONFIGS)
STRIDES = {kind: config["scale_factor_temporal"] for kind, config in vw.CONFIGS.items()}


@functools.cache
def imported(kind):
    return convert.video_autoencoder(vw.state_dict(kind), vw.CONFIGS[kind])


@functools.cache
def method(kind, name):
    """encode or decode of an imported toy network, compiled."""
    network, variables = imported(kind)
    return jax.jit(lambda x: network.apply(variables, x, method=name))


@pytest.mark.parametrize("frames", rows([1, 9], (1,)))
@pytest.mark.parametrize("kind", KINDS)
def test_video_autoencoders_are_those_of_diffusers(kind, frames):
    recorded, latents = vw.recorded(kind), 1 + (frames - 1) // STRIDES[kind]
    mean, log_variance = method(kind, "encode")(vw.clips(kind, frames))
    assert_close(mean, recorded["mean"][:, :latents], NETWORK)
    assert_close(log_variance, recorded["log_variance"][:, :latents], NETWORK)
    decoded = method(kind, "decode")(recorded["mean"][:, :latents])[:, :, :: vw.EVERY, :: vw.EVERY]
    # The published decoder clips.
    assert_close(np.clip(decoded, -1, 1), recorded["decoded"][:, :frames], NETWORK)
    assert (np.abs(recorded["decoded"]) < 1).mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_chunks_give_what_the_whole_gives(kind):
    network, variables = imported(kind)
    x = vw.clips(kind)
    whole, parts = method(kind, "encode")(x), jax.jit(codecs.encode_in_chunks, static_argnums=0)(network, variables, x)
    for one, other in zip(whole, parts, strict=True):
        assert_close(one, other, NETWORK)
    decoded = jax.jit(codecs.decode_in_chunks, static_argnums=0)(network, variables, whole[0])
    assert_close(decoded, method(kind, "decode")(whole[0]), NETWORK)
    assert decoded.shape == x.shape


@pytest.mark.parametrize("kind", rows(KINDS, ("wan_2_1",)))
def test_latents_depend_on_no_later_frame(kind):
    network, variables = imported(kind)
    x = jnp.asarray(vw.clips(kind))

    @jax.jit
    @jax.grad
    def gradient(x, frames):
        mean, log_variance = network.apply(variables, x, method="encode")
        return jnp.einsum("bfhwz,f->", mean**2 + log_variance**2, frames)

    latents = 1 + 8 // STRIDES[kind]
    for count in range(1, latents):
        sizes = np.abs(gradient(x, (np.arange(latents) < count).astype(np.float32))).max(axis=(0, 2, 3, 4))
        np.testing.assert_array_equal(sizes > 0, np.arange(9) < 1 + STRIDES[kind] * (count - 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_decoded_frames_depend_on_no_later_latent(kind):
    network, variables = imported(kind)

    def loss(latents):
        return (network.apply(variables, latents, method="decode")[:, :5] ** 2).sum()

    sizes = np.abs(jax.jit(jax.grad(loss))(vw.recorded(kind)["mean"])).max(axis=(0, 2, 3, 4))
    np.testing.assert_array_equal(sizes > 0, np.arange(1 + 8 // STRIDES[kind]) <= 4 // STRIDES[kind])


def test_published_sizes():
    def size(config):
        network = codecs.VideoAutoencoder(config)
        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: init(network, jax.random.key(0)))))

    presets = codecs.VIDEO_AUTOENCODER_PRESETS
    assert {name: size(config) for name, config in presets.items()} == {"wan_2_2": 704_688_668, "wan_2_1": 126_892_531}
    assert [(config.factor, config.stride) for config in presets.values()] == [(16, 4), (8, 4)]


SMALL = codecs.VideoAutoencoderConfig(
    channels=1,
    latent_channels=2,
    widths=(4, 8, 8),
    decoder_widths=(4, 4, 8),
    halve_time=(False, True),
    layers_per_block=1,
    patch_size=1,
)


TINY = dataclasses.replace(SMALL, widths=(4, 4), decoder_widths=(4, 6), halve_time=(True,))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 8, 8, 1), "clips have 4 frames; this codec needs 1, 3, 5, ... frames"),
        ((1, 3, 6, 8, 1), "clips are 6 x 8; this codec needs sides that are multiples of 4"),
        ((1, 3, 8, 8, 3), r"this codec needs \(batch, frames, height, width, 1\)"),
    ],
)
def test_clips_that_have_no_latents_are_refused(shape, message, key):
    network, x = codecs.VideoAutoencoder(SMALL), jnp.zeros(shape)
    variables = jax.eval_shape(lambda: init(network, key))
    for encode in (lambda v: network.apply(v, x, method="encode"), lambda v: codecs.encode_in_chunks(network, v, x)):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(encode, variables)


@pytest.mark.slow
def test_a_small_one_can_be_trained(key):
    config = dataclasses.replace(TINY, dtype="bfloat16", remat=True)
    network = codecs.VideoAutoencoder(config)
    shapes = jax.eval_shape(lambda: init(network, key))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    # To compile the generators of all weights takes longer than the test.
    draw = np.random.default_rng(0).normal
    variables = jax.tree.map(lambda leaf: draw(scale=0.3, size=leaf.shape).astype(np.float32), shapes)
    x = jax.random.normal(jax.random.fold_in(key, 1), (2, 5, 4, 4, 1))

    def loss(variables):
        mean, log_variance = network.apply(variables, x, method="encode")
        assert mean.shape == log_variance.shape == (2, 3, 2, 2, 2)
        decoded = network.apply(variables, mean + jnp.exp(0.5 * log_variance), method="decode")
        assert decoded.shape == x.shape
        assert decoded.dtype == mean.dtype == jnp.float32
        return ((decoded - x) ** 2).mean()

    gradients = jax.jit(jax.grad(loss))(variables)
    for path, x in jax.tree.leaves_with_path(gradients):
        assert np.abs(x).max() > 0, jax.tree_util.keystr(path)


def test_the_norm_of_nothing_has_a_gradient(key):
    norm = causal.channel_norm("norm")
    x = jnp.zeros((1, 1, 1, 1, 4))
    variables = norm.init(key, x)
    assert np.isfinite(jax.grad(lambda x: norm.apply(variables, x).sum())(x)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": ()}, "widths has 0 entries"),
        ({"widths": (4, 0, 8)}, "widths has the entry 0; it must be at least 1"),
        ({"decoder_widths": (4, 4)}, r"decoder_widths is \(4, 4\); with 3 widths, it must have 3"),
        ({"halve_time": (True,)}, r"halve_time is \(True,\); with 3 widths, it must have 2"),
        ({"widths": (4, 8, 16)}, "widths contains 16 after 8, but the shortcut between them has 8 values per position"),
        ({"decoder_widths": (4, 5, 7)}, "decoder_widths contains 7 before 7|decoder_widths contains 5 before 7"),
        (
            {"decoder_widths": (4, 4, 7), "shortcuts": False},
            "without shortcuts, every entry but the first",
        ),
        ({"patch_size": 0}, "patch_size is 0; it must be at least 1"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, message, untyped):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


# Import


@pytest.mark.parametrize("kind", rows(KINDS, ("wan_2_1",)))
def test_every_tensor_is_accounted_for(kind):
    tensors = vw.state_dict(kind)
    with pytest.raises(convert.MappingError, match=r"\(1 problem\): 'encoder.more.weight' is not expected"):
        convert.video_autoencoder(tensors | {"encoder.more.weight": np.zeros(3, np.float32)}, vw.CONFIGS[kind])
    with pytest.raises(convert.MappingError) as missing:
        convert.video_autoencoder({}, vw.CONFIGS[kind])
    assert sorted(missing.value.failures) == sorted(f"'{name}' is missing" for name in tensors)
    with pytest.raises(convert.MappingError) as misshapen:
        convert.video_autoencoder({name: np.stack([x, x]) for name, x in tensors.items()}, vw.CONFIGS[kind])
    assert len(misshapen.value.failures) == len(tensors)
    assert all(" has shape (2, " in failure for failure in misshapen.value.failures)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "it must be 'AutoencoderKLWan'"),
        ({"attn_scales": [0.5]}, r"attn_scales is \[0.5\]; flowgen supports only \[\]"),
        ({"dim_mult": [2, 2, 4, 4]}, r"dim_mult is \[2, 2, 4, 4\]; its first entry must be 1"),
        ({"out_channels": 3}, "in_channels is 12 and out_channels is 3"),
        ({"patch_size": 5}, "in_channels is 12; with patch_size 5, it must be a multiple of 25"),
        ({"z_dim": 4}, "The weights do not fit the model"),
        ({"is_residual": False}, "The weights do not fit the model"),
        ({"temperal_downsample": [False, True]}, r"halve_time is \(False, True\)"),
    ],
)
def test_networks_that_are_not_ours_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        convert.video_autoencoder(vw.state_dict("wan_2_2"), vw.CONFIGS["wan_2_2"] | change)


@pytest.mark.slow  # other files of weights are read by the same code
def test_a_video_autoencoder_loads_by_its_folder_and_by_its_pipeline(tmp_path):
    config = vw.CONFIGS["wan_2_2"]
    name = "diffusion_pytorch_model.safetensors"
    publish(tmp_path / "pipeline" / "vae", config, vw.state_dict("wan_2_2"), name)
    expected = (vw.recorded("wan_2_2")["mean"][:, :1] - config["latents_mean"]) / config["latents_std"]
    for path in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        codec = convert.load_video_autoencoder(path, temporal_scale=0.6)
        assert codec.temporal_scale == 0.6
        assert_close(codec.moments(vw.clips("wan_2_2", 1))[0], expected, NETWORK)
    file = tmp_path / "pipeline" / "vae" / "config.json"
    for change, message in (
        ({"latents_std": [1.0, 2.0]}, r"latents_std has shape \(2,\); it must be a list of z_dim = 3 finite numbers"),
        ({"latents_std": [1.0, 0.0, 2.0]}, "latents_std contains 0.0; all its values must be positive"),
    ):
        file.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            convert.load_video_autoencoder(tmp_path / "pipeline")
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "latents_mean"}))
    with pytest.raises(ValueError, match="has no 'latents_mean'; download the file again"):
        convert.load_video_autoencoder(tmp_path / "pipeline")
    with pytest.raises(FileNotFoundError, match=r"The folder '.*nowhere' of the video autoencoder does not exist"):
        convert.load_video_autoencoder(tmp_path / "nowhere")


# Codecs

SHIFT, SCALE = np.array([0.1, -0.2], np.float32), np.array([2.0, 0.5], np.float32)


def make_codec(temporal_scale=0.6):
    network, variables = imported("wan_2_1")
    return codecs.VideoAutoencoderCodec(network, variables, codecs.LatentNormalisation(SHIFT, SCALE), temporal_scale)


def frame_codec():
    return codecs.PixelCodec(pixel_channels=1, factor=2)


def test_a_codec_of_clips_normalises_and_undoes_it():
    codec, recorded = make_codec(), vw.recorded("wan_2_1")
    assert (codec.factor, codec.stride, codec.channels, codec.pixel_channels) == (2, 2, 2, 1)
    mean, std = codec.moments(vw.clips("wan_2_1"))
    temporal = np.array([1, 0.6, 0.6, 0.6, 0.6])[:, None, None, None]
    assert_close(mean, (recorded["mean"] - SHIFT) * SCALE * temporal, NETWORK)
    assert_close(std, np.exp(0.5 * recorded["log_variance"]) * SCALE * temporal, NETWORK)
    decoded = codec.decode(mean)
    assert_close(decoded[:, :, :: vw.EVERY, :: vw.EVERY], recorded["decoded"], NETWORK)


@pytest.mark.parametrize(("pixels", "whole"), [(9 * 48, True), pytest.param(2 * 48, False, marks=pytest.mark.slow)])
def test_a_codec_gives_the_same_in_any_parts(pixels, whole, monkeypatch):
    codec, x = make_codec(), np.concatenate([vw.clips("wan_2_1")] * 2)[:3]
    mean, std = codec.moments(x)
    decoded = codec.decode(mean)
    monkeypatch.setattr(backend, "PIXELS_AT_ONCE", pixels)
    chunked, encode = [], video_codec.encode_in_chunks
    monkeypatch.setattr(video_codec, "encode_in_chunks", lambda *inputs: chunked.append(True) or encode(*inputs))
    again, std_again = codec.moments(x)
    assert whole == (not chunked)
    assert_close(again, mean, NETWORK)
    assert_close(std_again, std, NETWORK)
    assert_close(codec.decode(mean), decoded, NETWORK)


@pytest.mark.parametrize("make", [make_codec, frame_codec])
def test_codecs_of_clips_are_codecs_of_clips(make):
    codec = make()
    assert isinstance(codec, codecs.Codec)
    assert isinstance(hash(codec), int)
    x = vw.clips("wan_2_1")
    mean, std = codec.moments(x)
    shape = (2, 1 + 8 // codec.stride, 3, 4, codec.channels)
    assert mean.shape == std.shape == shape
    decoded = codec.decode(mean)
    assert decoded.shape == x.shape


def test_an_image_is_a_clip_of_one_frame():
    codec, x = make_codec(), vw.clips("wan_2_1")[:, 0]
    mean, std = codec.moments(x)
    of_clip = codec.moments(x[:, None])
    np.testing.assert_array_equal(mean, of_clip[0][:, 0])
    np.testing.assert_array_equal(std, of_clip[1][:, 0])
    np.testing.assert_array_equal(codec.decode(mean), codec.decode(mean[:, None])[:, 0])


def test_a_codec_of_images_takes_every_frame():
    codec, x = frame_codec(), vw.clips("wan_2_1")
    mean, std = codec.moments(x)
    assert not std.any()
    np.testing.assert_array_equal(mean[:, 3], codec.moments(x[:, 3])[0])
    np.testing.assert_array_equal(codec.decode(mean), x)


@pytest.mark.parametrize("make", [make_codec, frame_codec])
def test_clips_that_do_not_fit_are_refused(make):
    codec = make()
    with pytest.raises(ValueError, match=r"clips have shape \(2, 5, 8, 8, 3\); this codec needs .*, 1\)"):
        codec.moments(np.zeros((2, 5, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="clips are 9 x 8; this codec needs sides that are multiples of 2"):
        codec.moments(np.zeros((2, 5, 9, 8, 1), np.float32))
    with pytest.raises(ValueError, match="the batch is empty; give at least one clip"):
        codec.moments(np.zeros((0, 5, 8, 8, 1), np.float32))
    with pytest.raises(ValueError, match="but no axis may be empty"):
        codec.decode(np.zeros((0, 2, 2, 2, codec.channels), np.float32))
    with pytest.raises(ValueError, match=r"latents have shape \(2, 2, 2, 2, 7\); this codec needs"):
        codec.decode(np.zeros((2, 2, 2, 2, 7), np.float32))


def test_numbers_of_frames_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"clips have 4 frames; this codec needs 1, 3, 5, \.\.\. frames \(1 \+ k"):
        make_codec().moments(np.zeros((2, 4, 8, 8, 1), np.float32))
    with pytest.raises(ValueError, match="clips have 0 frames"):
        frame_codec().moments(np.zeros((2, 0, 8, 8, 1), np.float32))
    with pytest.raises(ValueError, match=r"temporal_scale is 0.0; it must be a positive number"):
        make_codec(0.0)
