"""A hostile environment: four virtual devices, no silent broadcasting, no reused keys, warnings are errors."""

import os

# Before jax starts. NPROC enlarges the thread pool, without which collectives between virtual devices can hang.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs here are small and compiled once: compiling fast matters, running fast does not.
_FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture
def key():
    """A fresh root key."""
    return jax.random.key(0)


@pytest.fixture
def untyped(monkeypatch):
    """Calls arrive as a user's do, without the type checker that the tests put in front."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def x64():
    """64-bit arrays for the duration of a test."""
    with jax.enable_x64(True):
        yield
