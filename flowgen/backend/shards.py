"""The axes of the mesh on which sharded training runs, and how activations are divided over them.

The parameters' shardings alone do not decide how the compiler divides the activations. Between layers, a device must
hold whole tokens of its own rows; inside attention, it must hold whole heads. Without these constraints, the compiler
may divide activations like the parameters, and then exchange activations instead of parameters.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec, get_abstract_mesh
from jaxtyping import Array

# Devices along this axis share the rows of a batch and the parameters.
FSDP = "fsdp"
# Devices along this axis share the heads of attention and the hidden layer of MLPs.
TENSOR = "tensor"


def keep_rows_apart(h: Array) -> Array:
    """Returns h, an array of rows, with its rows divided over the devices that share the batch and its other axes whole.

    Outside sharded training, and if the devices cannot share the rows equally, h is returned unchanged.

    Example:
        h = keep_rows_apart(h)  # b n d
    """
    axes = _training_axes()
    if not axes:
        return h
    rows = _divided(FSDP, len(h), axes)
    return jax.lax.with_sharding_constraint(h, PartitionSpec(rows, *[None] * (h.ndim - 1)))


def keep_heads_apart(*arrays: Array) -> tuple[Array, ...]:
    """Returns queries, keys and values `b n h k` with their heads divided over the devices that share heads.

    If there are fewer keys and values than devices, every device has all of them. Outside sharded training, the arrays
    are returned unchanged.

    Raises ValueError if the devices cannot share the heads of the first array equally.

    Example:
        q, k, v = keep_heads_apart(q, k, v)
    """
    axes = _training_axes()
    if not axes:
        return arrays
    heads, count = arrays[0].shape[2], axes[TENSOR]
    if heads % count:
        raise ValueError(
            f"train.mesh divides attention over {count} devices, but a layer has {heads} heads; choose a second number "
            f"that divides {heads}."
        )
    return tuple(
        jax.lax.with_sharding_constraint(
            x, PartitionSpec(_divided(FSDP, x.shape[0], axes), None, _divided(TENSOR, x.shape[2], axes), None)
        )
        for x in arrays
    )


def _training_axes() -> dict[str, int]:
    """Returns the sizes of the axes of sharded training; empty if no program for sharded training is being traced."""
    mesh = get_abstract_mesh()
    return dict(mesh.shape) if set(mesh.axis_names) == {FSDP, TENSOR} else {}


def _divided(axis: str, size: int, axes: dict[str, int]) -> Any:
    """Returns the axis if it divides the size; otherwise, leaves the choice to the compiler (rows) or None (heads)."""
    if size % axes[axis] == 0:
        return axis
    return PartitionSpec.UNCONSTRAINED if axis == FSDP else None
