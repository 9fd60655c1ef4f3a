"""`decoding_weights`: the variables of all blocks in the form that decoding reads, made once for the same params.

Training stores the layers of a block in one stack, in float32. Decoding needs one array per layer, in the dtype of the
products. Inside the sampling program, these arrays would be temporary copies that every call makes again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from flowgen.backend import with_automatic_axes
from flowgen.flows.block import Variables, block_parameters, decoding_variables
from flowgen.flows.density import FlowConfig

Weights = tuple[Variables, ...]


def decoding_weights(config: FlowConfig, params: Variables) -> Weights:
    """Returns the variables of every block for its `decoding_config`, data side first.

    They are made once and kept for as long as all arrays in params["params"] live. Nothing is kept for arrays that can
    change, such as numpy's, or that are traced. Parameters over explicit mesh axes give weights over automatic axes.
    """
    own = {"params": params["params"]}
    make = partial(with_automatic_axes, partial(unstacked_weights, config), own)
    # Float64 parameters become float32 while x64 is off.
    form = (*map(_form, config.blocks), jnp.result_type(float))
    return _KEPT.value(jax.tree.leaves(own), form, make)


def unstacked_weights(config: FlowConfig, params: Variables) -> Weights:
    """Returns the same as `decoding_weights`, without keeping it."""
    blocks = enumerate(config.blocks)
    return tuple(decoding_variables(block_parameters(params, index), *_form(block)) for index, block in blocks)


def _form(block: Any) -> tuple[Any, ...]:
    """What the variables for decoding depend on besides the parameters."""
    return block.order, block.transformer.num_layers, block.transformer.dtype


class _WeakCache:
    """Values that were computed from arrays, each kept until the first of its arrays is gone.

    Arrays are known by identity. An array that is gone has removed its entry before another can have its id.
    """

    def __init__(self) -> None:
        self._entries: dict[Any, tuple[list[weakref.ref], Any]] = {}

    def value(self, arrays: list[Any], form: Any, make: Callable[[], Any]) -> Any:
        """Returns make(), or what it returned before for the same arrays and form."""
        key = (form, *map(id, arrays))
        # A donated array has no values anymore, although the object may live on.
        if not all(_is_fixed(x) and not x.is_deleted() for x in arrays):
            self._entries.pop(key, None)
            return make()
        if key not in self._entries:
            value = make()
            if any(isinstance(x, Tracer) for x in jax.tree.leaves(value)):  # made inside a program of the caller's
                return value
            self._entries[key] = ([weakref.ref(x, lambda _: self._entries.pop(key, None)) for x in arrays], value)
        return self._entries[key][1]


def _is_fixed(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, Tracer)


_KEPT = _WeakCache()
