"""The solver that inverts an autoregressive block: fixed-point sweeps over windows of tokens, with a cache.

The tokens of a block satisfy x_t = shift_t(x_<t) + exp(log_scale_t(x_<t)) · z_t. The solver processes windows of w
tokens, one after another. With w = 1, this is sequential decoding. With w = n, it is the Jacobi iteration of Song et
al. 2021 (arXiv 2002.03629); otherwise, it is their Gauss-Seidel-Jacobi iteration. After k sweeps, the first k tokens of
a window are exact.

Every sweep reads the whole cache, including empty slots. The windows are therefore solved in a few stages. Each stage
is one loop, whose cache has only as many slots as the stage needs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flowgen.decoding.plan import InitialGuess, Jacobi
from flowgen.flows.affine import TokenMaps

# Values beyond this limit are overflows. The network's input is clipped to the limit, and NaN is replaced by 0, so that
# unsolved tokens cannot corrupt solved ones. Data lie in [-1, 1].
OVERFLOW = 1e6


class PreviousFrame(NamedTuple):
    """The last frame's worth of tokens before the next window, and the number of them that are known."""

    tokens: Float[Array, "b p c"]
    known: Int[Array, ""] | Int[Array, " b"]

    def guess(self, noise: Float[Array, "b w c"]) -> Float[Array, "b w c"]:
        """Returns a guess for each token of the next window.

        The guess is the latest known token at the same place in a frame. If none is known, the guess is the token's
        noise.
        """
        period = self.tokens.shape[1]
        place = jnp.arange(noise.shape[1]) % period
        is_known = place[None] >= period - jnp.reshape(self.known, (-1, 1))
        return jnp.where(is_known[:, :, None], self.tokens[:, place], noise)

    def then(self, tokens: Float[Array, "b w c"]) -> PreviousFrame:
        """Returns the `PreviousFrame` for the window after `tokens`, which have now been solved."""
        period = self.tokens.shape[1]
        last = jnp.concatenate([self.tokens, tokens], axis=1)[:, -period:]
        return PreviousFrame(last, jnp.minimum(self.known + tokens.shape[1], period))


def ignore(count: Array) -> None:
    """Ignores the count; the default of `Conditioner.solved`."""


def as_it_is(cache: Any, length: int) -> Any:
    """Returns the cache unchanged; the default of `Conditioner.grow`."""
    return cache


def all_accepted(before: Any, window: Any, count: Array | None = None) -> Any:
    """Returns the window, which is itself the cache with all inputs added; the default of `Conditioner.accept`."""
    return window


class Conditioner(NamedTuple):
    """The interface through which a solver evaluates a block.

    window(previous, start, cache) -> (maps, window): the maps of the tokens after `previous`, and the window for
        `rewind` and `accept`.
    rewind(before, after) -> cache: a cache from which the same window can run again.
    accept(before, window, count=None) -> cache: the cache `before` with the first inputs of the window added; `count`
        is their number per sample, and None means all.
    begin_cache(length) -> cache: a cache that contains the prefix and the known tokens, with room for `length` more.
    grow(cache, length) -> cache: the same cache with room for `length` tokens after the known ones.
    first: the network's input for the first token to be solved. begin: the index of that input.
    previous_frame: the frame before that token, for plans with init="previous_frame"; None for images. draft: the
    tokens that a draft proposes, for plans with init="draft"; None without a draft.
    solved(count): called after each window with the number of newly solved tokens.
    stages: number of stages in which to decode. The cache grows between stages; if it cannot grow, use one stage.
    """

    window: Callable[[Array, Array, Any], tuple[TokenMaps, Any]]
    rewind: Callable[[Any, Any], Any]
    begin_cache: Callable[[int], Any]
    first: Float[Array, "b 1 c"]
    begin: int = 0
    previous_frame: PreviousFrame | None = None
    draft: Float[Array, "b n c"] | None = None
    solved: Callable[[Array], None] = ignore
    grow: Callable[[Any, int], Any] = as_it_is
    accept: Callable[..., Any] = all_accepted
    stages: int = 1


class Solution(NamedTuple):
    """The solved tokens and the solver's reports; see `DecodeResult`."""

    x: Float[Array, "b n c"]
    sweeps: Int[Array, " windows"]
    residual: Float[Array, " b"]
    overflows: Int[Array, " b"]
    unsolved: Bool[Array, " windows"]


class _Window(NamedTuple):
    """Tokens to be solved together: their noise, the index of the first one, and a mask that is False for padding."""

    noise: Float[Array, "b w c"]
    start: Int[Array, ""]
    real: Bool[Array, "1 w 1"]


class _Before(NamedTuple):
    """The state after the earlier windows: the last token, the cache and, if guesses use it, the previous frame."""

    last: Float[Array, "b 1 c"]
    cache: Any
    frame: PreviousFrame | None


class _Sweep(NamedTuple):
    guess: Float[Array, "b w c"]
    out: Float[Array, "b w c"]
    residual: Float[Array, " b"]
    converged: Bool[Array, " b"]
    cache: Any
    count: Int[Array, ""]
    overflows: Int[Array, " b"]


def solve(conditioner: Conditioner, z: Float[Array, "b n c"], plan: Jacobi) -> Solution:
    """Returns the x that satisfies x_t = shift_t(x_<t) + exp(log_scale_t(x_<t)) · z_t for all n tokens."""
    batch, n, channels = z.shape
    size = min(plan.window or n, n)
    count = -(-n // size)

    def windows(tokens):
        padded = jnp.pad(tokens, ((0, 0), (0, count * size - n), (0, 0)))
        return padded.reshape(batch, count, size, channels).swapaxes(0, 1)

    noise, guess = windows(z), windows(first_guess(plan.init, z, conditioner.draft))
    frame = conditioner.previous_frame if plan.init == "previous_frame" else None
    ends = stage_ends(count, conditioner.stages)
    before = _Before(conditioner.first, conditioner.begin_cache(ends[0] * size), frame)
    solved = Solution(
        x=jnp.zeros_like(noise),
        sweeps=jnp.zeros(count, jnp.int32),
        residual=jnp.zeros((count, batch), z.dtype),
        overflows=jnp.zeros((count, batch), jnp.int32),
        unsolved=jnp.zeros(count, bool),
    )

    def step(state):
        index, before, solved = state
        before, one = _solve_window(conditioner, plan, n, before, noise[index], guess[index], index * size)
        return index + 1, before, jax.tree.map(lambda parts, part: parts.at[index].set(part), solved, one)

    # Stages differ only in their cache, so the rest of the loop is compiled once.
    for begin, end in pairwise((0, *ends)):
        before = before._replace(cache=conditioner.grow(before.cache, end * size))
        state = jnp.asarray(begin), before, solved
        _, before, solved = jax.lax.while_loop(lambda state, end=end: state[0] < end, step, state)
    x = solved.x.swapaxes(0, 1).reshape(batch, count * size, channels)[:, :n]
    return solved._replace(x=x, residual=solved.residual.max(axis=0), overflows=solved.overflows.sum(axis=0))


def stage_ends(steps: int, stages: int) -> tuple[int, ...]:
    """Returns the step at which each stage ends. There are at most `stages` stages, of about equal length."""
    stages = min(stages, steps)
    return tuple(-(-steps * stage // stages) for stage in range(1, stages + 1))


def _solve_window(
    conditioner: Conditioner,
    plan: Jacobi,
    n: int,
    before: _Before,
    noise: Float[Array, "b w c"],
    guess: Float[Array, "b w c"],
    start: Int[Array, ""],
) -> tuple[_Before, Solution]:
    """Solves one window; returns the state for the next window, and the solution.

    n: total number of tokens. guess: the initial guess; ignored if the plan uses the previous frame.
    """
    size = noise.shape[1]
    window = _Window(noise, start, (start + jnp.arange(size) < n)[None, :, None])
    sweep = partial(_sweep, conditioner, plan, before, window)
    max_sweeps = min(plan.max_sweeps or size, size)

    def unsolved(state: _Sweep) -> Bool[Array, ""]:
        return (state.count < max_sweeps) & ~state.converged.all()

    guess = guess if before.frame is None else before.frame.guess(noise)
    state = _Sweep(
        guess=guess,
        out=guess,
        residual=jnp.full(len(noise), jnp.inf, noise.dtype),
        converged=jnp.zeros(len(noise), bool),
        cache=before.cache,
        count=jnp.zeros((), jnp.int32),
        overflows=jnp.zeros(len(noise), jnp.int32),
    )
    state = sweep(state) if max_sweeps == 1 else jax.lax.while_loop(unsolved, sweep, state)
    # After one sweep per token, a sample is exact, however large its last change was.
    exact = (state.count >= size) & (~state.converged | (size == 1))
    broken = (overflown(state.out) & window.real).any(axis=(1, 2))
    residual = jnp.where(broken, jnp.inf, jnp.where(exact, 0, state.residual))
    frame = None if before.frame is None else before.frame.then(state.out)
    conditioner.solved(jnp.minimum(size, n - start))
    after = _Before(state.out[:, -1:], state.cache, frame)
    is_unsolved = (broken | ~(state.converged | exact)).any()
    return after, Solution(state.out, state.count, residual, state.overflows, is_unsolved)


def _sweep(conditioner: Conditioner, plan: Jacobi, before: _Before, window: _Window, state: _Sweep) -> _Sweep:
    """One pass over a window, which computes each token from the guesses of the tokens before it."""
    previous = jnp.concatenate([before.last, state.guess[:, :-1]], axis=1)
    cache = conditioner.rewind(before.cache, state.cache)
    maps, after = conditioner.window(bounded(previous), conditioner.begin + window.start, cache)
    cache = conditioner.accept(cache, after)
    out = maps.to_data(window.noise)
    residual = _change(out, state.guess, window.real)
    converged = _has_converged(plan, out, state.guess, window.real, residual)
    # A converged sample keeps its guess, so that its tokens and its cache stay the same, no matter how many more sweeps
    # the other samples in the batch need.
    guess = jnp.where(converged[:, None, None], state.guess, out)
    overflows = state.overflows + (overflown(out) & window.real).sum(axis=(1, 2), dtype=jnp.int32)
    return _Sweep(guess, out, residual, converged, cache, state.count + 1, overflows)


def _has_converged(plan: Jacobi, new: Array, old: Array, real: Array, residual: Array) -> Bool[Array, " b"]:
    """Whether each sample may stop, by the plan's stop rule. residual: the largest change in each sample."""
    if plan.stop == "max_change":
        return residual <= plan.tol
    change, size = (jnp.where(real, jnp.square(part), 0).sum() for part in (new - old, new))
    return jnp.broadcast_to((change <= plan.tol * size) & jnp.isfinite(residual).all(), residual.shape)


def first_guess(
    init: InitialGuess, noise: Float[Array, "b n c"], draft: Float[Array, "b n c"] | None
) -> Float[Array, "b n c"]:
    """Returns the initial guess for tokens with this noise; "previous_frame" replaces it during decoding."""
    if init == "zeros":
        return jnp.zeros_like(noise)
    return noise if init != "draft" or draft is None else bounded(draft)


def overflown(x: Array) -> Array:
    """Returns a mask of the values that are not finite or exceed OVERFLOW in magnitude."""
    return ~(jnp.abs(x) <= OVERFLOW)


def bounded(x: Array) -> Array:
    """Returns x as a safe input for the network: clipped to ±OVERFLOW, with NaN replaced by 0."""
    return jnp.clip(jnp.nan_to_num(x, nan=0.0), -OVERFLOW, OVERFLOW)


def _change(new: Array, old: Array, real: Array) -> Array:
    """The largest change in each sample, ignoring padding; infinite if a new value overflowed."""
    change = jnp.where(overflown(new), jnp.inf, jnp.abs(new - old))
    return jnp.where(real, change, 0).max(axis=(1, 2))
