"""Converts conditions to a form in which single samples can be made unconditional, for dropout and guidance."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from flowgen.arrays import shown
from flowgen.conditioning import UNCONDITIONAL, ContextTokens, TextCondition


def as_condition(cond: Any) -> Any:
    """Returns labels, None and `ContextTokens` unchanged, and any other context as `ContextTokens`.

    Other contexts are vectors `b e` and tokens `b m e`, both without padding, and texts. The mask of `ContextTokens`
    can make any sample unconditional. Raises ValueError for anything else, such as images, which need a patch size to
    become tokens.

    Example:
        tokens, mask = as_condition(jnp.zeros((8, 5)))  # 8 1 5 and 8 1
    """
    if cond is None or isinstance(cond, ContextTokens):
        return cond
    if isinstance(cond, TextCondition):
        return ContextTokens(*(jnp.asarray(part) for part in cond))
    dtype, ndim = getattr(cond, "dtype", None), getattr(cond, "ndim", None)
    if dtype is not None and ndim == 1 and jnp.issubdtype(dtype, jnp.integer):
        return cond
    if dtype is None or ndim not in (2, 3) or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"cond is {shown(cond)}; to be dropped or guided, it must be integer labels of shape (b,), vectors (b, e), "
            "tokens (b, m, e) or ContextTokens. Convert an image by config.context.tokens(cond, b)."
        )
    tokens = jnp.asarray(cond)[:, None] if ndim == 2 else jnp.asarray(cond)
    return ContextTokens(tokens, jnp.ones(tokens.shape[:2], bool))


def is_conditional(cond: Any) -> Bool[Array, " b"]:
    """Returns whether each sample has a condition: a label other than -1, or a token that is not padding.

    Example:
        is_conditional(jnp.array([3, -1]))  # [True, False]
    """
    return cond.mask.any(axis=1) if isinstance(cond, ContextTokens) else cond != UNCONDITIONAL
