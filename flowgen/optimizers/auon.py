"""AuON: SGD with momentum, whose steps are divided by the root mean square of a hyperbolic cosine.

Maity (2025), arXiv 2509.24320, as in the authors' code. With momentum m and the Nesterov step G = (1 - β) g + β m,
    w <- (1 - lr λ) w - lr G / √(mean cosh²(γ G / |G|)).
For large matrices, each entry of G / |G| is small, so the divisor is near 1 and the rule is close to SGD with momentum.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flowgen.optimizers.matrices import beside_adamw


def auon(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any = None,
    *,
    momentum: float = 0.95,
    gamma: float = 1.5,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformation:
    """Returns AuON for the weight matrices of `are_matrices` and AdamW for all other parameters.

    The formula is in the docstring of the module.

    b1, b2, eps: AdamW's. momentum: β. gamma: γ.
    mask: selects the parameters to which weight decay applies, as in `optax.adamw`.
    adam_learning_rate: AdamW's learning rate; None means `learning_rate`. The authors use `learning_rate / 10`.

    Example:
        tx = per_layer(auon(0.08, weight_decay=0.01, adam_learning_rate=0.008))
    """

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(updates, state, params=None):
        del params
        state = optax.tree.update_moment(updates, state, momentum, 1)
        nesterov = optax.tree.update_moment(updates, state, momentum, 1)
        return jax.tree.map(lambda step: _braked(step, gamma), nesterov), state

    direction = optax.GradientTransformation(init, update)
    rates = learning_rate, adam_learning_rate
    return beside_adamw(direction, *rates, weight_decay=weight_decay, mask=mask, b1=b1, b2=b2, eps=eps)


def _braked(step: jax.Array, gamma: float) -> jax.Array:
    unit = step / (jnp.linalg.norm(step) + 1e-7)
    return step / (jnp.sqrt(jnp.mean(jnp.cosh(gamma * unit) ** 2)) + 1e-8)
