"""Log-densities as functions x -> log p(x): the density of a flow, and geometric paths between two densities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from flowgen.arrays import at_least_float32, shown
from flowgen.conditioning import AnyCondition, ContextTokens, TextCondition
from flowgen.flows.block import Variables
from flowgen.flows.density import Flow, check_flow, log_prob

# x `b *event` -> log p(x) `b`, in nats, perhaps up to a constant; -inf outside the support.
LogDensity = Callable[[Any], Array]


@partial(jax.tree_util.register_dataclass, data_fields=["params", "cond"], meta_fields=["flow"])
@dataclass(frozen=True, eq=False)
class FlowLogDensity:
    """The function x -> log p(x | cond) of a flow, in nats, with params and cond as leaves of a pytree.

    Example:
        log_p = FlowLogDensity(flow, params, cond)(x)
    """

    flow: Any
    params: Any
    cond: Any = None

    def __call__(self, x: Float[Array, "b *event"]) -> Float[Array, " b"]:
        return log_prob(self.flow, self.params, x, self.cond)

    def has_one_condition(self) -> Bool[Array, ""] | np.bool_:
        """Returns whether all rows of cond are equal, as a NumPy value unless cond is traced or on other hosts.

        Numbers at padding do not count.
        """
        leaves = jax.tree.leaves(self.cond)
        far = any(isinstance(x, Tracer) or not getattr(x, "is_fully_addressable", True) for x in leaves)
        xp: Any = jnp if far else np

        def tokens_that_exist(node):
            if not isinstance(node, ContextTokens | TextCondition):
                return node
            tokens, mask = node
            return xp.where(xp.asarray(mask)[..., None], xp.asarray(tokens), 0), mask

        kinds = (ContextTokens, TextCondition)
        cond = jax.tree.map(tokens_that_exist, self.cond, is_leaf=lambda node: isinstance(node, kinds))
        rows = [xp.asarray(x) for x in jax.tree.leaves(cond)]
        return xp.asarray([(x == x[:1]).all() for x in rows]).all()


def flow_log_density(flow: Flow, params: Variables, cond: AnyCondition | None = None) -> FlowLogDensity:
    """Returns the function x -> log p(x | cond) of a flow, in nats.

    The function is a pytree of params and cond, so it can be an argument of a jitted function. It is compiled once per
    flow and shapes.

    Raises ValueError unless `flow` is a flow and `params` is a dict with the key "params". The returned function raises
    ValueError if x or cond does not fit the flow.

    Example:
        log_q = flow_log_density(flow, params)
    """
    check_flow(flow, params)
    return FlowLogDensity(flow, params, jax.tree.map(_label_array, cond, is_leaf=lambda x: isinstance(x, list)))


def _label_array(labels: Any) -> Any:
    return np.asarray(labels) if isinstance(labels, list) else labels


def flow_log_densities(*log_densities: LogDensity) -> list[FlowLogDensity]:
    """Returns each `FlowLogDensity` among the given functions or inside a `Tempered` one.

    Example:
        found = flow_log_densities(log_q, log_target)
    """
    parts = jax.tree.leaves(log_densities, is_leaf=lambda x: isinstance(x, FlowLogDensity))
    return [part for part in parts if isinstance(part, FlowLogDensity)]


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


@partial(jax.tree_util.register_dataclass, data_fields=["log_q", "log_target", "beta"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class Tempered:
    """The log-density x -> (1 - beta) log q(x) + beta log p(x); see `tempered`.

    Example:
        log_half = Tempered(log_q, log_target, 0.5)(x)
    """

    log_q: Any
    log_target: Any
    beta: Any

    def __call__(self, x: Float[Array, "b *event"]) -> Float[Array, " b"]:
        return between(density_at("log_q", self.log_q, x), density_at("log_target", self.log_target, x), self.beta)


def tempered(log_q: LogDensity, log_target: LogDensity, beta: Float[Array, ""] | float) -> Tempered:
    """Returns the log-density x -> (1 - beta) log_q(x) + beta log_target(x), which lies on the geometric path from q to
    the target.

    If beta is 0, the returned function equals log_q; if beta is 1, it equals log_target. In between, its density is not
    normalised, and its values are -inf where log_q or log_target is -inf.

    The returned function raises ValueError if log_q or log_target does not return one number per sample.

    Example:
        log_half = tempered(log_q, log_target, 0.5)
    """
    return Tempered(log_q, log_target, beta)


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
