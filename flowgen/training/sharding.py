"""Divides the arrays of a training state over a mesh, by rules that depend only on their shapes and paths.

The mesh has two axes: devices along "fsdp" share the batch and the parameters, and devices along "tensor" share the
attention heads and the hidden channels of MLPs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from flowgen.backend import FSDP, TENSOR, shard_spec
from flowgen.optimizers import STACK, names_of

# Layers that read all channels and write heads or hidden channels, and layers that do the reverse.
BY_OUTPUT = ("qkv", "up", "gate")
BY_INPUT = ("proj", "down")
ONE_LAYER = "layer_"


def partition_specs(tree: Any, axes: Mapping[str, int]) -> Any:
    """Returns the `PartitionSpec` of every leaf of a state or of variables, in a tree of the same structure.

    The paths of moments and averages end with the path of their parameter, so they are divided like the parameter.

    tree: (abstract) arrays. axes: the sizes of the axes "fsdp" and "tensor".

    Example:
        specs = partition_specs(jax.eval_shape(initial), {"fsdp": 4, "tensor": 2})
    """

    def of_leaf(path, leaf):
        return partition_spec(names_of(path), leaf.shape, axes)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def partition_spec(path: tuple[str, ...], shape: tuple[int, ...], axes: Mapping[str, int]) -> PartitionSpec:
    """Returns the `PartitionSpec` of an array with this path and shape.

    The array's axis of stacked layers is never divided. The outputs of the layers "qkv", "up" and "gate", and the
    inputs of "proj" and "down", are divided over the mesh axis "tensor", if equal parts are possible. The largest of
    the array's other axes that can be divided equally is divided over the mesh axis "fsdp". Arrays with fewer than
    16,384 elements are not divided.

    Example:
        partition_spec(("layers", "mlp", "up", "kernel"), (4, 256, 1024), {"fsdp": 2, "tensor": 2})
        # PartitionSpec(None, "fsdp", "tensor")
    """
    return shard_spec(shape, axes, tensor_axis=_tensor_axis(path, len(shape)), whole=(0,) if _is_stacked(path) else ())


def bytes_per_device(tree: Any, axes: Mapping[str, int]) -> int:
    """Returns the number of bytes of a tree that each device stores if `partition_spec` divides the tree.

    Example:
        bytes_per_device(jax.eval_shape(initial), {"fsdp": 8, "tensor": 1})
    """
    specs = jax.tree.leaves(partition_specs(tree, axes), is_leaf=lambda x: isinstance(x, PartitionSpec))
    return sum(
        leaf.size * leaf.dtype.itemsize // math.prod(axes[name] for name in spec if name is not None)
        for leaf, spec in zip(jax.tree.leaves(tree), specs, strict=True)
    )


def gathered_bytes(params: Any, axes: Mapping[str, int]) -> tuple[int, int]:
    """Returns the bytes that the gathered kernels of the largest layer, and of all layers, occupy on a device.

    Before a matrix product, a device gathers the parts of the kernel (see `flowgen.backend.gather_kernel`). The
    backward pass needs the kernels of all layers, unless it recomputes the layers.

    Example:
        one, every = gathered_bytes(params, {"fsdp": 8, "tensor": 1})
    """
    layers: Counter[tuple[str, ...]] = Counter()
    every = 0
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path, spec = names_of(key_path), partition_spec(names_of(key_path), leaf.shape, axes)
        if path[-1] != "kernel" or FSDP not in spec:
            continue
        size = leaf.size * leaf.dtype.itemsize // (axes[TENSOR] if TENSOR in spec else 1)
        every += size
        stacked, inside = _is_stacked(path), path.index(STACK) + 1 if STACK in path else 0
        layer = path[:inside] if stacked else path[: inside + 1]
        layers[layer] += size // (leaf.shape[0] if stacked else 1)
    return max(layers.values(), default=0), every


def _is_stacked(path: tuple[str, ...]) -> bool:
    """Returns whether the first axis of an array is the axis of stacked layers."""
    if STACK not in path[:-1]:
        return False
    return not path[path.index(STACK) + 1].startswith(ONE_LAYER)


def _tensor_axis(path: tuple[str, ...], rank: int) -> int | None:
    """Returns the array axis that is divided over the mesh axis "tensor", or None."""
    module, name = path[-2:] if len(path) > 1 else ("", "")
    if module in BY_OUTPUT and name in ("kernel", "bias"):
        return rank - 1
    return rank - 2 if module in BY_INPUT and name == "kernel" else None
