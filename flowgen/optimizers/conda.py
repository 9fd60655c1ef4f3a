"""Conda: Adam in the basis of the momentum's singular vectors.

Wang et al. (2025), arXiv 2509.24218. The momentum m of a matrix is a running mean of its gradients g. The columns of U
are the singular vectors of m for its shorter side, recomputed every `update_every` updates. The rule for update t is
    v <- b2 v + (1 - b2) (Uᵀ g)²,    step = scale · U (Uᵀ m / (√v + ε)) √(1 - b2ᵗ) / (1 - b1ᵗ).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from flowgen.optimizers.matrices import as_matrix, beside_adamw


class CondaState(NamedTuple):
    """count: number of updates. mu, nu: running means of gradients and of squared projected gradients. basis: U."""

    count: Array
    mu: Any
    nu: Any
    basis: Any


def conda(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any = None,
    *,
    scale: float = 1.0,
    update_every: int = 2000,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformation:
    """Returns Conda for the weight matrices of `are_matrices` and AdamW for all other parameters.

    The formula is in the docstring of the module.

    scale: factor for Conda's steps; the authors use 0.25 for language models.
    update_every: the basis U is recomputed once in this many updates, beginning with the first.
    mask: selects the parameters to which weight decay applies, as in `optax.adamw`.
    adam_learning_rate: AdamW's learning rate; None means `learning_rate`.
    Weight decay is computed from the parameters before the update, as in optax; in the authors' code, it is computed
    from those after the update.

    Example:
        tx = per_layer(conda(1e-3, scale=0.25, weight_decay=0.01))
    """

    if update_every < 1:
        raise ValueError(f"update_every is {update_every}; it must be at least 1.")

    def init(params):
        zeros = jax.tree.map(lambda w: jnp.zeros(as_matrix(w).shape, w.dtype), params)
        basis = jax.tree.map(lambda w: jnp.eye(min(w.shape), dtype=w.dtype), zeros)
        return CondaState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.zeros_like, zeros), basis)

    def update(updates, state, params=None):
        del params
        grads = jax.tree.map(as_matrix, updates)
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        basis = lax.cond(
            state.count % update_every == 0, lambda: jax.tree.map(_singular_vectors, mu), lambda: state.basis
        )
        count = state.count + 1
        nu = optax.tree.update_moment(jax.tree.map(_projected, grads, basis), state.nu, b2, 2)
        factor = scale * jnp.sqrt(1 - b2**count) / (1 - b1**count)

        def step(g, m, v, u):
            return (factor * _projected(_projected(m, u) / (jnp.sqrt(v) + eps), u.T)).reshape(g.shape)

        return jax.tree.map(step, updates, mu, nu, basis), CondaState(count, mu, nu, basis)

    direction = optax.GradientTransformation(init, update)
    rates = learning_rate, adam_learning_rate
    return beside_adamw(direction, *rates, weight_decay=weight_decay, mask=mask, b1=b1, b2=b2, eps=eps)


def _singular_vectors(m: Float[Array, "i o"]) -> Float[Array, "s s"]:
    """Returns a matrix's singular vectors for its shorter side, as columns."""
    u, _, vh = jnp.linalg.svd(m.astype(jnp.promote_types(m.dtype, jnp.float32)), full_matrices=False)
    u, vh = u.astype(m.dtype), vh.astype(m.dtype)
    return u if m.shape[0] <= m.shape[1] else vh.T


def _projected(x: Float[Array, "i o"], basis: Float[Array, "s s"]) -> Float[Array, "i o"]:
    """Returns a matrix whose shorter side is expressed in the given basis."""
    return basis.T @ x if x.shape[0] <= x.shape[1] else x @ basis
