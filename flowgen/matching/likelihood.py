"""Log-densities under a velocity field, computed from its divergence along trajectories."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flowgen.arrays import check_floating, check_key
from flowgen.backend import any_derivative
from flowgen.gaussian import gaussian_log_density
from flowgen.matching.checks import check_output, check_velocity
from flowgen.matching.solvers import Method, Velocity, integrate


def log_prob(
    velocity: Velocity,
    x1: Float[Array, "b *event"],
    cond: Any = None,
    *,
    key: Key[Array, ""] | None = None,
    log_p0: Callable[[Array], Float[Array, " b"]] | None = None,
    method: Method = "rk4",
    num_steps: int = 50,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 4096,
) -> Float[Array, " b"]:
    """Returns the log-density of samples, log p1(x1) = log p0(x0) - ∫ div v dt, in nats.

    The integral runs along the trajectory that the velocity v generates from the noise x0 at t = 0 to x1 at t = 1.

    x1: data in the range of training, such as [-1, 1] for images; the values are not checked.
    key: None computes the exact divergence with one Jacobian-vector product per dimension. A key selects Hutchinson's
    estimate with one Rademacher probe per sample, which is the same along the whole trajectory (Grathwohl et al., arXiv
    1810.01367).
    log_p0: function that returns the log-density of x0; None means the standard normal density.
    Other settings: as for `integrate`.

    With "dopri5", the tolerances apply jointly to the state and to the integral of the divergence. The integral is
    accumulated in at least float32. The result is differentiable; with "dopri5", only in reverse mode.

    Example:
        lp = log_prob(velocity, x1, key=jax.random.key(0))
    """
    check_velocity(velocity)
    check_floating("x1", x1)
    if key is not None:
        check_key(key)
    x1 = jnp.asarray(x1)
    dtype = jnp.promote_types(x1.dtype, jnp.float32)
    probe = None if key is None else jnp.zeros_like(x1) + jax.random.rademacher(key, x1.shape, x1.dtype)

    def joint(t, state, cond):
        x, _ = jnp.split(state, [math.prod(x1.shape[1:])], axis=1)
        v, change = divergence(velocity, t, x.reshape(x1.shape).astype(x1.dtype), cond, probe=probe)
        return jnp.concatenate([v.reshape(len(v), -1).astype(dtype), change[:, None].astype(dtype)], axis=1)

    flat = x1.reshape(len(x1), -1).astype(dtype)
    state = jnp.concatenate([flat, jnp.zeros_like(flat[:, :1])], axis=1)
    state, _ = integrate(
        joint,
        state,
        cond,
        method=method,
        num_steps=num_steps,
        reverse=True,
        rtol=rtol,
        atol=atol,
        max_steps=max_steps,
    )
    x0, change = state[:, :-1].reshape(x1.shape), state[:, -1]
    # Integration backwards in time flips the sign of the integral of the divergence.
    if log_p0 is None:
        return gaussian_log_density(x0.reshape(len(x0), -1)).sum(axis=1) + change
    return log_p0(x0) + change


def divergence(
    velocity: Velocity,
    t: Float[Array, " b"],
    x: Float[Array, "b *event"],
    cond: Any = None,
    *,
    probe: Float[Array, "b *event"] | None = None,
) -> tuple[Float[Array, "b *event"], Float[Array, " b"]]:
    """Returns v = velocity(t, x, cond) and its divergence Σ_i ∂v_i/∂x_i for each sample.

    If probe is given, Hutchinson's estimate probe · (∂v/∂x) probe replaces the exact divergence.

    The exact divergence needs one Jacobian-vector product of the whole batch for each dimension. Sums are accumulated
    in at least float32.

    Example:
        v, change = divergence(velocity, t, x, probe=jax.random.rademacher(key, x.shape, x.dtype))
    """

    def field(y):
        with any_derivative():
            return check_output(velocity(t, y, cond), y)

    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if probe is not None:
        v, moved = jax.jvp(field, (x,), (probe,))
        return v, (moved * probe).reshape(len(x), -1).astype(dtype).sum(axis=1)
    size = math.prod(x.shape[1:])

    def along(total, index):
        direction = jnp.zeros((size,), x.dtype).at[index].set(1).reshape(x.shape[1:])
        _, moved = jax.jvp(field, (x,), (jnp.zeros_like(x) + direction[None],))
        return total + moved.reshape(len(x), -1)[:, index].astype(dtype), None

    v = field(x)
    # Zeros that are computed from v are sharded over devices in the same way as the sum.
    zeros = jnp.zeros_like(v, dtype).reshape(len(x), -1).sum(axis=1)
    total, _ = jax.lax.scan(along, zeros, jnp.arange(size))
    return v, total
