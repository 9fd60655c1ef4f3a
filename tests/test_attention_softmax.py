"""Softmax attention in parts: the same numbers and gradients in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows
from tolerances import LAYER, assert_close

from flowgen import backend
from flowgen.attention import FrameWindow, KVCache, attend_kv_window, softmax_attention

N = 150
RANDOM = np.random.default_rng(0)
Q, K, V = (RANDOM.normal(size=(2, N, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
MASKS = {
    "none": None,
    "pairs": jnp.asarray(RANDOM.random((2, 4, N, N)) < 0.7),
    "keys": jnp.asarray(RANDOM.random((2, 1, 1, N)) < 0.7),
}


def cached(q, k, v):
    """The last queries of all behind a cache of the others, with room that is not used."""
    keys, values = (jnp.pad(x[:, :40].swapaxes(1, 2), ((0, 0), (0, 0), (0, N - 20), (0, 0))) for x in (k, v))
    out, cache = attend_kv_window(q[:, 40:], k[:, 40:], v[:, 40:], KVCache(keys, values), 40)
    return out, cache.keys


CASES = {
    **{f"mask {name}": lambda q, k, v, m=mask: softmax_attention(q, k, v, m) for name, mask in MASKS.items()},
    **{f"causal, {n}": lambda q, k, v, m=m: softmax_attention(q, k, v, m, is_causal=True) for n, m in MASKS.items()},
    "frames": FrameWindow(prefix=6, tokens=16, past_frames=2, lookahead_frames=1).attend,
    "cached": cached,
}


@pytest.mark.parametrize("case", rows(CASES, ("mask pairs", "causal, none", "causal, keys")))
def test_parts_change_neither_numbers_nor_gradients(case, monkeypatch):
    def both():
        def total(*qkv):
            out = CASES[case](*qkv)
            return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(out)), out

        (_, out), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(Q, K, V)
        return jax.tree.leaves((out, gradients))

    whole = both()
    monkeypatch.setattr(backend, "MAX_LOGITS", 2 * 4 * N * 7)  # seven queries at a time, which leaves a rest
    for part, expected in zip(both(), whole, strict=True):
        assert_close(part, expected, LAYER)


@pytest.mark.parametrize("case", ["causal, none", "frames", "cached"])
def test_memory_does_not_grow_with_the_square_of_the_tokens(case, monkeypatch):
    def bytes_of(tokens):
        def loss(q, k, v):
            if case == "cached":
                cache = KVCache(k.swapaxes(1, 2), v.swapaxes(1, 2))
                out, _ = attend_kv_window(q, k, v, cache, 0)
            elif case == "frames":
                out = FrameWindow(prefix=0, tokens=64, past_frames=2, lookahead_frames=1).attend(q, k, v)
            else:
                out = softmax_attention(q, k, v, is_causal=True)
            return out.sum()

        shape = jax.ShapeDtypeStruct((1, tokens, 1, 8), jnp.float32)
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
        return program.memory_analysis().temp_size_in_bytes

    monkeypatch.setattr(backend, "MAX_LOGITS", 1 << 14)
    assert bytes_of(4096) < 5 * bytes_of(1024)
