"""The solver that inverts an autoregressive block: windowed fixed-point sweeps over a cache.

The tokens of a block solve x_t = shift_t(x_<t) + exp(log_scale_t(x_<t)) · z_t. Windows of w tokens are solved
one after another. w = 1 is sequential decoding; w = n is the Jacobi iteration of Song et al. 2021
(arXiv 2002.03629); in between it is Gauss-Seidel-Jacobi. After k sweeps the first k tokens of a window are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flowgen.decoding.plan import InitialGuess, Jacobi
from flowgen.flows.affine import to_data

# Iterates beyond this are treated as overflown: fed to the network as the limit (or 0 for NaN), so that unsolved tokens
# cannot spoil solved ones. Data lie in [-1, 1].
OVERFLOW = 1e6


class Conditioner(NamedTuple):
    """What the solver needs from a block.

    window(previous, start, cache) -> (shift, log_scale, cache): parameters of the tokens after `previous`.
    rewind(before, after) -> cache: a cache from which the same window can run again.
    solved(count): called after each window with the number of newly solved tokens.
    """

    window: Callable[[Array, Array, Any], tuple[Array, Array, Any]]
    rewind: Callable[[Any, Any], Any]
    solved: Callable[[Array], None] = lambda count: None


class PreviousFrame(NamedTuple):
    """The last frame's worth of tokens before those to be solved, and how many of them exist."""

    tokens: Float[Array, "b p c"]
    known: Int[Array, ""]

    def guess(self, noise: Float[Array, "b w c"]) -> Float[Array, "b w c"]:
        """Returns for each next token the one a whole number of frames earlier, or its noise if there is none."""
        period = self.tokens.shape[1]
        place = jnp.arange(noise.shape[1]) % period
        return jnp.where((place >= period - self.known)[None, :, None], self.tokens[:, place], noise)

    def then(self, tokens: Float[Array, "b w c"]) -> PreviousFrame:
        """Returns the last tokens after `tokens` are solved too."""
        period = self.tokens.shape[1]
        last = jnp.concatenate([self.tokens, tokens], axis=1)[:, -period:]
        return PreviousFrame(last, jnp.minimum(self.known + tokens.shape[1], period))


class Solution(NamedTuple):
    """Solved tokens and the solver's reports; see `DecodeResult` for their meaning."""

    x: Float[Array, "b n c"]
    sweeps: Int[Array, " windows"]
    residual: Float[Array, " b"]
    overflows: Int[Array, " b"]


class _Sweep(NamedTuple):
    guess: Float[Array, "b w c"]
    out: Float[Array, "b w c"]
    residual: Float[Array, " b"]
    cache: Any
    count: Int[Array, ""]
    overflows: Int[Array, " b"]


def solve(
    conditioner: Conditioner,
    first: Float[Array, "b 1 c"],
    z: Float[Array, "b n c"],
    empty_cache: Callable[[int], Any],
    plan: Jacobi,
    previous_frame: PreviousFrame | None = None,
) -> Solution:
    """Returns x with x_t = shift_t(x_<t) + exp(log_scale_t(x_<t)) · z_t for all n tokens.

    first: the network's input before the first token. empty_cache: length -> cache. previous_frame: the frame before
    the first token, the initial guess of windows if the plan says so.
    """
    batch, n, channels = z.shape
    window = min(plan.window or n, n)
    num_windows = -(-n // window)
    max_sweeps = min(plan.max_sweeps or window, window)
    padded = jnp.pad(z, ((0, 0), (0, num_windows * window - n), (0, 0)))
    windows = padded.reshape(batch, num_windows, window, channels).swapaxes(0, 1)
    starts = jnp.arange(num_windows) * window

    def solve_window(carry, inputs):
        first, committed, previous_frame = carry
        noise, start = inputs
        real = (start + jnp.arange(window) < n)[None, :, None]

        def sweep(state: _Sweep) -> _Sweep:
            previous = jnp.concatenate([first, state.guess[:, :-1]], axis=1)
            cache = conditioner.rewind(committed, state.cache)
            shift, log_scale, cache = conditioner.window(bounded(previous), start, cache)
            out = to_data(noise, shift, log_scale)
            residual = _change(out, state.guess, real)
            # A converged sample keeps its guess, so that it yields the same tokens and the same cache
            # however many more sweeps the others in the batch need.
            guess = jnp.where((residual <= plan.tol)[:, None, None], state.guess, out)
            overflows = state.overflows + (overflown(out) & real).sum(axis=(1, 2), dtype=jnp.int32)
            return _Sweep(guess, out, residual, cache, state.count + 1, overflows)

        def unsolved(state: _Sweep) -> Bool[Array, ""]:
            return (state.count < max_sweeps) & jnp.any(state.residual > plan.tol)

        guess = first_guess(plan.init, noise, previous_frame)
        state = _Sweep(
            guess=guess,
            out=guess,
            residual=jnp.full(batch, jnp.inf, z.dtype),
            cache=committed,
            count=jnp.zeros((), jnp.int32),
            overflows=jnp.zeros(batch, jnp.int32),
        )
        state = sweep(state) if max_sweeps == 1 else jax.lax.while_loop(unsolved, sweep, state)
        # After as many sweeps as tokens a sample is exact, whatever its last change was.
        exact = (state.count >= window) & ((state.residual > plan.tol) | (window == 1))
        broken = (overflown(state.out) & real).any(axis=(1, 2))
        residual = jnp.where(broken, jnp.inf, jnp.where(exact, 0, state.residual))
        report = (state.out, state.count, residual, state.overflows)
        previous_frame = None if previous_frame is None else previous_frame.then(state.out)
        conditioner.solved(jnp.minimum(window, n - start))
        return (state.out[:, -1:], state.cache, previous_frame), report

    carry = (first, empty_cache(num_windows * window), previous_frame if plan.init == "previous_frame" else None)
    _, (out, sweeps, residual, overflows) = jax.lax.scan(solve_window, carry, (windows, starts))
    x = out.swapaxes(0, 1).reshape(batch, num_windows * window, channels)[:, :n]
    return Solution(x, sweeps, residual.max(axis=0), overflows.sum(axis=0))


def first_guess(
    init: InitialGuess, noise: Float[Array, "b w c"], previous_frame: PreviousFrame | None
) -> Float[Array, "b w c"]:
    """Returns the initial guess of the first sweep over tokens with that noise."""
    if init == "zeros":
        return jnp.zeros_like(noise)
    return noise if init == "noise" or previous_frame is None else previous_frame.guess(noise)


def overflown(x: Array) -> Array:
    """Returns a mask of values that are not finite or beyond OVERFLOW."""
    return ~(jnp.abs(x) <= OVERFLOW)


def bounded(x: Array) -> Array:
    """Returns iterates bounded for the network's input."""
    return jnp.clip(jnp.nan_to_num(x, nan=0.0), -OVERFLOW, OVERFLOW)


def _change(new: Array, old: Array, real: Array) -> Array:
    """Largest change per sample among real tokens; infinite if an iterate overflowed."""
    change = jnp.where(overflown(new), jnp.inf, jnp.abs(new - old))
    return jnp.where(real, change, 0).max(axis=(1, 2))
