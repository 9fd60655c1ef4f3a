"""SOFT attention: recorded reference values, a quadratic NumPy oracle, the inverses, masks, shapes and errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows
from tolerances import FORMULA, LAYER, RIDGE, assert_close

from flowgen.attention import soft
from flowgen.attention.soft import soft_attention

PRINTED = 1e-8  # the reference values are printed with 8 digits after the point, their sums with 10
ORACLE = 1e-10

attend = jax.jit(soft_attention, static_argnames=("num_landmarks", "grid", "ridge", "solver", "normalize"))


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def newton_filter(w, alpha, iterations):
    """Returns (1 - (1 - alpha w²)^(2^iterations)) / w, keeping its digits where alpha w² is small."""
    return -np.expm1(2.0 ** (iterations - 1) * np.log1p(-alpha * w**2 * (2 - alpha * w**2))) / w


def oracle(q, k, v, points, keep=None, *, solver="cholesky", ridge=0.01, normalize=None):
    """Quadratic SOFT in float64 NumPy; landmarks are `b l h k` and `keep` is the mask `b m`."""
    q, k, v, points = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v, points))

    def kernel(x, y):
        distances = ((x[..., :, None, :] - y[..., None, :, :]) ** 2).sum(-1)
        return np.exp(-distances / (2 * np.sqrt(x.shape[-1])))

    gram = kernel(points, points)
    rows = gram.sum(-1)
    w, u = np.linalg.eigh(gram + ridge * np.eye(gram.shape[-1]))
    spectrum = newton_filter(w, 1.8 / rows.max(-1)[..., None] ** 2, 20) if solver == "newton" else 1 / w
    inverse = (u * spectrum[..., None, :]) @ u.swapaxes(-1, -2)
    if normalize == "symmetric":
        inverse = inverse / np.sqrt(rows[..., :, None] * rows[..., None, :])
    scores = kernel(q, points) @ inverse @ kernel(points, k)
    scores = scores if keep is None else scores * keep[:, None, None]
    if normalize == "row":
        scores = scores / scores.sum(-1, keepdims=True)
    return (scores @ v).swapaxes(1, 2)


# solver, ridge, normalize: three outputs, the sum of all and the sum of their squares
GOLDEN = {
    ("newton", 0.01, None): (2.64428876, 0.46583720, 1.39465317, 134.5894586172, 350.3427273929),
    ("cholesky", 0.01, None): (2.64428876, 0.46583720, 1.39465317, 134.5894586930, 350.3427275067),
    ("cholesky", 0.0, None): (2.68911011, 0.56292313, 1.38685592, 137.7255356515, 482.4224439064),
    ("cholesky", 0.0, "symmetric"): (0.71050726, 0.15051788, 0.33757357, 35.5471906481, 31.3447418385),
    ("newton_released", 0.0, "symmetric"): (0.67678093, 0.13662580, 0.38040344, 34.3040676520, 23.5390302665),
}


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_recorded_reference_values(case, float64):
    n, j, h = np.arange(16.0)[:, None, None], np.arange(8.0)[None, None, :], np.arange(2.0)[None, :, None]
    q, v = np.sin(0.7 * n + 1.3 * j + 2.1 * h + 0.3)[None], np.sin(0.2 * n * (j + 1) + 0.5 * h)[None]
    options = dict(zip(("solver", "ridge", "normalize"), case, strict=True))
    out = np.asarray(attend(q, q, v, num_landmarks=4, grid=(4, 4), **options))
    np.testing.assert_allclose([*out[0, 5, 0, :3], out.sum(), (out**2).sum()], GOLDEN[case], rtol=0, atol=PRINTED)
    if case[0] != "newton_released":
        points = q.reshape(1, 2, 2, 2, 2, 2, 8).mean((2, 4)).reshape(1, 4, 2, 8)
        np.testing.assert_allclose(out, oracle(q, q, v, points, **options), rtol=0, atol=10 * ORACLE)  # no ridge


@pytest.mark.parametrize("normalize", [None, "symmetric", "row"])
@pytest.mark.parametrize("solver", ["newton", "cholesky"])
def test_cross_attention_with_given_landmarks_and_a_mask_is_the_quadratic_form(solver, normalize, float64):
    q, k, v, points = normal(0, 2, 5, 3, 4), normal(1, 2, 7, 3, 4), normal(2, 2, 7, 3, 6), normal(3, 2, 4, 3, 4)
    keep = np.arange(7)[None] < np.array([[7], [4]])
    options = {"ridge": 0.05, "normalize": normalize, "solver": solver}
    tolerances = {"float64": ORACLE, "float32": RIDGE, "bfloat16": 4e-3, "float16": 1e-3}  # half: one rounding
    for dtype, tolerance in tolerances.items():
        if normalize == "row" and "16" in dtype:
            continue  # rows can sum to nearly 0, and nothing bounds the error of half precision relative to that
        cast = [x.astype(dtype) for x in (q, k, v, points)]
        out = attend(*cast[:3], landmarks=cast[3], mask=jnp.asarray(keep), **options)
        assert out.dtype == dtype
        exact = oracle(*cast, keep, **options)
        np.testing.assert_allclose(out.astype(float), exact, atol=tolerance * np.abs(exact).max(), rtol=tolerance)
    q, k, v, points = (x.astype(float) for x in (q, k, v, points))
    out = attend(q, k, v, landmarks=points[0], mask=jnp.asarray(keep)[:, None, None], **options)
    expected = oracle(q, k, v, np.repeat(points[:1], 2, 0), keep, **options)
    np.testing.assert_allclose(out, expected, atol=ORACLE, rtol=ORACLE)


@pytest.mark.parametrize(("n", "num"), [(1, 49), (3, 5), (7, 3), (12, 4)])
def test_segments_divide_any_length(n, num):
    x = normal(n, 2, n, 1, 3)
    points, live = soft.pool_landmarks(x, num)
    sizes = np.bincount(np.arange(n) * min(n, num) // n)
    assert live is None
    assert np.ptp(sizes) <= 1
    expected = [part.mean(1) for part in np.split(np.asarray(x), np.cumsum(sizes)[:-1], axis=1)]
    assert_close(points, np.stack(expected, 1), FORMULA)


def test_cells_of_a_grid():
    cases = [((56, 56), 49), ((14, 28), 32), ((16, 1), 4), ((2, 3), 49), ((5, 4), (2, 9))]
    assert [soft.landmark_cells(*case) for case in cases] == [(7, 7), (4, 8), (4, 1), (2, 3), (2, 4)]


def test_grids_that_do_not_divide_are_tiled_and_masked():
    x, keep = normal(0, 2, 15, 1, 3), np.random.default_rng(1).random((2, 15)) < 0.7
    keep[1].reshape(5, 3)[:3, :2] = False  # the first cell of the second sample is empty
    points, live = soft.pool_landmarks_2d(x, (5, 3), (2, 2), jnp.asarray(keep))
    image, kept = np.asarray(x).reshape(2, 5, 3, 3), keep.reshape(2, 5, 3)
    cells = enumerate(itertools.product((slice(0, 3), slice(3, 5)), (slice(0, 2), slice(2, 3))))
    for sample, (cell, where) in itertools.product(range(2), cells):
        chosen = image[sample][where][kept[sample][where]]
        assert live[sample, cell] == (len(chosen) > 0)
        assert_close(points[sample, cell, 0], chosen.sum(0) / max(len(chosen), 1), FORMULA)


# Every way to choose landmarks and to solve, on 12 tokens; the laws below hold for each.
VARIANTS = {
    "segments": {"num_landmarks": 5},
    "grid": {"num_landmarks": 6, "grid": (3, 4), "solver": "cholesky"},
    "cells": {"num_landmarks": (2, 3), "grid": (4, 3), "normalize": "row", "solver": "cholesky"},
    "SOFT++": {"num_landmarks": 4, "normalize": "symmetric"},
    "all tokens": {"solver": "cholesky"},
}


@pytest.fixture(params=rows(VARIANTS, ("cells",)))
def variant(request):
    return VARIANTS[request.param]


def test_padding_changes_nothing(variant):
    q, v = normal(0, 2, 12, 2, 4), normal(1, 2, 12, 2, 3)
    keep = jnp.asarray(np.arange(12)[None] < np.array([[12], [7]]))
    kept = keep[..., None, None]
    out, changed = attend(q, q, v, mask=keep, **variant), jnp.where(kept, q, 30 * q[::-1])
    altered = attend(changed, changed, jnp.where(kept, v, jnp.nan), mask=keep, **variant)
    np.testing.assert_array_equal(out[keep], altered[keep])
    unmasked = attend(q, q, v, **variant)
    assert_close(unmasked[0], out[0], RIDGE)
    assert jnp.abs(unmasked[1] - out[1])[:7].max() > 1e-2
    if "grid" not in variant:
        alone = attend(q[1:, :7], q[1:, :7], v[1:, :7], **variant)
        assert_close(out[1, :7], alone[0], RIDGE)


def test_samples_do_not_meet(variant):
    q, v = normal(0, 3, 12, 2, 4), normal(1, 3, 12, 2, 3)
    out, changed = attend(q, q, v, **variant), q.at[1].multiply(5.0)
    np.testing.assert_array_equal(out[::2], attend(changed, changed, v.at[1].add(1e3), **variant)[::2])
    gradient = jax.jit(jax.grad(lambda q: jnp.sin(soft_attention(q, q, v, **variant)[0]).sum()))(q)
    assert jnp.abs(gradient[0]).max() > 1e-3
    assert not gradient[1:].any()
    single = jax.jit(jax.vmap(lambda q, v: soft_attention(q[None], q[None], v[None], **variant)[0]))(q, v)
    assert_close(single, out, RIDGE)


def test_nothing_to_attend_to_gives_zero_and_finite_gradients(variant):
    q, v = normal(0, 2, 12, 2, 4), normal(1, 2, 12, 2, 3)
    keep = jnp.asarray([[True] * 12, [False] * 12])

    def loss(q, v):
        out = soft_attention(q, q, v, mask=keep, **variant)
        return (out**2).sum(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(q, v)
    for array in (out, *gradients):
        assert jnp.isfinite(array).all()
        assert array[0].any()
        assert not array[1].any()


@pytest.mark.parametrize("solver", ["newton", "cholesky"])
def test_identical_tokens_and_one_token(solver):
    one = normal(0, 1, 1, 2, 4)
    q, v = jnp.tile(one, (1, 12, 1, 1)), normal(1, 1, 12, 2, 3)
    options = {"num_landmarks": 4, "solver": solver, "normalize": "row"}
    out, gradient = attend(q, q, v, **options), jax.grad(lambda q: jnp.sin(attend(q, q, v, **options)).sum())(q)
    assert_close(out, jnp.tile(v.mean(1, keepdims=True), (1, 12, 1, 1)), RIDGE)
    assert jnp.isfinite(gradient).all()
    assert soft.gaussian_kernel(170 * q, 170 * q).max() == 1  # rounding makes some distances negative
    assert_close(attend(one, one, v[:, :1], solver=solver), v[:, :1] / 1.01, LAYER)


def gram_matrices(spread):
    return soft.gaussian_kernel(*[normal(0, 2, 9, 2, 4, dtype=jnp.float64) * spread] * 2)


@pytest.mark.parametrize("spread", [1.0, 0.3, 0.05])
def test_newton_is_its_spectral_form(spread, float64):
    a = gram_matrices(spread)
    alpha = 1.8 / np.asarray(a).sum(-1).max(-1) ** 2
    for ridge, iterations in itertools.product((0.0, 0.01), (3, 20)):
        w, u = np.linalg.eigh(np.asarray(a) + ridge * np.eye(9))
        expected = np.einsum("bhij,bhj,bhkj->bhik", u, newton_filter(w, alpha[..., None], iterations), u)
        x = soft.newton_inverse(a, ridge=ridge, iterations=iterations)
        np.testing.assert_allclose(x, expected, atol=1e-9 * np.abs(expected).max())


def test_newton_derivative_is_the_closed_form_in_both_modes(float64):
    a, (da, cotangent) = gram_matrices(1.0), normal(1, 2, 2, 2, 9, 9, dtype=jnp.float64)
    da = da + da.mT
    newton = jax.jit(lambda a: soft.newton_inverse(a, ridge=0.1))
    x, tangent = jax.jvp(newton, (a,), (da,))
    np.testing.assert_allclose(tangent, -x @ da @ x, atol=ORACLE)
    (gradient,) = jax.vjp(newton, a)[1](cotangent)
    np.testing.assert_allclose((gradient * da).sum(), (cotangent * tangent).sum(), rtol=ORACLE)
    exact = jax.jit(lambda a: soft.cholesky_solve(a, jnp.broadcast_to(jnp.eye(9), a.shape), ridge=0.1))
    np.testing.assert_allclose(jax.jvp(exact, (a,), (da,)), (x, tangent), atol=1e-8)


@pytest.mark.parametrize(
    ("solver", "pooled"),
    [("newton", False), pytest.param("cholesky", False, marks=pytest.mark.slow), ("cholesky", True)],
)
def test_derivatives_are_finite_differences_and_modes_agree(solver, pooled, float64):
    q, v = 1.5 * normal(0, 1, 6, 1, 4, dtype=jnp.float64), normal(1, 1, 6, 1, 3, dtype=jnp.float64)
    direction, cotangent = normal(2, 1, 6, 1, 4, dtype=jnp.float64), normal(3, 1, 6, 1, 3, dtype=jnp.float64)
    keep = jnp.asarray([[True] * 5 + [False]])

    # Tokens on top of landmarks, moving with them or not: coinciding points, where second derivatives are delicate.
    landmarks = None if pooled else q

    def projected(q):
        out = attend(q, q, v, mask=keep, landmarks=landmarks, solver=solver, ridge=0.1, normalize="symmetric")
        return (out * cotangent).sum()

    slope = jax.jit(lambda q: jax.jvp(projected, (q,), (direction,))[1])

    def difference(fn, step=1e-5):
        return (fn(q + step * direction) - fn(q - step * direction)) / (2 * step)

    np.testing.assert_allclose(slope(q), difference(projected), rtol=1e-7)
    np.testing.assert_allclose((jax.jit(jax.grad(projected))(q) * direction).sum(), slope(q), rtol=1e-11)
    np.testing.assert_allclose((jax.jit(jax.grad(slope))(q) * direction).sum(), difference(slope), rtol=1e-6)


def test_released_inverse_couples_the_samples_of_a_batch(float64):
    a, inverse = gram_matrices(0.3), jax.jit(soft.released_softpp_inverse)
    assert jnp.abs(inverse(a[:1]) - inverse(a.at[1].set(1.0))[:1]).max() > 1e-3
    assert jnp.isfinite(jax.jit(jax.grad(lambda a: inverse(a).sum()))(a)).all()


def test_landmark_features_factor_the_nystrom_kernel_token_by_token(float64):
    x, points, v = (normal(seed, 2, 6, 3, 4, dtype=jnp.float64) for seed in range(3))
    features = jax.jit(soft.gaussian_landmark_features, static_argnames="whiten")
    learned = points[0].swapaxes(0, 1)
    whitened = features(x, learned, ridge=0.02, whiten=True)
    out = jnp.einsum("bnhl,bmhl,bmhd->bnhd", whitened, whitened, v)
    expected = oracle(x, x, v, np.repeat(points[:1], 2, 0), ridge=0.02)
    np.testing.assert_allclose(out, expected, atol=ORACLE)
    future = features(x.at[:, 3:].add(1.0), learned, ridge=0.02, whiten=True)
    np.testing.assert_array_equal(future[:, :3], whitened[:, :3])
    half = x.astype(jnp.bfloat16), learned.astype(jnp.bfloat16)
    positive = features(*half, whiten=False)
    assert_close(positive, features(*(x.astype(float) for x in half), whiten=False), LAYER)
    assert positive.min() > 0


Q, V = np.ones((2, 6, 3, 4), np.float32), np.ones((2, 6, 3, 5), np.float32)
ERRORS = {
    "causal": ((Q, Q, V), {"is_causal": True}, "cannot be causal.*gaussian_landmark_attention"),
    "rank": ((Q[0], Q, V), {}, "q, k and v must be .batch, tokens, heads, width."),
    "lengths": ((Q, Q[:, :5], V), {}, "same number of tokens"),
    "batch": ((Q[:1], Q, V), {}, "same batch size"),
    "heads": ((Q, Q[:, :, :1], V), {}, "same number of heads"),
    "widths": ((Q, Q[..., :3], V), {}, "same width"),
    "mask per query": ((Q, Q, V), {"mask": np.tile(np.tri(6, dtype=bool), (2, 1, 1, 1))}, "key masks"),
    "mask per head": ((Q, Q, V), {"mask": np.ones((2, 3, 1, 6), bool)}, "key masks"),
    "mask length": ((Q, Q, V), {"mask": np.ones((2, 5), bool)}, "key masks, .2, 6. or .2, 1, 1, 6."),
    "grid": ((Q, Q, V), {"grid": (2, 4)}, "grid .2, 4. does not match the 6 keys"),
    "grid and landmarks": ((Q, Q, V), {"grid": (2, 3), "landmarks": Q}, "cannot be combined"),
    "landmark width": ((Q, Q, V), {"landmarks": Q[..., :2]}, "landmarks have .* pass .number, 3, 4."),
    "no landmarks": ((Q, Q, V), {"num_landmarks": 0}, "must be at least 1"),
    "cells without grid": ((Q, Q, V), {"num_landmarks": (2, 2)}, "needs a grid"),
    "solver": ((Q, Q, V), {"solver": "pinv"}, "solver 'pinv' is unknown; choose one of 'newton'"),
    "normalize": ((Q, Q, V), {"normalize": "sym"}, "normalize must be .* not 'sym'"),
    "ridge": ((Q, Q, V), {"ridge": -0.1}, "ridge must be at least 0, not -0.1"),
    "released ridge": ((Q, Q, V), {"solver": "newton_released"}, "does not support ridge"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case, untyped):
    arrays, options, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *arrays: soft_attention(*arrays, **options), *arrays)
    with pytest.raises(ValueError, match="pass landmarks"):
        soft.gaussian_landmark_features(Q, Q[:, 0])
