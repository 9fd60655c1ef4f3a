"""Linear attention with a separable kernel φ(q)·φ(k): full, causal, block-causal, packed, or from a running state.

    out_i = Σ_j φ(q_i)·φ(k_j) v_j / (Σ_j φ'(q_i)·φ'(k_j) + eps)        (Katharopoulos et al. 2020, arXiv 2006.16236)

φ' is φ without the map's rotary embedding; it equals φ for maps that have none. Features, sums and states have at least
float32 precision; the output has the dtype of v. If all keys of a query are masked, its output is 0. There may be fewer
key heads than query heads (GQA).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from flowgen.attention.causal import Causal, as_causal
from flowgen.attention.checks import (
    check_causal,
    check_heads,
    check_key_mask,
    check_mask,
    check_pallas,
    check_quadratic,
    check_segments,
    errors_of_kernel,
    hide_keys,
    is_key_mask,
)
from flowgen.attention.features import FeatureMap, feature_map
from flowgen.attention.linalg import HIGHEST
from flowgen.attention.masks import hide_queries, split_pairs
from flowgen.attention.prefix import (
    CHUNK_SIZE,
    Features,
    LinearState,
    Tokens,
    check_features,
    empty_state,
    finite_prefix_product,
    keep_keys,
    prefix_product,
)
from flowgen.attention.segments import finite, spoil, spoiled
from flowgen.attention.slices import positions
from flowgen.backend import keep_axes

EPS = 1e-6


def linear_attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m g k"],
    v: Float[Array, "b m g d"],
    features: FeatureMap | str = "elu_plus_one",
    *,
    mask: Array | None = None,
    is_causal: bool | Causal = False,
    segment_ids: Int[Array, "b n"] | None = None,
    eps: float = EPS,
) -> Float[Array, "b n h d"]:
    """Returns the outputs of linear attention, out_i in the module docstring.

    features: the feature map, or its name in `FEATURE_MAPS`.
    mask: True for keys to keep; its shape must broadcast to `b h n m`. With a key mask (query axis of length 1), the
    cost is linear in the number of tokens. Outside jit, the cost is also linear if the mask is the product of a query
    mask and a key mask (and, in causal attention, of the causal mask). Inside jit, pass only the key mask of such a
    product; if it keeps the same tokens as queries and as keys, `own_keys` returns the key mask. With all other masks,
    the cost is quadratic, and n · m must not exceed 4096 x 4096.
    is_causal: whether query i attends only to keys 0..i. A `Causal` means True and sets options, such as blocks.
    segment_ids: tokens attend to each other only if their ids are equal. Tokens with equal ids must be contiguous; see
    `prefix_product`.
    eps: added to the normaliser.

    Raises ValueError if shapes, dtypes, the mask, the segment ids or the name of the feature map are invalid.

    Example:
        out = linear_attention(q, k, v, "focused", is_causal=True)
    """
    check_heads(q, k, v)
    if as_causal(is_causal):
        check_causal(q, k)
    k, v = hide_keys(k, v, check_mask(mask, q, k))
    phi = feature_map(features)
    mapped = phi(q, k)
    if segment_ids is not None:  # a feature map may hide non-finite values
        mapped = mapped._replace(q=spoil(mapped.q, finite((q,))[1]), k=spoil(mapped.k, finite((k,))[1]))
    if phi.query_scale is None:
        return attend_features(mapped, v, mask=mask, is_causal=is_causal, segment_ids=segment_ids, eps=eps)
    scaled = eps * phi.query_scale(q)
    return attend_features(mapped, v, mask=mask, is_causal=is_causal, segment_ids=segment_ids, eps=scaled)


def attend_features(
    features: Features,
    v: Float[Array, "b m g d"],
    *,
    mask: Array | None = None,
    is_causal: bool | Causal = False,
    segment_ids: Int[Array, "b n"] | None = None,
    eps: float | Float[Array, "b n h"] = EPS,
) -> Float[Array, "b n h d"]:
    """Returns linear attention for features that are already computed.

    The arguments after v are as in `linear_attention`. eps may also be an array with one number per query and head.

    Example:
        out = attend_features(Features(phi(q), phi(k)), v, is_causal=True)
    """
    return normalised(*products(features, v, mask=mask, is_causal=is_causal, segment_ids=segment_ids), eps, v.dtype)


def products(
    features: Features,
    v: Float[Array, "b m g d"],
    *,
    mask: Array | None = None,
    is_causal: bool | Causal = False,
    segment_ids: Int[Array, "b n"] | None = None,
) -> tuple[Float[Array, "b n h d"], Float[Array, "b n h"]]:
    """Returns the numerators Σ_j φ(q_i)·φ(k_j) v_j and the normalisers Σ_j φ'(q_i)·φ'(k_j) of `attend_features`."""
    check_features(features, v)
    q, k = features.q, features.k
    mask = check_mask(mask, q, k)
    causal = as_causal(is_causal)
    if causal is not None:
        check_causal(q, k)
    check_segments(segment_ids, q, k)
    queries = None
    if mask is not None and not is_key_mask(mask, k):
        queries, mask = split_pairs(mask, k.shape[2], None if causal is None else causal.block_size) or (None, mask)
    if mask is not None and not is_key_mask(mask, k):
        check_quadratic(q, k)
    if causal is not None and causal.implementation == "pallas":
        check_pallas(causal.block_size, segment_ids)
        with errors_of_kernel("the Pallas kernel"):
            results = _products(features, v, mask, segment_ids, causal)
    else:
        results = _products(features, v, mask, segment_ids, causal)
    return results if queries is None else hide_queries(results, queries)


@partial(jax.jit, static_argnames="causal")
def _products(features, v, mask, segment_ids, causal: Causal | None):
    if segment_ids is None or segment_ids.shape[1] == 0:
        return _finite_products(features, v, mask, None, causal)

    def run(features, v, mask, segment_ids):
        (q, norm_q), bad_q = finite((features.q, features.norm_q))
        (k, norm_k, v), bad_k = finite((features.k, features.norm_k, v))
        results = _finite_products(Features(q, k, norm_q, norm_k), v, mask, segment_ids, causal)
        block_size = None if causal is None else causal.block_size
        bad = spoiled(segment_ids, bad_q, bad_k, jnp.zeros_like(bad_k[:, 0]), block_size).out
        return spoil(results[0], bad), spoil(results[1], bad)

    return _with_axes(run, features, v, mask, segment_ids)


def _finite_products(features: Features, v: Array, mask, segment_ids, causal: Causal | None) -> tuple[Array, Array]:
    q, k = features.q, features.k
    if mask is not None and not is_key_mask(mask, k):
        return quadratic_products(features, v, seen_pairs(mask, causal, segment_ids, q.shape[1], k.shape[1]))
    if mask is not None:
        features, v = keep_keys(features, v, mask)
    if causal is not None and causal.implementation == "pallas":
        return _pallas(features, v, causal)
    if causal is not None:
        tokens = Tokens(features, v, segment_ids=segment_ids)
        return finite_prefix_product(tokens, block_size=causal.block_size, chunk_size=causal.chunk_size)[:2]
    if segment_ids is not None:
        return _packed(features, v, segment_ids)
    return _full(features, v)


@jax.jit
def quadratic_products(
    features: Features,
    v: Float[Array, "b m g d"],
    mask: Bool[Array, "#b #h #n #m"] | None,
    factors: Float[Array, "#b #h #n #m"] | None = None,
) -> tuple[Float[Array, "b n h d"], Float[Array, "b n h"]]:
    """Returns the numerators and normalisers of linear attention (see the module docstring) at quadratic cost.

    All n x m weights are computed, so the mask may be any query-key mask.

    mask: True for keys to keep; None keeps all keys.
    factors: finite numbers by which the weights of both sums are multiplied; None means no factors.

    Raises ValueError if shapes, dtypes or the mask do not match.

    Example:
        out, total = quadratic_products(Features(q, k), v, mask)
    """
    check_features(features, v)
    mask = check_mask(mask, features.q, features.k)

    def run(features, v, mask, factors):
        dtype = jnp.promote_types(jnp.result_type(features.k, v), jnp.float32)
        repeats = features.q.shape[2] // v.shape[2]
        keys, bad = (features.k, features.norm_k, v), None
        if mask is not None:  # A non-finite key or value affects only the queries that see it.
            keys, bad = finite(keys)
        features = features._replace(k=keys[0], norm_k=keys[1])

        def weights(q, k):
            pairs = jnp.einsum("bnhp,bmhp->bhnm", q, jnp.repeat(k, repeats, axis=2), precision=HIGHEST)
            pairs = pairs.astype(dtype) if factors is None else pairs.astype(dtype) * factors
            return pairs if mask is None else jnp.where(mask, pairs, 0)

        numerator = weights(features.q, features.k)
        norm = numerator if features.norm_q is None else weights(*features.normaliser)
        values = jnp.repeat(keys[2].astype(dtype), repeats, axis=2)
        out = jnp.einsum("bhnm,bmhd->bnhd", numerator, values, precision=HIGHEST)
        total = norm.sum(axis=-1).swapaxes(1, 2)
        if bad is None:
            return out, total
        reached = (mask & jnp.repeat(bad, repeats, axis=2).swapaxes(1, 2)[:, :, None]).any(axis=-1).swapaxes(1, 2)
        return spoil(out, reached), spoil(total, reached)

    return _with_axes(run, features, v, mask, factors)


def seen_pairs(
    mask: Bool[Array, "#b #h #n #m"], causal: Causal | None, segment_ids: Int[Array, "b n"] | None, n: int, m: int
) -> Bool[Array, "#b #h #n #m"]:
    """Returns a mask combined with causal order and segments, for n queries and m keys."""
    if causal is not None:
        block_q, block_k = jnp.arange(n) // causal.block_size, jnp.arange(m) // causal.block_size
        mask = mask & (block_q[:, None] >= block_k[None, :])[None, None]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return mask


def normalised(
    out: Float[Array, "b n h d"], total: Float[Array, "b n h"], eps: float | Float[Array, "b n h"], dtype: jnp.dtype
) -> Float[Array, "b n h d"]:
    """Returns out / (total + eps), or out itself where the divisor is 0."""
    total = total + eps
    return (out / jnp.where(total == 0, 1, total)[..., None]).astype(dtype)


def init_state(
    batch: int,
    num_heads: int,
    key_dim: int,
    value_dim: int,
    features: FeatureMap | str = "elu_plus_one",
    *,
    dtype: DTypeLike = jnp.float32,
) -> LinearState:
    """Returns the state of linear attention before the first token, with at least float32 precision.

    num_heads: the number of key heads.
    features: the feature map, or its name, as in the later calls of `prefill` and `step`.
    dtype: the dtype of the inputs.

    Example:
        state = init_state(batch=1, num_heads=8, key_dim=64, value_dim=64, features="nala")
    """
    token = jnp.zeros((batch, 1, num_heads, key_dim), dtype)
    return empty_state(feature_map(features)(token, token), jnp.zeros((batch, 1, num_heads, value_dim), dtype))


def prefill(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b n g k"],
    v: Float[Array, "b n g d"],
    features: FeatureMap | str = "elu_plus_one",
    *,
    state: LinearState | None = None,
    mask: Array | None = None,
    eps: float = EPS,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Array, "b n h d"], LinearState]:
    """Returns causal linear attention for the next n tokens of a sequence, and the state after them.

    features: the feature map, or its name in `FEATURE_MAPS`.
    state: the state after the earlier tokens; None means that there are none.
    mask: a key mask (query axis of length 1), True for tokens to keep; any other mask raises ValueError. Prompts may be
    padded on either side: the next token of each sample follows the last token that its mask keeps.
    eps: added to the normaliser.
    chunk_size: number of tokens that are processed in parallel; it affects speed, memory and rounding.

    Example:
        out, state = prefill(q, k, v, "nala")
    """
    check_heads(q, k, v)
    check_causal(q, k)
    mask = None if mask is None else check_key_mask(mask, q, k)
    k, v = hide_keys(k, v, mask)
    phi = feature_map(features)
    start = 0 if state is None else state.length
    mapped = phi(q, k, start)
    if phi.limit is not None:  # tokens beyond the limit, such as a window's padding, must not affect earlier ones
        exists = (positions(start, k.shape[1]) < phi.limit)[:, None, None]
        mask = exists if mask is None else mask & exists
    out, total, state = prefix_product(mapped, v, state=state, mask=mask, chunk_size=chunk_size)
    scale = 1 if phi.query_scale is None else phi.query_scale(q)
    return normalised(out, total, eps * scale, v.dtype), state


def step(
    state: LinearState,
    q: Float[Array, "b h k"],
    k: Float[Array, "b g k"],
    v: Float[Array, "b g d"],
    features: FeatureMap | str = "elu_plus_one",
    *,
    eps: float = EPS,
) -> tuple[Float[Array, "b h d"], LinearState]:
    """Returns the output of causal linear attention for one more token, and the state after it.

    state: the state after the earlier tokens, from `init_state`, `prefill` or an earlier step with the same features.

    The other arguments are as in `prefill`. The cost does not depend on the number of earlier tokens.

    Example:
        out, state = step(state, q[:, t], k[:, t], v[:, t], "nala")
    """
    if not isinstance(state, LinearState):
        raise ValueError(
            f"state is a {type(state).__name__}; call step(state, q, k, v) with a state from init_state or prefill."
        )
    if not q.ndim == k.ndim == v.ndim == 3:
        raise ValueError(f"q has shape {q.shape} and k has shape {k.shape}, but step expects (batch, heads, width).")
    out, state = prefill(q[:, None], k[:, None], v[:, None], features, state=state, eps=eps)
    return out[:, 0], state


def _pallas(features: Features, v: Array, causal: Causal) -> tuple[Array, Array]:
    from flowgen.attention.pallas import causal_product  # imported here because pallas loads the TPU dialects

    out, total = causal_product(features.q, features.k, v, causal.chunk_size)
    if features.norm_q is not None:
        total = causal_product(*features.normaliser, v[..., :1], causal.chunk_size)[1]
    return out, total


def _full(features: Features, v: Array) -> tuple[Array, Array]:
    """Returns products for queries that attend to every key, from one state for all keys and one product per query."""

    def run(features, v):
        dtype = jnp.promote_types(jnp.result_type(features.k, v), jnp.float32)
        groups = v.shape[2]
        kv = jnp.einsum("bmgp,bmgd->bgpd", features.k, v.astype(dtype), precision=HIGHEST)
        norm_q, norm_k = features.normaliser

        def grouped(x):
            return rearrange(x, "b n (g r) p -> b n g r p", g=groups)

        out = jnp.einsum("bngrp,bgpd->bngrd", grouped(features.q), kv, precision=HIGHEST)
        total = jnp.einsum("bngrp,bgp->bngr", grouped(norm_q), norm_k.sum(axis=1), precision=HIGHEST)
        return rearrange(out, "b n g r d -> b n (g r) d"), rearrange(total, "b n g r -> b n (g r)")

    return _with_axes(run, features, v)


def _packed(features: Features, v: Array, segment_ids: Array) -> tuple[Array, Array]:
    """Returns products for tokens that attend to their whole segment.

    Each result is the sum up to the token, plus the sum from the token on, minus the token's own term.
    """

    def run(features, v, segment_ids):
        back = jax.tree.map(lambda x: x[:, ::-1], (features, v, segment_ids))
        ahead = finite_prefix_product(Tokens(features, v, segment_ids=segment_ids))
        behind = finite_prefix_product(Tokens(*back[:2], segment_ids=back[2]))
        repeats = features.q.shape[2] // v.shape[2]

        def own(q, k):
            return (q * jnp.repeat(k, repeats, axis=2)).sum(axis=-1)

        weight = own(features.q, features.k)
        norm = weight if features.norm_q is None else own(*features.normaliser)
        values = jnp.repeat(v.astype(weight.dtype), repeats, axis=2)
        out = ahead[0] + behind[0][:, ::-1] - weight[..., None] * values
        return out, ahead[1] + behind[1][:, ::-1] - norm

    return _with_axes(run, features, v, segment_ids)


def _with_axes(run, features: Features, v: Array, *rest: Array | None) -> tuple[Array, Array]:
    named = [(features.q, "b n h p"), (features.k, "b m g p"), (v, "b m g d")]
    return keep_axes(run, features, v, *rest, named=named, out=("b n h d", "b n h"))
