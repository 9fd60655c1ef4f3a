"""Guidance: how the parameters of the conditional and the unconditional branch are combined, token by token.

With (a, m) = (log_scale, shift), c conditional, u unconditional, and weight w:

    linear (TARFlow)     a = a_c + w (a_c - a_u),   m = m_c + w (m_c - m_u)
    product (STARFlow, Prop. 2), the Gaussian p_c^(1+w) / p_u^w with its precision kept positive:
        s = min(σ_c / σ_u, 1)²,   d = 1 + w - w s,   σ = σ_c / √d,   m = ((1+w) m_c - w s m_u) / d
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from flowgen.settings import config
from flowgen.settings.ranges import NonNegative, Positive

Rule = Literal["linear", "product"]
Parts = Literal["both", "log_scale", "shift"]


@config
class Guidance:
    """What is guided, where and how strongly; scale 0 is no guidance and costs nothing.

    scale: w. rule: "linear" or "product". parts: what the linear rule changes.
    blocks: indices of guided blocks, data side = 0; None means all.
    anneal: w grows along each block's tokens, from 0 at the first to `scale` at the last.
    temperature: attention temperature of the unconditional branch; with a model without classes (or -1 labels)
    it alone tells the two branches apart, so values below or above 1 guide an unconditional model.

    Example:
        r = sample(flow, params, key, 16, labels, guidance=Guidance(scale=2.0))
    """

    scale: NonNegative = 0.0
    rule: Rule = "linear"
    parts: Parts = "both"
    blocks: tuple[int, ...] | None = None
    anneal: bool = False
    temperature: Positive = 1.0

    def __post_init__(self):
        if self.rule == "product" and self.parts != "both":
            raise ValueError(f"parts is {self.parts!r}; the product rule always guides both.")


def linear_rule(
    conditional: tuple[Float[Array, "b n c"], Float[Array, "b n c"]],
    unconditional: tuple[Float[Array, "b n c"], Float[Array, "b n c"]],
    weight: Float[Array, "n 1"],
    parts: Parts = "both",
) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"]]:
    """Returns guided (shift, log_scale), extrapolated linearly; the parts not named stay conditional.

    Example:
        shift, log_scale = linear_rule((m_c, a_c), (m_u, a_u), jnp.full((n, 1), 2.0))
    """
    shift, log_scale = conditional
    if parts in ("both", "shift"):
        shift = shift + weight[None] * (shift - unconditional[0])
    if parts in ("both", "log_scale"):
        log_scale = log_scale + weight[None] * (log_scale - unconditional[1])
    return shift, log_scale


def product_rule(
    conditional: tuple[Float[Array, "b n c"], Float[Array, "b n c"]],
    unconditional: tuple[Float[Array, "b n c"], Float[Array, "b n c"]],
    weight: Float[Array, "n 1"],
) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"]]:
    """Returns guided (shift, log_scale) of the Gaussian p_c^(1+w) / p_u^w, with σ_c / σ_u clipped at 1.

    Example:
        shift, log_scale = product_rule((m_c, a_c), (m_u, a_u), jnp.full((n, 1), 2.0))
    """
    (shift, log_scale), (shift_u, log_scale_u) = conditional, unconditional
    w = weight[None]
    log_ratio = 2 * jnp.minimum(log_scale - log_scale_u, 0)
    # 1 + w - w s and the shift, written so that nothing cancels where s is close to 1 or w is large.
    precision = 1 - w * jnp.expm1(log_ratio)
    guided_shift = shift + w * jnp.exp(log_ratio) * (shift - shift_u) / precision
    return guided_shift, log_scale - 0.5 * jnp.log(precision)
