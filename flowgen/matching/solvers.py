"""Sampling, encoding and likelihood of a velocity field: dx/dt = v(t, x, cond), t from 0 (source) to 1 (data)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

Velocity = Callable[[Array, Array, Any], Array]
Method = Literal["euler", "midpoint", "heun", "rk4"]

# Butcher tableaus: stage times c, stage weights a, result weights b.
TABLEAUS: dict[str, tuple[tuple[float, ...], tuple[tuple[float, ...], ...], tuple[float, ...]]] = {
    "euler": ((0.0,), ((),), (1.0,)),
    "midpoint": ((0.0, 0.5), ((), (0.5,)), (0.0, 1.0)),
    "heun": ((0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
    "rk4": ((0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


def integrate(
    velocity: Velocity,
    x0: Float[Array, "b *event"],
    cond: Any = None,
    *,
    method: Method = "heun",
    num_steps: int = 50,
    times: Sequence[float] | np.ndarray | None = None,
    reverse: bool = False,
) -> tuple[Float[Array, "b *event"], int]:
    """Returns the state at the end of the time grid, and the number of velocity evaluations; one scan over steps.

    times: the grid, increasing within [0, 1]; num_steps equal steps where it is None. reverse: from data to source,
    the grid walked backwards. velocity(t, x, cond) gets t of shape `b`. Raises ValueError for an unknown method,
    fewer than one step, or a grid that is not increasing within [0, 1].

    Example:
        x1, nfe = integrate(velocity, x0, method="heun", num_steps=25)
    """
    states, evaluations = trajectory(
        velocity, x0, cond, method=method, num_steps=num_steps, times=times, reverse=reverse, keep=False
    )
    return states, evaluations


def trajectory(
    velocity: Velocity,
    x0: Float[Array, "b *event"],
    cond: Any = None,
    *,
    method: Method = "heun",
    num_steps: int = 50,
    times: Sequence[float] | np.ndarray | None = None,
    reverse: bool = False,
    keep: bool = True,
) -> tuple[Any, int]:
    """Returns the states at all times of the grid, `steps+1 b *event` (the last alone without `keep`), and the count.

    Example:
        path, nfe = trajectory(velocity, x0, num_steps=100, method="rk4")
    """
    if method not in TABLEAUS:
        raise ValueError(f"method is {method!r}; choose one of {', '.join(TABLEAUS)}.")
    grid = time_grid(num_steps, times)
    grid = grid[::-1] if reverse else grid
    nodes, stage_weights, weights = TABLEAUS[method]

    def step(x, ends):
        start, width = ends[0], ends[1] - ends[0]
        slopes: list[Array] = []
        for node, row in zip(nodes, stage_weights, strict=True):
            moved = x
            for weight, slope in zip(row, slopes, strict=True):
                moved = moved + width.astype(x.dtype) * weight * slope
            t = jnp.full(x.shape[0], start + node * width)
            slopes.append(velocity(t, moved, cond).astype(x.dtype))
        for weight, slope in zip(weights, slopes, strict=True):
            x = x + width.astype(x.dtype) * weight * slope
        return x, x if keep else None

    last, states = jax.lax.scan(step, x0, jnp.stack([grid[:-1], grid[1:]], axis=1))
    result = jnp.concatenate([x0[None], states]) if keep else last
    return result, len(nodes) * (len(grid) - 1)


def time_grid(num_steps: int, times: Sequence[float] | np.ndarray | None) -> Float[Array, " n"]:
    """Returns the grid of `integrate`; ValueError where it has no step or is not increasing within [0, 1].

    Example:
        grid = time_grid(50, None)
    """
    if times is None:
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}; integration needs at least one step.")
        return jnp.linspace(0.0, 1.0, num_steps + 1)
    grid = np.asarray(times, np.float32)
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"times have shape {grid.shape}; a grid is a line of at least two times.")
    if not ((grid >= 0) & (grid <= 1)).all() or not (grid[1:] > grid[:-1]).all():
        raise ValueError(f"times run from {grid[0]} to {grid[-1]}; they must increase within [0, 1].")
    return jnp.asarray(grid)


def log_prob(
    velocity: Velocity,
    x1: Float[Array, "b *event"],
    cond: Any = None,
    *,
    key: Key[Array, ""] | None = None,
    log_source: Callable[[Array], Float[Array, " b"]] | None = None,
    method: Method = "rk4",
    num_steps: int = 50,
) -> Float[Array, " b"]:
    """Returns log p1(x1) = log p0(x0) - ∫ div v dt in nats, along the path that ends in x1; differentiable.

    key: None for the exact divergence, one forward-mode product per dimension; a key for Hutchinson's estimate with
    one Rademacher probe per sample, kept for the whole path (Grathwohl et al., arXiv 1810.01367). log_source: log p0,
    standard normal by default. Exact up to the error of the solver.

    Example:
        lp = log_prob(velocity, x1, key=jax.random.key(0))
    """
    probe = None if key is None else jax.random.rademacher(key, x1.shape, x1.dtype)
    event = tuple(range(1, x1.ndim))

    def joint(t, state, cond):
        x, _ = jnp.split(state, [x1[0].size], axis=1)
        x = x.reshape(x1.shape)
        field = lambda y: velocity(t, y, cond)  # noqa: E731
        if probe is not None:
            v, moved = jax.jvp(field, (x,), (probe,))
            divergence = (moved * probe).sum(axis=event)
        else:
            v, divergence = _exact_divergence(field, x)
        return jnp.concatenate([v.reshape(len(v), -1), divergence[:, None]], axis=1)

    state = jnp.concatenate([x1.reshape(len(x1), -1), jnp.zeros((len(x1), 1), x1.dtype)], axis=1)
    state, _ = integrate(joint, state, cond, method=method, num_steps=num_steps, reverse=True)
    x0, change = state[:, :-1].reshape(x1.shape), state[:, -1]
    # Backwards in time the integral of the divergence has come out with its sign turned.
    return (_standard_normal(x0) if log_source is None else log_source(x0)) + change


def _exact_divergence(field: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    """The field and Σ_i ∂v_i/∂x_i per sample, all samples at once, one direction after another."""
    size = x[0].size

    def along(total, index):
        direction = jnp.zeros((size,), x.dtype).at[index].set(1).reshape(x.shape[1:])
        _, moved = jax.jvp(field, (x,), (jnp.broadcast_to(direction[None], x.shape),))
        return total + moved.reshape(len(x), -1)[:, index], None

    total, _ = jax.lax.scan(along, jnp.zeros(len(x), x.dtype), jnp.arange(size))
    return field(x), total


def _standard_normal(x: Array) -> Float[Array, " b"]:
    flat = x.reshape(len(x), -1)
    return -0.5 * (jnp.square(flat) + jnp.log(2 * jnp.pi)).sum(axis=1)


def guided(
    velocity: Velocity, unconditional: Any, *, scale: float, interval: tuple[float, float] = (0.0, 1.0)
) -> Velocity:
    """Returns the field v_u + scale (v_c - v_u), classifier-free guidance in the convention where scale 1 is v_c.

    Both halves go through the network in one batch. unconditional: the condition that means none, shaped like cond.
    interval: times in which guidance acts; outside it the field is v_c (Kynkäänniemi et al., arXiv 2404.07724).

    Example:
        x1, nfe = integrate(guided(velocity, -jnp.ones_like(labels), scale=2.0), x0, labels)
    """
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"guidance interval is {interval}; it must be two increasing times within [0, 1].")

    def field(t, x, cond):
        both = jax.tree.map(lambda c, u: jnp.concatenate([c, u]), cond, unconditional)
        v = velocity(jnp.concatenate([t, t]), jnp.concatenate([x, x]), both)
        conditional, free = jnp.split(v, 2)
        inside = ((t >= low) & (t <= high)).reshape((-1,) + (1,) * (x.ndim - 1))
        return jnp.where(inside, free + scale * (conditional - free), conditional)

    return field


def integrate_sde(
    velocity: Velocity,
    score: Velocity,
    x0: Float[Array, "b *event"],
    key: Key[Array, ""],
    cond: Any = None,
    *,
    diffusion: Callable[[Array], Array] = lambda t: 1 - t,
    num_steps: int = 100,
) -> tuple[Float[Array, "b *event"], int]:
    """Returns samples of dX = (v + g²/2 · score) dt + g dW, which has the marginals of the ODE for any g(t) ≥ 0.

    Euler-Maruyama; the last step is taken without noise. diffusion: g as a function of t. score(t, x, cond): see
    `flowgen.matching.score_of`. The count is of calls to velocity and score together.

    Example:
        x1, nfe = integrate_sde(velocity, score, x0, key, num_steps=200)
    """
    grid = time_grid(num_steps, None)

    def step(carry, inputs):
        x, key = carry
        start, end, last = inputs
        key, draw = jax.random.split(key)
        t, width, g = jnp.full(x.shape[0], start), end - start, diffusion(start)
        drift = velocity(t, x, cond) + 0.5 * g**2 * score(t, x, cond)
        noise = jnp.where(last, 0, jax.random.normal(draw, x.shape, x.dtype))
        return (x + width * drift + g * jnp.sqrt(width) * noise, key), None

    last = jnp.arange(num_steps) == num_steps - 1
    (x, _), _ = jax.lax.scan(step, (x0, key), (grid[:-1], grid[1:], last))
    return x, 2 * num_steps
