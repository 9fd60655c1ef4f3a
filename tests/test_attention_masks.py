"""Masks of pairs as Flax makes them: masks of tokens run at linear cost, and the others keep their meaning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows
from flax import linen as nn
from flax import nnx
from laws import drawn

import flowgen.attention as attention
from flowgen.attention import make_attention_fn

ROUNDING = 1e-5  # float32, relative to the largest value
HEADS = 2


def draw(n=12, batch=2, heads=HEADS):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(batch, n, heads, 4)), jnp.float32) for _ in range(3)]


def close(x, y):
    np.testing.assert_allclose(x, y, rtol=ROUNDING, atol=ROUNDING * max(1e-30, float(np.abs(y).max())))


def flax_masks(n):
    valid = jnp.asarray(np.arange(n)[None] < np.array([[n], [n - 3]]))
    causal = nn.make_causal_mask(jnp.ones((2, n)))
    return {
        "causal": (causal, jnp.ones((2, n), bool)),
        "padding of keys": (nn.make_attention_mask(jnp.ones((2, n)), valid), valid),
        "padding": (nn.make_attention_mask(valid, valid), valid),
        "padding and causal": (nn.combine_masks(causal, nn.make_attention_mask(valid, valid)), valid),
    }


CAUSAL_CASES = {"causal": True, "padding of keys": False, "padding": False, "padding and causal": True}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        (name, case)
        for name in ("nala", "pola", "inline", "retention", "softmax", "soft")
        for case, is_causal in CAUSAL_CASES.items()
        if not (name == "retention" and not is_causal) and not (name == "soft" and is_causal)
    ],
)
def test_masks_of_flax_are_masks_over_keys(name, case):
    n = 8
    mask, valid = flax_masks(n)[case]
    is_causal = CAUSAL_CASES[case]
    q, k, v = draw(n=n)
    expected = make_attention_fn(name, is_causal=is_causal)(q, k, v, mask=valid[:, None, None, :])
    seen = make_attention_fn(name, is_causal=is_causal)(q, k, v, mask=mask)
    by_promise = jax.jit(make_attention_fn(name, is_causal=is_causal, masks="keys"))(q, k, v, mask=mask)
    for b, length in enumerate((n, n - 3 if "padding" in case else n)):
        close(seen[b, :length], expected[b, :length])
        close(by_promise[b, :length], expected[b, :length])


@pytest.mark.parametrize("name", rows(["nala", "pola", "inline", "retention"], ("pola", "inline")))
@pytest.mark.parametrize("case", ["causal", "padding and causal"])
def test_masks_of_flax_are_the_same_inside_of_jit(name, case):
    n = 8
    mask, _ = flax_masks(n)[case]
    qkv = draw(n=n)
    attend = make_attention_fn(name, is_causal=True)
    expected = attend(*qkv, mask=mask)
    close(jax.jit(lambda q, k, v, mask: attend(q, k, v, mask=mask))(*qkv, mask), expected)
    close(jax.jit(lambda q, k, v: attend(q, k, v, mask=mask))(*qkv), expected)


@pytest.mark.parametrize("name", ["nala", "retention"])
def test_flaxs_layer_with_a_causal_mask_is_the_same_inside_of_jit(name):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 10, 8)), jnp.float32)
    module = nn.MultiHeadDotProductAttention(HEADS, attention_fn=make_attention_fn(name, is_causal=True))
    variables = drawn(module.init, jax.random.key(0), x)

    def apply(x):
        return module.apply(variables, x, mask=nn.make_causal_mask(x[..., 0]))

    close(jax.jit(apply)(x), apply(x))


@pytest.mark.parametrize("name", rows(["nala", "pola", "inline", "retention", "softmax"], ("pola", "inline")))
def test_a_mask_of_pairs_is_exported_with_a_symbolic_length(name, untyped):
    b, n = jax.export.symbolic_shape("b, n", constraints=["n >= 4"])
    shape = jax.ShapeDtypeStruct((b, n, HEADS, 4), jnp.float32)
    attend = make_attention_fn(name, is_causal=name == "retention")

    def call(q, k, v, mask):
        return attend(q, k, v, mask=mask)

    exported = jax.export.export(jax.jit(call))(shape, shape, shape, jax.ShapeDtypeStruct((b, 1, n, n), jnp.bool_))
    mask = jnp.asarray(np.random.default_rng(0).random((2, 1, 6, 6)) < 0.7)
    close(exported.call(*draw(n=6), mask), jax.jit(call)(*draw(n=6), mask))


@pytest.mark.parametrize("name", rows(["nala", "pola", "inline", "retention"], ("pola", "inline")))
def test_masks_of_flax_run_at_linear_cost(name):
    n = 5000  # whose square is more than the quadratic form may have
    q, k, v = draw(n=n, batch=1, heads=1)
    mask = nn.make_causal_mask(jnp.ones((1, n)))
    out = make_attention_fn(name, is_causal=True)(q, k, v, mask=mask)
    promised = make_attention_fn(name, is_causal=True, masks="keys")
    jitted = jax.jit(lambda q, k, v: promised(q, k, v, mask=nn.make_causal_mask(jnp.ones((1, n)))))
    close(jitted(q, k, v), out)
    with pytest.raises(ValueError, match=r"own_keys.*masks='keys'"):
        jax.jit(make_attention_fn(name, is_causal=True))(q, k, v, mask=mask)
    jaxpr = jax.make_jaxpr(lambda q, k, v, mask: promised(q, k, v, mask=mask))(q, k, v, mask[..., :n, :n])
    bools = [eqn.outvars[0].aval for eqn in jaxpr.eqns if eqn.outvars[0].aval.shape[-2:] == (n, n)]
    assert len(bools) <= 1  # `mask != 0`, which the compiler fuses into the reading of the diagonal


@pytest.mark.parametrize("mask", ["window", "holes"])
def test_other_masks_of_pairs_keep_their_meaning(mask):
    q, k, v = draw(n=8)
    near = np.abs(np.subtract.outer(np.arange(8), np.arange(8))) < 3
    pairs = near if mask == "window" else np.random.default_rng(0).random((8, 8)) < 0.7
    given = jnp.asarray(np.broadcast_to(pairs, (2, 1, 8, 8)))
    for options in ({}, {"is_causal": True}):
        seen = attention.nala_attention(q, k, v, given, **options)
        traced = jax.jit(lambda m, options=options: attention.nala_attention(q, k, v, m, **options))(given)
        close(seen, traced)


def test_retention_in_the_modules_of_flax():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 10, 8)), jnp.float32)
    fn = make_attention_fn("retention", is_causal=True)
    module = nn.MultiHeadDotProductAttention(HEADS, attention_fn=fn)
    variables = drawn(module.init, jax.random.key(0), x)
    close(module.apply(variables, x, mask=nn.make_causal_mask(x[..., 0])), module.apply(variables, x))
    one = module.apply(variables, x[:, :1], mask=nn.make_causal_mask(x[:, :1, 0]))
    close(one, module.apply(variables, x)[:, :1])
    decoder = nnx.MultiHeadAttention(HEADS, 8, attention_fn=fn, decode=True, rngs=nnx.Rngs(0))
    decoder.init_cache(x.shape)
    with pytest.raises(ValueError, match="retention cannot decode from Flax's cache"):
        decoder(x[:, :1])
