"""`decoding_weights`: the variables of all blocks in the form that decoding requires, computed once and cached.

`rounded_weights` does the same for variables of lower precision.

Training stores the layers of a block in one stack, in float32. Decoding needs one array per layer, in the dtype of the
matrix products. A conversion inside the sampling program would be repeated in every call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from flowgen.backend import with_automatic_axes
from flowgen.decoding.plan import RoundedDtype
from flowgen.flows.block import BlockConfig, Variables, block_parameters
from flowgen.flows.decoding_form import decoding_variables
from flowgen.flows.density import FlowConfig
from flowgen.nn.int8 import round_linear

Weights = tuple[Variables, ...]
SomeWeights = tuple[Variables | None, ...]


def decoding_weights(config: FlowConfig, params: Variables) -> Weights:
    """Returns the variables of every block, data side first, in the form that its `decoding_config` requires.

    The result is computed once and kept as long as all arrays in params["params"] exist. It is not kept if any of these
    arrays is traced or mutable, such as a NumPy array. If the parameters are sharded over explicit mesh axes, the
    result is sharded over automatic axes.
    """
    own = {"params": params["params"]}
    make = partial(with_automatic_axes, partial(unstacked_weights, config), own)
    # Float64 parameters become float32 while x64 is off.
    form = (*map(_form, config.blocks), jnp.result_type(float))
    return _KEPT.value(jax.tree.leaves(own), form, make)


def unstacked_weights(config: FlowConfig, params: Variables) -> Weights:
    """Returns the same variables as `decoding_weights`, but does not cache them."""
    blocks = enumerate(config.blocks)
    return tuple(decoding_variables(block_parameters(params, index), *_form(block)) for index, block in blocks)


def rounded_weights(config: FlowConfig, params: Variables, dtypes: tuple[RoundedDtype | None, ...]) -> SomeWeights:
    """Returns the rounded variables of the blocks that have a dtype, in the form that `rounded_config` requires.

    The result is cached in the same way as that of `decoding_weights`.
    """
    if not any(dtypes):
        return (None,) * len(dtypes)
    own = {"params": params["params"]}
    make = partial(with_automatic_axes, partial(new_rounded_weights, config, dtypes=dtypes), own)
    form = (dtypes, *map(_form, config.blocks), jnp.result_type(float))
    return _KEPT.value(jax.tree.leaves(own), form, make)


def new_rounded_weights(config: FlowConfig, params: Variables, dtypes: tuple[RoundedDtype | None, ...]) -> SomeWeights:
    """Returns the same variables as `rounded_weights`, but does not cache them."""

    def of_block(index: int, block: Any, dtype: RoundedDtype) -> Variables:
        order, num_layers, own = _form(block)
        form = (order, num_layers, own, round_linear) if dtype == "int8" else (order, num_layers, dtype)
        return decoding_variables(block_parameters(params, index), *form)

    blocks = enumerate(zip(config.blocks, dtypes, strict=True))
    return tuple(None if dtype is None else of_block(index, block, dtype) for index, (block, dtype) in blocks)


def rounded_config(config: BlockConfig, dtype: RoundedDtype) -> BlockConfig:
    """Returns the config of a block with rounded weights; only the compute dtype may change."""
    if dtype == "int8":
        return config
    return replace(config, transformer=replace(config.transformer, dtype=dtype))


def _form(block: Any) -> tuple[Any, ...]:
    """The properties of a block, besides its parameters, that determine its variables for decoding."""
    return block.table_order, block.transformer.num_layers, block.transformer.dtype


class _WeakCache:
    """A cache of values that were computed from arrays. A value is kept until the first of its arrays is freed.

    Arrays are identified by their ids. When an array is freed, its entry is removed before another array can have the
    same id.
    """

    def __init__(self) -> None:
        self._entries: dict[Any, tuple[list[weakref.ref], Any]] = {}

    def value(self, arrays: list[Any], form: Any, make: Callable[[], Any]) -> Any:
        """Returns make(), or its cached result for the same arrays and form."""
        key = (form, *map(id, arrays))
        # A donated array no longer has values, although the object may still exist.
        if not all(_is_fixed(x) and not x.is_deleted() for x in arrays):
            self._entries.pop(key, None)
            return make()
        if key not in self._entries:
            value = make()
            if any(isinstance(x, Tracer) for x in jax.tree.leaves(value)):  # inside a program that the caller compiles
                return value
            self._entries[key] = ([weakref.ref(x, lambda _: self._entries.pop(key, None)) for x in arrays], value)
        return self._entries[key][1]


def _is_fixed(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, Tracer)


_KEPT = _WeakCache()
