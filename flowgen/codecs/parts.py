"""Frozen networks on any number of samples by few compiled programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def in_parts(run: Callable[..., tuple[Any, ...]], most: int, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns what a compiled function gives on parts of the inputs, joined along their first axis.

    All parts have one size, a power of two up to `most`, which the last one is filled up to: so that few sizes are
    ever compiled.

    Raises ValueError where the inputs are empty.

    Example:
        (features,) = in_parts(lambda ids, mask: (encoder(ids, mask),), 64, ids, mask)
    """
    count = len(inputs[0])
    if not count:
        raise ValueError("the batch is empty; give at least one sample.")
    size = 1
    while size < count and 2 * size <= most:
        size *= 2
    parts = []
    for start in range(0, count, size):
        chosen = np.minimum(np.arange(start, start + size), count - 1)
        parts.append([np.asarray(out)[: count - start] for out in run(*(x[chosen] for x in inputs))])
    return tuple(np.concatenate(outs) for outs in zip(*parts, strict=True))
