"""`make_attention_fn` inside Flax's own multi-head attention: what each module passes is honoured or refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows
from flax import linen as nn
from flax import nnx
from laws import drawn
from tolerances import LAYER, RIDGE, assert_close

import flowgen.attention as attention
from flowgen.attention import make_attention_fn

RNG = np.random.default_rng(0)
WIDTH, HEADS, TOKENS = 16, 4, 10
NAMES = [*attention.KERNELS, "softmax", "soft"]
ROUNDING = {name: RIDGE if name == "soft" else LAYER for name in NAMES}
FULL = [name for name in NAMES if name != "retention"]
CAUSAL = [name for name in NAMES if name != "soft"]
# What has a path of its own through the hook is kept: feature maps differ by a function.
ALIKE = ("relu", "squared_relu", "focused", "elu_plus_one")


@pytest.fixture(autouse=True)
def same_draws(monkeypatch):
    """Every test draws the same inputs, whichever tests ran before it."""
    monkeypatch.setitem(globals(), "RNG", np.random.default_rng(0))


def inputs(n=TOKENS, batch=2):
    return jnp.asarray(RNG.standard_normal((batch, n, WIDTH)), jnp.float32)


def qkv(n=TOKENS, m=TOKENS, groups=HEADS, leading=(2,)):
    shapes = (*leading, n, HEADS, 4), (*leading, m, groups, 4), (*leading, m, groups, 6)
    return [jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in shapes]


def linen(fn, **options):
    return nn.MultiHeadDotProductAttention(HEADS, attention_fn=fn, **options)


def nnx_module(fn, **options):
    options = {"decode": False, **options}
    return nnx.MultiHeadAttention(HEADS, WIDTH, attention_fn=fn, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("name", rows(CAUSAL, ALIKE))
def test_causal_in_linen_and_nnx_sees_no_future(name):
    fn, x = make_attention_fn(name, is_causal=True), inputs()
    module = linen(fn)
    variables = drawn(module.init, jax.random.key(0), x)
    for apply in (lambda y: module.apply(variables, y), nnx_module(fn)):
        gradient = jax.jit(jax.grad(lambda y, apply=apply: apply(y)[:, 4].sum()))(x)
        assert not gradient[:, 5:].any()
        assert gradient[:, :5].any()


@pytest.mark.parametrize("name", rows(FULL, ALIKE))
def test_a_padding_mask_is_exact(name):
    fn, x = make_attention_fn(name), inputs()
    valid = jnp.arange(TOKENS) < 7
    mask = nn.make_attention_mask(jnp.ones((2, TOKENS)), jnp.broadcast_to(valid[None], (2, TOKENS)))[:, :, :1]
    module = linen(fn)
    variables = drawn(module.init, jax.random.key(0), x)
    for apply in (partial(module.apply, variables), nnx_module(fn)):
        run = jax.jit(lambda x, apply=apply, **options: apply(x, **options))
        assert_close(run(x, mask=mask)[:, :7], run(x[:, :7]), ROUNDING[name])


@pytest.mark.parametrize("name", rows([name for name in FULL if name != "soft"], ALIKE))
def test_a_causal_mask_of_flax_equals_is_causal(name):
    x = inputs()
    mask = nn.make_causal_mask(jnp.ones((2, TOKENS)))
    module = linen(make_attention_fn(name))
    variables = drawn(module.init, jax.random.key(0), x)
    masked = module.apply(variables, x, mask=mask)
    causal = linen(make_attention_fn(name, is_causal=True)).apply(variables, x)
    assert_close(masked, causal, LAYER)


def test_nnx_passes_is_causal_and_grouped_keys():
    fn, x = make_attention_fn("nala"), inputs()
    grouped = nnx_module(fn, num_kv_heads=2)
    assert grouped(x).shape == x.shape
    gradient = jax.jit(jax.grad(lambda y: grouped(y, is_causal=True)[:, 4].sum()))(x)
    assert not gradient[:, 5:].any()
    assert gradient[:, :5].any()
    q, k, v = qkv(groups=2)
    for attend in (fn, make_attention_fn("softmax", is_causal=True)):
        repeated = attend(q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2))
        assert_close(attend(q, k, v), repeated, LAYER)


@pytest.mark.parametrize("name", ["nala", "elu_plus_one", "softmax", "inline"])
def test_decoding_from_flaxs_cache_equals_the_parallel_form(name):
    x = inputs()
    fn = make_attention_fn(name, is_causal=True)
    parallel = nnx_module(fn)
    decoder = nnx_module(fn, decode=True)
    nnx.update(decoder, nnx.state(parallel, nnx.Param))
    decoder.init_cache(x.shape)
    out = jnp.concatenate([decoder(x[:, t : t + 1]) for t in range(TOKENS)], axis=1)
    assert_close(out, parallel(x), LAYER)


def test_leading_axes_masks_and_bias():
    fn = make_attention_fn("elu_plus_one")
    q, k, v = qkv(m=7, leading=(2, 3))
    mask = jnp.asarray(RNG.random((2, 3, 1, 1, 7)) < 0.7)
    bias = jnp.asarray(RNG.standard_normal((2, 3, HEADS, 1, 7)), jnp.float32)
    out = fn(q, k, v, bias, mask)
    phi = attention.elu_plus_one()
    for index in np.ndindex(2, 3):
        features = phi(q[index][None], k[index][None])
        weights = jnp.einsum("bnhf,bmhf->bhnm", features.q, features.k) * jnp.exp(bias[index])[None]
        weights = jnp.where(mask[index][None], weights, 0)
        expected = jnp.einsum("bhnm,bmhd->bnhd", weights / (weights.sum(-1, keepdims=True) + 1e-6), v[index][None])
        assert_close(out[index], expected[0], LAYER)
    unbatched = fn(q[0, 0], k[0, 0], v[0, 0])
    assert_close(unbatched, fn(q, k, v)[0, 0], LAYER)


def test_dtype_is_the_one_asked_for():
    q, k, v = qkv()
    fn = make_attention_fn("nala")
    assert fn(q, k, v, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert fn(*(y.astype(jnp.bfloat16) for y in (q, k, v))).dtype == jnp.bfloat16
    module = linen(fn, dtype=jnp.bfloat16)
    assert module.init_with_output(jax.random.key(0), inputs())[0].dtype == jnp.bfloat16


REFUSED = {
    "dropout of weights": ({"dropout_rate": 0.1}, "nala", ["dropout_rate is 0.1", "set it to 0"]),
    "sown weights": ({"module": object()}, "nala", ["sow_weights", "turn it off"]),
    "a bias of pairs": (
        {"bias": jnp.zeros((1, 1, TOKENS, TOKENS))},
        "nala",
        ["(1, 1, 10, 10)", "supports only a bias"],
    ),
    "a bias elsewhere": ({"bias": jnp.zeros((1, 1, 1, TOKENS))}, "pola", ["(1, 1, 1, 10)", "'pola'"]),
    "a mask that does not fit": ({"mask": jnp.ones((1, 1, 3, TOKENS))}, "nala", ["(1, 1, 3, 10)", "(2, 4, 10, 10)"]),
    "causal SOFT": ({"is_causal": True}, "soft", ["cannot be causal", "gaussian_landmark_attention"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_kept_is_refused(what):
    options, name, parts = REFUSED[what]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make_attention_fn(name)(*qkv(), **options)
    for part in parts:
        assert part in str(error.value)


def test_dropout_is_refused_through_the_modules_and_allowed_where_deterministic():
    x = inputs()
    module = linen(make_attention_fn("nala"), dropout_rate=0.1)
    variables = module.init(jax.random.key(0), x, deterministic=True)
    module.apply(variables, x, deterministic=True)
    with pytest.raises(ValueError, match=r"dropout_rate is 0\.1"):
        module.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(1)})
    with pytest.raises(ValueError, match="is_causal needs as many queries as keys, but q"):
        make_attention_fn("nala", is_causal=True)(*qkv(n=5))
    with pytest.raises(ValueError, match="attention 'nalaa' is unknown; choose one of softmax"):
        make_attention_fn("nalaa")


def test_positions_do_not_decode_from_flaxs_cache():
    fn = make_attention_fn(attention.cosformer_features(TOKENS), is_causal=True)
    decoder = nnx_module(fn, decode=True)
    x = inputs()
    decoder.init_cache(x.shape)
    with pytest.raises(ValueError, match="a feature map with positions cannot decode"):
        decoder(x[:, :1])


def test_a_bias_of_keys_shifts_nothing_and_does_not_overflow():
    fn = make_attention_fn("elu_plus_one")
    q, k, v = qkv()
    bias = jnp.zeros((1, 1, 1, TOKENS)).at[..., 3].set(300.0)
    assert_close(fn(q, k, v, bias), jnp.broadcast_to(v[:, 3:4], (2, TOKENS, HEADS, 6)), LAYER)
    assert_close(fn(q, k, v, jnp.full_like(bias, -120.0)), fn(q, k, v), LAYER)


def test_block_causal_reaches_the_kernel(untyped):
    x = inputs()
    fn = make_attention_fn("nala", is_causal=attention.Causal(block_size=5))
    gradient = jax.grad(lambda y: nnx_module(fn)(y)[:, 1].sum())(x)
    assert gradient[:, 2:5].any()
    assert not gradient[:, 5:].any()
    with pytest.raises(ValueError, match="softmax_attention accepts only True or False"):
        make_attention_fn("softmax", is_causal=attention.Causal(block_size=5))(*qkv())
