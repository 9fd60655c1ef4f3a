"""Guidance combines a network's conditional and unconditional predictions.

Let c be the conditional prediction, u the unconditional prediction, and w the weight. There are two rules:

    linear (Ho and Salimans, arXiv 2207.12598)   c + w (c - u), for velocities and for TARFlow's shift and log_scale
    product (STARFlow, arXiv 2506.06276, Prop. 2), the Gaussian p_c^(1+w) / p_u^w, whose precision is kept positive:
        s = min(σ_c / σ_u, 1)²,   d = 1 + w - w s,   σ = σ_c / √d,   m = ((1+w) m_c - w s m_u) / d
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from flowgen import settings
from flowgen.conditioning import TextCondition
from flowgen.settings.annotations import hints_of
from flowgen.settings.ranges import NonNegative, Positive

Rule = Literal["linear", "product"]
Parts = Literal["both", "log_scale", "shift"]
# (shift, log_scale) of tokens.
AffineParameters = tuple[Float[Array, "b n c"], Float[Array, "b n c"]]


def linear_rule(
    conditional: Float[Array, "..."], unconditional: Float[Array, "..."], weight: Float[Array, "..."] | float
) -> Float[Array, "..."]:
    """Returns c + weight · (c - u), where c is `conditional` and u is `unconditional`; weight 0 gives c.

    Example:
        v = linear_rule(v_conditional, v_unconditional, 1.5)
    """
    return conditional + weight * (conditional - unconditional)


def product_rule(
    conditional: AffineParameters, unconditional: AffineParameters, weight: Float[Array, "..."] | float
) -> AffineParameters:
    """Returns (shift, log_scale) of the Gaussian p_c^(1+w) / p_u^w, with σ_c / σ_u clipped at 1.

    Example:
        shift, log_scale = product_rule((m_c, a_c), (m_u, a_u), 2.0)
    """
    (shift, log_scale), (shift_u, log_scale_u) = conditional, unconditional
    log_ratio = 2 * jnp.minimum(log_scale - log_scale_u, 0)
    # 1 + w - w s and the shift, written to avoid cancellation if s is close to 1 or w is large.
    precision = 1 - weight * jnp.expm1(log_ratio)
    guided_shift = shift + weight * jnp.exp(log_ratio) * (shift - shift_u) / precision
    return guided_shift, log_scale - 0.5 * jnp.log(precision)


@dataclass(frozen=True)
class Guidance:
    """The guidance of a flow: its strength, and the parts and blocks that it changes. Scale 0 turns guidance off.

    A Guidance is a pytree of scale, temperature and null, so these three can change without recompilation. Inside jit,
    scale and temperature may also be traced scalars; their values are then not checked. If the attention does not
    support a temperature, build the Guidance inside jit: in an argument of a jitted function, the temperature would be
    traced, so it might differ from 1.

    scale: the weight w in c + w (c - u), at least 0; `flowgen.matching.guided` calls it `weight`.
    rule: "linear" or "product".
    parts: what the linear rule changes: "shift", "log_scale" or "both".
    blocks: indices of the guided blocks, from 0 at the data side; None means all.
    anneal: whether w increases along each block's tokens, from 0 at the first token to `scale` at the last.
    temperature: divides the attention logits of the unconditional branch; must be above 0. A temperature above 1
    flattens the attention of this branch. Guidance moves samples away from the branch's prediction. Without classes, or
    with labels -1, the two branches differ only in temperature, so a temperature other than 1 also guides an
    unconditional model, and guidance with temperature 1 has no effect.
    null: the text of the unconditional branch, usually the encoded "". May be a single text or one per sample. Required
    for flows that are conditioned on texts.

    Example:
        r = sample(flow, params, key, 16, labels, guidance=Guidance(scale=2.0))
    """

    scale: NonNegative | Tracer = 0.0
    rule: Rule = "linear"
    parts: Parts = "both"
    blocks: tuple[int, ...] | None = None
    anneal: bool = False
    temperature: Positive | Tracer = 1.0
    null: TextCondition | None = None

    def __post_init__(self):
        for name, annotation in hints_of(Guidance).items():
            value = getattr(self, name)
            if not isinstance(value, Tracer):
                known = _KNOWN.get(name, annotation)
                object.__setattr__(self, name, settings.check(known, value, path=name))
            elif value.shape:
                raise ValueError(f"{name} has shape {value.shape}; it must be a scalar.")
        if self.rule == "product" and self.parts != "both":
            raise ValueError(f"parts is {self.parts!r}, but the product rule always guides both; set parts to 'both'.")

    def combine(
        self,
        conditional: AffineParameters,
        unconditional: AffineParameters,
        progress: Float[Array, "#b n 1"],
    ) -> AffineParameters:
        """Returns the guided (shift, log_scale). Parts that are not guided keep the conditional prediction.

        progress: the relative position of each token in its block, from 0 at the first token to 1 at the last.
        """
        weight = (self.scale * (progress if self.anneal else jnp.ones_like(progress))).astype(conditional[0].dtype)
        if self.rule == "product":
            return product_rule(conditional, unconditional, weight)
        return (
            linear_rule(conditional[0], unconditional[0], weight) if self.parts != "log_scale" else conditional[0],
            linear_rule(conditional[1], unconditional[1], weight) if self.parts != "shift" else conditional[1],
        )


# The annotations that scale and temperature are checked against if they are not traced.
_KNOWN = {"scale": NonNegative, "temperature": Positive}
_TRACED = ("scale", "temperature", "null")
_STATIC = tuple(field.name for field in fields(Guidance) if field.name not in _TRACED)


def _flatten(guidance: Guidance) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return tuple(getattr(guidance, n) for n in _TRACED), tuple(getattr(guidance, n) for n in _STATIC)


def _unflatten(static: tuple[Any, ...], traced: tuple[Any, ...]) -> Guidance:
    guidance = object.__new__(Guidance)  # JAX also builds pytrees of placeholders, which would fail the checks.
    for name, value in zip((*_TRACED, *_STATIC), (*traced, *static), strict=True):
        object.__setattr__(guidance, name, value)
    return guidance


jax.tree_util.register_pytree_node(Guidance, _flatten, _unflatten)
