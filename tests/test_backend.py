"""What is chosen by device: the same numbers everywhere, by the library where there is no reason against it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from tolerances import FORMULA, LAYER, assert_close

from flowgen import backend

RANDOM = np.random.default_rng(0)
SQUARE = RANDOM.normal(size=(2, 3, 9, 9)).astype(np.float32)
POSITIVE = SQUARE @ SQUARE.swapaxes(-1, -2) + np.eye(9, dtype=np.float32)


def library_calls(fn, x, platform):
    """Whether the program for a platform, which need not be here, calls a factorisation or a solver."""
    text = jax.jit(fn).trace(x).lower(lowering_platforms=(platform,)).as_text()
    return any(call in text for call in ("stablehlo.cholesky", "stablehlo.triangular_solve", "stablehlo.custom_call"))


LOWER = np.tril(SQUARE, -1)
FACTORS = {
    "cholesky": (backend.cholesky, POSITIVE, np.linalg.cholesky(POSITIVE)),
    "triangular_solve": (backend.unit_lower_inverse, LOWER, np.linalg.inv(np.eye(9) + LOWER)),
}


@pytest.mark.parametrize("name", FACTORS)
def test_matrices_are_factored_by_the_library_everywhere_but_on_cpus(name):
    fn, x, exact = FACTORS[name]
    assert_close(jax.jit(fn)(x), exact, LAYER)
    called = {platform: library_calls(fn, x, platform) for platform in ("tpu", "cuda", "cpu")}
    assert called == {"tpu": True, "cuda": True, "cpu": False}


@pytest.mark.parametrize("check_vma", [True, False])
def test_gelu_has_the_derivatives_of_its_formula_in_mapped_programs_too(check_vma):
    """d/dx x Φ(x) = Φ(x) + x φ(x), and d²/dx² = (2 - x²) φ(x), with the density φ of the normal distribution."""
    slope = jax.vmap(jax.grad(backend.gelu))
    curvature = jax.vmap(jax.grad(jax.grad(backend.gelu)))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    part = PartitionSpec("data")
    mapped = jax.shard_map(
        lambda x: (slope(x), curvature(x)), mesh=mesh, in_specs=part, out_specs=part, check_vma=check_vma
    )
    x = np.linspace(-3, 3, 16, dtype=np.float32)
    first, second = jax.jit(mapped)(x)
    density = np.exp(-np.square(x) / 2) / math.sqrt(2 * math.pi)
    distribution = np.array([(1 + math.erf(value / math.sqrt(2))) / 2 for value in x])
    assert_close(first, distribution + x * density, FORMULA)
    assert_close(second, (2 - np.square(x)) * density, FORMULA)


def test_nan_survives_an_exponential():
    x = jnp.linspace(-1, 1, 5)
    out = jax.jit(lambda x: jnp.exp(x + backend.nan_if(x > 0, x.dtype)))(x)
    assert np.isnan(out).tolist() == [False, False, False, True, True]


def test_the_host_is_called_sample_after_sample():
    out = jax.ShapeDtypeStruct((3,), jnp.int32)
    order = jax.jit(jax.vmap(lambda x: backend.call_host(lambda x: np.argsort(np.asarray(x)).astype(np.int32), out, x)))
    assert order(jnp.array([[3.0, 1, 2], [0, 2, 1]])).tolist() == [[1, 2, 0], [0, 2, 1]]
