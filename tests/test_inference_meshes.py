"""Inference with samples that are divided over a mesh with explicit axes: the numbers of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tolerances import LAYER, assert_close

from flowgen import inference
from flowgen.inference import MALA, ManyWell

ROWS = 8
WELL = ManyWell(2)
X = jax.random.normal(jax.random.key(0), (ROWS, 2))
LOG_WEIGHT = jnp.linspace(-2, 2, ROWS)


def normal(x):
    return -0.5 * jnp.square(x).sum(axis=1)


def key():
    return jax.random.key(3)


def annealed(log_q, **options):
    def call(x, _):
        return inference.anneal(key(), x, log_q, WELL.log_density, MALA(0.05), betas=np.linspace(0, 1, 3), **options)

    return call


def adaptive(x, _):
    return inference.anneal_adaptively(key(), x, WELL.log_density, WELL.log_density, MALA(0.05), max_stages=3)


# Calls of samples and log weights.
CALLS = {
    "ManyWell": lambda x, _: WELL.log_density(x),
    "tempered": lambda x, _: inference.tempered(normal, WELL.log_density, 0.5)(x),
    "resample": lambda x, w: inference.resample(key(), {"x": x, "w": w}, w),
    "resample to another number": lambda x, w: inference.resample(key(), x, w, 5),
    "self_normalised": inference.self_normalised,
    "log_normaliser": lambda _, w: inference.log_normaliser(w),
    "MALA": lambda x, _: MALA(0.05, num_steps=2)(key(), x, WELL.log_density),
    "anneal": annealed(WELL.log_density, resample_below=1.0),
    "anneal from a function": annealed(normal),
    "anneal_adaptively": adaptive,
}
# Annealing compiles for long; outside jit, it is one program for objects of flowgen, and several for other functions.
SLOW = ("anneal from a function", "anneal_adaptively")
SHOWN = [(name, name not in ("resample", "anneal")) for name in CALLS if name not in SLOW]


@pytest.mark.parametrize(
    ("name", "jitted"),
    [
        pytest.param(name, jitted, marks=[] if (name, jitted) in SHOWN else [pytest.mark.slow])
        for name in CALLS
        for jitted in (False, True)
    ],
)
def test_explicit_axes_give_the_numbers_of_one_device(name, jitted):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    divided = jax.device_put((X, LOG_WEIGHT), NamedSharding(mesh, PartitionSpec("data")))
    call = jax.jit(CALLS[name]) if jitted else CALLS[name]
    expected = jax.tree.leaves(call(X, LOG_WEIGHT))

    def check():
        for x, y in zip(jax.tree.leaves(call(*divided)), expected, strict=True):
            assert_close(x, y, LAYER)
            if y.shape[:1] == (ROWS,):
                assert jax.typeof(x).sharding.spec[0] == "data"

    check()
    if jitted:
        with jax.set_mesh(mesh):
            check()
