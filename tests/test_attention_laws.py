"""Laws of linear attention over one table of kernels: formulas, running states, causality, padding, degenerate input.

The formulas are in attention_formulas.py. What a kernel cannot do it must refuse with a
ValueError: no row is left out of a law.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_formulas import (
    BATCH,
    CAUSAL_FORMS,
    EXACT,
    FORMS,
    HEADS,
    KEYS,
    LENGTH,
    PADDING,
    PAIRS,
    ROWS,
    SAME_SEGMENT,
    TRIL,
    VALID,
    VALUES,
    WIDTH,
    as_jax,
    attend,
    close,
    draw,
    each_kernel,
    formula,
    in_chunks,
)
from conftest import rows
from tolerances import LAYER, assert_close

from flowgen.attention import (
    KERNELS,
    checks,
)


def test_every_named_kernel_has_a_row():
    assert set(KERNELS) <= set(ROWS)


@each_kernel
def test_every_form_is_the_formula(name, x64):
    inputs = draw(name)
    for form, (options, keep) in FORMS.items():
        options = {key: jnp.asarray(x) if isinstance(x, np.ndarray) else x for key, x in options.items()}
        if ROWS[name].causal_only and form not in CAUSAL_FORMS:
            with pytest.raises(ValueError, match="always causal"):
                attend(name, *as_jax(inputs, jnp.float64), **options)
            continue
        out = attend(name, *as_jax(inputs, jnp.float64), **options)
        close(name, out, formula(name, *inputs, keep), form)
        if form in ("packed", "packed causal"):
            for part in (slice(0, 3), slice(3, 8), slice(8, 9), slice(9, 10)):
                alone = [x[:1, part] for x in inputs]
                expected = formula(name, *alone, np.tri(alone[0].shape[1]) if options.get("is_causal") else True)
                close(name, out[:1, part], expected, f"{form}, {part}")


@each_kernel
def test_cross_attention_is_the_formula(name, x64):
    inputs = draw(name, m=KEYS)
    if ROWS[name].causal_only:
        with pytest.raises(ValueError, match="always causal"):
            attend(name, *as_jax(inputs, jnp.float64))
        return
    close(name, attend(name, *as_jax(inputs, jnp.float64)), formula(name, *inputs, True))


@each_kernel
def test_grouped_heads_are_refused_where_parameters_belong_to_heads(name, untyped):
    inputs, options = as_jax(draw("nala")), {"is_causal": True}
    if ROWS[name].grouped:  # then the other laws were tested with fewer key heads
        assert draw(name)[1].shape[2] < HEADS
        return
    with pytest.raises(ValueError, match="heads"):
        jax.eval_shape(lambda *x: ROWS[name].kernel.attend(*x, **options), *inputs)


@each_kernel
def test_chunks_pieces_and_steps_are_one_pass(name):
    inputs = as_jax(draw(name, n=130, seed=1))
    kernel = ROWS[name].kernel

    @jax.jit
    def passes(*inputs):
        out = {"chunks of 64": in_chunks(name, *inputs, 64), "chunks of 7": in_chunks(name, *inputs, 7)}
        state, pieces = None, []
        for start, end in ((0, 1), (1, 64), (64, 130)):
            piece, state = kernel.prefill(*(x[:, start:end] for x in inputs), state=state)
            pieces.append(piece)
        out["pieces"] = jnp.concatenate(pieces, axis=1)

        def step(state, token):
            piece, state = kernel.prefill(*(x[:, None] for x in token), state=state)
            return state, piece[:, 0]

        empty = kernel.init_state(BATCH, inputs[1].shape[2], WIDTH, VALUES)
        last, out["steps"] = jax.lax.scan(step, empty, tuple(x.swapaxes(0, 1) for x in inputs))
        return out | {"steps": out["steps"].swapaxes(0, 1)}, (state, last)

    outputs, (state, last) = passes(*inputs)
    expected = formula(name, *(np.asarray(x, np.float64) for x in inputs), np.tri(130, dtype=bool))
    for label, out in outputs.items():
        close(name, out, expected, label)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(last), strict=True):
        assert_close(x, y, LAYER)


@each_kernel
def test_a_call_may_be_split_before_its_first_token(name):
    shapes = [jax.ShapeDtypeStruct((x.shape[0], 0, *x.shape[2:]), jnp.float32) for x in draw(name)]
    kernel = ROWS[name].kernel
    out, state = jax.eval_shape(kernel.prefill, *shapes)
    assert out.shape == (BATCH, 0, HEADS, VALUES)
    empty = jax.eval_shape(lambda: kernel.init_state(BATCH, shapes[1].shape[2], WIDTH, VALUES))
    assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(lambda x: x.shape, empty)


@each_kernel
def test_derivatives_in_both_modes_agree_and_never_reach_the_future_or_other_samples(name, x64):
    n = 7
    inputs, tangents = (as_jax(draw(name, n=n, seed=s), jnp.float64) for s in (0, 3))

    @jax.jit
    def derivatives(inputs, tangents):
        def run(*inputs):
            return in_chunks(name, *inputs, 3)

        return jax.jacrev(run, argnums=(0, 1, 2))(*inputs), jax.jvp(run, inputs, tangents)[1]

    jacobians, forward = derivatives(inputs, tangents)
    past = np.tri(n, dtype=bool)
    for argument, jacobian in zip("qkv", jacobians, strict=True):
        # Axes b n h d of the output, then those of the input.
        size = np.abs(np.asarray(jacobian)).max(axis=(2, 3, 6, 7))
        assert (size[0, :, 1] == 0).all(), argument
        assert (size[1, :, 0] == 0).all(), argument
        by_token = size.max(axis=(0, 2))
        assert (by_token[~past] == 0).all(), argument
        reached = np.eye(n, dtype=bool) if argument == "q" else past
        assert (by_token[reached & (np.arange(n) > 0)[:, None]] > 0).all(), argument
    reverse = sum(np.tensordot(j, t, axes=4) for j, t in zip(jacobians, tangents, strict=True))
    np.testing.assert_allclose(forward, reverse, rtol=1e-7, atol=EXACT)


@each_kernel
def test_a_sample_is_bitwise_the_same_beside_any_other(name, x64):
    inputs, seconds = (as_jax(draw(name, seed=s), jnp.float64) for s in (0, 2))
    others = tuple(jnp.concatenate([x[:1], y[1:]]) for x, y in zip(inputs, seconds, strict=True))
    for form in ("causal", "packed causal" if ROWS[name].causal_only else "packed"):
        options = {key: jnp.asarray(x) if key == "segment_ids" else x for key, x in FORMS[form][0].items()}
        out, other = (attend(name, *x, **options) for x in (inputs, others))
        assert (out[0] == other[0]).all()
        assert (out[1] != other[1]).any()


@jax.jit(static_argnames="name")
def masked(name, q, k, v, mask):
    """Outputs by form with a mask over keys, the state, and gradients of the squared outputs."""
    kernel = ROWS[name].kernel

    def loss(q, k, v):
        out = {"causal": kernel.attend(q, k, v, mask=mask, is_causal=True)}
        out["prefill"], state = kernel.prefill(q, k, v, mask=mask)
        if not ROWS[name].causal_only:
            out["full"] = kernel.attend(q, k, v, mask=mask)
        return sum(jnp.square(x).sum() + x.sum() for x in out.values()), (out, state)

    gradients, (out, state) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, state, gradients


def finite(*trees):
    return all(jnp.isfinite(x).all() for x in jax.tree.leaves(trees))


@pytest.mark.parametrize("k_holds", rows([1e4, 1e30, np.nan], (1e4,)))
@each_kernel
def test_padded_keys_are_irrelevant_whatever_they_hold(name, k_holds):
    # Drawn such that no token sees only keys of weight 0, whose roundings EPS would enlarge a million times.
    clean = [np.float64(np.float32(x)) for x in draw(name, seed=1)]
    garbage = [x.copy() for x in clean]
    garbage[1][PADDING], garbage[2][PADDING] = k_holds, np.nan
    garbage[2][0, 1], garbage[2][1, 8] = np.inf, -np.inf
    out, state, gradients = masked(name, *as_jax(garbage), jnp.asarray(VALID))
    for form, values in out.items():
        causal = form != "full"
        close(name, values, formula(name, *clean, VALID & TRIL if causal else VALID), form)
        if ROWS[name].positional and form == "full":  # turned by its place, which is another one alone
            continue
        for b in range(BATCH):
            alone = [x[b : b + 1][:, ~PADDING[b]] for x in clean]
            expected = formula(name, *alone, np.tri(alone[0].shape[1]) if causal else True)
            close(name, values[b : b + 1, ~PADDING[b]], expected, form)
    assert finite(state)
    assert finite(gradients)
    for gradient in gradients[1:]:
        assert (gradient[PADDING] == 0).all()
        assert (gradient[~PADDING] != 0).any()


@each_kernel
def test_a_mask_over_pairs_hides_values_that_are_not_finite(name, x64):
    clean, form = draw(name), FORMS["pairs, packed causal"][0]
    options = {"is_causal": True, "segment_ids": jnp.asarray(form["segment_ids"])}
    options["mask"] = jnp.asarray(np.broadcast_to(VALID, form["mask"].shape))
    garbage = [x.copy() for x in clean]
    garbage[1][PADDING], garbage[2][PADDING] = 1e200, np.nan
    out = attend(name, *as_jax(garbage, jnp.float64), **options)
    close(name, out, formula(name, *clean, VALID & SAME_SEGMENT & TRIL))


@pytest.mark.parametrize("case", ["zero q", "zero k", "zeros", "some zeros", "tiny q", "tiny k"])
@each_kernel
def test_degenerate_inputs_have_finite_values_and_gradients(name, case):
    q, k, v = as_jax(draw(name))
    few = np.ones((1, LENGTH, 1, WIDTH), np.float32)
    few[:, 3], few[:, 5, :, 1:] = 0, 0  # a zero token, and one with zero channels
    factors = {
        "zero q": (0, 1, 1),
        "zero k": (1, 0, 1),
        "zeros": (0, 0, 0),
        "some zeros": (few, few, 1),
        "tiny q": (1e-20, 1, 1),
        "tiny k": (1, 1e-20, 1),
    }[case]
    inputs = (x * jnp.asarray(f, jnp.float32) for x, f in zip((q, k, v), factors, strict=True))
    assert finite(*masked(name, *inputs, jnp.ones((BATCH, 1, 1, LENGTH), bool)))


@each_kernel
def test_a_single_token(name):
    inputs = [np.float64(np.float32(x)) for x in draw(name, n=1)]

    def loss(*inputs):
        out = ROWS[name].kernel.attend(*inputs, is_causal=ROWS[name].causal_only)
        return jnp.square(out).sum(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*as_jax(inputs))
    close(name, out, formula(name, *inputs, True))
    assert finite(gradients)


@each_kernel
def test_a_query_without_keys_gets_exactly_zero(name):
    inputs = as_jax(draw(name))
    out, _, gradients = masked(name, *inputs, jnp.zeros((BATCH, 1, 1, LENGTH), bool))
    assert all((x == 0).all() for x in (*out.values(), *gradients))
    out, _, gradients = masked(name, *inputs, jnp.asarray(VALID))
    assert finite(gradients)
    assert (out["causal"][0, :3] == 0).all()
    assert (out["causal"][0, 3:] != 0).any()

    def loss(*inputs):
        out = ROWS[name].kernel.attend(*inputs, mask=jnp.asarray(PAIRS), is_causal=ROWS[name].causal_only)
        return jnp.square(out).sum() + out.sum(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
    assert (out[0, 4] == 0).all()
    assert (gradients[0][0, 4] == 0).all()
    assert finite(gradients)


@each_kernel
def test_too_many_weights_are_refused(name, monkeypatch):
    assert checks.QUADRATIC_LIMIT == 4096 * 4096
    monkeypatch.setattr(checks, "QUADRATIC_LIMIT", LENGTH * LENGTH - 1)
    with pytest.raises(ValueError, match=r"10 x 10 weights, but the limit is 99\. Use is_causal"):
        jax.eval_shape(
            lambda q, k, v: ROWS[name].kernel.attend(q, k, v, mask=jnp.asarray(PAIRS), is_causal=True),
            *as_jax(draw(name)),
        )
    kept = jnp.asarray(VALID)  # a mask over keys alone has no limit
    jax.eval_shape(lambda q, k, v: ROWS[name].kernel.attend(q, k, v, mask=kept, is_causal=True), *as_jax(draw(name)))
