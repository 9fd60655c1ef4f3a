"""Sampling with parameters on a mesh or in pmap: the samples of one device, with weights made ready once."""

import contextlib
import gc
import weakref
from functools import cache

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tolerances import NETWORK, assert_close

from flowgen.decoding import sample
from flowgen.decoding.weights import decoding_weights

DEVICES, BATCH = 4, 8
LABELS = np.arange(BATCH) % 3
MESHES = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


@cache
def case():
    return laws.perturbed(laws.FLOWS["classes"], jax.random.key(0))


def draw(params, labels=LABELS):
    return sample(case()[0], params, jax.random.key(3), len(labels), labels, denoise=False).x


@cache
def samples():
    return np.asarray(draw(case()[1]))


def mesh_of(kind):
    return jax.make_mesh((DEVICES,), ("model",), axis_types=(MESHES[kind],), devices=jax.devices()[:DEVICES])


def divided(params, mesh):
    """Parameters whose last axis is divided over the mesh, where its length is a multiple of the number of devices."""

    def put(x):
        divides = x.ndim and x.shape[-1] % DEVICES == 0
        return jax.device_put(x, NamedSharding(mesh, P(*[None] * (x.ndim - 1), "model") if divides else P()))

    return jax.tree.map(put, params)


@pytest.mark.parametrize(
    ("kind", "is_context"),
    [
        pytest.param("automatic", False, marks=pytest.mark.slow),
        ("explicit", False),
        ("explicit", True),
        pytest.param("automatic", True, marks=pytest.mark.slow),
    ],
)
def test_divided_parameters_give_the_samples_of_one_device(kind, is_context, caplog):
    mesh = mesh_of(kind)
    params = divided(case()[1], mesh)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(params))
    with jax.set_mesh(mesh) if is_context else contextlib.nullcontext():
        first = draw(params)
        with jax.log_compiles():
            second = draw(params)
    assert not [record for record in caplog.records if "Compiling" in record.getMessage()]
    np.testing.assert_array_equal(first, second)
    assert_close(first, samples(), NETWORK)


@pytest.mark.parametrize("kind", MESHES)
def test_whole_parameters_may_be_used_under_a_mesh(kind):
    with jax.set_mesh(mesh_of(kind)):
        assert_close(draw(case()[1]), samples(), NETWORK)


@pytest.mark.slow
def test_each_device_of_pmap_draws_its_own_samples():
    labels = LABELS.reshape(DEVICES, -1)
    everywhere = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), case()[1])
    found = jax.pmap(draw, devices=jax.devices()[:DEVICES])(everywhere, labels)
    for x, own in zip(found, labels, strict=True):
        assert_close(x, draw(case()[1], own), NETWORK)


@pytest.mark.parametrize("kind", MESHES)
def test_divided_weights_are_kept_as_long_as_the_parameters_live(kind):
    flow, params = case()[0], divided(case()[1], mesh_of(kind))
    weights = jax.tree.leaves(decoding_weights(flow.config, params))
    again = jax.tree.leaves(decoding_weights(flow.config, params))
    assert all(x is y for x, y in zip(again, weights, strict=True))
    alive = [weakref.ref(x) for x in weights]
    del weights, again
    draw(params)
    gc.collect()
    assert all(ref() is not None for ref in alive)
    del params
    gc.collect()
    assert all(ref() is None for ref in alive)
