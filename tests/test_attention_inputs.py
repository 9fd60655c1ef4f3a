"""What attention is given: odd sizes and types, padded prompts, packed segments, pickles, options."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows

import flowgen.attention as attention
from flowgen.attention import KERNELS, Causal, FeatureMap, make_attention_fn

ROUNDING = 1e-5  # float32, relative to the largest value
HEADS, WIDTH = 2, 4
FEATURES = {
    "elu_plus_one": attention.elu_plus_one(),
    "rotary": attention.nala_features(rotary=attention.rotary_line(40, WIDTH)),
    "cosformer": attention.cosformer_features(40),
}


def draw(n=12, batch=2, seed=0, heads=HEADS):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(batch, n, heads, WIDTH)), jnp.float32) for _ in range(3)]


def close(x, y, message=""):
    np.testing.assert_allclose(x, y, rtol=ROUNDING, atol=ROUNDING * max(1e-30, float(np.abs(y).max())), err_msg=message)


def gates(q, seed=3):
    rng = np.random.default_rng(seed)
    return -jnp.asarray(rng.uniform(0.1, 1, size=q.shape[:3]), jnp.float32)


# Attention of tokens behind a state: (q, k, v, gate, state, mask) -> (out, state).
STATEFUL = {
    **{
        name: lambda q, k, v, g, state, mask, kernel=kernel: kernel.prefill(q, k, v, state=state, mask=mask)
        for name, kernel in KERNELS.items()
    },
    **{
        name: lambda q, k, v, g, state, mask, phi=phi: attention.prefill(q, k, v, phi, state=state, mask=mask)
        for name, phi in FEATURES.items()
    },
    "simple GLA": lambda q, k, v, g, state, mask: attention.gated_linear_attention(q, k, v, g, state=state, mask=mask),
    "gated delta": lambda q, k, v, g, state, mask: attention.gated_delta_rule(
        q, k, v, jnp.exp(g), g, state=state, mask=mask
    ),
}


@pytest.mark.parametrize("side", rows(["left", "right"], ("right",)))
@pytest.mark.parametrize("name", rows(STATEFUL, set(STATEFUL) - {"nala", "retention", "gated delta"}))
def test_a_padded_prompt_is_the_prompt_alone_and_so_are_the_tokens_behind_it(name, side):
    q, k, v = draw()
    g, lengths = gates(q), (9, 5)
    prompts = [slice(9 - length, 9) if side == "left" else slice(0, length) for length in lengths]
    mask = np.zeros((2, 1, 1, 9), bool)
    for b, prompt in enumerate(prompts):
        mask[b, ..., prompt] = True

    @jax.jit
    def run(*tokens):
        keep = jnp.asarray(mask)[:, 0, 0, :, None, None]
        query, *dirty = (x[:, :9] for x in tokens)
        dirty = [jnp.where(keep if x.ndim == 4 else keep[..., 0], x, jnp.nan) for x in dirty]
        out, state = STATEFUL[name](query, *dirty, None, jnp.asarray(mask))
        after, _ = STATEFUL[name](*(x[:, 9:] for x in tokens), state, None)
        pairs = []
        for b, prompt in enumerate(prompts):
            alone, alone_state = STATEFUL[name](*(x[b : b + 1, prompt] for x in tokens), None, None)
            after_it, _ = STATEFUL[name](*(x[b : b + 1, 9:] for x in tokens), alone_state, None)
            pairs += [(out[b : b + 1, prompt], alone), (after[b : b + 1], after_it)]
        return pairs

    for together, alone in run(q, k, v, g):
        close(together, alone)


@pytest.mark.slow
@pytest.mark.parametrize("rotary", [True, False])
def test_a_padded_prompt_in_the_nala_layer(rotary):
    layer = attention.NaLaAttention(8, HEADS, is_causal=True, rotary=rotary)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 8)), jnp.float32)
    variables = layer.init(jax.random.key(0), x)
    mask = jnp.arange(9)[None, None, None] < jnp.asarray([9, 5])[:, None, None, None]
    _, state = layer.apply(variables, x[:, :9], mask=mask, method="prefill")
    after, _ = layer.apply(variables, x[:, 9:], state, method="prefill")
    _, alone = layer.apply(variables, x[1:, :5], method="prefill")
    close(after[1:], layer.apply(variables, x[1:, 9:], alone, method="prefill")[0])


def test_a_masked_token_of_simple_gla_changes_nothing_anywhere():
    q, k, v = draw(n=70)
    g = gates(q)
    keep = np.random.default_rng(1).random(70) < 0.6
    mask = jnp.asarray(keep)[None, None, None]
    dirty = [jnp.where(jnp.asarray(keep)[None, :, None, None], x, jnp.nan) for x in (k, v)]
    spoiled_gate = jnp.where(jnp.asarray(keep)[None, :, None], g, jnp.nan)
    out, state = attention.gated_linear_attention(q, *dirty, spoiled_gate, mask=jnp.broadcast_to(mask, (2, 1, 1, 70)))
    alone, alone_state = attention.gated_linear_attention(*(x[:, keep] for x in (q, k, v, g)))
    close(out[:, keep], alone)
    close(state.kv, alone_state.kv)


PACKED = {
    **{
        f"{name}, {form}": (name, options)
        for name in KERNELS
        for form, options in {
            "causal": {"is_causal": Causal(chunk_size=4)},
            "blocks": {"is_causal": Causal(block_size=2, chunk_size=4)},
            "full": {},
        }.items()
        if name != "retention" or form == "causal"
    },
}


@pytest.mark.parametrize("bad", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", rows(PACKED, [name for name in PACKED if not name.startswith(("nala", "retention"))]))
def test_what_is_not_finite_stays_in_its_segment(name, bad):
    kernel, options = PACKED[name]
    q, k, v = draw()
    ids = jnp.asarray(np.tile([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 3, 3], (2, 1)))
    other = np.r_[0:3, 8:12]

    def attend(*arrays):
        return KERNELS[kernel].attend(*arrays, segment_ids=ids, **options)

    @jax.jit
    def both(*arrays):
        return attend(*arrays), jax.grad(lambda *x: attend(*x)[0, other].sum(), argnums=(0, 1, 2))(*arrays)

    clean, _ = both(q, k, v)
    for spoil in range(3):
        arrays = [x.at[0, 5].set(bad) if i == spoil else x for i, x in enumerate((q, k, v))]
        out, gradients = both(*arrays)
        close(out[1], clean[1])
        close(out[0, other], clean[0, other])
        assert all(jnp.isfinite(x[0, other]).all() for x in gradients)
        if spoil == 2:  # a feature map may make a finite number of one that is not
            assert jnp.isnan(out[0, 5]).all()


def test_a_bad_number_in_the_state_or_in_the_last_segment_is_told():
    q, k, v = draw()
    ids = jnp.asarray(np.tile([0] * 6 + [1] * 6, (2, 1)))
    g = gates(q)
    _, state = attention.retention(q, k, v.at[0, 8].set(jnp.nan), segment_ids=ids)
    assert jnp.isnan(state.kv[0]).all()
    assert jnp.isfinite(state.kv[1]).all()
    out, after = attention.gated_linear_attention(q, k, v, g, state=state, segment_ids=ids)
    assert jnp.isnan(out[0, :6]).all()
    assert jnp.isfinite(out[0, 6:]).all()
    assert jnp.isfinite(after.kv).all()


@pytest.mark.parametrize("n", [12, 150])  # in one chunk, and in several
def test_segment_ids_that_come_back_are_refused_or_nan(n):
    q, k, v = draw(n=n)
    ids = np.tile(np.arange(n) // 4, (2, 1))
    ids[1, -2:] = 0
    for causal in (True, False):
        with pytest.raises(ValueError, match="segment_ids recur"):
            attention.linear_attention(q, k, v, is_causal=causal, segment_ids=jnp.asarray(ids))
        run = jax.jit(lambda ids, causal=causal: attention.linear_attention(q, k, v, is_causal=causal, segment_ids=ids))
        out = run(jnp.asarray(ids))
        assert jnp.isnan(out[1]).all()
        assert jnp.isfinite(out[0]).all()
    with pytest.raises(ValueError, match="segment_ids recur"):
        attention.gated_linear_attention(q, k, v, gates(q), segment_ids=jnp.asarray(ids))


def delta_recurrence(q, k, v, beta, scale):
    """The delta rule as it is written, token by token, with q and k as they are."""
    out, state = np.zeros(v.shape), np.zeros((*v.shape[:1], *v.shape[2:3], k.shape[-1], v.shape[-1]))
    for t in range(q.shape[1]):
        recalled = np.einsum("bhkd,bhk->bhd", state, k[:, t])
        state += beta[:, t, :, None, None] * np.einsum("bhk,bhd->bhkd", k[:, t], v[:, t] - recalled)
        out[:, t] = scale * np.einsum("bhkd,bhk->bhd", state, q[:, t])
    return out


def test_the_delta_rule_with_keys_as_they_are_and_a_scale(x64):
    q, k, v = (0.3 * np.float64(x) for x in draw(n=9))
    beta = np.random.default_rng(5).uniform(0.1, 0.9, size=q.shape[:3])
    arrays = [jnp.asarray(x) for x in (q, k, v, beta)]
    out, state = attention.delta_rule(*arrays, use_qk_l2norm=False, scale=0.7, chunk_size=4)
    np.testing.assert_allclose(out, delta_recurrence(q, k, v, beta, 0.7), rtol=1e-12, atol=1e-12)
    out, _ = attention.delta_rule(*arrays, use_qk_l2norm=False)
    np.testing.assert_allclose(out, delta_recurrence(q, k, v, beta, WIDTH**-0.5), rtol=1e-12, atol=1e-12)
    steps = attention.init_delta_state(2, HEADS, WIDTH, WIDTH, dtype=jnp.float64)
    for t in range(9):
        _, steps = attention.gated_delta_step(steps, *(x[:, t] for x in arrays), use_qk_l2norm=False, scale=0.7)
    np.testing.assert_allclose(steps.kv, state.kv, rtol=1e-12, atol=1e-12)
    unit = [x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k)]
    default, _ = attention.delta_rule(*arrays)
    np.testing.assert_allclose(default, delta_recurrence(*unit, v, beta, WIDTH**-0.5), rtol=1e-12, atol=1e-12)


def test_states_of_float64_decode_in_a_scan(x64):
    q, k, v = (x.astype(jnp.float64) for x in draw(n=6))
    beta = jnp.exp(gates(q)).astype(jnp.float64)
    whole, _ = attention.delta_rule(q, k, v, beta)

    def step(state, token):
        out, state = attention.gated_delta_step(state, *token)
        return state, out

    start = attention.init_delta_state(2, HEADS, WIDTH, WIDTH, dtype=jnp.float64)
    _, steps = jax.lax.scan(step, start, tuple(x.swapaxes(0, 1) for x in (q, k, v, beta)))
    np.testing.assert_allclose(steps.swapaxes(0, 1), whole, rtol=1e-12, atol=1e-12)
    assert attention.init_delta_state(1, 1, 1, 1, dtype=jnp.bfloat16).kv.dtype == jnp.float32


def test_named_functions_reach_the_released_layers(x64):
    q, k, v = (x.astype(jnp.float64) for x in draw())
    m = k.shape[1]

    def average(weights, v, eps):
        total = weights.sum(-1, keepdims=True) + eps
        return np.einsum("bhnm,bmhd->bnhd", weights / np.where(total == 0, 1, total), v)

    def focused(x):  # FLatten: both norms over all heads
        y = np.maximum(x, 0) + 1e-6
        joint = [np.sqrt((z**2).sum((-2, -1), keepdims=True)) for z in (y, y**3)]
        return y**3 * joint[0] / joint[1]

    weights = np.einsum("bnhk,bmhk->bhnm", focused(np.asarray(q)), focused(np.asarray(k)))
    out = attention.focused_attention(q, k, v, joint_heads=True, eps=1e-6)
    np.testing.assert_allclose(out, average(weights, v, 1e-6), rtol=1e-7, atol=1e-9)
    signs = [np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)], -1) ** 3 for x in (q, k, -q)]
    same, opposite = (np.einsum("bnhk,bmhk->bhnm", x, signs[1]) for x in (signs[0], signs[2]))
    halves = [average(w, x, m * 1e-6) for w, x in zip((same, opposite), np.split(np.asarray(v), 2, -1), strict=True)]
    np.testing.assert_allclose(attention.pola_attention(q, k, v, eps=m * 1e-6), np.concatenate(halves, -1), rtol=1e-9)
    angle = np.pi / 2 / m * np.subtract.outer(np.arange(m), np.arange(m))
    weights = np.einsum("bnhk,bmhk->bhnm", *(np.maximum(x, 0) for x in (q, k))) * np.cos(angle)
    out = attention.cosformer_attention(q, k, v, max_length=m, eps=0.0)
    np.testing.assert_allclose(out, average(weights, v, 0), rtol=1e-9, atol=1e-12)
    direct = attention.linear_attention(q, k, v, "nala", eps=m * 1e-6)
    np.testing.assert_allclose(attention.nala_attention(q, k, v, eps=m * 1e-6), direct, rtol=1e-12)


FUNCTIONS = {
    **{name: lambda q, k, v, kernel=kernel: kernel.attend(q, k, v, is_causal=True) for name, kernel in KERNELS.items()},
    "full": attention.linear_attention,
    "packed": lambda q, k, v: attention.linear_attention(q, k, v, segment_ids=jnp.zeros(q.shape[:2], int)),
    "prefill": lambda q, k, v: attention.prefill(q, k, v)[0],
    "cosformer": lambda q, k, v: attention.cosformer_attention(q, k, v, max_length=9),
    "landmarks": lambda q, k, v: attention.gaussian_landmark_attention(q, k, v, jnp.ones((HEADS, 3, WIDTH))),
    "landmarks, whitened": lambda q, k, v: attention.gaussian_landmark_attention(
        q, k, v, jnp.ones((HEADS, 3, WIDTH)), whiten=True
    ),
    "delta": lambda q, k, v: attention.delta_rule(q, k, v, jnp.ones(q.shape[:3]))[0],
    "simple GLA": lambda q, k, v: attention.gated_linear_attention(q, k, v, jnp.zeros(q.shape[:3]))[0],
    "soft": attention.soft_attention,
    "soft on a grid": lambda q, k, v: attention.soft_attention(q, k, v, grid=(1, k.shape[1])),
    "soft rows": lambda q, k, v: attention.soft_attention(q, k, v, normalize="row", solver="cholesky"),
    "softmax": attention.softmax_attention,
    "softmax causal": lambda q, k, v: attention.softmax_attention(q, k, v, is_causal=True),
    "hook": make_attention_fn("nala"),
}


@pytest.mark.parametrize(("batch", "n"), [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_in_is_nothing_out(name, batch, n):
    q, k, v = draw(n=n, batch=batch)
    assert FUNCTIONS[name](q, k, v).shape == q.shape


@pytest.mark.parametrize("name", ["full", "soft", "softmax", "hook", "landmarks"])
def test_queries_without_any_key_get_zero(name):
    q, k, v = draw(n=5)
    out = FUNCTIONS[name](q, k[:, :0], v[:, :0])
    assert out.shape == q.shape
    assert not out.any()


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.complex64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_numbers_than_floats_are_refused(name, dtype, untyped):
    q, k, v = draw(n=4)
    for i, argument in enumerate("qkv"):
        arrays = [x.astype(dtype) if i == j else x for j, x in enumerate((q, k, v))]
        if name == "hook":
            arrays = [x.astype(dtype) for x in (q, k, v)]
        with pytest.raises(ValueError, match=f"{'q' if name == 'hook' else argument} has dtype {jnp.dtype(dtype)}"):
            FUNCTIONS[name](*arrays)


def test_steps_frames_and_gates_take_floats_alone(untyped):
    q, k, v = draw(n=4)
    ints = q.astype(jnp.int32)
    state = attention.init_delta_state(2, HEADS, WIDTH, WIDTH)
    calls = [
        lambda: attention.gated_delta_step(state, ints[:, 0], k[:, 0], v[:, 0], v[:, 0, :, 0]),
        lambda: attention.delta_rule(q, k, v, ints[..., 0]),
        lambda: attention.gated_linear_attention(q, k, v, ints[..., 0]),
        lambda: attention.FrameWindow(0, 2, 0, 0).attend(ints, k, v),
        lambda: attention.attend_kv_window(ints, k, v, attention.init_kv_cache(2, 4, HEADS, WIDTH, jnp.float32), 0),
        lambda: attention.gaussian_landmark_attention(q, k, v, jnp.ones((HEADS, 3, WIDTH), jnp.int32)),
        lambda: attention.step(attention.init_state(2, HEADS, WIDTH, WIDTH), ints[:, 0], k[:, 0], v[:, 0]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="dtype int32"):
            call()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: make_attention_fn(3), "3"),
        (lambda: make_attention_fn(None), "None"),
        (lambda: make_attention_fn("nala", masks="both"), "'both'"),
        (lambda: attention.kernel(3), "3"),
        (lambda: attention.linear_attention(*draw(), features=3), "3"),
        (lambda: FeatureMap(jax.nn.relu, jax.nn.relu), "query"),
        (lambda: FeatureMap(lambda x, positions: x, lambda x: x), "key"),
        (lambda: attention.own_keys(jnp.ones((1, 1, 3, 4), bool)), r"\(1, 1, 3, 4\)"),
    ],
)
def test_what_is_no_kernel_is_refused_by_name(call, named, untyped):
    with pytest.raises(ValueError, match=named):
        call()


def held(name):
    return {
        "hook": make_attention_fn("nala"),
        "causal hook": make_attention_fn("pola", is_causal=Causal(chunk_size=4)),
        "softmax hook": make_attention_fn("softmax"),
        "features": make_attention_fn(attention.focused_features(2.0, joint_heads=True)),
        "rotary": attention.kernel(attention.nala_features(rotary=attention.rotary_grid(3, 4, WIDTH))),
        "cosformer": attention.cosformer_features(12),
        "inline": attention.InlineKernel(scale=0.3),
        **KERNELS,
    }[name]


HELD = [*("hook", "causal hook", "softmax hook", "features", "rotary", "cosformer", "inline"), *KERNELS]


@pytest.mark.parametrize("name", HELD)
def test_kernels_and_attention_functions_pickle_and_compare(name):
    first, copy = held(name), pickle.loads(pickle.dumps(held(name)))
    assert first == held(name) == copy
    assert hash(first) == hash(held(name)) == hash(copy)
    assert first != held("hook" if name != "hook" else "features")


@pytest.mark.parametrize("name", ["nala", "softmax"])
def test_kernels_of_decoders_pickle(name):
    q, k, v = draw()
    copy = pickle.loads(pickle.dumps(attention.causal_kernel(name)))
    close(copy.attend(q, k, v), attention.causal_kernel(name).attend(q, k, v))


def test_a_pickled_attention_function_computes_the_same_and_parameters_make_it_another():
    q, k, v = draw()
    fn = make_attention_fn(attention.nala_features(jnp.asarray([2.0, 3.0])), is_causal=True)
    copy = pickle.loads(pickle.dumps(fn))
    close(copy(q, k, v), fn(q, k, v))
    assert fn != make_attention_fn(attention.nala_features(jnp.asarray([2.0, 3.0])), is_causal=True)
    assert attention.nala_features(2.0) != attention.nala_features(3.0)


@pytest.mark.parametrize("ridge", rows([0.05, 0.3, 2.0], (0.3,)))
def test_newton_converges_for_any_ridge(ridge):
    q, _, v = draw(n=6)
    options = {"num_landmarks": 2, "ridge": ridge}
    out, exact = (attention.soft_attention(3 * q, 3 * q, v, solver=s, **options) for s in ("newton", "cholesky"))
    close(out, exact)
