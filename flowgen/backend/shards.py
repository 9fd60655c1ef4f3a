"""The axes of the mesh on which sharded training runs, and how arrays are divided over them.

The shardings of the parameters do not determine how the compiler divides the activations: the compiler may exchange
activations instead of parameters. The functions in this file therefore constrain the activations. Between layers, each
device has its own rows of the batch, with all tokens and channels. Inside attention, it has its own heads, with all
tokens and channels. For each matrix product, it gathers the parts of one layer's kernel.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

import jax
from jax.sharding import PartitionSpec, get_abstract_mesh
from jaxtyping import Array

# Devices along this axis share the rows of a batch and the parameters.
FSDP = "fsdp"
# Devices along this axis share the heads of attention and the hidden layer of MLPs.
TENSOR = "tensor"
# Smaller arrays are copied to every device, because dividing them saves too little memory to justify the exchange.
MIN_SIZE = 1 << 14
# The axis of a kernel that devices along the tensor axis share, if any.
Shared = Literal["", "inputs", "outputs"]


def shard_spec(
    shape: tuple[int, ...], axes: Mapping[str, int], *, tensor_axis: int | None = None, whole: Collection[int] = ()
) -> PartitionSpec:
    """Returns the `PartitionSpec` of an array of parameters with this shape.

    The mesh axis "tensor" divides axis `tensor_axis` of the array; None means that it divides no axis. The mesh axis
    "fsdp" divides the largest remaining axis that it divides equally. An axis that cannot be divided equally is not
    divided. Arrays with fewer than 16384 elements are not divided.

    axes: the sizes of the mesh axes "fsdp" and "tensor". whole: axes of the array that "fsdp" never divides.

    Example:
        shard_spec((256, 1024), {"fsdp": 2, "tensor": 2}, tensor_axis=1)  # PartitionSpec("fsdp", "tensor")
    """
    spec: list[str | None] = [None] * len(shape)
    if math.prod(shape) < MIN_SIZE:
        return PartitionSpec(*spec)
    if tensor_axis is not None and axes[TENSOR] > 1 and shape[tensor_axis] % axes[TENSOR] == 0:
        spec[tensor_axis] = TENSOR
    free = [i for i, size in enumerate(shape) if spec[i] is None and i not in whole and size % axes[FSDP] == 0]
    if axes[FSDP] > 1 and free:
        spec[max(free, key=lambda axis: shape[axis])] = FSDP
    return PartitionSpec(*spec)


def gather_kernel(kernel: Array, shared: Shared = "") -> Array:
    """Returns the kernel `inputs outputs` of one layer, gathered from the devices that share the batch.

    The gradient of the kernel is divided again, so that no device accumulates whole gradients. Outside sharded
    training, the kernel is returned unchanged.

    Example:
        y = x @ gather_kernel(kernel, "outputs")
    """
    axes = _training_axes()
    if not axes:
        return kernel
    divided = shard_spec(kernel.shape, axes, tensor_axis={"inputs": 0, "outputs": 1}.get(shared))
    gathered = PartitionSpec(*(TENSOR if axis == TENSOR else None for axis in divided))
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(kernel, divided), gathered)


def keep_rows_apart(h: Array) -> Array:
    """Returns h with its rows, but no other axes, divided over the devices that share the batch.

    If the rows cannot be divided equally, the compiler decides where to place them. Outside sharded training, h is
    returned unchanged.

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

    If the heads of the keys and values cannot be divided equally, every device has all of them. Outside sharded
    training, the arrays are returned unchanged.

    Raises ValueError if the heads of the first array cannot be divided equally.

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
    """Returns the mesh axis if it divides `size` equally; otherwise, UNCONSTRAINED for rows and None for heads."""
    if size % axes[axis] == 0:
        return axis
    return PartitionSpec.UNCONSTRAINED if axis == FSDP else None
