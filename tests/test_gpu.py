"""On an accelerator: its attention, densities, decoding and training agree with float32 and take part in a run.

python -m pytest -m gpu tests/test_gpu.py, with JAX_PLATFORMS set to the accelerator, such as cuda or tpu
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import NETWORK, assert_close

import flowgen
from flowgen.attention import softmax_attention
from flowgen.decoding import Jacobi, Sequential, invert

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("jax.default_backend() == 'cpu'", reason="there is no accelerator"),
]
BFLOAT16 = 2**-6  # a few roundings of 8 bits each
FLOW = flowgen.TARFlowConfig(
    image_size=16, channels=3, patch_size=2, width=128, num_blocks=2, layers_per_block=2, head_dim=64, num_classes=3
)


def perturbed(flow, key):
    params = flowgen.init(flow, key)
    return jax.tree.map(lambda leaf: leaf + 0.02 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)


@pytest.mark.parametrize("n", [63, 128, 1023])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_and_its_gradient(n, is_causal, key):
    q, k, v = jax.random.normal(key, (3, 2, n, 4, 64)).astype(jnp.bfloat16)

    def loss(q, k, v):
        return jnp.square(softmax_attention(q, k, v, is_causal=is_causal).astype(jnp.float32)).sum()

    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(jax.grad(loss, (0, 1, 2)))(*exact)
    for found, right in zip(jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v), expected, strict=True):
        assert_close(found.astype(jnp.float32), right, BFLOAT16)


@pytest.mark.parametrize("plan", [Sequential(), Jacobi(window=16, tol=0.0)])
def test_decoding_inverts(plan, key):
    flow = FLOW.build()
    params, labels = perturbed(flow, key), jnp.array([0, 2], jnp.int32)
    x = jax.random.uniform(jax.random.fold_in(key, 1), (2, *FLOW.image_shape), minval=-1, maxval=1)
    with jax.default_matmul_precision("highest"):
        z, _ = flow.apply(params, x, labels, method="forward")
        assert_close(invert(flow, params, z, labels, plan=plan).x, x, 10 * NETWORK)


def test_half_precision_density(key):
    flow, half = FLOW.build(), dataclasses.replace(FLOW, dtype="bfloat16").build()
    params = perturbed(flow, key)
    x = jax.random.uniform(jax.random.fold_in(key, 1), (4, *FLOW.image_shape), minval=-1, maxval=1)
    assert_close(
        half.apply(params, x, None, method="log_prob"), flow.apply(params, x, None, method="log_prob"), BFLOAT16
    )


def test_training(tmp_path):
    result = flowgen.fit(flowgen.load_config("tarflow_digits").debug(), tmp_path / "run")
    assert all(np.isfinite(value) for value in result.metrics.values())
