"""The Pallas kernel in interpret mode against the scan over chunks, and its lowering for TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import LAYER, NETWORK, assert_close

from flowgen import backend
from flowgen.attention import Causal, linear_attention, nala_features, rotary_line

RNG = np.random.default_rng(0)
PALLAS = Causal(implementation="pallas")


def qkv(n, heads=2, groups=2):
    shapes = (1, n, heads, 8), (1, n, groups, 8), (1, n, groups, 6)
    return [jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(("n", "groups"), [(1, 2), pytest.param(64, 2, marks=pytest.mark.slow), (150, 1)])
@pytest.mark.parametrize("features", ["elu_plus_one", nala_features(rotary=rotary_line(150, 8))], ids=["elu", "rotary"])
def test_it_is_the_scan_over_chunks(n, groups, features, monkeypatch):
    monkeypatch.setattr(backend, "interpret_kernels", lambda: True)
    q, k, v = qkv(n, groups=groups)
    mask = jnp.arange(n)[None, None, None] != 3

    def loss(implementation):
        def value(q, k, v):
            out = linear_attention(q, k, v, features, mask=mask, is_causal=implementation)
            return (out**2).sum(), out

        (_, out), gradient = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return out, *gradient

    (out, *gradients), (expected, *slopes) = loss(PALLAS), loss(True)
    assert_close(out, expected, LAYER)
    # Of few tokens the weights hardly change with q and k, and terms as large as the gradient of v cancel.
    scale = max(float(jnp.abs(slope).max()) for slope in slopes)
    for ours, slope in zip(gradients, slopes, strict=True):
        assert_close(ours, slope, NETWORK, scale=scale)


@pytest.mark.parametrize(("platform", "kernels"), [("tpu", 1), ("cuda", 0)])
def test_only_tpus_run_the_kernel(platform, kernels):
    def causal(q, k, v):
        return linear_attention(q, k, v, is_causal=PALLAS)

    program = jax.jit(causal).trace(*qkv(300)).lower(lowering_platforms=(platform,)).as_text()
    assert program.count("tpu_custom_call") == kernels
    assert "triton" not in program


def test_what_it_cannot_do_is_refused():
    q, k, v = qkv(8)
    with pytest.raises(ValueError, match="neither blocks nor segments"):
        linear_attention(q, k, v, is_causal=Causal(implementation="pallas", block_size=2))
    with pytest.raises(ValueError, match="neither blocks nor segments"):
        linear_attention(q, k, v, is_causal=PALLAS, segment_ids=jnp.zeros((1, 8), jnp.int32))
    with pytest.raises(ValueError, match="chunk_size is 24, but the Pallas kernel needs a power of two"):
        linear_attention(q, k, v, is_causal=Causal(implementation="pallas", chunk_size=24))
