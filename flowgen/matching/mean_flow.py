"""MeanFlow: average velocity over an interval of the path, for sampling in one step (Geng et al., arXiv 2505.13447).

The average velocity is u(t, x, cond, interval) = 1/interval ∫ v(τ, x_τ) dτ over [t, t + interval], along the trajectory
that passes through x at time t. For interval 0, u is v itself. Multiplying this equation by interval, and
differentiating along the trajectory with fixed end t + interval, yields the identity

    u = v + interval · du/dt,    du/dt = ∂u/∂t + (∂u/∂x) v - ∂u/∂interval                               (identity)

In the paper, noise is at t = 1, and the identity is u = v - (t - r) du/dt. Here, data are at t = 1, and interval is the
paper's t - r.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flowgen.arrays import check_floating
from flowgen.backend import any_derivative
from flowgen.conditioning import unconditional
from flowgen.guidance import linear_rule
from flowgen.matching.checks import check_output
from flowgen.matching.conditions import as_condition, is_conditional
from flowgen.matching.couplings import Coupling
from flowgen.matching.loss import (
    Loss,
    check_dropout,
    check_parts,
    check_step,
    draw_pairs,
    draw_point,
    mean_square,
    rows_of,
)
from flowgen.matching.paths import CondOT, Path, over_event
from flowgen.matching.solvers import time_grid
from flowgen.matching.times import LogitNormal

AverageVelocity = Callable[[Array, Array, Any, Array], Array]

# The published code draws logit-normal times with mean -0.4. Noise is at t = 1 there, so the mean becomes 0.4 here.
PUBLISHED_TIME = LogitNormal(mean=0.4, std=1.0)
# Number added to the squared error in the denominator of the adaptive weight.
ADAPTIVE_OFFSET = 0.01


def mean_flow_loss(
    *,
    path: Path | None = None,
    coupling: Coupling | None = None,
    time: Callable[[Array, int], Array] | None = None,
    instantaneous: float = 0.75,
    power: float = 1.0,
    guidance_weight: float = 0.0,
    label_dropout: float = 0.1,
) -> Loss:
    """Returns the MeanFlow loss, loss_fn(average_velocity, batch, key, log_mean=None) -> (loss, metrics, log_mean).

    The loss is E[w · a · |u - target|²], with u = average_velocity(t, x_t, cond, interval) and the pair weight w. The
    target is v + interval · du/dt, the right-hand side of the identity in `flowgen.matching.mean_flow`, where v is the
    path's target velocity. One Jacobian-vector product computes du/dt. |u - target|² is *summed* over dimensions, as in
    the published code, and a = 1 / (|u - target|² + 0.01)^power is an adaptive weight. No gradient flows through the
    target or through a. For each pair, two times are drawn from `time`; the smaller is t, and the larger is t +
    interval. The defaults are the published settings.

    path, coupling, time: None means `CondOT()`, `Independent()` and `LogitNormal(mean=0.4, std=1.0)`, respectively.
    instantaneous: probability with which the interval of a pair is set to 0, so that the network also learns the
    velocity itself.
    power: exponent of the adaptive weight. With power 1, a · |u - target|² stays below 1 for each pair, so monitor the
    metric "unweighted_loss", which is the mean of |u - target|² over dimensions and pairs. In high dimensions, |u -
    target|² is similar for all pairs, and so are the adaptive weights. In low dimensions, the adaptive weights move the
    minimum of the loss towards the most likely target, so use power 0.
    guidance_weight: weight of classifier-free guidance; 0 for none. For samples with a condition, (1 + guidance_weight)
    v - guidance_weight · average_velocity(t, x_t, no condition, 0) replaces v, so that one step draws a guided sample.
    A positive weight requires a condition. It also needs a label_dropout above 0, which trains the network without a
    condition.
    batch, label_dropout, log_mean: as for `flow_matching_loss`.

    Raises ValueError if settings or shapes are invalid.

    Example:
        loss_fn = mean_flow_loss(coupling=MinibatchOT())
        loss, metrics, log_mean = loss_fn(average_velocity, {"x1": images, "cond": labels}, key)
    """
    path = CondOT() if path is None else path
    time = PUBLISHED_TIME if time is None else time
    check_parts(path, coupling, time)
    check_dropout(label_dropout)
    check_mean_flow(instantaneous, power, guidance_weight)

    def loss_fn(
        average_velocity: AverageVelocity,
        batch: dict[str, Any],
        key: Key[Array, ""],
        log_mean: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array], Float[Array, ""]]:
        check_step(average_velocity, batch, key)
        pair_rows, time_rows, end_rows, share_rows, path_rows = rows_of(batch, key).split(5)
        pairs = draw_pairs(pair_rows, batch, coupling, log_mean, label_dropout=label_dropout)
        one, other = time_rows.draw_whole(time), end_rows.draw_whole(time)
        t = jnp.minimum(one, other)
        at_once = share_rows.draw_whole(lambda key, size: jax.random.bernoulli(key, instantaneous, (size,)))
        interval = jnp.where(at_once, 0, jnp.maximum(one, other) - t)
        point = draw_point(path_rows, path, t, pairs)
        v = point.u_t
        if guidance_weight:
            v = guided_target(average_velocity, t, point.x_t, pairs.cond, v, guidance_weight)
        u, target = average_and_target(average_velocity, t, point.x_t, pairs.cond, interval, v)
        num_dims = math.prod(pairs.x1.shape[1:])
        square = mean_square(u - target) * num_dims
        adaptive = jax.lax.stop_gradient((square + ADAPTIVE_OFFSET) ** -power)
        loss = (pairs.weight * adaptive * square).mean()
        metrics = {"loss": loss, "unweighted_loss": square.mean() / num_dims, "ess": pairs.ess}
        return loss, metrics, pairs.log_mean

    return loss_fn


def check_mean_flow(instantaneous: float, power: float, guidance_weight: float) -> None:
    """Raises ValueError if a setting of `mean_flow_loss` is out of range.

    Example:
        check_mean_flow(0.75, 1.0, 0.0)
    """
    if not 0 <= instantaneous <= 1:
        raise ValueError(f"instantaneous is {instantaneous}; it must be between 0 and 1.")
    if not (0 <= power < float("inf") and 0 <= guidance_weight < float("inf")):
        raise ValueError(
            f"power is {power} and guidance_weight is {guidance_weight}; both must be finite and at least 0."
        )


def average_and_target(
    average_velocity: AverageVelocity,
    t: Float[Array, " b"],
    x_t: Float[Array, "b *event"],
    cond: Any,
    interval: Float[Array, " b"],
    v: Float[Array, "b *event"],
) -> tuple[Float[Array, "b *event"], Float[Array, "b *event"]]:
    """Returns u(t, x_t, cond, interval) and its target v + interval · du/dt (see the identity in the module's
    docstring).

    No gradient flows through the target. If u is the average velocity of the field v, then u equals the target. If v
    contains the velocities of single pairs instead, u equals the expectation of the target, because the target is
    affine in v.

    Example:
        u, target = average_and_target(average_velocity, t, x_t, None, interval, v)
    """
    v = jax.lax.stop_gradient(v)

    def field(t, x, interval):
        with any_derivative():
            return check_output(average_velocity(t, x, cond, interval), x)

    u, change = jax.jvp(field, (t, x_t, interval), (jnp.ones_like(t), v, -jnp.ones_like(interval)))
    return u, jax.lax.stop_gradient(v + over_event(interval, v) * change)


def guided_target(
    average_velocity: AverageVelocity,
    t: Float[Array, " b"],
    x_t: Float[Array, "b *event"],
    cond: Any,
    v: Float[Array, "b *event"],
    weight: float,
) -> Float[Array, "b *event"]:
    """Returns (1 + weight) v - weight u(t, x_t, no condition, 0), or v itself for samples without a condition.

    Raises ValueError if cond is None, or if `flowgen.matching.conditions.as_condition` does not accept it.

    Example:
        v = guided_target(average_velocity, t, x_t, labels, v, weight=1.0)
    """
    if cond is None:
        raise ValueError("guidance_weight needs a condition, but cond is None; give one, or set guidance_weight to 0.")
    cond = as_condition(cond)
    free = average_velocity(t, x_t, unconditional(cond, None), jnp.zeros_like(t))
    conditional = over_event(is_conditional(cond).astype(v.dtype), v)
    return linear_rule(v, free.astype(v.dtype), weight * conditional)


def integrate_mean(
    average_velocity: AverageVelocity, x0: Float[Array, "b *event"], cond: Any = None, *, num_steps: int = 1
) -> tuple[Float[Array, "b *event"], int]:
    """Returns the samples x1 computed from the noise x0, and the number of network evaluations.

    Each step is x ← x + interval · average_velocity(t, x, cond, interval), with interval = 1 / num_steps. Raises
    ValueError if num_steps is below 1.

    Example:
        x1, nfe = integrate_mean(average_velocity, x0, labels, num_steps=1)
    """
    check_floating("x0", x0)
    grid = time_grid(num_steps, None)

    def step(x, ends):
        start, width = jnp.full(len(x), ends[0]), jnp.full(len(x), ends[1] - ends[0])
        return x + over_event(width, x) * average_velocity(start, x, cond, width).astype(x.dtype), None

    x1, _ = jax.lax.scan(step, x0, jnp.stack([grid[:-1], grid[1:]], axis=1))
    return x1, num_steps
