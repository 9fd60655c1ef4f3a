"""The delta rule: chunks against an independent recurrence, recorded values, causality, padding, extreme gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import FORMULA, LAYER, assert_close

from flowgen.attention.delta import DeltaState, delta_rule, gated_delta_rule, gated_delta_step, init_delta_state

EXACT = 1e-10  # float64
RECORDED = FORMULA  # the recorded values come from a float32 program
ROUNDING = LAYER
HALF = 2e-2  # bfloat16 inputs and outputs, float32 state

rule = jax.jit(gated_delta_rule, static_argnames="chunk_size")
step = jax.jit(gated_delta_step)


def draw(n, batch=2, heads=2, key_dim=4, value_dim=3, seed=0):
    """q, k, v, beta, log_decay in float64."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, batch, n, heads, key_dim))
    v = rng.normal(size=(batch, n, heads, value_dim))
    beta, decay = rng.uniform(0.05, 0.95, size=(2, batch, n, heads))
    return q, k, v, beta, np.log(decay)


def as_jax(arrays, dtype=jnp.float32):
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def recurrence(q, k, v, beta, log_decay=None, state=None):
    """One token, sample and head at a time in NumPy, as the papers write it."""
    batch, n, heads, key_dim = q.shape
    out = np.zeros(v.shape)
    final = np.zeros((batch, heads, key_dim, v.shape[-1])) if state is None else np.array(state, np.float64)
    for b, t, h in np.ndindex(batch, n, heads):
        key = k[b, t, h] / np.sqrt(k[b, t, h] @ k[b, t, h] + 1e-6)
        query = q[b, t, h] / np.sqrt(q[b, t, h] @ q[b, t, h] + 1e-6) / np.sqrt(key_dim)
        keep = 1.0 if log_decay is None else np.exp(log_decay[b, t, h])
        householder = np.eye(key_dim) - beta[b, t, h] * np.outer(key, key)
        final[b, h] = householder @ final[b, h] * keep + beta[b, t, h] * np.outer(key, v[b, t, h])
        out[b, t, h] = final[b, h].T @ query
    return out, final


@pytest.mark.parametrize(
    ("log_decay", "corner", "total", "squares"),
    [
        (None, (0.04103134, 0.01431400, -0.08094037), 0.1825420224, 3.0534334753),
        (-0.1, (0.05138605, 0.03344948, -0.05591991), 0.2081180864, 2.1924533930),
    ],
)
def test_recorded_values(x64, log_decay, corner, total, squares):
    h, n, j = np.arange(2)[None, :, None], np.arange(16)[:, None, None], np.arange(8)[None, None, :]
    q = np.sin(0.7 * n + 1.3 * j + 2.1 * h + 0.3)[None]
    k = np.cos(0.4 * n - 0.9 * j + 1.7 * h)[None]
    v = np.sin(0.2 * n * (j + 1) + 0.5 * h)[None]
    gates = [np.full((1, 16, 2), 0.5)] + ([] if log_decay is None else [np.full((1, 16, 2), log_decay)])
    out, _ = (delta_rule if log_decay is None else gated_delta_rule)(
        *as_jax([q, k, v, *gates], jnp.float64), chunk_size=6
    )
    np.testing.assert_allclose(out, recurrence(q, k, v, *gates)[0], atol=EXACT)
    assert_close(out[0, 5, 0, :3], corner, RECORDED)
    assert_close([out.sum(), jnp.square(out).sum()], [total, squares], RECORDED)


@pytest.mark.parametrize("chunk_size", [1, 16, 64])
@pytest.mark.parametrize("n", [1, 5, 64, 65, 130])
def test_chunks_are_the_recurrence(x64, n, chunk_size):
    inputs = draw(n)
    start = np.random.default_rng(1).normal(size=(2, 2, 4, 3))
    expected, final = recurrence(*inputs, state=start)
    out, state = rule(*as_jax(inputs, jnp.float64), state=DeltaState(jnp.asarray(start)), chunk_size=chunk_size)
    np.testing.assert_allclose(out, expected, atol=EXACT)
    np.testing.assert_allclose(state.kv, final, atol=EXACT)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_steps_are_the_recurrence(x64, dtype):
    arrays = draw(12)
    for inputs in (arrays, arrays[:4]):
        expected, final = recurrence(*inputs)
        state = init_delta_state(2, 2, 4, 3)
        for t in range(12):
            out, state = step(state, *as_jax((x[:, t] for x in inputs), dtype))
            assert out.dtype == state.kv.dtype == dtype
            assert_close(out, expected[:, t], ROUNDING if dtype == "float32" else EXACT)
        assert_close(state.kv, final, ROUNDING if dtype == "float32" else EXACT)


@pytest.mark.parametrize("split", [0, 16, 37])
def test_a_call_may_be_split_anywhere_and_continued_by_a_step(split):
    inputs = as_jax(draw(50))
    whole, final = rule(*inputs, chunk_size=16)
    first, state = rule(*(x[:, :split] for x in inputs), chunk_size=16)
    second, state = rule(*(x[:, split:49] for x in inputs), state=state, chunk_size=16)
    last, state = step(state, *(x[:, 49] for x in inputs))
    assert_close(jnp.concatenate([first, second, last[:, None]], axis=1), whole, ROUNDING)
    assert_close(state.kv, final.kv, ROUNDING)


@pytest.mark.parametrize("chunk_size", [3, 64])
def test_nothing_depends_on_the_future_or_on_other_samples(chunk_size):
    inputs = as_jax(draw(7))
    outputs = jax.jacrev(lambda *x: rule(*x, chunk_size=chunk_size)[0], argnums=range(5))
    for name, jacobian in zip(("q", "k", "v", "beta", "log_decay"), outputs(*inputs), strict=True):
        # Output axes b n h d come first, then those of the input, which begin with b n h too.
        size = np.moveaxis(np.abs(np.asarray(jacobian)), (0, 1, 2, 4, 5, 6), range(6))
        size = size.reshape(2, 7, 2, 2, 7, 2, -1).max(axis=-1)
        by_token = size.max(axis=(0, 2, 3, 5))
        assert (by_token[np.triu_indices(7, k=1)] == 0).all()
        assert (by_token[2:, 1] > 0).all() != (name == "q")  # a query is used once
        for same in (size.max(axis=(1, 2, 4, 5)), size.max(axis=(0, 1, 3, 4))):  # sample by sample, head by head
            assert (same[~np.eye(2, dtype=bool)] == 0).all()


@pytest.mark.parametrize("shape", [(1, 13), (2, 1, 1, 13)])
def test_tokens_left_out_change_nothing_whatever_they_hold(shape):
    inputs = draw(13)
    keep = np.isin(np.arange(13), [2, 3, 4, 6, 7, 8])
    mask = jnp.asarray(np.broadcast_to(keep.reshape((1,) * (len(shape) - 1) + (13,)), shape))
    expected, final = rule(*as_jax(x[:, keep] for x in inputs), chunk_size=4)
    for x in inputs[1:]:
        x[:, ~keep] = np.nan
    out, state = rule(*as_jax(inputs), mask=mask, chunk_size=4)
    assert_close(out[:, keep], expected, ROUNDING)
    assert_close(state.kv, final.kv, ROUNDING)
    assert (out[:, :2] == 0).all()  # nothing was written yet

    def loss(*inputs):
        out, state = rule(*inputs, mask=mask, chunk_size=4)
        return jnp.square(out).sum() + state.kv.sum()

    for gradient in jax.jit(jax.grad(loss, argnums=range(1, 5)))(*as_jax(inputs)):
        assert jnp.isfinite(gradient).all()
        assert (gradient[:, ~keep] == 0).all()


def test_gradients_in_both_modes_are_finite_differences(x64):
    inputs = as_jax((*draw(7), np.random.default_rng(1).normal(size=(2, 2, 4, 3))), jnp.float64)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(2, 7, 2, 3)))

    @jax.jit
    def loss(*inputs):
        out, state = gated_delta_rule(*inputs[:5], state=DeltaState(inputs[5]), chunk_size=3)
        return (out * weights).sum() + jnp.square(state.kv).sum()

    rng, slope = np.random.default_rng(3), jax.jit(lambda x, d: jax.jvp(loss, x, d)[1])
    gradients = jax.jit(jax.grad(loss, argnums=range(6)))(*inputs)
    for i, gradient in enumerate(gradients):
        change = [jnp.zeros_like(x) for x in inputs]
        change[i] = jnp.asarray(rng.normal(size=inputs[i].shape))
        ahead, behind = (loss(*(x + s * d for x, d in zip(inputs, change, strict=True))) for s in (1e-5, -1e-5))
        numeric = (ahead - behind) / 2e-5
        np.testing.assert_allclose((gradient * change[i]).sum(), numeric, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(slope(inputs, tuple(change)), numeric, rtol=1e-6, atol=1e-7)


def test_what_the_backward_pass_stores_and_does_not_call():
    inputs = as_jax(draw(64))
    _, pullback = jax.vjp(lambda *x: rule(*x, chunk_size=8)[0], *inputs)
    stored = sum(x.size for x in jax.tree.leaves(pullback) if x.shape[:1] == (8,))
    assert stored <= 8 * 2 * 2 * 4 * 3 + sum(x.size for x in inputs)  # one state per chunk, and the inputs themselves
    # Two triangular solves at a time can wait for each other forever on the CPU.
    program = jax.jit(jax.grad(lambda *x: rule(*x)[0].sum())).lower(*inputs).as_text()
    assert "triangular_solve" not in program
    assert "custom_call @lapack" not in program


def test_bfloat16_with_a_float32_state():
    inputs = as_jax(draw(130), jnp.bfloat16)
    expected, final = recurrence(*(np.asarray(x, np.float64) for x in inputs))
    out, state = rule(*inputs)
    assert (out.dtype, state.kv.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(out.astype(jnp.float32), expected, HALF)
    assert_close(state.kv, final, HALF)


@jax.jit
def gradients_and_results(*inputs):
    def loss(*inputs):
        out, state = gated_delta_rule(*inputs, chunk_size=16)
        return jnp.square(out).sum() + state.kv.sum(), (out, state)

    return jax.grad(loss, argnums=range(5), has_aux=True)(*inputs)


@pytest.mark.parametrize("log_decay", [0.0, -50.0, -1e4, -np.inf])
@pytest.mark.parametrize("vectors", ["drawn", "zero"])
def test_zero_vectors_and_strong_decays_have_finite_values_and_gradients(log_decay, vectors):
    q, k, v, beta, g = as_jax(draw(20))
    q, k = (q, k) if vectors == "drawn" else (0 * q, 0 * k)
    g = g.at[:, 7:12].set(log_decay).at[:, 15].set(log_decay)
    gradients, (out, state) = gradients_and_results(q, k, v, beta, g)
    assert all(jnp.isfinite(x).all() for x in (*gradients, out, state.kv))
    expected, final = recurrence(*(np.asarray(x, np.float64) for x in (q, k, v, beta, g)))
    assert_close(out, expected, ROUNDING)
    assert_close(state.kv, final, ROUNDING)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_one_key_written_again_and_again(beta):
    k = jnp.ones((1, 70, 1, 4))
    v = jnp.asarray(np.random.default_rng(0).normal(size=(1, 70, 1, 3)), jnp.float32)
    out, _ = rule(k, k, v, jnp.full((1, 70, 1), beta))
    expected, _ = recurrence(*(np.asarray(x, np.float64) for x in (k, k, v, jnp.full((1, 70, 1), beta))))
    # With 2 the state is reflected, and every error is kept: 70 of 2.4e-7, of |k|², which is 2e-5.
    assert_close(out, expected, ROUNDING)
    if beta == 1:
        assert_close(out, v / 2, ROUNDING)  # what was written last, times 4^-0.5


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (6, 3, 4), r"q has shape \(6, 3, 4\), but must have 4 axes"),
        ("k", (1, 6, 3, 4), r"k has shape \(1, 6, 3, 4\) and q has shape \(2, 6, 3, 4\), but both must be `b n h k`"),
        ("v", (2, 5, 3, 5), r"v has shape \(2, 5, 3, 5\) and q has shape \(2, 6, 3, 4\), but v must be `b n h d`"),
        ("beta", (2, 6, 3, 1), r"beta has shape \(2, 6, 3, 1\) and q .*one number per token and head, `b n h`"),
        ("log_decay", (2, 6), r"log_decay has shape \(2, 6\) and q has shape \(2, 6, 3, 4\)"),
        ("state", (2, 3, 5, 4), r"state.kv has shape \(2, 3, 5, 4\), but q and v need \(2, 3, 4, 5\)"),
        ("mask", (2, 3, 6, 6), r"mask has shape \(2, 3, 6, 6\), but \(batch, tokens\) is \(2, 6\)"),
        ("chunk_size", 0, "chunk_size must be at least 1, not 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(untyped, name, shape, message):
    shapes = {"q": (2, 6, 3, 4), "k": (2, 6, 3, 4), "v": (2, 6, 3, 5), "beta": (2, 6, 3), "log_decay": (2, 6, 3)}
    arguments = {other: np.zeros(fits, np.float32) for other, fits in shapes.items()}
    wrong = shape if name == "chunk_size" else np.zeros(shape, bool if name == "mask" else np.float32)
    arguments[name] = DeltaState(jnp.asarray(wrong)) if name == "state" else wrong
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**arguments)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32])
def test_masks_of_numbers_are_refused(untyped, dtype):
    """Of a mask that is added to logits, -1e9 would count as True."""
    q, k, v, beta, log_decay = as_jax(draw(6))
    mask = jnp.asarray([[0, 0, 0, 0, -1e9, -1e9]]).astype(dtype)
    for call in (lambda: delta_rule(q, k, v, beta, mask=mask), lambda: rule(q, k, v, beta, log_decay, mask=mask)):
        with pytest.raises(ValueError, match=f"mask has dtype {jnp.dtype(dtype)}, but must be boolean"):
            call()


def test_a_step_takes_one_token(untyped):
    token = jnp.zeros((2, 6, 3, 4))
    with pytest.raises(ValueError, match=r"q has shape \(2, 6, 3, 4\), but must have 3 axes, `b h k`"):
        gated_delta_step(init_delta_state(2, 3, 4, 4), token, token, token, token[..., 0])
