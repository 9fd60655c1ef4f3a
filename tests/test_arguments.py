"""What public functions say of wrong arguments: ValueError in one sentence that names the argument, before compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import one_sentence
from conftest import rows
from laws import drawn

import flowgen
from flowgen import matching as fm
from flowgen.codecs import (
    Autoencoder,
    AutoencoderCodec,
    AutoencoderConfig,
    PixelCodec,
    VideoAutoencoder,
    VideoAutoencoderCodec,
    VideoAutoencoderConfig,
)
from flowgen.data import Batch, ClipsConfig, DataConfig, from_uint8, load, load_clips, to_uint8
from flowgen.decoding import Clip, Guidance, Jacobi, invert, sample
from flowgen.flows import ClipDenoiser, STARFlowV, STARFlowVConfig, density
from flowgen.flows.batches import dequantise
from flowgen.flows.objective import nll_objective
from flowgen.flows.score_matching import flow_score_objective

pytestmark = pytest.mark.usefixtures("untyped")


def key():
    return jax.random.key(0)


FLOW = flowgen.TARFlow(
    flowgen.TARFlowConfig(
        image_size=4, channels=1, patch_size=2, width=16, head_dim=8, num_blocks=2, layers_per_block=1, num_classes=3
    )
)
PARAMS = drawn(flowgen.init, FLOW, key())
CLIP_FLOW = STARFlowV(
    STARFlowVConfig(
        image_size=4, channels=1, width=20, head_dim=20, layers_per_block=(1, 1), frames=2, denoiser_layers=1
    )
)
CLIP_PARAMS = drawn(flowgen.init, CLIP_FLOW, key())
ENCODER = Autoencoder(AutoencoderConfig(channels=1, latent_channels=1, widths=(8,), layers_per_block=1, num_groups=4))
ENCODER_PARAMS = drawn(flowgen.init, ENCODER, key())
VIDEO = VideoAutoencoder(VideoAutoencoderConfig(channels=1, widths=(8, 8), decoder_widths=(8, 8), halve_time=(True,)))
VIDEO_PARAMS = drawn(flowgen.init, VIDEO, key())
NETWORK = fm.DiT(fm.DiTConfig(image_size=4, channels=1, patch_size=2, width=16, num_layers=1, head_dim=8))
NETWORK_PARAMS = drawn(flowgen.init, NETWORK, key())
LOSS = fm.flow_matching_loss()
T = jnp.full(2, 0.5)


def still(t, x, cond=None, *_):
    return jnp.zeros_like(x)


# Every public entry that takes pixels, latents or noise, as a function of them.
IMAGE, CLIP = (2, 4, 4, 1), (2, 1, 32, 32, 1)
TAKES_PIXELS = {
    "forward": (IMAGE, lambda x: FLOW.apply(PARAMS, x, method="forward")[0]),
    "log_prob": (IMAGE, lambda x: FLOW.apply(PARAMS, x, method="log_prob")),
    "bits_per_dim": (IMAGE, lambda x: FLOW.apply(PARAMS, x, method="bits_per_dim")),
    "trajectory": (IMAGE, lambda x: FLOW.apply(PARAMS, x, method="trajectory")[1]),
    "class_posterior": (IMAGE, lambda x: density.class_posterior(FLOW, PARAMS, x)),
    "score": (IMAGE, lambda x: density.score(FLOW, PARAMS, x)),
    "denoise": (IMAGE, lambda x: density.tweedie_step(FLOW, PARAMS, x, noise_std=0.1)),
    "denoise nothing": (IMAGE, lambda x: density.tweedie_step(FLOW, PARAMS, x, noise_std=0.0)),
    "invert": ((2, 4, 4), lambda z: invert(FLOW, PARAMS, z).x),
    "log_prob of clips": ((2, 2, 4, 4, 1), lambda x: CLIP_FLOW.apply(CLIP_PARAMS, x, method="log_prob")),
    "given frames": ((2, 1, 4, 4, 1), lambda x: sample(CLIP_FLOW, CLIP_PARAMS, key(), 2, clip=Clip(given=x)).x),
    "denoiser": (
        (2, 2, 4, 4, 1),
        lambda x: ClipDenoiser(CLIP_FLOW.config).apply({"params": CLIP_PARAMS["params"]["denoiser"]}, x),
    ),
    "PixelCodec.moments": (IMAGE, lambda x: PixelCodec(pixel_channels=1, factor=2).moments(x)[0]),
    "PixelCodec.decode": ((2, 2, 2, 4), PixelCodec(pixel_channels=1, factor=2).decode),
    "AutoencoderCodec.moments": (IMAGE, lambda x: AutoencoderCodec(ENCODER, ENCODER_PARAMS).moments(x)[0]),
    "AutoencoderCodec.decode": (IMAGE, lambda x: AutoencoderCodec(ENCODER, ENCODER_PARAMS).decode(x)),
    "Autoencoder.encode": (IMAGE, lambda x: ENCODER.apply(ENCODER_PARAMS, x, method="encode")[0]),
    "Autoencoder.decode": (IMAGE, lambda x: ENCODER.apply(ENCODER_PARAMS, x, method="decode")),
    "PixelCodec.moments of clips": ((2, 2, 4, 4, 1), lambda x: PixelCodec(pixel_channels=1).moments(x)[0]),
    "VideoAutoencoderCodec.moments": (CLIP, lambda x: VideoAutoencoderCodec(VIDEO, VIDEO_PARAMS).moments(x)[0]),
    "VideoAutoencoder.encode": (CLIP, lambda x: VIDEO.apply(VIDEO_PARAMS, x, method="encode")[0]),
    "network": (IMAGE, lambda x: NETWORK.apply(NETWORK_PARAMS, T, x)),
    "flow_matching_loss": (IMAGE, lambda x: LOSS(still, {"x1": x}, key())[0]),
    "mean_flow_loss": (IMAGE, lambda x: fm.mean_flow_loss()(still, {"x1": x}, key())[0]),
    "integrate": (IMAGE, lambda x: fm.integrate(still, x, num_steps=2)[0]),
    "trajectory of a field": (IMAGE, lambda x: fm.trajectory(still, x, num_steps=2)[0]),
    "integrate_mean": (IMAGE, lambda x: fm.integrate_mean(still, x)[0]),
    "integrate_sde": (IMAGE, lambda x: fm.integrate_sde(still, still, x, key(), num_steps=2)[0]),
    "log_prob of a field": (IMAGE, lambda x: fm.log_prob(still, x, key=key(), num_steps=2)),
    "Independent": (IMAGE, lambda x: fm.Independent()(key(), x, x).x0),
    "MinibatchOT": (IMAGE, lambda x: fm.MinibatchOT()(key(), x, x).x0),
    "GibbsWeights": (IMAGE, lambda x: fm.GibbsWeights(epsilon=1.0)(key(), x, x).log_weight),
    "weight_report": (IMAGE, lambda x: fm.weight_report(x, x, 1.0).ess),
    "choose_epsilon": (IMAGE, lambda x: fm.choose_epsilon(x, x + 1)),
    "path": (IMAGE, lambda x: fm.CondOT().sample(key(), T, x, x).x_t),
    "to_uint8": (IMAGE, to_uint8),
}
# Of half precision they draw other noise.
DRAW_IN_THE_TYPE_OF_X = ("flow_matching_loss", "mean_flow_loss", "integrate_sde")
SLOW_TO_COMPILE = ("given frames", "VideoAutoencoder.encode", "VideoAutoencoderCodec.moments")


@pytest.mark.parametrize("dtype", ["uint8", "int32", "bool"])
@pytest.mark.parametrize("name", TAKES_PIXELS)
def test_pixels_that_are_no_floats_are_refused(name, dtype):
    shape, function = TAKES_PIXELS[name]
    for x in (jnp.ones(shape, dtype), np.ones(shape, dtype)):
        with pytest.raises(ValueError, match=r"from_uint8"):
            function(x)
    with pytest.raises(ValueError, match=r"from_uint8"):
        jax.eval_shape(function, jax.ShapeDtypeStruct(shape, dtype))


SHOWN = ("log_prob", "invert", "network", "integrate", "GibbsWeights", "PixelCodec.moments", "path", "to_uint8")
TAKES_HALF = [name for name in TAKES_PIXELS if name not in SLOW_TO_COMPILE + DRAW_IN_THE_TYPE_OF_X]


@pytest.mark.parametrize("name", rows(TAKES_HALF, set(TAKES_HALF) - set(SHOWN)))
def test_half_and_double_precision_are_taken_as_the_numbers_they_are(name):
    shape, function = TAKES_PIXELS[name]
    exact = np.linspace(-1, 1, int(np.prod(shape))).reshape(shape).astype(jnp.bfloat16)  # in all of the types
    expected = np.asarray(function(jnp.asarray(exact, jnp.float32)), np.float32)
    for dtype in (jnp.bfloat16, jnp.float16):
        answer = np.asarray(function(jnp.asarray(exact).astype(dtype)), np.float32)
        assert np.isfinite(answer).all()
        # Fields and paths keep the type of x, of which the last digit is 2^-8.
        np.testing.assert_allclose(answer, expected, rtol=2**-6, atol=2**-6 * max(1.0, np.abs(expected).max()))
    np.testing.assert_array_equal(np.asarray(function(np.asarray(exact, np.float64)), np.float32), expected)


DENSITIES = ("forward", "log_prob", "class_posterior", "score", "denoise")


@pytest.mark.parametrize("name", rows(DENSITIES, ("score",)))
def test_densities_of_half_precision_are_float32(name):
    shape, function = TAKES_PIXELS[name]
    x = jnp.linspace(-1, 1, 32).reshape(shape).astype(jnp.bfloat16)
    half, full = function(x), function(x.astype(jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, half, full)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half))


X, Z = jnp.zeros(IMAGE), jnp.zeros((2, 4, 4))
# A call with wrong arguments, and what its sentence begins with.
WRONG = {
    "sample: a number for the key": (lambda: sample(FLOW, PARAMS, 0, 1), "key is 0"),
    "sample: several keys": (lambda: sample(FLOW, PARAMS, jax.random.split(key()), 1), "key is "),
    "sample: flow and params swapped": (lambda: sample(PARAMS, FLOW, key(), 1), "flow is a dict"),
    "sample: params without 'params'": (lambda: sample(FLOW, PARAMS["params"], key(), 1), "params is a dict"),
    "sample: num negative": (lambda: sample(FLOW, PARAMS, key(), -1), "num is -1"),
    "sample: num a float": (lambda: sample(FLOW, PARAMS, key(), 2.0), "num is 2.0"),
    "sample: unknown plan": (lambda: sample(FLOW, PARAMS, key(), 1, plan="fast"), "plan is 'fast'"),
    "sample: plan a number": (lambda: sample(FLOW, PARAMS, key(), 1, plan=8), "plan is 8"),
    "sample: guidance a number": (lambda: sample(FLOW, PARAMS, key(), 1, [0], guidance=1.5), "guidance is 1.5"),
    "sample: denoise a text": (lambda: sample(FLOW, PARAMS, key(), 1, denoise="yes"), "denoise is 'yes'"),
    "sample: a label for all": (
        lambda: sample(FLOW, PARAMS, key(), 3, 1),
        "cond must be an integer array of shape (3,)",
    ),
    "sample: labels as floats": (lambda: sample(FLOW, PARAMS, key(), 1, jnp.ones(1)), "cond must be an integer array"),
    "invert: an image for z": (lambda: invert(FLOW, PARAMS, X), "z has shape (2, 4, 4, 1)"),
    "invert: swapped": (lambda: invert(PARAMS, FLOW, Z), "flow is a dict"),
    "invert: a list": (lambda: invert(FLOW, PARAMS, [0.0]), "z is a list"),
    "sample: no numbers": (lambda: sample(FLOW, PARAMS, key(), range(0)), "num is empty"),
    "sample: fractions": (
        lambda: sample(FLOW, PARAMS, key(), np.array([0.5, 1.9])),
        "num is float64 of shape (2,); it must be the number of samples",
    ),
    "sample: a mask": (lambda: sample(FLOW, PARAMS, key(), np.array([True, False])), "num is bool of shape (2,)"),
    "sample: a table": (lambda: sample(FLOW, PARAMS, key(), np.array([[0, 1]])), "num is int64 of shape (1, 2)"),
    "sample: beyond int32": (
        lambda: sample(FLOW, PARAMS, key(), np.array([0, 2**32 + 1])),
        "num contains sample numbers from 0 to 4294967297",
    ),
    "sample: below 0": (lambda: sample(FLOW, PARAMS, key(), range(-1, 2)), "num contains sample numbers from -1 to 1"),
    "sample: a clip of images": (
        lambda: sample(FLOW, PARAMS, key(), 1, clip=Clip(frames=2)),
        "clip is only for a STARFlowV",
    ),
    "sample: frames for a clip": (lambda: sample(CLIP_FLOW, CLIP_PARAMS, key(), 1, clip=2), "clip is 2"),
    "Guidance: a text": (lambda: Guidance(scale="strong"), "scale is 'strong'"),
    "Jacobi: a text": (lambda: Jacobi(window="8"), "window is '8'"),
    "init: a number for the key": (lambda: flowgen.init(FLOW, 0), "key is 0"),
    "init of a network": (lambda: flowgen.init(NETWORK, 0), "key is 0"),
    "forward: channels first": (lambda: FLOW.apply(PARAMS, X.swapaxes(1, 3), method="forward"), "x has shape"),
    "forward: a list": (lambda: FLOW.apply(PARAMS, [[0.0]], method="forward"), "x is a list"),
    "log_prob: labels of another batch": (
        lambda: FLOW.apply(PARAMS, X, jnp.zeros(3, int), method="log_prob"),
        "cond must be an integer array of shape (2,)",
    ),
    "score: swapped": (lambda: density.score(PARAMS, FLOW, X), "flow is a dict"),
    "class_posterior: swapped": (lambda: density.class_posterior(PARAMS, FLOW, X), "flow is a dict"),
    "class_posterior: prior": (lambda: density.class_posterior(FLOW, PARAMS, X, jnp.zeros(2)), "log_prior is"),
    "dequantise: floats": (lambda: dequantise(key(), X), "images is float32"),
    "from_uint8: floats": (lambda: from_uint8(X), "images is float32"),
    "nll_objective: an array": (lambda: nll_objective(FLOW)(PARAMS, X, key()), "batch is float32"),
    "nll_objective: a number for the key": (
        lambda: nll_objective(FLOW)(PARAMS, Batch(jnp.zeros(IMAGE, jnp.uint8), jnp.zeros(2, int)), 0),
        "key is 0",
    ),
    "nll_objective: a dict": (lambda: nll_objective(FLOW)(PARAMS, {"x": X}, key()), "batch is a dict; give a flowgen"),
    "nll_objective: no labels": (
        lambda: nll_objective(FLOW)(PARAMS, Batch(jnp.zeros(IMAGE, jnp.uint8)), key()),
        "batch.context is None; this flow requires classes",
    ),
    "nll_objective: float labels": (
        lambda: nll_objective(FLOW, label_dropout=0.1)(PARAMS, Batch(jnp.zeros(IMAGE, jnp.uint8), jnp.ones(2)), key()),
        "batch.context is float32 of shape (2,); this flow requires classes",
    ),
    "nll_objective: labels of another batch": (
        lambda: nll_objective(FLOW)(PARAMS, Batch(jnp.zeros(IMAGE, jnp.uint8), jnp.zeros(3, int)), key()),
        "batch.context has 3 rows, and batch.x has 2",
    ),
    "nll_objective: nothing": (
        lambda: nll_objective(FLOW)(PARAMS, Batch(jnp.zeros((0, *IMAGE[1:]), jnp.uint8), jnp.zeros(0, int)), key()),
        "the batch is empty",
    ),
    "nll_objective: floats": (
        lambda: nll_objective(FLOW)(PARAMS, Batch(X, jnp.zeros(2, int)), key()),
        "batch.x is float32",
    ),
    "flow_score_objective: an array": (
        lambda: flow_score_objective(CLIP_FLOW)(CLIP_PARAMS, X, key()),
        "batch is float32",
    ),
    "loss: an array": (lambda: LOSS(still, X, key()), "batch is float32"),
    "loss: a number for the key": (lambda: LOSS(still, {"x1": X}, 0), "key is 0"),
    "loss: swapped": (lambda: LOSS({"x1": X}, still, key()), "velocity is a dict"),
    "mean_flow_loss: an array": (lambda: fm.mean_flow_loss()(still, X, key()), "batch is float32"),
    "integrate: swapped": (lambda: fm.integrate(X, still), "velocity is float32"),
    "log_prob of a field: swapped": (lambda: fm.log_prob(X, still), "velocity is float32"),
    "log_prob of a field: key": (lambda: fm.log_prob(still, X, key=0), "key is 0"),
    "network: a number for t": (lambda: NETWORK.apply(NETWORK_PARAMS, 0.5, X), "t is 0.5"),
    "path: a number for t": (lambda: fm.CondOT().sample(key(), 0.5, X, X), "t is 0.5"),
    "coupling: shapes": (lambda: fm.MinibatchOT()(key(), X, X[:1]), "x0 has shape"),
    "GibbsWeights: a text": (lambda: fm.GibbsWeights(epsilon="small"), "epsilon is 'small'"),
    "load: a path": (lambda: load("photos", image_size=8, channels=1, split="train"), "config is 'photos'"),
    "load: a text for the size": (
        lambda: load(DataConfig(), image_size="8", channels=1, split="train"),
        "image_size is '8'",
    ),
    "load_clips: frames": (
        lambda: load_clips(ClipsConfig(), frames=0, image_size=16, channels=1, split="train"),
        "frames is 0",
    ),
    "fit: swapped": (lambda: flowgen.fit("runs/x", "configs/tarflow_digits.py"), "experiment is 'runs/x'"),
    "load of a run: a number": (lambda: flowgen.checkpoint.load(3), "run_dir must be the path of a run"),
    "init: swapped": (lambda: flowgen.init(key(), FLOW), "model is key<fry>"),
    "init: a config": (lambda: flowgen.init(FLOW.config, key()), "model is a TARFlowConfig"),
    "flow_matching_loss: a name for the coupling": (
        lambda: fm.flow_matching_loss(coupling="MinibatchOT"),
        "coupling is 'MinibatchOT'",
    ),
    "mean_flow_loss: a class for the path": (lambda: fm.mean_flow_loss(path=fm.CondOT), "path is a type"),
    "score_and_flow_matching_loss: times": (lambda: fm.score_and_flow_matching_loss(time=0.5), "time is 0.5"),
    "tarflow: a path": (
        lambda: flowgen.convert.tarflow("a.pth", image_size=8, patch_size=2),
        "state_dict is 'a.pth'",
    ),
    "starflow: a path": (lambda: flowgen.convert.starflow("a.pth", {}), "state_dict is 'a.pth'"),
    "starflow: arguments": (lambda: flowgen.convert.starflow({}, "a.yaml"), "arguments is 'a.yaml'"),
    "to_uint8: a list": (lambda: to_uint8([0.0]), "x is a list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named_in_one_sentence(name):
    call, begins = WRONG[name]
    with pytest.raises(ValueError, match=r"\.$") as error:
        call()
    assert one_sentence(error).startswith(begins)


def test_keys_of_the_old_kind_are_keys():
    old = jax.random.PRNGKey(0)
    np.testing.assert_array_equal(sample(FLOW, PARAMS, old, 2).x, sample(FLOW, PARAMS, key(), 2).x)


def test_a_side_stands_for_a_square():
    dataset = load(DataConfig(), image_size=8, channels=1, split="eval")
    assert dataset.event_shape == (8, 8, 1)
    clips = load_clips(ClipsConfig(num=20), frames=2, image_size=16, channels=1, split="train")
    assert clips.event_shape[-3:] == (16, 16, 1)
