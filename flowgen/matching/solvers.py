"""Sampling and encoding with a velocity field: dx/dt = v(t, x, cond), t from 0 (noise) to 1 (data)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from flowgen import conditioning
from flowgen.arrays import check_floating, check_key
from flowgen.backend import alike_rows, check_unmapped, keep_rows, nan_if
from flowgen.guidance import linear_rule
from flowgen.matching.checks import check_output, check_velocity
from flowgen.matching.conditions import as_condition
from flowgen.packages import need

Velocity = Callable[[Array, Array, Any], Array]
FixedMethod = Literal["euler", "midpoint", "heun", "rk4"]
Method = Literal["euler", "midpoint", "heun", "rk4", "dopri5"]

# Size of dopri5's first step; the error estimate determines the later ones.
FIRST_STEP = 0.01

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
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 4096,
) -> tuple[Float[Array, "b *event"], int | Int[Array, ""]]:
    """Returns the solution x of dx/dt = velocity(t, x, cond) at the end of the time grid, and the number of velocity
    evaluations.

    velocity is called with t of shape `b`. The state x starts at x0 and is accumulated in at least float32, even if x0
    has a smaller dtype. Outside jit, every call recompiles the scan over steps, so apply jit to the calling function.

    times: the time grid, which must increase within [0, 1]; None for num_steps equal steps from 0 to 1.
    reverse: whether to integrate backward over the grid, from data (passed as x0) at its end to noise at its start.

    The method "dopri5" adapts its step sizes, which are the same for the whole batch. In each step, the root mean
    square of (estimated error) / (atol + rtol |x|) over the batch is kept below 1. num_steps has no effect, and times
    must be None. The number of evaluations is an int32 array. Only reverse-mode differentiation is supported. If
    max_steps steps do not suffice, the method raises RuntimeError outside jit, and returns NaN inside jit. If the
    package diffrax is not installed, the method raises ModuleNotFoundError. rtol, atol and max_steps have no effect on
    other methods.

    Raises ValueError for an unknown method, fewer than one step, a grid that does not increase within [0, 1],
    tolerances that are negative or both 0, an integer x0, or a velocity whose shape differs from the shape of x.

    Example:
        x1, nfe = integrate(velocity, x0, method="heun", num_steps=25)
        x1, nfe = jax.jit(lambda x: integrate(velocity, x, method="dopri5", rtol=1e-4))(x0)
    """
    check_velocity(velocity)
    if method == "dopri5":
        if times is not None:
            raise ValueError("dopri5 chooses its own times; omit `times`, or use a fixed-step method.")
        return _dopri5(velocity, x0, cond, reverse=reverse, rtol=rtol, atol=atol, max_steps=max_steps)
    return trajectory(velocity, x0, cond, method=method, num_steps=num_steps, times=times, reverse=reverse, keep=False)


def trajectory(
    velocity: Velocity,
    x0: Float[Array, "b *event"],
    cond: Any = None,
    *,
    method: FixedMethod = "heun",
    num_steps: int = 50,
    times: Sequence[float] | np.ndarray | None = None,
    reverse: bool = False,
    keep: bool = True,
) -> tuple[Any, int]:
    """Returns the solution of dx/dt = velocity(t, x, cond) at all times of the grid, and the number of evaluations.

    The solution has shape `steps+1 b *event`; its first entry is x0.

    keep: whether to return the solution at all times; if False, only its last entry is returned, of shape `b *event`.

    Other settings and errors are the same as for `integrate` with a fixed-step method.

    Example:
        path, nfe = trajectory(velocity, x0, num_steps=100, method="rk4")
    """
    check_velocity(velocity)
    if method not in TABLEAUS:
        raise ValueError(f"method is {method!r}; choose one of {', '.join(TABLEAUS)} (or dopri5 in integrate).")
    grid = time_grid(num_steps, times)
    grid = grid[::-1] if reverse else grid
    nodes, stage_weights, weights = TABLEAUS[method]
    dtype, x0 = _state_dtype(x0), jnp.asarray(x0)

    def step(x, ends):
        start, width = ends[0], (ends[1] - ends[0]).astype(dtype)
        slopes: list[Array] = []
        for node, row in zip(nodes, stage_weights, strict=True):
            moved = x
            for weight, slope in zip(row, slopes, strict=True):
                moved = moved + width * weight * slope
            moved = moved.astype(x0.dtype)
            t = jnp.full(x.shape[0], start + node * width)
            slopes.append(check_output(velocity(t, moved, cond), moved).astype(dtype))
        for weight, slope in zip(weights, slopes, strict=True):
            x = x + width * weight * slope
        return x, x.astype(x0.dtype) if keep else None

    last, states = jax.lax.scan(step, x0.astype(dtype), jnp.stack([grid[:-1], grid[1:]], axis=1))
    result = jnp.concatenate([x0[None], states]) if keep else last.astype(x0.dtype)
    return result, len(nodes) * (len(grid) - 1)


def _state_dtype(x0: Array) -> jnp.dtype:
    """Returns the dtype in which the state is accumulated; raises ValueError unless x0 is floating-point."""
    check_floating("x0", x0)
    return jnp.promote_types(jnp.asarray(x0).dtype, jnp.float32)  # float64 if jax has it enabled


def _dopri5(
    velocity: Velocity, x0: Array, cond: Any, *, reverse: bool, rtol: float, atol: float, max_steps: int
) -> tuple[Array, Array]:
    if not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
        raise ValueError(
            f"rtol is {rtol} and atol is {atol}; neither may be negative, and at least one must be positive."
        )
    if max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}; it must be at least 1.")
    dtype, x0 = _state_dtype(x0), jnp.asarray(x0)
    check_unmapped("dopri5", (x0, cond))

    def solve(velocity, x0, cond):
        return _adaptive(velocity, x0, cond, dtype, reverse=reverse, rtol=rtol, atol=atol, max_steps=max_steps)

    return keep_rows(solve, velocity, x0, cond)


def _adaptive(
    velocity: Velocity, x0: Array, cond: Any, dtype: Any, *, reverse: bool, rtol: float, atol: float, max_steps: int
) -> tuple[Array, Array]:
    diffrax: Any = need("diffrax", "The adaptive solver dopri5")

    def field(t, x, _):
        return check_output(velocity(jnp.full(len(x), t, dtype), x.astype(x0.dtype), cond), x).astype(dtype)

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Dopri5(),
        jnp.asarray(float(reverse), dtype),
        jnp.asarray(float(not reverse), dtype),
        jnp.asarray(-FIRST_STEP if reverse else FIRST_STEP, dtype),
        x0.astype(dtype),
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        max_steps=max_steps,
        throw=False,
    )
    arrived = solution.result == diffrax.RESULTS.successful
    if not isinstance(arrived, Tracer) and not arrived:
        raise RuntimeError(
            f"dopri5 did not finish within max_steps={max_steps}; increase max_steps, loosen rtol={rtol} and "
            f"atol={atol}, or use a fixed-step method. A NaN velocity also causes this error."
        )
    # Every step has seven stages, even if it is rejected, but the first stage is known from the last accepted step.
    evaluations = 6 * solution.stats["num_steps"] + 1
    x1 = solution.ys[0] + nan_if(jnp.logical_not(arrived), dtype)
    return x1.astype(x0.dtype), jnp.asarray(evaluations, jnp.int32)


def time_grid(num_steps: int, times: Sequence[float] | np.ndarray | None) -> Float[Array, " n"]:
    """Returns the time grid of `integrate`: the given times or, if times is None, num_steps equal steps.

    Raises ValueError if the grid has no step or does not increase within [0, 1].

    Example:
        grid = time_grid(50, None)
    """
    if times is None:
        if not isinstance(num_steps, int | np.integer) or num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}; it must be a whole number of at least 1.")
        return jnp.linspace(0.0, 1.0, num_steps + 1)
    # Compare times in JAX's default dtype: times that round to the same number would give an empty step.
    grid = np.asarray(times, jnp.result_type(float))
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"times have shape {grid.shape}; give a one-dimensional array of at least two times.")
    if not ((grid >= 0) & (grid <= 1)).all() or not (grid[1:] > grid[:-1]).all():
        raise ValueError(f"times start at {grid[0]} and end at {grid[-1]}; they must increase within [0, 1].")
    return jnp.asarray(grid)


def edm_times(num_steps: int) -> tuple[float, ...]:
    """Returns EDM's grid of num_steps + 1 times, which is finer near the data, for `integrate(times=...)`.

    The times are t_i = 1 / (1 + sigma_i), at which noise and data on the path `CondOT` have the ratio sigma_i =
    (80^(1/7) + i/(num_steps - 1) (0.002^(1/7) - 80^(1/7)))^7 for i from 0 to num_steps - 1, and 0 for i = num_steps
    (Karras et al., arXiv 2206.00364). Integration starts at t = 1/81 instead of 0, with the noise x0 in place of x_t.
    Raises ValueError for fewer than two steps.

    Example:
        x1, nfe = integrate(velocity, x0, method="heun", times=edm_times(25))
    """
    if not isinstance(num_steps, int | np.integer) or num_steps < 2:
        raise ValueError(f"num_steps is {num_steps}; it must be a whole number of at least 2.")
    largest, smallest = 80.0 ** (1 / 7), 0.002 ** (1 / 7)
    sigmas = [(largest + i / (num_steps - 1) * (smallest - largest)) ** 7 for i in range(num_steps)]
    return (*(1 / (1 + sigma) for sigma in sigmas), 1.0)


def guided(
    velocity: Velocity,
    unconditional: Any = None,
    *,
    scale: float | None = None,
    weight: float | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """Returns the velocity field with classifier-free guidance (Ho and Salimans, arXiv 2207.12598).

    Let v_c be the velocity with the condition, and v_u the velocity without it. `velocity` computes both in one batch
    of twice the size. Set the strength of the guidance with either scale or weight, where scale = 1 + weight.

    unconditional: the value of cond that means "no condition", such as -1 for labels. It has the structure of cond,
    with one value for all samples or one for each. None means -1 if cond consists of labels; if cond consists of
    vectors, tokens or texts, None means a `ContextTokens` whose mask is False everywhere.
    scale: the field is v_u + scale (v_c - v_u), so scale 1 means no guidance.
    weight: the field is (1 + weight) v_c - weight v_u, so weight 0 means no guidance.
    interval: range of times at which guidance is applied; at other times, the field is v_c (Kynkäänniemi et al., arXiv
    2404.07724).

    Raises ValueError unless exactly one of scale and weight is given and finite, and interval increases within [0, 1].
    The returned field raises ValueError if cond is None.

    Example:
        x1, nfe = integrate(guided(velocity, -1, scale=2.0), x0, labels)
    """
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"interval is {interval}; it must be two increasing times within [0, 1].")
    weights = [number for number in (weight, None if scale is None else scale - 1) if number is not None]
    if len(weights) != 1:
        raise ValueError(f"scale is {scale} and weight is {weight}; give exactly one of them (scale = 1 + weight).")
    if not isinstance(weights[0], Tracer) and not np.isfinite(weights[0]):
        raise ValueError(f"scale is {scale} and weight is {weight}; the strength of the guidance must be finite.")

    def stacked(cond, free):
        # In an unsigned dtype, -1 would wrap around to a large label.
        if jnp.issubdtype(cond.dtype, jnp.integer):
            cond = cond.astype(jnp.int32)
        free = jnp.broadcast_to(jnp.asarray(free, cond.dtype), cond.shape)
        return jnp.concatenate(alike_rows([cond, free]))

    def field(t, x, cond):
        if cond is None:
            raise ValueError("guidance needs a condition, but cond is None; give one, or do not use guidance.")
        cond = as_condition(cond) if unconditional is None else cond
        free = conditioning.unconditional(cond, None) if unconditional is None else unconditional
        both = jax.tree.map(stacked, cond, free)
        v = velocity(jnp.concatenate([t, t]), jnp.concatenate([x, x]), both)
        v_c, v_u = jnp.split(v, 2)
        inside = ((t >= low) & (t <= high)).reshape((-1,) + (1,) * (x.ndim - 1))
        return jnp.where(inside, linear_rule(v_c, v_u, weights[0]), v_c)

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
    """Returns samples X at t = 1 of dX = (v + g²/2 · score) dt + g dW from x0 at t = 0, and the number of evaluations.

    For any g(t) ≥ 0, the SDE has the same marginals as the ODE dx = v dt. The method is Euler-Maruyama with num_steps
    equal steps; the last step adds no noise. The number of evaluations counts those of velocity and of score.

    score: a function (t, x, cond) that returns ∇ log p_t(x), for instance computed by
    `flowgen.matching.velocity_to_score`.
    diffusion: the function g, called with a scalar t.

    Example:
        x1, nfe = integrate_sde(velocity, score, x0, key, num_steps=200)
    """
    check_velocity(velocity)
    check_key(key)
    grid = time_grid(num_steps, None)
    dtype, x0 = _state_dtype(x0), jnp.asarray(x0)

    def step(carry, inputs):
        x, key = carry
        start, end, last = inputs
        key, draw = jax.random.split(key)
        t, width, g = jnp.full(x.shape[0], start), end - start, diffusion(start)
        at = x.astype(x0.dtype)
        v, s = check_output(velocity(t, at, cond), at), check_output(score(t, at, cond), at, "the score")
        noise = jnp.where(last, 0, jax.random.normal(draw, x.shape, dtype))
        return ((x + width * (v + 0.5 * g**2 * s) + g * jnp.sqrt(width) * noise).astype(dtype), key), None

    last = jnp.arange(num_steps) == num_steps - 1
    (x, _), _ = jax.lax.scan(step, (x0.astype(dtype), key), (grid[:-1], grid[1:], last))
    return x.astype(x0.dtype), 2 * num_steps
