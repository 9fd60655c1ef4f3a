"""The delta rule and its gated form: linear attention that overwrites values instead of accumulating them.

Arrays have axes `b n h k` (batch, tokens, heads, width). The state S maps keys to values. Writing (k, v) replaces the
value that S returns for k with a mix of that value and v. The values of a repeated key therefore do not add up, and no
normaliser is needed. The chunked parallel form and the token-by-token step give the same outputs and states up to
rounding.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flowgen.attention.checks import check_boolean, check_floats
from flowgen.attention.linalg import unit_lower_inverse
from flowgen.attention.prefix import decay_weights
from flowgen.backend import keep_axes, varying

# Added to the squared norms of q and k, as in the published implementation; a zero vector stays zero.
NORM_EPS = 1e-6


class DeltaState(NamedTuple):
    """The state of the delta rule: S for every sample and head, in float32, or in float64 if the inputs are float64."""

    kv: Float[Array, "b h k d"]


def init_delta_state(
    batch: int, num_heads: int, key_dim: int, value_dim: int, *, dtype: jnp.dtype | type = jnp.float32
) -> DeltaState:
    """Returns the state of the delta rule before the first token; all its entries are 0.

    dtype: the dtype of the inputs; the state has at least float32 precision.

    Example:
        state = init_delta_state(batch=4, num_heads=8, key_dim=64, value_dim=64)
    """
    return DeltaState(jnp.zeros((batch, num_heads, key_dim, value_dim), jnp.promote_types(dtype, jnp.float32)))


def gated_delta_rule(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b n h k"],
    v: Float[Array, "b n h d"],
    beta: Float[Array, "b n h"],
    log_decay: Float[Array, "b n h"] | None = None,
    *,
    state: DeltaState | None = None,
    mask: Bool[Array, "#b n"] | Bool[Array, "#b 1 1 n"] | None = None,
    chunk_size: int = 64,
    use_qk_l2norm: bool = True,
    scale: float | None = None,
) -> tuple[Float[Array, "b n h d"], DeltaState]:
    """Returns the outputs of the gated delta rule, in the dtype of v, and the state after the last token.

    For each token in order, each head updates its state S and computes its output o (Yang, Kautz and Hatamizadeh, Gated
    Delta Networks, arXiv 2412.06464):

        S ← exp(g) S;   S ← S + β k (v − Sᵀk)ᵀ;   o = Sᵀq

    beta: β, the write strength, between 0 and 1.
    log_decay: g, the logarithm of the decay factor of each token and head, at most 0; None means no decay. If g is
    -inf, the token erases the earlier state. The ranges of beta and log_decay are not checked.
    state: the state after earlier tokens; None means that there are none.
    mask: True for tokens to keep. A masked token does not change the state: its k, v, beta and log_decay are ignored.
    Its output is Sᵀq with the state before the token.
    chunk_size: the number of tokens that are processed in parallel (Yang et al., DeltaNet, arXiv 2406.06484). The
    chunks are processed in order, and the backward pass stores one state per chunk. The last chunk may be shorter.
    use_qk_l2norm: whether to divide each query and key by its L2 norm first, as in the published layers. If False, make
    sure that β |k|² is at most 2 for every token; otherwise, the state can grow without bound.
    scale: the factor by which q is multiplied, after the division if there is one; None means (width of k)^-0.5.

    Raises ValueError if shapes do not match, if an array is not floating-point, if the mask is not boolean, or if
    chunk_size is below 1.

    Example:
        out, state = gated_delta_rule(q, k, v, jax.nn.sigmoid(b), -jax.nn.softplus(g))
    """
    _check_arrays(4, q, k, v, beta, log_decay, state)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}; 64 suits most widths.")
    if mask is not None:
        keep = _key_mask(mask, q.shape[0], q.shape[1])
        k, v, beta, log_decay = jax.tree.map(partial(_silence, keep), (k, v, beta, log_decay))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _in_chunks(_Tokens(q, k, v, beta, log_decay), state, scale, chunk_size, use_qk_l2norm)


def delta_rule(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b n h k"],
    v: Float[Array, "b n h d"],
    beta: Float[Array, "b n h"],
    *,
    state: DeltaState | None = None,
    mask: Bool[Array, "#b n"] | Bool[Array, "#b 1 1 n"] | None = None,
    chunk_size: int = 64,
    use_qk_l2norm: bool = True,
    scale: float | None = None,
) -> tuple[Float[Array, "b n h d"], DeltaState]:
    """Returns the outputs of the delta rule (DeltaNet, arXiv 2406.06484), and the state after the last token.

    For each token in order, each head computes S ← S + β k (v − Sᵀk)ᵀ and o = Sᵀq. This is `gated_delta_rule` without
    decay; see there for the arguments.

    Example:
        out, state = delta_rule(q, k, v, jax.nn.sigmoid(b))
    """
    return gated_delta_rule(
        q, k, v, beta, state=state, mask=mask, chunk_size=chunk_size, use_qk_l2norm=use_qk_l2norm, scale=scale
    )


def gated_delta_step(
    state: DeltaState,
    q: Float[Array, "b h k"],
    k: Float[Array, "b h k"],
    v: Float[Array, "b h d"],
    beta: Float[Array, "b h"],
    log_decay: Float[Array, "b h"] | None = None,
    *,
    use_qk_l2norm: bool = True,
    scale: float | None = None,
) -> tuple[Float[Array, "b h d"], DeltaState]:
    """Returns the output of the gated delta rule for one more token, and the state after it.

    state: the state after the earlier tokens, from `init_delta_state`, `gated_delta_rule` or an earlier step.

    The other arguments are as in `gated_delta_rule`. The cost does not depend on the number of earlier tokens. Raises
    ValueError if shapes do not match, or if an array is not floating-point.

    Example:
        out, state = gated_delta_step(state, q[:, 0], k[:, 0], v[:, 0], beta[:, 0])
    """
    _check_arrays(3, q, k, v, beta, log_decay, state)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _one_token(_Tokens(q, k, v, beta, log_decay), state, scale, use_qk_l2norm)


@partial(jax.jit, static_argnames=("chunk_size", "use_qk_l2norm"))
def _in_chunks(given: _Tokens, state: DeltaState | None, scale, chunk_size: int, use_qk_l2norm: bool):
    precision = _precision(given)

    def run(given, state, scale):
        batch, n, heads = given.q.shape[:3]
        size = max(1, min(chunk_size, n)) if isinstance(n, int) else chunk_size
        count = -(-n // size)
        tokens, start = _prepare(given, state, scale, use_qk_l2norm)
        start = varying(start, tokens)

        def in_chunks(x: Array) -> Array:
            # Padding has β = 0 and g = 0, so it does not change the state.
            x = jnp.pad(x, [(0, 0), (0, count * size - n)] + [(0, 0)] * (x.ndim - 2))
            x = x.reshape(batch, count, size, *x.shape[2:])
            return x.transpose(1, 0, 3, 2, *range(4, x.ndim))

        # Without the checkpoint, the backward pass would store every chunk's c × c matrices as well as its state.
        body = jax.checkpoint(partial(_advance, precision=precision), prevent_cse=False)
        kv, out = jax.lax.scan(body, start, jax.tree.map(in_chunks, tokens))
        out = out.transpose(1, 0, 3, 2, 4).reshape(batch, count * size, heads, given.v.shape[-1])[:, :n]
        return out.astype(given.v.dtype), kv

    named = [(given.q, "b n h k"), (given.k, "b n h k"), (given.v, "b n h d")]
    out, kv = keep_axes(run, given, state, scale, named=named, out=("b n h d", "b h k d"))
    return out, DeltaState(kv)


@partial(jax.jit, static_argnames="use_qk_l2norm")
def _one_token(given: _Tokens, state: DeltaState | None, scale, use_qk_l2norm: bool):
    precision = _precision(given)

    def run(given, state, scale):
        token, kv = _prepare(given, state, scale, use_qk_l2norm)
        if token.log_decay is not None:
            kv = kv * jnp.exp(token.log_decay)[..., None, None]
        recalled = jnp.einsum("bhk,bhkd->bhd", token.k, kv, precision=precision)
        written = token.beta[..., None] * (token.v - recalled)
        kv = kv + token.k[..., :, None] * written[..., None, :]
        out = jnp.einsum("bhk,bhkd->bhd", token.q, kv, precision=precision)
        return out.astype(given.v.dtype), kv

    named = [(given.q, "b h k"), (given.k, "b h k"), (given.v, "b h d")]
    out, kv = keep_axes(run, given, state, scale, named=named, out=("b h d", "b h k d"))
    return out, DeltaState(kv)


class _Tokens(NamedTuple):
    """The inputs for one or several tokens; `*tokens` stands for the axes before the width."""

    q: Float[Array, "*tokens k"]
    k: Float[Array, "*tokens k"]
    v: Float[Array, "*tokens d"]
    beta: Float[Array, "*tokens"]
    log_decay: Float[Array, "*tokens"] | None


def _prepare(
    given: _Tokens, state: DeltaState | None, scale: Array | float, use_qk_l2norm: bool
) -> tuple[_Tokens, Float[Array, "b h k d"]]:
    """Returns the tokens in the state's dtype (q scaled; q and k normalised if requested), and the state."""
    dtype = jnp.promote_types(jnp.result_type(given.q, given.k, given.v), jnp.float32)
    q, k, v, beta, log_decay = jax.tree.map(lambda x: x.astype(dtype), given)
    if state is None:
        state = init_delta_state(q.shape[0], q.shape[-2], q.shape[-1], v.shape[-1], dtype=dtype)
    if use_qk_l2norm:
        q, k = _unit(q), _unit(k)
    return _Tokens(q * jnp.asarray(scale, dtype), k, v, beta, log_decay), state.kv.astype(dtype)


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + NORM_EPS)


def _precision(given: _Tokens) -> jax.lax.Precision:
    """Returns the precision of matrix products: the highest for inputs of 32 bits or more, otherwise the default.

    With the default precision, some devices round the factors to fewer bits.
    """
    narrow = jnp.finfo(jnp.result_type(given.q, given.k, given.v)).bits < 32
    return jax.lax.Precision.DEFAULT if narrow else jax.lax.Precision.HIGHEST


def _advance(
    kv: Float[Array, "b h k d"], chunk: _Tokens, *, precision: jax.lax.Precision
) -> tuple[Float[Array, "b h k d"], Float[Array, "b h c d"]]:
    """Returns the state after one chunk, and the chunk's outputs.

    Token t writes u_t = β_t (v_t − exp(b_t) S₀ᵀk_t − Σ_{s<t} exp(b_t − b_s) (k_t·k_s) u_s), where S₀ is the state
    before the chunk and b is the running sum of g. These equations form a unit lower triangular system, whose solutions
    u_t are the rows of the paper's U − W S₀.
    """
    q, k, v, beta, log_decay = chunk
    if log_decay is None:
        pair = jnp.tril(jnp.ones((k.shape[2], k.shape[2]), kv.dtype))[None, None]
        past = jnp.ones((1, 1, k.shape[2], 1), kv.dtype)
    else:
        pair, past = decay_weights(log_decay)
        past = past[..., None]

    def product(pattern: str, *arrays: Array) -> Array:
        return jnp.einsum(pattern, *arrays, precision=precision)

    overlap = beta[..., None] * pair * product("bhck,bhsk->bhcs", k, k)
    inverse = unit_lower_inverse(jnp.tril(overlap, -1))
    missing = beta[..., None] * (v - product("bhck,bhkd->bhcd", past * k, kv))
    written = product("bhcs,bhsd->bhcd", inverse, missing)
    scores = pair * product("bhck,bhsk->bhcs", q, k)
    out = product("bhck,bhkd->bhcd", past * q, kv) + product("bhcs,bhsd->bhcd", scores, written)
    to_end = pair[:, :, -1, :, None]
    kv = past[:, :, -1:] * kv + product("bhck,bhcd->bhkd", to_end * k, written)
    return kv, out


def _silence(keep: Bool[Array, "b n"], x: Float[Array, "b n h *width"]) -> Float[Array, "b n h *width"]:
    """Returns x with zeros for masked tokens, which then neither change the state nor propagate NaN."""
    return jnp.where(jnp.expand_dims(keep, range(2, x.ndim)), x, 0)


def _key_mask(mask: Array, batch: int, n: int) -> Bool[Array, "b n"]:
    keep = mask[:, 0, 0] if mask.ndim == 4 and mask.shape[1:3] == (1, 1) else mask
    if keep.ndim != 2 or keep.shape[0] not in (1, batch) or keep.shape[1] != n:
        raise ValueError(
            f"mask has shape {mask.shape}, but (batch, tokens) is {(batch, n)}. "
            "Pass a key mask, `b n` or `b 1 1 n`; causal order needs no mask."
        )
    check_boolean(mask)
    return jnp.broadcast_to(keep, (batch, n))


def _check_arrays(rank: int, q, k, v, beta, log_decay, state: DeltaState | None) -> None:
    check_floats(q=q, k=k, v=v, beta=beta, log_decay=log_decay)
    letters = "b n h" if rank == 4 else "b h"
    tokens = q.shape[:-1]
    if q.ndim != rank:
        raise ValueError(f"q has shape {q.shape}, but must have {rank} axes, `{letters} k`.")
    if k.shape != q.shape:
        raise ValueError(
            f"k has shape {k.shape} and q has shape {q.shape}, but both must be `{letters} k`; repeat keys that "
            "several heads share."
        )
    if v.ndim != rank or v.shape[:-1] != tokens:
        raise ValueError(
            f"v has shape {v.shape} and q has shape {q.shape}, but v must be `{letters} d`; only the width may differ."
        )
    for name, gate in (("beta", beta), ("log_decay", log_decay)):
        if gate is not None and gate.shape != tokens:
            raise ValueError(
                f"{name} has shape {gate.shape} and q has shape {q.shape}; pass one number per token and head, "
                f"`{letters}`."
            )
    expected = (q.shape[0], q.shape[-2], q.shape[-1], v.shape[-1])
    if state is not None and state.kv.shape != expected:
        raise ValueError(
            f"state.kv has shape {state.kv.shape}, but q and v need {expected}; create it with "
            f"init_delta_state{expected}."
        )
