"""NNX twins: the same parameters, the same results to the bit, trained by NNX's own transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows
from flax import nnx
from laws import case, drawn

import flowgen
from flowgen.decoding import sample
from flowgen.matching import MLPConfig
from flowgen.nnx import Twin
from flowgen.runs import flatten

ROWS = rows(("volume preserving", "classes", "starflow text"), rare=("classes", "starflow text"))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for leaf, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("name", ROWS)
def test_a_twin_is_its_flow_bitwise(name):
    flow, params, x, cond = case(name)
    twin = Twin(flow, params)
    assert_same(twin.params, params)
    for method in ("forward", "log_prob"):
        expected = jax.jit(lambda params, method=method: flow.apply(params, x, cond, method=method))(params)
        assert_same(nnx.jit(lambda twin, method=method: getattr(twin, method)(x, cond))(twin), expected)
    expected = sample(flow, params, jax.random.key(1), 4, cond, plan="sequential").x
    np.testing.assert_array_equal(twin.sample(jax.random.key(1), 4, cond, plan="sequential").x, expected)


def test_a_velocity_network_has_a_twin_that_nnx_trains():
    network = MLPConfig(dim=2, width=8, num_layers=1).build()
    params = jax.tree.map(jnp.asarray, drawn(flowgen.init, network, jax.random.key(0)))
    t, x = jnp.linspace(0, 1, 5), jnp.linspace(-1, 1, 10).reshape(5, 2)
    twin = Twin(network, params)
    np.testing.assert_array_equal(twin(t, x), network.apply(params, t, x))
    gradient = nnx.grad(lambda twin: (twin(t, x) ** 2).sum())(twin)
    expected = jax.grad(lambda params: (network.apply(params, t, x) ** 2).sum())(params)
    assert [leaf.shape for leaf in jax.tree.leaves(gradient)] == [leaf.shape for leaf in jax.tree.leaves(expected)]
    moved = Twin(network, jax.tree.map(lambda one, by: one - 0.1 * by, params, expected))
    assert flatten(moved.params).keys() == flatten(params).keys()


@pytest.mark.usefixtures("untyped")
def test_a_twin_needs_a_linen_module_and_its_variables():
    network = MLPConfig(dim=2, width=8, num_layers=1).build()
    for given in ((network, {}), (print, {"params": {}})):
        with pytest.raises(ValueError, match=r"pass both as flowgen.load returns them\.$"):
            Twin(*given)
