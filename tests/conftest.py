"""A hostile environment: four virtual devices, no silent broadcasting, no reused keys, warnings are errors."""

import os

# Before jax starts. NPROC enlarges the thread pool, without which collectives between virtual devices can hang.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture
def key():
    """A fresh root key."""
    return jax.random.key(0)
