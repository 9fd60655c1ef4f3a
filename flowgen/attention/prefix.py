"""Prefix products: causal linear attention before normalisation, in chunks with a running float32 state.

For queries q_t, keys k_s, values v_s and the weights w_ts defined below,

    out_t = Σ_s w_ts (q_t·k_s) v_s,      total_t = Σ_s w_ts (q'_t·k'_s),      s ≤ t (or block(s) ≤ block(t)),

where q', k' are the normaliser's features. They equal q, k unless they are given separately, for example by feature
maps that rotate only the numerator. The weight w_ts is exp(b_t - b_s), where b is the running sum of the log-decay; it
is 1 without decay, and 0 if s and t are in different segments. A chunk of C tokens requires one C x C product; the
state Σ_s k_s v_sᵀ sums over the tokens before the chunk.

Reverse-mode differentiation stores one state per chunk and recomputes the rest, because the body of the scan is
checkpointed. Forward-mode differentiation is also supported.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flowgen.attention.checks import check_causal, check_heads, check_key_mask, check_segments
from flowgen.attention.linalg import HIGHEST
from flowgen.attention.segments import finite, spoil, spoiled
from flowgen.backend import keep_axes, varying

CHUNK_SIZE = 64


class LinearState(NamedTuple):
    """The sums over all tokens so far from which linear attention continues a sequence.

    The symbols are those of the module docstring, and t is the last token.

    kv: Σ_s w_ts k_s v_sᵀ for each sample and key head.
    norm: Σ_s w_ts k'_s for each sample and key head.
    length: the position of each sample's next token, counted from 0. The next token follows the last token that the
    mask keeps, so masked tokens count towards the length only if a kept token follows them.
    """

    kv: Float[Array, "b g p d"]
    norm: Float[Array, "b g e"]
    length: Int[Array, " b"]


class Features(NamedTuple):
    """The features of queries and keys from which linear attention computes its weights.

    q, k: the features for the numerator. h must be a multiple of g.
    norm_q, norm_k: the features for the normaliser; None means that they equal q and k.
    """

    q: Float[Array, "b n h p"]
    k: Float[Array, "b m g p"]
    norm_q: Float[Array, "b n h e"] | None = None
    norm_k: Float[Array, "b m g e"] | None = None

    @property
    def normaliser(self) -> tuple[Float[Array, "b n h e"], Float[Array, "b m g e"]]:
        """The features of queries and keys for the normaliser: norm_q and norm_k or, if these are None, q and k."""
        if (self.norm_q is None) != (self.norm_k is None):
            raise ValueError("only one of norm_q and norm_k is given; pass both, or neither to use q and k.")
        if self.norm_q is None or self.norm_k is None:
            return self.q, self.k
        return self.norm_q, self.norm_k


class Tokens(NamedTuple):
    """The inputs of `prefix_product` that have one row per token."""

    features: Features
    v: Float[Array, "b n g d"]
    log_decay: Float[Array, "#b n #g"] | None = None
    mask: Bool[Array, "#b #g 1 n"] | None = None
    segment_ids: Int[Array, "b n"] | None = None


class _Chunk(NamedTuple):
    q: Float[Array, "b g r c p"]
    k: Float[Array, "b g c p"]
    v: Float[Array, "b g c d"]
    norm_q: Float[Array, "b g r c e"] | None
    norm_k: Float[Array, "b g c e"] | None
    log_decay: Float[Array, "b g c"] | None
    segment: Int[Array, "b c"] | None


def check_features(features: Features, v: Array) -> None:
    """Raises ValueError unless the features and v have the axes that `Features` states, in floating point."""
    check_heads(features.q, features.k, v)
    norm_q, norm_k = features.normaliser
    for name, norm, other in (("norm_q", norm_q, features.q), ("norm_k", norm_k, features.k)):
        if norm.shape[:-1] != other.shape[:-1] or norm.shape[-1:] != norm_k.shape[-1:]:
            raise ValueError(
                f"{name} has shape {norm.shape}, but needs the axes {other.shape[:-1]} of the numerator's features, "
                f"and the width {norm_k.shape[-1]} of norm_k."
            )


def empty_state(features: Features, v: Float[Array, "b n g d"]) -> LinearState:
    """Returns the state before the first token, with shapes that match these arrays and at least float32 precision."""
    dtype = jnp.promote_types(jnp.result_type(features.k, v), jnp.float32)
    kv, norm, length = _state_shapes(features, v)
    return LinearState(jnp.zeros(kv, dtype), jnp.zeros(norm, dtype), jnp.zeros(length, jnp.int32))


def keep_keys(
    features: Features, v: Float[Array, "b m g d"], mask: Bool[Array, "#b #g 1 m"]
) -> tuple[Features, Float[Array, "b m g d"]]:
    """Returns the features and v with zeros for masked keys (False), so that even NaN there has no effect."""
    keep = _per_token(mask)[..., None]
    zeroed = {"k": jnp.where(keep, features.k, 0)}
    if features.norm_k is not None:
        zeroed["norm_k"] = jnp.where(keep, features.norm_k, 0)
    return features._replace(**zeroed), jnp.where(keep, v, 0)


def prefix_product(
    features: Features,
    v: Float[Array, "b n g d"],
    *,
    state: LinearState | None = None,
    log_decay: Float[Array, "b n g"] | None = None,
    mask: Bool[Array, "#b #g 1 n"] | None = None,
    segment_ids: Int[Array, "b n"] | None = None,
    block_size: int = 1,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Array, "b n h d"], Float[Array, "b n h"], LinearState]:
    """Returns out and total (see the module docstring) and the state after the last token, all in at least float32.

    state: the state after earlier tokens, which belong to the segment of the first token in v; None means that there
    are none.
    log_decay: the logarithm of the decay factor of each token and key head, at most 0; None means no decay.
    mask: True for keys to keep. The key, value and decay of a masked token are ignored. Masked tokens after the last
    kept token do not count towards `length` in the returned state.
    segment_ids: tokens attend to each other only if their ids are equal; None means one segment. Tokens with equal ids
    must be contiguous. If an id recurs later in a sample, the function raises ValueError or, if segment_ids is traced,
    returns NaN for that sample. With segment_ids, a non-finite number affects only its own segment.
    block_size: the number of tokens in a block. Each token attends to its whole block and to all earlier blocks. If
    block_size is above 1, log_decay must be None, and the number of tokens in `state` must be a multiple of block_size;
    this is not checked.
    chunk_size: the number of tokens that are processed in parallel, rounded up to whole blocks; it affects speed,
    memory and rounding.

    Raises ValueError if shapes, dtypes or the mask do not match.

    Example:
        out, total, state = prefix_product(Features(q, k), v)
    """
    if chunk_size < 1 or block_size < 1:
        raise ValueError(f"chunk_size is {chunk_size} and block_size is {block_size}, but both must be at least 1.")
    check_features(features, v)
    check_causal(features.q, features.k)
    check_segments(segment_ids, features.q, features.k)
    mask = None if mask is None else check_key_mask(mask, features.q, features.k)
    if log_decay is not None and log_decay.shape != v.shape[:3]:
        raise ValueError(
            f"log_decay has shape {log_decay.shape}, but must be (batch, tokens, key heads) = {v.shape[:3]}."
        )
    kv, norm, length = _state_shapes(features, v)
    if state is not None and (state.kv.shape, state.norm.shape) != (kv, norm):
        raise ValueError(
            f"state does not match the features and values: state.kv has shape {state.kv.shape}, but they need {kv}."
        )
    if state is not None and state.length.shape not in ((), length):
        raise ValueError(
            f"state.length has shape {state.length.shape}, but must contain one position per sample, {length}."
        )
    tokens = Tokens(features, v, log_decay, mask, segment_ids)
    return finite_prefix_product(tokens, state, block_size=block_size, chunk_size=chunk_size, isolate=True)


@partial(jax.jit, static_argnames=("block_size", "chunk_size", "isolate"))
def finite_prefix_product(
    tokens: Tokens,
    state: LinearState | None = None,
    *,
    block_size: int = 1,
    chunk_size: int = CHUNK_SIZE,
    isolate: bool = False,
):
    """Returns the result of `prefix_product` for arguments that are already checked.

    If there are segments, all numbers must be finite unless `isolate` is True.
    """
    features, v = tokens.features, tokens.v
    named = [(features.q, "b n h p"), (features.k, "b n g p"), (v, "b n g d"), (features.normaliser[1], "b n g e")]
    letters = ("b n h d", "b n h", "b g p d", "b g e", "b")

    def run(tokens, state):
        given, v, log_decay, mask, segment_ids = tokens
        features, v = _at_least_float32(given, v)
        empty = empty_state(features, v)
        state = empty if state is None else LinearState(*(x + y for x, y in zip(state, empty, strict=True)))
        state = varying(state, (features, v, log_decay, mask, segment_ids))
        n, ends = v.shape[1], v.shape[1]
        if mask is not None:
            features, v = keep_keys(features, v, mask)
            keep = _per_token(mask)
            log_decay = None if log_decay is None else jnp.where(keep, log_decay, 0)
            ends = jnp.where(keep.any(axis=2), 1 + jnp.arange(n)[None], 0).max(axis=1, initial=0)
        length = state.length + ends
        if n == 0:
            heads = features.q.shape[:3]
            return jnp.zeros((*heads, v.shape[-1]), v.dtype), jnp.zeros(heads, v.dtype), *state
        product = _in_segments if isolate and segment_ids is not None else _in_chunks
        kept = Tokens(features, v, log_decay, segment_ids=segment_ids)
        out, total, kv, norm = product(kept, state, block_size, chunk_size)
        return out, total, kv, norm, length

    out, total, *after = keep_axes(run, tokens, state, named=named, out=letters)
    return out, total, LinearState(*after)


def _in_segments(tokens: Tokens, state: LinearState, block_size: int, chunk_size: int):
    """Runs `_in_chunks` on finite numbers only; returns NaN where a result depends on a non-finite number."""
    features, v, log_decay, _, segment_ids = tokens
    assert segment_ids is not None
    queries, keys = (features.q, features.norm_q), (features.k, features.norm_k, v)
    queries, bad_q = finite(queries)
    keys, bad_k = finite(keys)
    (kv, norm), bad_state = finite((state.kv[:, None], state.norm[:, None]))
    if log_decay is not None:
        bad_decay = jnp.isnan(log_decay) | jnp.isposinf(log_decay)
        log_decay, bad_k = jnp.where(bad_decay, 0, log_decay), bad_k | bad_decay
    features = Features(queries[0], keys[0], queries[1], keys[1])
    state = state._replace(kv=kv[:, 0], norm=norm[:, 0])
    tokens = Tokens(features, keys[2], log_decay, segment_ids=segment_ids)
    results = _in_chunks(tokens, state, block_size, chunk_size)
    bad = spoiled(segment_ids, bad_q, bad_k, bad_state[:, 0], block_size)
    return tuple(map(spoil, results, (bad.out, bad.out, bad.state, bad.state)))


def _in_chunks(tokens: Tokens, state: LinearState, block_size: int, chunk_size: int):
    """Returns out, total, kv and norm for at least one token."""
    v, segment_ids = tokens.v, tokens.segment_ids
    batch, n = v.shape[:2]
    size = -(-chunk_size // block_size) * block_size
    if isinstance(n, int):  # not symbolic, as in an exported program
        size = min(size, -(-n // block_size) * block_size)
    chunks = _split(tokens, size)
    past = None if segment_ids is None else segment_ids[:, 0]

    def body(carry, chunk):
        return _advance(carry, chunk, block_size)

    carry = (state.kv, state.norm, past)
    if isinstance(n, int) and size >= n:
        carry, (out, total) = body(carry, jax.tree.map(lambda x: x[0], chunks))
        out, total = out[None], total[None]
    else:
        carry, (out, total) = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), carry, chunks)
    count = chunks.k.shape[0] * size
    heads = tokens.features.q.shape[2]
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, count, heads, v.shape[-1])[:, :n]
    total = total.transpose(1, 0, 4, 2, 3).reshape(batch, count, heads)[:, :n]
    return out, total, carry[0], carry[1]


def _state_shapes(features: Features, v: Array) -> tuple[tuple[int, ...], ...]:
    batch, _, groups, feature_dim = features.k.shape
    return (batch, groups, feature_dim, v.shape[-1]), (batch, groups, features.normaliser[1].shape[-1]), (batch,)


def _at_least_float32(features: Features, v: Array) -> tuple[Features, Array]:
    dtype = jnp.promote_types(jnp.result_type(features.q, features.k, v), jnp.float32)
    return jax.tree.map(lambda x: x.astype(dtype), features), v.astype(dtype)


def _per_token(mask: Bool[Array, "#b #g 1 n"]) -> Bool[Array, "#b n #g"]:
    return mask[:, :, 0, :].swapaxes(1, 2)


def _split(tokens: Tokens, size: int) -> _Chunk:
    """Returns chunks of `size` tokens, stacked along the first axis; zero padding adds nothing to the state."""
    features, v, log_decay, _, segment_ids = tokens
    batch, n, groups = v.shape[:3]
    count = -(-n // size)

    def chunked(x, mode="constant"):
        x = jnp.pad(x, [(0, 0), (0, count * size - n)] + [(0, 0)] * (x.ndim - 2), mode=mode)
        return x.reshape(batch, count, size, *x.shape[2:])

    def queries(x):
        if x is None:
            return None
        x = chunked(x)
        return x.reshape(*x.shape[:3], groups, x.shape[3] // groups, x.shape[-1]).transpose(1, 0, 3, 4, 2, 5)

    def keys(x):
        return None if x is None else chunked(x).transpose(1, 0, 3, 2, 4)

    decay = None if log_decay is None else chunked(log_decay.astype(v.dtype)).transpose(1, 0, 3, 2)
    segment = None if segment_ids is None else chunked(segment_ids, "edge").swapaxes(0, 1)
    q, k, norm_q, norm_k = features
    return _Chunk(queries(q), keys(k), keys(v), queries(norm_q), keys(norm_k), decay, segment)


def _advance(carry, chunk: _Chunk, block_size: int):
    """Returns the state after one chunk, and the chunk's outputs."""
    kv, norm, past = carry
    size = chunk.k.shape[2]
    block = jnp.arange(size) // block_size
    within = _Weights(
        pair=(block[:, None] >= block[None, :])[None, None],
        query=jnp.ones((1, 1, size), kv.dtype),
        key=jnp.ones((1, 1, size), kv.dtype),
        state=jnp.ones((1, 1), kv.dtype),
    )
    if chunk.segment is not None:
        within, past = _cut_segments(within, chunk.segment, past), chunk.segment[:, -1]
    within = _weigh(within, chunk.log_decay, kv.dtype)

    def product(pattern, *arrays):
        return jnp.einsum(pattern, *arrays, precision=HIGHEST)

    scores = product("bgrcp,bgsp->bgrcs", chunk.q, chunk.k) * within.pair[:, :, None]
    query, key = within.query[:, :, None, :, None], within.key[..., None]
    out = product("bgrcs,bgsd->bgrcd", scores, chunk.v) + product("bgrcp,bgpd->bgrcd", chunk.q * query, kv)
    norm_q, norm_k = chunk.q, chunk.k
    if chunk.norm_q is not None and chunk.norm_k is not None:
        norm_q, norm_k = chunk.norm_q, chunk.norm_k
        scores = product("bgrcp,bgsp->bgrcs", norm_q, norm_k) * within.pair[:, :, None]
    total = scores.sum(axis=-1) + product("bgrcp,bgp->bgrc", norm_q * query, norm)
    kv = kv * within.state[..., None, None] + product("bgsp,bgsd->bgpd", chunk.k * key, chunk.v)
    norm = norm * within.state[..., None] + (norm_k * key).sum(axis=2)
    return (kv, norm, past), (out, total)


class _Weights(NamedTuple):
    """The factors in a chunk that result from causal order, segments and decay.

    pair: the factor of each key for each query. query: the factor of the earlier state for each query. key: the factor
    of each key in the next state. state: the factor of the earlier state in the next state.
    """

    pair: Bool[Array, "#b #g c c"] | Float[Array, "#b #g c c"]
    query: Float[Array, "#b #g c"]
    key: Float[Array, "#b #g c"]
    state: Float[Array, "#b #g"]


def _cut_segments(within: _Weights, segment: Int[Array, "b c"], past: Int[Array, " b"]) -> _Weights:
    last = segment[:, -1]
    return _Weights(
        pair=within.pair & (segment[:, :, None] == segment[:, None, :])[:, None],
        query=within.query * (segment == past[:, None])[:, None],
        key=within.key * (segment == last[:, None])[:, None],
        state=within.state * (last == past)[:, None],
    )


def decay_weights(
    log_decay: Float[Array, "b h c"],
) -> tuple[Float[Array, "b h c c"], Float[Array, "b h c"]]:
    """Returns the factors by which tokens s and the earlier state have decayed at each token t; 0 for s > t.

    The log-decays between s and t are summed directly, not computed as differences of running sums. This avoids
    cancellation after a strong decay, and allows -inf. Entries with s > t are exp(0) before they are masked, so their
    gradients are finite.
    """
    size = log_decay.shape[-1]
    causal = jnp.tril(jnp.ones((size, size), bool))[None, None]
    after = jnp.tril(causal, -1)
    between = jnp.cumsum(jnp.where(after, log_decay[..., None], 0), axis=2)
    return jnp.where(causal, jnp.exp(between), 0), jnp.exp(jnp.cumsum(log_decay, axis=2))


def _weigh(within: _Weights, log_decay: Float[Array, "b g c"] | None, dtype: jnp.dtype) -> _Weights:
    if log_decay is None:
        return within._replace(pair=within.pair.astype(dtype))
    pair, past = decay_weights(log_decay)
    return _Weights(
        pair=jnp.where(within.pair, pair, 0),
        query=within.query * past,
        key=within.key * pair[:, :, -1],
        state=within.state * past[..., -1],
    )
