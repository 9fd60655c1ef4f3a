"""Optimizers for weight matrices; AdamW updates all other parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from flowgen.optimizers.layers import names_of

MATRIX, OTHER = "matrix", "other"


def are_kernels(params: Any) -> Any:
    """Returns a tree of bools: True for each array that is named `kernel`, as in Flax, and is not a vector.

    Example:
        tx = optax.adamw(1e-3, mask=are_kernels)
    """

    def is_kernel(path, leaf):
        return jnp.ndim(leaf) >= 2 and names_of(path)[-1:] == ("kernel",)

    return jax.tree_util.tree_map_with_path(is_kernel, params)


def are_matrices(params: Any) -> Any:
    """Returns a tree of bools: True for each weight matrix `inputs outputs` and each kernel of a convolution.

    These are the arrays called `kernel` that have two axes, or that have at least four axes and several input channels.
    Biases, scales and tables of embeddings are not matrices, and neither are kernels of depthwise convolutions. Kernels
    with three axes are left out, because Flax's `DenseGeneral` may have split their inputs or their outputs.

    Example:
        tx = optax.masked(optax.add_decayed_weights(0.1), are_matrices)
    """

    def is_matrix(leaf, kernel):
        return kernel and (leaf.ndim == 2 or (leaf.ndim > 3 and leaf.shape[-2] > 1))

    return jax.tree.map(is_matrix, params, are_kernels(params))


def for_matrices(
    matrices: optax.GradientTransformation, others: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Returns an optimizer that updates weight matrices by `matrices` and all other parameters by `others`.

    `are_matrices` defines the weight matrices.

    Example:
        tx = for_matrices(optax.contrib.muon(0.02), optax.adamw(1e-3))
    """

    def labels(params):
        return jax.tree.map(lambda matrix: MATRIX if matrix else OTHER, are_matrices(params))

    return optax.partition({MATRIX: matrices, OTHER: others}, labels)


def beside_adamw(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    adam_learning_rate: optax.ScalarOrSchedule | None,
    *,
    weight_decay: float,
    mask: Any,
    b1: float,
    b2: float,
    eps: float,
) -> optax.GradientTransformation:
    """Returns an optimizer that updates weight matrices along `direction`, and all other parameters with AdamW.

    Weight decay is decoupled for all parameters. direction: transforms the gradients of weight matrices to updates,
    before the learning rate is applied. b1, b2, eps: AdamW's. adam_learning_rate: AdamW's learning rate; None to use
    `learning_rate`.

    Example:
        tx = beside_adamw(optax.scale_by_sign(), 1e-4, 1e-3, weight_decay=0.1, mask=None, b1=0.9, b2=0.95, eps=1e-8)
    """
    matrices = optax.chain(
        direction, optax.add_decayed_weights(weight_decay, mask), optax.scale_by_learning_rate(learning_rate)
    )
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    return for_matrices(matrices, optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay, mask=mask))


def as_matrix(x: jax.Array) -> jax.Array:
    """Returns a kernel as a matrix `inputs outputs`: all axes but the last are inputs."""
    return x.reshape(-1, x.shape[-1])


def muon(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any = None,
    *,
    beta: float = 0.95,
    ns_steps: int = 5,
    nesterov: bool = True,
    consistent_rms: float = 0.2,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformation:
    """Returns optax's Muon for weight matrices and AdamW for all other parameters.

    `are_matrices` defines the weight matrices. The kernel of a convolution is orthogonalised as a matrix
    `inputs outputs`, in which all axes but the last are joined as inputs.
    b1, b2, eps: AdamW's.
    beta, nesterov: Muon's momentum, and whether it is Nesterov momentum. ns_steps: number of Newton-Schulz steps.
    consistent_rms: the root mean square of Muon's updates at learning rate 1. With 0.2, learning rates that suit AdamW
    also suit Muon (Liu et al., 2025, arXiv 2502.16982).
    mask: selects the parameters to which weight decay applies, as in `optax.adamw`.
    adam_learning_rate: AdamW's learning rate; None means `learning_rate`.

    Example:
        tx = per_layer(muon(3e-4, weight_decay=0.1))
    """

    if ns_steps < 1:
        raise ValueError(f"ns_steps is {ns_steps}; it must be at least 1.")

    def dimensions(params):
        return jax.tree.map(
            lambda leaf: MuonDimensionNumbers(reduction_axis=tuple(range(leaf.ndim - 1)), output_axis=leaf.ndim - 1),
            params,
        )

    matrices = optax.contrib.muon(
        learning_rate,
        ns_steps=ns_steps,
        beta=beta,
        weight_decay=weight_decay,
        weight_decay_mask=mask,
        nesterov=nesterov,
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=consistent_rms,
    )
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    return for_matrices(matrices, optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay, mask=mask))
