"""Checks of numbers, batches, times and outputs, shared by the modules of this package."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from flowgen.arrays import check_floating, is_number, shown


def check_positive(name: str, value: float | int) -> None:
    """Raises ValueError unless a number is positive and finite."""
    if not (is_number(value) and 0 < value < float("inf")):
        raise ValueError(f"{name} is {shown(value)}; it must be positive and finite.")


def check_batch(x0: Array, x1: Array) -> None:
    """Raises ValueError unless x0 and x1 are floating-point arrays of the same shape with at least one sample."""
    check_floating("x0", x0)
    check_floating("x1", x1)
    if x0.shape != x1.shape:
        raise ValueError(f"x0 has shape {x0.shape}, but x1 has shape {x1.shape}; they must have the same shape.")
    if len(x0) == 0:
        raise ValueError("the batch is empty; give at least one x0 and one x1.")


def check_pair(t: Array, x0: Array, x1: Array) -> None:
    """Raises ValueError unless `check_batch` accepts x0 and x1 and t contains one time in [0, 1] per sample.

    The range of t is checked only outside jit.
    """
    check_batch(x0, x1)
    check_times(t, x0)


def check_times(t: Array, x0: Array) -> None:
    """Raises ValueError unless t contains one time in [0, 1] per sample; the range is checked only outside jit."""
    if getattr(t, "shape", None) != x0.shape[:1]:
        raise ValueError(f"t is {shown(t)}; give one time per sample, as an array of shape {x0.shape[:1]}.")
    if not isinstance(t, Tracer) and not ((np.asarray(t) >= 0) & (np.asarray(t) <= 1)).all():
        raise ValueError(
            f"t runs from {np.min(t)} to {np.max(t)}; times must be within [0, 1] (noise at 0, data at 1)."
        )


def check_takes(name: str, function: Callable[..., object], *arguments: str) -> None:
    """Raises ValueError if a function cannot be called with the positional `arguments`."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        taken = ", ".join(arguments)
        raise ValueError(f"{name} is {shown(function)}, which cannot be called with ({taken}): {error}.") from error
    except ValueError:  # Some built-in functions have no signature.
        return


def check_velocity(velocity: object) -> None:
    """Raises ValueError unless `velocity` is callable."""
    if not callable(velocity):
        raise ValueError(
            f"velocity is {shown(velocity)}; give a function (t, x, cond) -> v, such as velocity_field(...)."
        )


def check_output(output: Array, x: Array, name: str = "the velocity") -> Array:
    """Returns a network's output unchanged; raises ValueError unless it has the shape of x.

    Without this check, broadcasting could hide a wrong shape.
    """
    if output.shape != x.shape:
        raise ValueError(f"{name} has shape {output.shape}, but x has shape {x.shape}; they must have the same shape.")
    return output
