"""TARFlow beside the published PyTorch code: the same weights through our importer, the same numbers out.

The recorded side is written by fixtures/record_tarflow.py; the weights of both sides are the closed formula
of fixtures/reference_weights.py. Published images are `b c h w`, ours `b h w c`; the published logdet is a
mean over tokens and channels, ours a sum.
"""

import dataclasses
import functools
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_weights as rw
from conftest import rows
from tolerances import LAYER, NETWORK, assert_close

from flowgen import convert
from flowgen.data import Batch
from flowgen.decoding import Guidance, Sequential, invert
from flowgen.flows import density
from flowgen.flows.objective import nll_objective

FIXTURES = Path(__file__).parent / "fixtures"

EXACT = 1e-12  # float64 on both sides, values up to 10
NOISE_STD = 0.1
ALMOST_NO_NOISE = 1e-30  # the objective adds Gaussian noise only where σ is positive, else it dequantises

REVERSE = {
    "plain": (True, None),
    "null": (False, None),
    "guided": (True, Guidance(scale=1.5)),
    "guided_log_scale": (True, Guidance(scale=1.5, parts="log_scale")),
    "guided_shift": (True, Guidance(scale=1.5, parts="shift")),
    "guided_anneal": (True, Guidance(scale=1.5, anneal=True)),
    "guided_temperature": (True, Guidance(scale=1.5, temperature=0.5)),
    "null_temperature": (False, Guidance(scale=1.5, temperature=0.5)),
    "temperature": (False, Guidance(scale=1.5, temperature=0.5)),
    "temperature_anneal": (False, Guidance(scale=1.5, temperature=0.5, anneal=True)),
}


RECORDED = dict(np.load(FIXTURES / "tarflow_reference.npz", allow_pickle=False))


class Published:
    """The recorded arrays of one case."""

    def __init__(self, case):
        self.case = case

    def __getitem__(self, name):
        return RECORDED[f"{self.case}/{name}"]

    def get(self, name):
        return RECORDED.get(f"{self.case}/{name}")

    def output(self, name, dtype="float64"):
        return self[f"{name}/{dtype}"]

    def reverse_names(self):
        keys = (key.split("/") for key in RECORDED)
        return [key[2] for key in keys if key[:2] == [self.case, "reverse"] and key[3] == "float64"]


SAMPLED = [(case, name) for case in rw.CASES for name in Published(case).reverse_names()]
WITH_CLASSES = [case for case, shape in rw.CASES.items() if shape.num_classes]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield "float64"


def imported(shape, state_dict):
    return convert.tarflow(
        state_dict, image_size=shape.image_size, patch_size=shape.patch_size, channels=shape.channels
    )


@functools.cache
def ours(case, dtype):
    """Returns the imported flow, its variables and its compiled `apply`, computing in `dtype`."""
    flow, variables = imported(rw.CASES[case], rw.state_dict(rw.CASES[case]))
    flow = type(flow)(dataclasses.replace(flow.config, dtype=dtype, noise_std=ALMOST_NO_NOISE))
    return flow, cast(variables, dtype), jax.jit(flow.apply, static_argnames="method")


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def unit_prior(variables):
    """Returns variables without the tracked variance, which the published loss leaves out."""
    return {name: tree if name == "params" else jax.tree.map(jnp.ones_like, tree) for name, tree in variables.items()}


def channels_last(images):
    return np.moveaxis(images, 1, -1)


def inputs(published, dtype):
    labels = published.get("labels")
    images = jnp.asarray(channels_last(published["images"]), dtype)
    return images, None if labels is None else jnp.asarray(labels, jnp.int32)


@pytest.mark.parametrize("case", rw.CASES)
def test_the_recorded_file_was_made_with_these_weights_and_inputs(case):
    published, shape, crc = Published(case), rw.CASES[case], 0
    for value in rw.state_dict(shape).values():
        crc = zlib.crc32(value.tobytes(), crc)
    assert crc == published["weights_crc32"]
    np.testing.assert_array_equal(published["images"], rw.images(shape))
    np.testing.assert_array_equal(published["noise"], rw.noise(shape))


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=EXACT)


def check(published, name, actual, dtype):
    """Asserts that `actual` is the recorded array, as closely as `dtype` can be asked to be."""
    expected = published.output(name)
    if dtype == "float64":
        close(actual, expected)
    else:
        assert_close(actual, expected, NETWORK, scale=max(1.0, np.abs(expected).max()))  # of terms of order 1


def check_trajectory(case, dtype):
    published, (flow, variables, apply) = Published(case), ours(case, dtype)
    states, logdet = apply(variables, *inputs(published, dtype), method="trajectory")
    for index, state in enumerate(states):
        check(published, f"block/{index}", state, dtype)
    check(published, "logdet", logdet / flow.config.num_dims, dtype)


def check_sampling(case, name, dtype):
    published, (flow, variables, _) = Published(case), ours(case, dtype)
    labelled, guidance = REVERSE[name]
    cond = jnp.asarray(published["reverse_labels"], jnp.int32) if labelled else None
    z = jnp.asarray(published["noise"], dtype)
    if "prior" in variables:
        z = z * jnp.sqrt(variables["prior"]["variance"])[None]
    result = invert(flow, variables, z, cond, plan=Sequential(), guidance=guidance)
    check(published, f"reverse/{name}", np.moveaxis(result.x, -1, 1), dtype)


@pytest.mark.parametrize("case", rw.CASES)
def test_tokens_after_every_block_and_logdet(case, float64):
    check_trajectory(case, float64)


@pytest.mark.parametrize("case", rows(rw.CASES, ("affine", "volume_class")))
def test_tokens_after_every_block_and_logdet_in_float32(case):
    check_trajectory(case, "float32")


# The laws of decoding hold what the other ways to guide are made of.
SHOWN = {"affine_class": ("guided", "guided_anneal"), "affine": ("temperature_anneal",), "volume_class": ("guided",)}


@pytest.mark.parametrize(
    ("case", "name"),
    [pytest.param(case, name, marks=[] if name in SHOWN[case] else [pytest.mark.slow]) for case, name in SAMPLED],
)
def test_sampling_from_given_noise(case, name, float64):
    check_sampling(case, name, float64)


@pytest.mark.parametrize("name", rows(["plain", "guided", "guided_temperature"], ("plain", "guided_temperature")))
def test_sampling_from_given_noise_in_float32(name):
    check_sampling("affine_class", name, "float32")


@pytest.mark.parametrize("case", rows(WITH_CLASSES, ("volume_class",)))
@pytest.mark.parametrize("labels", [None, [-1] * 4], ids=["none", "minus one"])
def test_unconditional_is_the_mean_class(case, labels, float64):
    published, (flow, variables, apply) = Published(case), ours(case, float64)
    images, _ = inputs(published, float64)
    labels = None if labels is None else jnp.asarray(labels, jnp.int32)
    z, logdet = apply(variables, images, labels, method="forward")
    check(published, "z_null", z, float64)
    check(published, "logdet_null", logdet / flow.config.num_dims, float64)


@pytest.mark.parametrize("case", rows(rw.CASES, ("affine",)))
def test_objective_and_tracked_variance(case):
    published, (flow, variables, _) = Published(case), ours(case, "float32")
    _, labels = inputs(published, "float32")
    batch = Batch(jnp.asarray(channels_last(rw.pixels(rw.CASES[case]))), labels)
    loss, _, *state = jax.jit(nll_objective(flow))(variables, batch, jax.random.key(0))
    assert_close(loss, published.output("loss"), LAYER)
    assert bool(state) == (flow.config.scale_parameterisation == "volume_preserving")
    for tracked in state:
        assert_close(tracked["prior"]["variance"], published.output("updated_var"), LAYER)


@pytest.mark.parametrize("case", rw.CASES)
def test_log_prob_is_the_published_loss_with_its_constant(case, float64):
    published, (flow, variables, apply) = Published(case), ours(case, float64)
    log_prob = apply(unit_prior(variables), *inputs(published, float64), method="log_prob")
    nats = -log_prob.mean() / flow.config.num_dims
    close(nats, published.output("loss") + 0.5 * np.log(2 * np.pi))


@pytest.mark.parametrize("case", rows(WITH_CLASSES, ("volume_class",)))
def test_gradient_of_the_loss_along_directions_in_parameter_space(case, float64):
    published, (flow, variables, _) = Published(case), ours(case, float64)
    images, labels = inputs(published, float64)
    shape = rw.CASES[case]

    def loss(params):
        z, logdet = flow.apply({**variables, "params": params}, images, labels, method="forward")
        return 0.5 * jnp.square(z).mean() - logdet.mean() / flow.config.num_dims

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    for name, expected in zip(("first", "second", "third"), published.output("slope"), strict=True):
        # A direction is a state dict like any other, so the importer lays it out as it does the weights.
        tangent = imported(shape, rw.state_dict(shape) | rw.direction(shape, name))[1]["params"]
        products = jax.tree.map(jnp.vdot, gradient, cast(tangent, float64))
        close(sum(jax.tree.leaves(products)), expected)


@pytest.mark.parametrize("case", rows(rw.CASES, ("affine", "volume_class")))
def test_score_denoising(case, float64):
    """The published step descends the loss at rate batch · dims · σ²; the tracked variance is not in it."""
    published, (flow, variables, _) = Published(case), ours(case, float64)
    denoise = jax.jit(functools.partial(density.tweedie_step, flow, noise_std=NOISE_STD))
    clean = denoise(unit_prior(variables), *inputs(published, float64))
    check(published, "denoised", np.moveaxis(clean, -1, 1), float64)
