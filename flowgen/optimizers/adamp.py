"""AdamP: Adam without the part of an update that only increases the norm of scale-invariant weights.

Heo et al. (2021), arXiv 2006.08217. Adam's update is p = m̂ / (√v̂ + ε). If the weights w are almost orthogonal to their
gradient g,
    |cos(g, w)| < δ / √dim(w),
the update is p - (w·p) w / |w|², and the weight decay is multiplied by `wd_ratio`. Here, w stands for the weights of a
single output if all outputs meet this condition, and otherwise for the whole array.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from flowgen.optimizers.matrices import are_kernels


class AdamPState(NamedTuple):
    """count: number of updates. mu, nu: running means of gradients and of their squares."""

    count: Array
    mu: Any
    nu: Any


def adamp(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any = None,
    *,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Returns AdamP with decoupled weight decay; see the module for the formula.

    The projection p - (w·p) w / |w|² applies only to arrays with two or more axes. The outputs of an array called
    `kernel` are indexed by its last axis, and those of any other array, such as a table of embeddings, by its first.
    delta: the factor δ of the threshold for the cosine. wd_ratio: factor for the weight decay of projected arrays.
    mask: selects the parameters to which weight decay applies, as in `optax.adamw`.

    Example:
        tx = per_layer(adamp(1e-3, weight_decay=0.01))
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AdamPState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("adamp needs the parameters; call update(updates, state, params).")
        count = state.count + 1
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(updates, state.nu, b2, 2)
        decayed = mask(params) if callable(mask) else jax.tree.map(lambda _: True, params) if mask is None else mask

        def direction(g, w, m, v, is_kernel, decays):
            first = b1 * m + (1 - b1) * g if nesterov else m
            p = first / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps)
            if w.ndim > 1:
                outputs_first = jnp.moveaxis(jnp.stack((g, w, p)), -1 if is_kernel else 1, 1)
                p, ratio = _projected(*outputs_first.reshape(3, outputs_first.shape[1], -1), delta, wd_ratio, eps)
                p = jnp.moveaxis(p.reshape(outputs_first.shape[1:]), 0, -1 if is_kernel else 0)
            else:
                ratio = 1.0
            return (p + weight_decay * ratio * w if decays else p).astype(w.dtype)

        new = jax.tree.map(direction, updates, params, mu, nu, are_kernels(params), decayed)
        return new, AdamPState(count, mu, nu)

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate))


def _projected(
    g: Float[Array, "c n"], w: Float[Array, "c n"], p: Float[Array, "c n"], delta: float, wd_ratio: float, eps: float
) -> tuple[Float[Array, "c n"], Float[Array, ""]]:
    """Returns the update of an array with c outputs, projected if necessary, and the factor for its weight decay."""

    def attempt(g, w, p):
        unit = w / (jnp.linalg.norm(w, axis=1, keepdims=True) + eps)
        product = jnp.linalg.norm(g, axis=1) * jnp.linalg.norm(w, axis=1)
        cosine = jnp.abs((g * w).sum(axis=1)) / jnp.maximum(product, eps)
        return p - unit * (unit * p).sum(axis=1, keepdims=True), cosine.max() < delta / w.shape[1] ** 0.5

    by_output, outputs = attempt(g, w, p)
    whole, array = attempt(*(x.reshape(1, -1) for x in (g, w, p)))
    projected = jnp.where(outputs, by_output, jnp.where(array, whole.reshape(p.shape), p))
    return projected, jnp.where(outputs | array, wd_ratio, 1.0)
