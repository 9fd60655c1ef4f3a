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
    """Returns (shift, log_scale) of the Gaussian proportional to p_c^(1+w) / p_u^w, where w is `weight`.

    p_c is the Gaussian with the mean and log standard deviation in `conditional`, and p_u the one in `unconditional`.
    Where σ_u is below σ_c, it is raised to σ_c, so that the precision of the result is positive. Weight 0 gives
    `conditional`.

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
    """Options of guidance for sampling from a flow with affine blocks. Scale 0 turns guidance off.

    A Guidance is a pytree of scale, temperature and null. If it is an argument of a jitted function, these three can
    change without recompilation. Inside jit, scale and temperature may be traced scalars, whose values are not checked.
    Linear attention does not support a temperature, so a traced temperature raises ValueError. If a flow uses linear
    attention, create the Guidance inside the jitted function instead of passing it as an argument.

    scale: the weight w of the rule, at least 0; `flowgen.matching.guided` calls it `weight`.
    rule: how the conditional and the unconditional prediction are combined; see the module docstring.
    parts: which outputs of a block the linear rule changes. The product rule requires "both".
    blocks: indices of the blocks to guide, counted from 0 at the data side; None means all blocks.
    anneal: whether the weight increases along each block's tokens, from 0 at the first token to `scale` at the last.
    temperature: the number above 0 by which the logits of softmax attention are divided in the unconditional
    prediction; 1 means no change. Guidance moves samples away from the unconditional prediction. Without a condition,
    or with labels -1, the two predictions differ only in temperature, so guidance has no effect at temperature 1.
    null: the text of the unconditional prediction, usually the encoded "": a single text, or one per sample. It is
    required if the flow is conditioned on texts; for all other flows, it must be None.

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
        """Returns the guided (shift, log_scale) of a block's tokens.

        conditional, unconditional: the two predictions of (shift, log_scale). If `parts` is "shift" or "log_scale", the
        other of the two is returned as in `conditional`.
        progress: the relative position of each token in its block, from 0 at the first token to 1 at the last; used
        only if `anneal` is True.
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
