"""What is chosen by device: the same numbers everywhere, by the library where there is no reason against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import LAYER, assert_close

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


def test_nan_survives_an_exponential():
    x = jnp.linspace(-1, 1, 5)
    out = jax.jit(lambda x: jnp.exp(x + backend.nan_if(x > 0, x.dtype)))(x)
    assert np.isnan(out).tolist() == [False, False, False, True, True]


def test_the_host_is_called_sample_after_sample():
    out = jax.ShapeDtypeStruct((3,), jnp.int32)
    order = jax.jit(jax.vmap(lambda x: backend.call_host(lambda x: np.argsort(np.asarray(x)).astype(np.int32), out, x)))
    assert order(jnp.array([[3.0, 1, 2], [0, 2, 1]])).tolist() == [[1, 2, 0], [0, 2, 1]]
