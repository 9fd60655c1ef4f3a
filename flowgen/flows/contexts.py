"""Continuous contexts of flows: the prefix that contains a context, and a check of the config's fields."""

from __future__ import annotations

from flowgen.arrays import shown
from flowgen.attention import causal_kernel
from flowgen.contexts import Context, ImageContext, check_one_condition
from flowgen.flows.prefixes import ContextPrefix
from flowgen.nn.transformer import Attention


def context_prefix(context: Context | None) -> ContextPrefix | None:
    """Returns the prefix that contains a context."""
    if context is None:
        return None
    return ContextPrefix(context.length, context.dim, has_positions=isinstance(context, ImageContext))


def check_one_context(num_classes: int, context: Context | None, attention: Attention) -> None:
    """Raises ValueError if a model has both classes and a context, or if its attention cannot skip padding."""
    check_one_condition(num_classes, context)
    if context is not None and not causal_kernel(attention).can_slide:
        raise ValueError(
            f"context is {shown(context)}, but {attention!r} attention has no `accept`, which leaves out the padding "
            "of a context; define it, or use another attention."
        )
