"""Decoding with a window that advances past the tokens it has solved (Song et al. 2021, arXiv 2002.03629).

Each sample has its own window. A pass over the tokens t .. t+w-1 of a sample computes new values from guesses. Let k be
the number of leading tokens that changed by at most `tol`. These tokens keep their guesses, because the cached keys of
later tokens were computed from them. All inputs of token t+k are then accepted tokens, so its new value is exact and is
accepted too. The sample's window therefore advances by k+1 tokens. For the window's remaining tokens, the new values
are the next guesses. Every pass accepts at least one token of each sample that still has unsolved tokens.

A sample that is solved no longer changes while the passes for the other samples continue. Its tokens therefore do not
depend on the other samples in its batch. Decoding has stages, between which the cache grows; a sample that has finished
a stage waits for the others.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flowgen.attention.slices import positions, put, take
from flowgen.decoding.jacobi import Conditioner, PreviousFrame, Solution, bounded, first_guess, overflown, stage_ends
from flowgen.decoding.plan import SlidingWindow


class _Pass(NamedTuple):
    """tokens: the network's first input, the accepted tokens, and guesses for all later tokens.

    start: the number of accepted tokens of each sample.
    """

    tokens: Float[Array, "b slots c"]
    start: Int[Array, " b"]
    cache: Any
    count: Int[Array, ""]
    residual: Float[Array, " b"]
    overflows: Int[Array, " b"]


class _Noise(NamedTuple):
    """The noise of n tokens, padded so that a window can begin after any of these tokens."""

    tokens: Float[Array, "b padded c"]
    n: int
    window: int

    def at(self, start: Int[Array, " b"]) -> Float[Array, "b w c"]:
        """Returns the noise of the windows that begin at `start`."""
        return take(self.tokens, start, self.window)


def solve_sliding(conditioner: Conditioner, z: Float[Array, "b n c"], plan: SlidingWindow) -> Solution:
    """Solves the same equations as `flowgen.decoding.jacobi.solve`; `sweeps` is the total number of passes.

    There are at most n passes. The conditioner's `accept` must be able to add only some of a window's inputs.
    """
    batch, n, _ = z.shape
    window = min(plan.window or n, n)
    noise = _Noise(jnp.pad(z, ((0, 0), (0, 2 * window), (0, 0))), n, window)
    guess = jnp.pad(first_guess(plan.init, z, conditioner.draft), ((0, 0), (0, 2 * window), (0, 0)))
    if plan.init == "previous_frame" and conditioner.previous_frame is not None:
        guess = conditioner.previous_frame.guess(noise.tokens)
    ends = stage_ends(n, conditioner.stages)
    room = partial(_room, n, window)
    state = _Pass(
        tokens=jnp.concatenate([conditioner.first, guess], axis=1),
        start=jnp.zeros(batch, jnp.int32),
        cache=conditioner.begin_cache(room(ends[0])),
        count=jnp.zeros((), jnp.int32),
        residual=jnp.zeros(batch, z.dtype),
        overflows=jnp.zeros(batch, jnp.int32),
    )
    for end in ends:
        state = state._replace(cache=conditioner.grow(state.cache, room(end)))
        state = jax.lax.while_loop(
            lambda state, end=end: _is_active(state, end).any(), partial(_pass, conditioner, plan, noise, end), state
        )
    x = state.tokens[:, 1 : n + 1]
    residual = jnp.where(overflown(x).any(axis=(1, 2)), jnp.inf, state.residual)
    return Solution(x, state.count[None], residual, state.overflows, ~(residual <= plan.tol).all()[None])


def _room(n: int, window: int, end: int) -> int:
    """The number of cache slots for a stage, with room for the tokens that waiting samples write."""
    return min(end + 2 * window - 1, n + window)


def _is_active(state: _Pass, end: int) -> Bool[Array, " b"]:
    """Whether each sample still advances in the stage that ends at token `end`."""
    return state.start < end


def _pass(conditioner: Conditioner, plan: SlidingWindow, noise: _Noise, end: int, state: _Pass) -> _Pass:
    """One pass over each sample's window, which then advances past the tokens it has solved."""
    start, window, active = state.start, noise.window, _is_active(state, end)
    real = (positions(start, window) < noise.n) & active[:, None]
    tokens = take(state.tokens, start, window + 1)
    previous, guess = tokens[:, :-1], tokens[:, 1:]
    maps, after = conditioner.window(bounded(previous), conditioner.begin + start, state.cache)
    out = maps.to_data(noise.at(start))
    bad = overflown(out)
    change = jnp.where(real, jnp.where(bad, jnp.inf, jnp.abs(out - guess)).max(axis=2), 0)
    accepted = jnp.cumprod(change <= plan.tol, axis=1).astype(bool)  # padding and samples that wait do not change
    solved = jnp.where(accepted[:, :, None], guess, out)
    step = jnp.where(active, jnp.minimum(accepted.sum(axis=1) + 1, jnp.minimum(window, noise.n - start)), 0)
    step = step.astype(start.dtype)
    conditioner.solved((start + step).min() - start.min())
    tokens = put(state.tokens, solved, start + 1)
    return _Pass(
        tokens=_with_guesses(conditioner, plan, noise, tokens, start + window),
        start=start + step,
        cache=conditioner.accept(state.cache, after, step),
        count=state.count + 1,
        residual=jnp.maximum(state.residual, jnp.where(accepted, change, 0).max(axis=1)),
        overflows=state.overflows + (bad & real[:, :, None]).sum(axis=(1, 2), dtype=jnp.int32),
    )


def _with_guesses(
    conditioner: Conditioner,
    plan: SlidingWindow,
    noise: _Noise,
    tokens: Float[Array, "b slots c"],
    end: Int[Array, " b"],
) -> Float[Array, "b slots c"]:
    """The tokens, with guesses from the previous frame written from `end` on for the next window."""
    frame = conditioner.previous_frame
    if plan.init != "previous_frame" or frame is None:
        return tokens
    period = frame.tokens.shape[1]
    all_tokens = jnp.concatenate([frame.tokens, tokens[:, 1:]], axis=1)
    frame = PreviousFrame(take(all_tokens, end, period), jnp.minimum(frame.known + end, period))
    return put(tokens, frame.guess(noise.at(end)), end + 1)
