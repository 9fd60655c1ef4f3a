"""SOFT: softmax-free attention with a Gaussian kernel in Nyström form (Lu et al. 2021, 2024), for arrays `b n h k`.

Let K(x, y) = exp(-|x - y|²/2) for tokens x and y that have been divided by (head width)^¼. With A = K(L, L) for l
landmarks L, P_q = K(q, L) and P_k = K(k, L), the output is

    Ŝ v = P_q (A + ridge I)⁻¹ P_kᵀ v                                                     (SOFT)
    Ŝ v = P_q D^-½ (A + ridge I)⁻¹ D^-½ P_kᵀ v,   D = diag(row sums of A)                (SOFT++, "symmetric")

The cost per sample and head is O(n l (k + d) + l³). Samples and heads do not affect each other, except in
`released_softpp_inverse`.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from flowgen.attention.checks import check_boolean, check_floats
from flowgen.attention.linalg import (
    HIGHEST,
    Ridge,
    add_ridge,
    cholesky_solve,
    inverse_cholesky,
    newton_inverse,
    released_softpp_inverse,
)
from flowgen.attention.masks import hide_queries, split_pairs
from flowgen.backend import keep_axes

Pair = tuple[int, int]
Solver = Literal["newton", "cholesky", "newton_released"]
Normalization = Literal["symmetric", "row"] | None


class Landmarks(NamedTuple):
    """Landmarks in kernel space. live: which landmarks represent at least one token; None if all do."""

    points: Float[Array, "b l h k"]
    live: Bool[Array, "b l"] | None = None


def to_kernel_space(x: Float[Array, "*tokens k"]) -> Float[Array, "*tokens k"]:
    """Returns x / d^¼ in at least float32, where d is the width. In this space, SOFT's kernel is exp(-|x - y|²/2)."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) * x.shape[-1] ** -0.25


def gaussian_kernel(x: Float[Array, "b n h k"], y: Float[Array, "b m h k"]) -> Float[Array, "b h n m"]:
    """Returns exp(-|x - y|²/2) per head for x and y in kernel space. The dtype is at least float32."""
    master = jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)
    x, y = (rearrange(tokens.astype(master), "b n h k -> b h n k") for tokens in (x, y))
    cross = jnp.einsum("bhnk,bhmk->bhnm", x, y, precision=HIGHEST)
    squared = (x * x).sum(-1)[..., :, None] + (y * y).sum(-1)[..., None, :] - 2 * cross
    # Rounding can make the square negative. The clamp affects only its value: at coinciding points, the derivative of
    # the clamp would lose the kernel's curvature, and with it second derivatives such as the gradient of a divergence.
    squared = squared + jax.lax.stop_gradient(jnp.maximum(squared, 0) - squared)
    return jnp.exp(-squared / 2)


def _segment_means(
    x: Float[Array, "b n h k"], segment: Int[Array, "#b n"], num: int, mask: Bool[Array, "b n"] | None
) -> Landmarks:
    """Returns the means of the unmasked tokens in `num` segments; empty segments have the mean 0 and are not live."""
    every = mask is None and isinstance(x.shape[1], int)  # if the number of tokens is symbolic, segments may be empty

    def run(x, segment, mask):
        master = jnp.promote_types(x.dtype, jnp.float32)
        member = segment[..., None] == jnp.arange(num)[None, None]
        if mask is not None:
            member = member & mask[..., None]
            x = jnp.where(mask[..., None, None], x, 0)
        member = jnp.broadcast_to(member, (*x.shape[:2], num))
        count = member.sum(axis=1)
        total = jnp.einsum("bnl,bnhk->blhk", member.astype(master), x.astype(master), precision=HIGHEST)
        points = total / jnp.maximum(count, 1).astype(master)[..., None, None]
        return points, None if every else count > 0

    out = ("b l h k", None if every else "b l")
    return Landmarks(*keep_axes(run, x, segment, mask, named=[(x, "b n h k")], out=out))


def pool_landmarks(x: Float[Array, "b n h k"], num_landmarks: int, mask: Bool[Array, "b n"] | None = None) -> Landmarks:
    """Returns the means of min(num_landmarks, n) contiguous segments of the unmasked tokens.

    Segment sizes differ by at most one token. Masked tokens do not count, so padding does not change a sample's
    landmarks. `live` is False for landmarks without tokens.
    """
    n = x.shape[1]
    num = min(num_landmarks, n) if isinstance(n, int) else num_landmarks
    if mask is None:
        return _segment_means(x, (jnp.arange(n) * num // n)[None], num, None)

    def segments(mask):
        rank = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        return rank * num // jnp.maximum(mask.sum(axis=1, keepdims=True), 1)

    return _segment_means(x, keep_axes(segments, mask, named=[(mask, "b n")], out="b n"), num, mask)


def landmark_cells(grid: Pair, num_landmarks: int | Pair) -> Pair:
    """Returns the number of rows and columns of landmark cells on a (height, width) grid of tokens.

    num_landmarks: a pair (rows, columns), or the maximum number m of cells. For m, the cells are as square as possible:
    rows = round(√(m height / width)), capped at the grid's height, and then columns = m // rows, capped at its width. A
    pair is capped in the same way.
    """
    height, width = grid
    if isinstance(num_landmarks, tuple):
        rows, columns = num_landmarks
    else:
        rows = min(max(round((num_landmarks * height / width) ** 0.5), 1), height, num_landmarks)
        columns = num_landmarks // rows
    return min(rows, height), min(columns, width)


def pool_landmarks_2d(
    x: Float[Array, "b n h k"], grid: Pair, cells: int | Pair, mask: Bool[Array, "b n"] | None = None
) -> Landmarks:
    """Returns the means over the cells of a (height, width) grid of tokens; tokens and cells are in row-major order.

    cells: (rows, columns), or an int that `landmark_cells` converts to them. Cells tile the grid. If the grid cannot be
    divided evenly, the heights and the widths of cells differ by at most one token. `live` is True for a cell if at
    least one of its tokens is unmasked.
    """
    height, width = grid
    rows, columns = landmark_cells(grid, cells)
    row = jnp.arange(height) * rows // height
    column = jnp.arange(width) * columns // width
    cell = (row[:, None] * columns + column[None, :]).reshape(1, -1)
    return _segment_means(x, cell, rows * columns, mask)


def _solve(a: Array, rhs: Array, ridge: Ridge, solver: Solver) -> Array:
    if solver == "cholesky":
        return cholesky_solve(a, rhs, ridge=ridge)
    inverse = newton_inverse(a, ridge=ridge) if solver == "newton" else released_softpp_inverse(a)
    return jnp.matmul(inverse, rhs, precision=HIGHEST)


def _check_options(ridge: Ridge, solver: str, normalize: str | None) -> None:
    if solver not in get_args(Solver):
        raise ValueError(f"solver {solver!r} is unknown; choose one of {', '.join(map(repr, get_args(Solver)))}.")
    if normalize not in (None, "symmetric", "row"):
        raise ValueError(f"normalize must be None, 'symmetric' or 'row', not {normalize!r}.")
    if isinstance(ridge, int | float) and ridge < 0:
        raise ValueError(f"ridge must be at least 0, not {ridge}; a negative ridge can make eigenvalues negative.")
    if solver == "newton_released" and not (isinstance(ridge, int | float) and ridge == 0):
        raise ValueError(f"solver 'newton_released' does not support ridge={ridge}; pass ridge=0.0.")


def nystrom_attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h d"],
    landmarks: Landmarks,
    *,
    mask: Bool[Array, "b m"] | None = None,
    ridge: Ridge = 0.01,
    solver: Solver = "newton",
    normalize: Normalization = None,
) -> Float[Array, "b n h d"]:
    """Returns Ŝ v (see the module docstring) for q, k and landmarks that are already in kernel space.

    mask: True for keys to keep. The other options are as in `soft_attention`. Landmarks whose `live` is False have no
    effect. The kernel matrices and the linear solve use at least float32; the result has the dtype of v.
    """
    _check_options(ridge, solver, normalize)
    if 0 in (*q.shape[:3], k.shape[1]):
        return jnp.zeros((*q.shape[:3], v.shape[-1]), v.dtype)
    return _nystrom(q, k, v, landmarks, mask, ridge, solver, normalize)


@partial(jax.jit, static_argnames=("solver", "normalize"))
def _nystrom(q, k, v, landmarks, mask, ridge, solver, normalize):
    named = [(q, "b n h k"), (k, "b m h k"), (v, "b m h d")]
    run = partial(_run_nystrom, solver=solver, normalize=normalize)
    return keep_axes(run, q, k, v, landmarks, mask, ridge, named=named, out="b n h d")


def _run_nystrom(q, k, v, landmarks, mask, ridge, solver, normalize):
    points, live = landmarks
    gram, p_q = gaussian_kernel(points, points), gaussian_kernel(q, points)
    if mask is not None:  # zeros, so that not even a NaN in the padding passes through
        k, v = (jnp.where(mask[..., None, None], x, 0) for x in (k, v))
    p_k = gaussian_kernel(k, points)
    if mask is not None:
        p_k = jnp.where(mask[:, None, :, None], p_k, 0)
    if live is not None:
        p_q, p_k = (jnp.where(live[:, None, None, :], p, 0) for p in (p_q, p_k))
        gram = jnp.where((live[:, :, None] & live[:, None, :])[:, None], gram, 0)
    gram = jnp.where(jnp.eye(gram.shape[-1], dtype=bool)[None, None], 1, gram)

    # The two products with all tokens may use reduced precision if the values have half precision anyway.
    precision = HIGHEST if jnp.finfo(v.dtype).bits >= 32 else None
    values = v.astype(jnp.promote_types(v.dtype, p_k.dtype))
    if normalize == "row":
        values = jnp.concatenate([values, jnp.ones_like(values[..., :1])], axis=-1)
    summary = jnp.einsum("bhml,bmhd->bhld", p_k, values, precision=precision)
    scale = jax.lax.rsqrt(gram.sum(axis=-1, keepdims=True)) if normalize == "symmetric" else 1
    summary = scale * _solve(gram, scale * summary, ridge, solver)
    out = jnp.einsum("bhnl,bhld->bnhd", p_q, summary, precision=precision)
    if normalize == "row":
        out, total = out[..., :-1], out[..., -1:]
        out = out / jnp.where(total == 0, 1, total)
    return out.astype(v.dtype)


def gaussian_landmark_features(
    x: Float[Array, "b n h k"], landmarks: Float[Array, "h l k"], *, ridge: Ridge = 0.01, whiten: bool = True
) -> Float[Array, "b n h l"]:
    """Returns features φ(x) of queries or keys x for linear attention with fixed landmarks, in at least float32.

    They are computed from the kernel K of the module docstring and the landmarks L. Do not divide x and landmarks by
    (head width)^¼; this function does so.

    whiten: if True, φ(x) is C⁻¹ K(L, x) with C Cᵀ = K(L, L) + ridge I, so φ(x)·φ(y) is the Nyström approximation of
    K(x, y). It may be negative, so apply a normalisation layer to the outputs of attention instead of dividing them by
    the sum of the weights. If False, φ(x) is K(L, x), which is positive.
    ridge: used only if whiten is True.

    Raises ValueError if x and landmarks differ in the number or the width of heads.

    Example:
        phi_q, phi_k = (gaussian_landmark_features(x, landmarks) for x in (q, k))
    """
    if x.shape[2:] != (landmarks.shape[0], landmarks.shape[2]):
        raise ValueError(
            f"x has shape {x.shape} and landmarks have shape {landmarks.shape}; pass landmarks of shape "
            "(heads, number, width) whose heads and width match x."
        )
    check_floats(x=x, landmarks=landmarks)
    return _landmark_features(x, landmarks, ridge, whiten)


@partial(jax.jit, static_argnames="whiten")
def _landmark_features(x, landmarks, ridge, whiten):
    def run(x, landmarks, ridge):
        points = rearrange(to_kernel_space(landmarks), "h l k -> 1 l h k")
        features = gaussian_kernel(to_kernel_space(x), jnp.broadcast_to(points, (x.shape[0], *points.shape[1:])))
        if whiten:  # all samples share one Cholesky factor
            whitening = inverse_cholesky(add_ridge(gaussian_kernel(points, points)[0], ridge))
            features = jnp.einsum("hlm,bhnm->bhnl", whitening, features, precision=HIGHEST)
        return features.swapaxes(1, 2)

    return keep_axes(run, x, landmarks, ridge, named=[(x, "b n h k"), (landmarks, "h l k")], out="b n h l")


def _check_tokens(q: Array, k: Array, v: Array) -> None:
    check_floats(q=q, k=k, v=v)
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must be (batch, tokens, heads, width), but have shapes {shapes}; reshape them.")
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"k and v must have the same number of tokens (axis 1), but have shapes {shapes}.")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k and v must have the same batch size (axis 0), but have shapes {shapes}.")
    if not q.shape[2] == k.shape[2] == v.shape[2]:
        raise ValueError(
            f"q, k and v must have the same number of heads (axis 2), but have shapes {shapes}. If k and v have "
            "fewer heads, repeat them."
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have the same width (axis 3), but have shapes {shapes}; project one of them.")


def _key_padding(mask: Array, k: Array) -> Bool[Array, "b m"]:
    """Returns a key mask `b m` or `b 1 1 m` as `b m`; raises ValueError for any other mask."""
    batch, length = k.shape[:2]
    check_boolean(mask)
    keys = mask[:, 0, 0] if mask.ndim == 4 and mask.shape[1:3] == (1, 1) else mask
    if keys.ndim != 2 or keys.shape[0] not in (1, batch) or keys.shape[1] not in (1, length):
        raise ValueError(
            f"mask has shape {mask.shape}, but SOFT supports only key masks, ({batch}, {length}) or "
            f"({batch}, 1, 1, {length}). For masks that differ between queries or heads, use softmax_attention."
        )
    return jnp.broadcast_to(keys, (batch, length))


def _choose_landmarks(
    k: Array, mask: Array | None, num_landmarks: int | Pair, grid: Pair | None, landmarks: Array | None
) -> Landmarks:
    """Returns the given landmarks, or pools them from keys k in kernel space."""
    if landmarks is not None:
        if grid is not None:
            raise ValueError(f"landmarks cannot be combined with grid={grid}; leave one of them out.")
        points = landmarks[None] if landmarks.ndim == 3 else landmarks
        batch, _, heads, width = k.shape
        if points.ndim != 4 or points.shape[0] not in (1, batch) or points.shape[2:] != (heads, width):
            raise ValueError(
                f"landmarks have shape {landmarks.shape}, but k has {heads} heads of width {width}; pass (number, "
                f"{heads}, {width}) or ({batch}, number, {heads}, {width})."
            )
        return Landmarks(jnp.broadcast_to(to_kernel_space(points), (batch, *points.shape[1:])))
    if min(num_landmarks if isinstance(num_landmarks, tuple) else (num_landmarks,)) < 1:
        raise ValueError(f"num_landmarks must be at least 1, not {num_landmarks}.")
    if grid is None:
        if isinstance(num_landmarks, tuple):
            raise ValueError(f"num_landmarks={num_landmarks} needs a grid; pass grid=(height, width).")
        return pool_landmarks(k, num_landmarks, mask)
    if grid[0] * grid[1] != k.shape[1]:
        raise ValueError(f"grid {grid} does not match the {k.shape[1]} keys; pass the (height, width) of the keys.")
    return pool_landmarks_2d(k, grid, num_landmarks, mask)


def soft_attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h d"],
    *,
    num_landmarks: int | Pair = 49,
    grid: Pair | None = None,
    landmarks: Float[Array, "l h k"] | Float[Array, "#b l h k"] | None = None,
    mask: Bool[Array, "#b #m"] | Bool[Array, "#b #h #n #m"] | None = None,
    is_causal: bool = False,
    ridge: Ridge = 0.01,
    solver: Solver = "newton",
    normalize: Normalization = None,
) -> Float[Array, "b n h d"]:
    """Returns SOFT attention Ŝ v (see the module docstring). In the paper, keys equal queries: soft_attention(q, q, v).

    num_landmarks: the number of landmarks, capped at m. Each landmark is the mean of a run of consecutive unmasked
    keys. With a grid, it is the maximum number of landmarks, or a pair: the numbers of rows and columns of landmarks.
    grid: (height, width) of the grid of keys, which are in row-major order. If it is given, each landmark is the mean
    of the keys in one cell of the grid. None means that the keys form a sequence.
    landmarks: points in the space of k, used instead of means of keys; num_landmarks is then ignored, and grid must be
    None.
    mask: True for keys to keep, `b m` or `b 1 1 m`; masked keys have no effect. Outside jit, the product of a query
    mask and a key mask, `b 1 n m`, is also allowed; the outputs of masked queries are then 0.
    is_causal: must be False.
    ridge: the number added to the diagonal of A, at least 0.
    solver: how (A + ridge I)⁻¹ is computed. "newton" is the paper's Newton-Raphson iteration, with a closed-form
    derivative. "cholesky" is exact. "newton_released" is the solver of the published SOFT++ code; with it, the samples
    of a batch affect each other, and ridge must be 0.0.
    normalize: None means no normalisation, as in SOFT; the weights of a query, which are a row of Ŝ, may then sum to as
    much as m. "symmetric" is the normalisation of SOFT++. "row" divides the weights of each query by their sum.

    Raises ValueError if is_causal is True, or if the mask, shapes or options are invalid.

    Example:
        out = soft_attention(q, q, v, num_landmarks=49, grid=(14, 14), solver="cholesky")
    """
    if is_causal:
        raise ValueError(
            "SOFT cannot be causal: its landmarks are pooled from the whole sequence, so every token would see the "
            "future. Use gaussian_landmark_attention, which has fixed landmarks."
        )
    _check_tokens(q, k, v)
    _check_options(ridge, solver, normalize)
    queries = None
    if mask is not None and mask.ndim == 4 and mask.shape[2] == q.shape[1] > 1:
        queries, mask = split_pairs(mask, groups=1, block_size=None) or (None, mask)
    mask = None if mask is None else _key_padding(mask, k)
    if 0 in (*q.shape[:3], k.shape[1]):
        return jnp.zeros((*q.shape[:3], v.shape[-1]), v.dtype)
    q, k = to_kernel_space(q), to_kernel_space(k)
    chosen = _choose_landmarks(k, mask, num_landmarks, grid, landmarks)
    out = nystrom_attention(q, k, v, chosen, mask=mask, ridge=ridge, solver=solver, normalize=normalize)
    return out if queries is None else hide_queries(out, queries)
