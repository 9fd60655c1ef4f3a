"""The interface of invertible transforms, chains of transforms, and the density of transformed variables.

The density of a flow has unbounded support, so a flow models unbounded variables u. The density of bounded variables x
follows:

    log p(x) = log p(u) + log|det du/dx|

`forward` and `inverse` both return log|det du/dx| as `logdet`: in nats, summed over the axes of an event, of shape
`*b`. For a sample x that `inverse` returns, log p(x) is therefore log p(u) + logdet, too. The logdet is finite for
every finite u, even if x is rounded to a bound.

Transforms are pytrees of their bounds and other arrays, which may be traced, differentiated and mapped. The number of
axes of an event, `event_ndim`, is static: 1 for vectors `b d`, 2 for sequences `b n c`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from flowgen.arrays import check_count, shown
from flowgen.transforms.events import EVENT_NDIM, Numbers, Pair, as_field, of_events, pytree, sum_over_event


@runtime_checkable
class Transform(Protocol):
    """The interface of an invertible transform of bounded events x `*b *event` to unbounded events u."""

    @property
    def event_ndim(self) -> int:
        """Number of axes of an event, which are the last axes of x and of u."""
        ...

    def forward(self, x: Float[Array, "..."]) -> Pair:
        """Returns the unbounded u and log|det du/dx| `*b`."""
        ...

    def inverse(self, u: Float[Array, "..."]) -> Pair:
        """Returns the bounded x and log|det du/dx| `*b`: as for `forward`, and not its negative, log|det dx/du|."""
        ...


def transformed_log_prob(
    transform: Transform, log_prob: Callable[..., Float[Array, "*b"]]
) -> Callable[..., Float[Array, "*b"]]:
    """Returns the function (x, ...) -> log p(x), in nats, of the bounded x that `transform` maps to u.

    log_prob: the function (u, ...) -> log p(u) of a model of u, in nats. Further arguments are passed on to it.

    To draw x, draw u from the model and call `transform.inverse(u)`.

    Example:
        log_prob = transformed_log_prob(box, lambda u, cond: flow.apply(params, u, cond, method="log_prob"))
    """

    def of_bounded(x: Float[Array, "..."], *args: Any, **kwargs: Any) -> Float[Array, "*b"]:
        u, logdet = transform.forward(x)
        return log_prob(u, *args, **kwargs) + logdet

    return of_bounded


@pytree
@dataclass(frozen=True)
class Chain:
    """Applies transforms one after another: the first to x, and each of the others to the result of the previous one.

    Raises ValueError unless `transforms` is a tuple of at least one transform, all with the same `event_ndim`.

    Example:
        u, logdet = Chain((Box(0.0, 1.0), Standardise(mean, scale))).forward(x)
    """

    transforms: tuple[Transform, ...]

    def __post_init__(self):
        if not isinstance(self.transforms, tuple) or not self.transforms:
            raise ValueError(f"transforms is {shown(self.transforms)}; give a tuple of at least one transform.")
        for transform in self.transforms:
            if not isinstance(transform, Transform):
                raise ValueError(f"transforms contains {shown(transform)}; give transforms, such as Box(0.0, 1.0).")
        if len(numbers := {transform.event_ndim for transform in self.transforms}) > 1:
            raise ValueError(f"transforms have an event_ndim of {sorted(numbers)}; give all the same event_ndim.")

    @property
    def event_ndim(self) -> int:
        """Number of axes of an event."""
        return self.transforms[0].event_ndim

    def forward(self, x: Float[Array, "..."]) -> Pair:
        """Returns u and log|det du/dx|, summed over the transforms."""
        first, *others = self.transforms
        u, total = first.forward(x)
        for transform in others:
            u, logdet = transform.forward(u)
            total = total + logdet
        return u, total

    def inverse(self, u: Float[Array, "..."]) -> Pair:
        """Returns x and log|det du/dx|, summed over the transforms."""
        *others, last = self.transforms
        x, total = last.inverse(u)
        for transform in reversed(others):
            x, logdet = transform.inverse(x)
            total = total + logdet
        return x, total


@pytree
@dataclass(frozen=True, eq=False)
class Standardise:
    """Maps each entry x of an event to u = (x - mean) / scale.

    mean, scale: arrays that are broadcast to the shape of an event.
    event_ndim: number of axes of an event.

    Raises ValueError unless `mean` is finite and `scale` is positive and finite; traced arrays are not checked.

    Example:
        u, logdet = Standardise.from_data(x).forward(x)
    """

    mean: Numbers
    scale: Numbers
    event_ndim: int = EVENT_NDIM

    def __post_init__(self):
        mean, scale = (as_field(self, name) for name in ("mean", "scale"))
        check_count("event_ndim", self.event_ndim)
        if not isinstance(mean, Tracer) and not np.isfinite(mean).all():
            raise ValueError("mean has entries that are not finite; give finite means.")
        if not isinstance(scale, Tracer) and not ((scale > 0) & np.isfinite(scale)).all():
            wrong = np.asarray(scale)[~((scale > 0) & np.isfinite(scale))]
            raise ValueError(f"scale has the entry {wrong[0]}; give positive and finite scales.")

    @classmethod
    def from_data(cls, x: Float[Array | np.ndarray, "..."], event_ndim: int = 1) -> Standardise:
        """Returns the transform that gives each entry mean 0 and standard deviation 1 over the events x `*b *event`.

        The mean and standard deviation of x are computed in float64 on the host. Raises ValueError if an entry is not
        finite in some event, or if it is the same in all events.

        Example:
            standardise = Standardise.from_data(x)
        """
        check_count("event_ndim", event_ndim)
        values = np.asarray(x, np.float64)
        if values.ndim < event_ndim:
            raise ValueError(f"x is {shown(x)}; give events with {event_ndim} axes, after the axes of the batch.")
        events = values.reshape(-1, *values.shape[values.ndim - event_ndim :])
        if len(events) == 0:
            raise ValueError("x has no events; give at least two.")
        mean, scale = events.mean(axis=0), events.std(axis=0)
        if not (scale > 0).all():
            entry = tuple(map(int, np.argwhere(~(scale > 0))[0]))
            raise ValueError(
                f"the standard deviation of x is {scale[entry]} at entry {entry}; leave out entries that are constant "
                "or not finite."
            )
        return cls(mean, scale, event_ndim)

    def forward(self, x: Float[Array, "..."]) -> Pair:
        """Returns u and log|det du/dx|."""
        x, mean, scale = of_events(self.event_ndim, x, mean=self.mean, scale=self.scale)
        return (x - mean) / scale, sum_over_event(self.event_ndim, -jnp.log(scale))

    def inverse(self, u: Float[Array, "..."]) -> Pair:
        """Returns x and log|det du/dx|."""
        u, mean, scale = of_events(self.event_ndim, u, mean=self.mean, scale=self.scale)
        return mean + scale * u, sum_over_event(self.event_ndim, -jnp.log(scale))
