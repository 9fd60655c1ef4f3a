"""The form of a block for decoding: unrolled layers, tokens in the block's order, weights in the compute dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from flowgen.flows.block import AutoregressiveBlock, BlockConfig, Variables
from flowgen.flows.orders import TokenOrder, to_order
from flowgen.nn.layers import cast_linear
from flowgen.nn.transformer import unstack_layers


def decoding_block(config: BlockConfig, variables: Variables) -> tuple[AutoregressiveBlock, Variables]:
    """Returns a block in the form for decoding, and its variables in this form.

    config, variables: those of the block in the form for training. For the differences between the forms, see
    `decoding_config` and `decoding_variables`.
    """
    transformer = config.transformer
    decoding = decoding_variables(variables, config.table_order, transformer.num_layers, transformer.dtype)
    return AutoregressiveBlock(decoding_config(config)), decoding


def decoding_config(config: BlockConfig) -> BlockConfig:
    """Returns the config of a block for decoding.

    The layers are unrolled, so that they accept caches. Inputs and outputs are in the block's order instead of raster
    order, so blocks that differ only in their order can share a compiled program.
    """
    return replace(config, order="raster", transformer=replace(config.transformer, scan=False))


def decoding_variables(
    variables: Variables,
    order: TokenOrder,
    num_layers: int,
    dtype: str,
    cast_layer: Callable[..., Any] = cast_linear,
) -> Variables:
    """Returns the variables of a block in the form that its `decoding_config` requires.

    Every layer has separate arrays. The arrays of linear maps have the dtype of the matrix products.

    order: the `table_order` of the block's config. cast_layer: the function (parameters, dtype) -> parameters that
    casts the linear maps of a layer.
    """
    others = {name: part for name, part in variables["params"].items() if name != "layers"}
    layers = unstack_layers(variables["params"]["layers"], num_layers, dtype, cast_layer)
    params = {**cast_linear(others, dtype), "layers": layers}
    if "pos_embed" in params:
        params["pos_embed"] = to_order(jnp.asarray(params["pos_embed"]), order)
    return {"params": params}
