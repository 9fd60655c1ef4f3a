"""How flows use a continuous context: as a prefix, and checks of the fields and conditions that concern it."""

from __future__ import annotations

from typing import Any

from flowgen.arrays import shown
from flowgen.attention import causal_kernel
from flowgen.conditioning import Unpadded, check_labels
from flowgen.contexts import Context, check_context
from flowgen.flows.block import ContextPrefix
from flowgen.nn.transformer import Attention


def context_prefix(context: Context | None) -> ContextPrefix | None:
    """Returns the prefix that contains a context."""
    return None if context is None else ContextPrefix(context.length, context.dim)


def check_one_context(num_classes: int, context: Context | None, attention: Attention) -> None:
    """Raises ValueError if a model has classes and another context, or if its attention cannot skip padding."""
    if context is None:
        return
    if num_classes:
        raise ValueError(
            f"num_classes is {num_classes} and context is {shown(context)}; set num_classes to 0 or context to none."
        )
    if not causal_kernel(attention).can_slide:
        raise ValueError(
            f"context is {shown(context)}, but {attention!r} attention has no `accept`, which leaves out the padding "
            "of a context; define it, or use another attention."
        )


def check_labels_or_context(cond: Any, num_classes: int, context: Context | None, batch: int) -> Unpadded | None:
    """Returns labels or a context as arrays, or None. Raises ValueError if it does not fit the model and batch."""
    if context is not None:
        return check_context(cond, context, batch)
    return check_labels(cond, num_classes=num_classes, batch=batch)
