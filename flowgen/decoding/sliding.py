"""Decoding with a window that advances past the tokens it has solved (Song et al. 2021, arXiv 2002.03629).

A pass over the tokens t .. t+w-1 maps a guess to an output. Let k be the number of leading tokens that changed by at
most `tol` in every sample. These tokens keep their guesses, because the cached keys of later tokens were computed from
these guesses. All inputs of token t+k are then accepted tokens, so its new value is exact and is accepted too. The
window therefore advances by k+1 tokens. For the window's remaining tokens, the new values are the next guesses. Every
pass accepts at least one token.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flowgen.decoding.jacobi import Conditioner, PreviousFrame, Solution, bounded, first_guess, overflown, stage_ends
from flowgen.decoding.plan import SlidingWindow
from flowgen.flows.affine import to_data


class _Pass(NamedTuple):
    """tokens: the network's first input, the accepted tokens, and guesses for the other tokens reached so far."""

    tokens: Float[Array, "b slots c"]
    start: Int[Array, ""]
    cache: Any
    count: Int[Array, ""]
    residual: Float[Array, " b"]
    overflows: Int[Array, " b"]


class _Noise(NamedTuple):
    """The noise of n tokens, padded so that a window can begin at any of these tokens."""

    tokens: Float[Array, "b padded c"]
    n: int
    window: int

    def at(self, start: Int[Array, ""]) -> Float[Array, "b w c"]:
        """Returns the noise of the window that begins at `start`."""
        return jax.lax.dynamic_slice_in_dim(self.tokens, start, self.window, axis=1)


def solve_sliding(conditioner: Conditioner, z: Float[Array, "b n c"], plan: SlidingWindow) -> Solution:
    """Returns x, as `flowgen.decoding.jacobi.solve` does; `sweeps` is one number, the total number of passes.

    There are at most n passes. It must be possible to overwrite cache slots, because a window can begin at any slot.
    """
    batch, n, _ = z.shape
    window = min(plan.window or n, n)
    noise = _Noise(jnp.pad(z, ((0, 0), (0, 2 * window), (0, 0))), n, window)
    guess = first_guess(plan.init, z[:, :window], conditioner.previous_frame)
    room = jnp.zeros((batch, n + 2 * window - guess.shape[1], z.shape[2]), z.dtype)
    ends = stage_ends(n, conditioner.stages)
    state = _Pass(
        tokens=jnp.concatenate([conditioner.first, guess, room], axis=1),
        start=jnp.zeros((), int),
        cache=conditioner.begin_cache(ends[0] + window),
        count=jnp.zeros((), jnp.int32),
        residual=jnp.zeros(batch, z.dtype),
        overflows=jnp.zeros(batch, jnp.int32),
    )
    for end in ends:
        state = state._replace(cache=conditioner.grow(state.cache, end + window))
        state = jax.lax.while_loop(partial(_begins_before, end), partial(_pass, conditioner, plan, noise), state)
    x = state.tokens[:, 1 : n + 1]
    residual = jnp.where(overflown(x).any(axis=(1, 2)), jnp.inf, state.residual)
    return Solution(x, state.count[None], residual, state.overflows, ~(residual <= plan.tol).all()[None])


def _begins_before(end: int, state: _Pass) -> Bool[Array, ""]:
    return state.start < end


def _pass(conditioner: Conditioner, plan: SlidingWindow, noise: _Noise, state: _Pass) -> _Pass:
    """One pass over a window, which then advances past the tokens it has solved."""
    start, window = state.start, noise.window
    real = (start + jnp.arange(window) < noise.n)[None]
    guess = jax.lax.dynamic_slice_in_dim(state.tokens, start + 1, window, axis=1)
    previous = jax.lax.dynamic_slice_in_dim(state.tokens, start, window, axis=1)
    shift, log_scale, cache = conditioner.window(bounded(previous), conditioner.begin + start, state.cache)
    out = to_data(noise.at(start), shift, log_scale)
    bad = overflown(out)
    change = jnp.where(real, jnp.where(bad, jnp.inf, jnp.abs(out - guess)).max(axis=2), 0)
    accepted = jnp.cumprod((change <= plan.tol).all(axis=0)).astype(bool)[None]
    solved = jnp.where(accepted[:, :, None], guess, out)
    step = jnp.minimum(accepted.sum() + 1, window)
    kept = jnp.where(accepted, change, 0).max(axis=1)
    conditioner.solved(jnp.minimum(step, noise.n - start))
    tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, solved, start + 1, axis=1)
    return _Pass(
        tokens=_with_guesses(conditioner, plan, noise, tokens, start + window),
        start=start + step.astype(start.dtype),
        cache=conditioner.rewind(state.cache, cache),
        count=state.count + 1,
        residual=jnp.maximum(state.residual, kept),
        overflows=state.overflows + (bad & real[:, :, None]).sum(axis=(1, 2), dtype=jnp.int32),
    )


def _with_guesses(
    conditioner: Conditioner, plan: SlidingWindow, noise: _Noise, tokens: Float[Array, "b slots c"], end: Int[Array, ""]
) -> Float[Array, "b slots c"]:
    """The tokens, with initial guesses written from `end` on; the next window uses as many of them as it needs."""
    frame = conditioner.previous_frame
    if frame is not None:
        period = frame.tokens.shape[1]
        all_tokens = jnp.concatenate([frame.tokens, tokens[:, 1:]], axis=1)
        last = jax.lax.dynamic_slice_in_dim(all_tokens, end, period, axis=1)
        frame = PreviousFrame(last, jnp.minimum(frame.known + end, period))
    guess = first_guess(plan.init, noise.at(end), frame)
    return jax.lax.dynamic_update_slice_in_dim(tokens, guess, end + 1, axis=1)
