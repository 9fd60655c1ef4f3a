"""Log-densities as functions x -> log p(x): the density of a flow, and geometric paths between two densities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowgen.arrays import at_least_float32, shown
from flowgen.backend import keep_rows
from flowgen.conditioning import AnyCondition
from flowgen.flows.block import Variables
from flowgen.flows.density import Flow, check_flow

# x `b *event` -> log p(x) `b`, in nats, perhaps up to a constant; -inf outside the support.
LogDensity = Callable[[Any], Array]


def flow_log_density(flow: Flow, params: Variables, cond: AnyCondition | None = None) -> LogDensity:
    """Returns the function x -> log p(x | cond) of a flow, in nats.

    Example:
        log_q = flow_log_density(flow, params)
    """
    check_flow(flow, params)

    def log_prob(params, x, cond):
        return flow.apply(params, x, cond, method="log_prob")

    return lambda x: keep_rows(log_prob, params, x, cond)


def density_at(name: str, log_density: LogDensity, x: Float[Array, "b *event"]) -> Float[Array, " b"]:
    """Returns log_density(x). Raises ValueError unless the result is one floating-point number per sample.

    name: name of the argument in the error message.

    Example:
        log_p = density_at("log_target", log_target, x)
    """
    if not callable(log_density):
        raise ValueError(f"{name} is {shown(log_density)}; give a function x -> log p(x), one number per sample.")
    value = at_least_float32(f"{name}(x)", log_density(x))
    if value.shape != x.shape[:1]:
        raise ValueError(
            f"{name}(x) has shape {value.shape}; it must be {x.shape[:1]}, one number per sample: sum over the other "
            "axes of x, not over the samples."
        )
    return value


def tempered(log_q: LogDensity, log_target: LogDensity, beta: Float[Array, ""] | float) -> LogDensity:
    """Returns the log-density x -> (1 - beta) log q(x) + beta log p(x), which lies on the geometric path from q to the
    target.

    For beta between 0 and 1, it is not normalised, and is -inf outside the support of either density. At 0, it is log
    q; at 1, log p.

    Example:
        log_half = tempered(log_q, log_target, 0.5)
    """

    def log_density(x):
        return between(density_at("log_q", log_q, x), density_at("log_target", log_target, x), beta)

    return log_density


def between(log_q: Float[Array, " b"], log_p: Float[Array, " b"], beta: Float[Array, ""] | float) -> Float[Array, " b"]:
    """Returns (1 - beta) log q + beta log p, with 0 times -inf taken as 0.

    Example:
        between(jnp.array([-1.0]), jnp.array([-jnp.inf]), 0.0)  # -1
    """

    def part(factor, log_density):
        return jnp.where(factor == 0, 0.0, factor * log_density)

    return part(1 - beta, log_q) + part(beta, log_p)


def value_and_score(log_density: LogDensity, x: Float[Array, "b *event"]) -> tuple[Array, Array]:
    """Returns log p(x) of each sample and its gradient ∇_x log p(x).

    Example:
        log_p, score = value_and_score(log_target, x)
    """

    def total(x):
        value = log_density(x)
        return value.sum(), value

    (_, value), slope = jax.value_and_grad(total, has_aux=True)(x)
    return value, slope
