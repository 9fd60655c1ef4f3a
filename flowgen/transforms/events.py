"""Functions that transforms share: registration as pytrees, and checks of the arrays of events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, fields
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from flowgen.arrays import at_least_float32, shown
from flowgen.backend import alike_rows

Class = TypeVar("Class", bound=type[Any])
# Events `*b *event`, and log|det du/dx| `*b`.
Pair = tuple[Float[Array, "..."], Float[Array, "*b"]]
Numbers = Array | np.ndarray | Sequence[Any] | float | int
# The field of the number of axes of an event.
EVENT_NDIM: Any = field(default=1, metadata={"static": True})


def pytree(cls: Class) -> Class:
    """Registers a frozen dataclass as a pytree.

    Unflattening skips the checks of `__post_init__`, because JAX may use placeholders as leaves.

    Example:
        Box = pytree(dataclass(frozen=True)(Box))
    """
    static = tuple(part.name for part in fields(cls) if part.metadata.get("static"))
    traced = tuple(part.name for part in fields(cls) if not part.metadata.get("static"))

    def flatten(transform: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(transform, name) for name in traced), tuple(getattr(transform, name) for name in static)

    def unflatten(aux: tuple[Any, ...], leaves: tuple[Any, ...]) -> Any:
        transform = object.__new__(cls)
        for name, value in zip((*traced, *static), (*leaves, *aux), strict=True):
            object.__setattr__(transform, name, value)
        return transform

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)
    return cls


def as_field(transform: Any, name: str) -> Any:
    """Returns a field of a frozen transform as an array, and stores it; numbers and lists become float64 arrays.

    Raises ValueError if the field is not an array of numbers.

    Example:
        low = as_field(self, "low")
    """
    value = getattr(transform, name)
    if not isinstance(value, jax.Array):
        try:
            value = np.asarray(value, np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"{name} is {shown(value)}; give a number or an array of numbers.") from None
        object.__setattr__(transform, name, value)
    return value


def of_events(event_ndim: int, x: Any, **parameters: Any) -> list[Array]:
    """Returns x in at least float32, and parameters in the dtype and shape of x.

    Raises ValueError if x has too few axes or is not floating-point, or if a parameter does not broadcast to the shape
    of an event.

    Example:
        x, low, high = of_events(1, x, low=low, high=high)
    """
    x = at_least_float32("x", x)
    if x.ndim < event_ndim:
        raise ValueError(f"x has shape {x.shape}; give events with {event_ndim} axes, after the axes of the batch.")
    event = x.shape[x.ndim - event_ndim :]
    for name, value in parameters.items():
        if value.ndim > event_ndim or any(
            size not in (1, n) for size, n in zip(value.shape[::-1], event[::-1], strict=False)
        ):
            raise ValueError(f"{name} has shape {value.shape}, but events have shape {event}; it must fit them.")
    values = [jnp.broadcast_to(jnp.asarray(value, x.dtype), x.shape) for value in parameters.values()]
    return alike_rows([x, *values])


def sum_over_event(event_ndim: int, x: Float[Array, "..."]) -> Float[Array, "*b"]:
    """Returns the sum over the last `event_ndim` axes.

    Example:
        logdet = sum_over_event(1, log_slope)
    """
    return x.sum(axis=tuple(range(-event_ndim, 0)))


def check_values(name: str, x: Float[Array, "..."], valid: Bool[Array, "..."], fix: str) -> None:
    """Raises a ValueError that states the first invalid entry; traced values are not checked.

    Example:
        check_values("x", x, x > 0, "values must be positive")
    """
    if isinstance(valid, Tracer) or bool(valid.all()):
        return
    entry = tuple(map(int, np.argwhere(~np.asarray(valid))[0]))
    raise ValueError(f"{name} has the value {x[entry]} at index {entry}; {fix}.")


def exp_within_range(u: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns exp(u), limited to the normal numbers of its dtype, so that it is neither 0 nor infinite.

    Example:
        x = exp_within_range(jnp.asarray(1000.0))  # 3.4e38
    """
    limits = jnp.finfo(u.dtype)
    # The next number towards 0, because exp of the rounded logarithm may be outside the range.
    least, most = (np.nextafter(np.log(limit), limit.dtype.type(0)) for limit in (limits.tiny, limits.max))
    return jnp.exp(jnp.clip(u, least, most))
