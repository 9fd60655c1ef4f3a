"""Velocity networks for points, and the interface of all velocity networks.

A velocity network is a Flax module that is called as `network.apply(variables, t, x, cond, interval, train=False)`:

t: times `b` from 0 (noise) to 1 (data).
x: samples `b *event`.
cond: integer labels `b` (-1 for none), the context that the config's field `context` describes, or None.
interval: lengths of time `b`, or None; used only by networks whose config sets `intervals`. These networks return the
average velocity from t to t + interval (MeanFlow), or the velocity itself if interval is 0 or None.

The module's field `config` is a `NetworkConfig`.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from flowgen.arrays import check_floating, shown
from flowgen.backend import OnMeshes
from flowgen.contexts import Context, ImageContext, VectorContext, check_condition, check_one_condition
from flowgen.matching.contexts import Given, given_context, masked_mean
from flowgen.nn.embeddings import class_rows
from flowgen.nn.layers import linear
from flowgen.settings import config
from flowgen.settings.ranges import Channels, Classes, Loops, Own, Width


@runtime_checkable
class NetworkConfig(Protocol):
    """The interface that experiments require of a velocity network's config, which must be a frozen dataclass.

    A config may also have a field `context`, which is None or describes the context that the velocity is conditioned
    on.
    """

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample: (height, width, channels) for images, (2,) for points in the plane."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of classes that the velocity is conditioned on; 0 for none."""
        ...

    def build(self) -> Any:
        """Returns the network, without parameters; the network's field `config` is this config."""
        ...


OwnNetwork = Annotated[NetworkConfig, Own("a frozen dataclass with event_shape, num_classes and build()")]


@config
class MLPConfig:
    """Architecture of a multilayer perceptron (MLP), a velocity network for points.

    dim: number of coordinates of a point.
    width: width of the hidden layers.
    num_layers: number of hidden layers.
    num_classes: number of classes that the velocity is conditioned on; 0 for none.
    intervals: whether the network also predicts average velocities over time intervals; required by the loss MeanFlow.
    context: the context that the velocity is conditioned on, a vector or tokens; None for no context. The vector, or
    the mean of the tokens' embeddings, is concatenated to the input, so the order of the tokens has no effect.
    """

    dim: Channels = 2
    width: Width = 64
    num_layers: Loops = 3
    num_classes: Classes = 0
    intervals: bool = False
    context: Context | None = None

    def __post_init__(self):
        check_one_condition(self.num_classes, self.context)
        if isinstance(self.context, ImageContext):
            raise ValueError(
                f"context is {self.context}, but an MLP accepts no images; use a VectorContext for the output of your "
                "own image network, or a DiTConfig."
            )

    def build(self) -> VelocityMLP:
        """Returns the network that this config describes, without parameters."""
        return VelocityMLP(self)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample: (dim,)."""
        return (self.dim,)

    def shrunk(self) -> MLPConfig:
        """Returns a small version of this config, for tests and `--debug` runs."""
        return dataclasses.replace(self, width=16, num_layers=1)


class VelocityMLP(OnMeshes, nn.Module):
    """A velocity network for points: a multilayer perceptron on [x, t, condition] with SELU and PyTorch's
    initialisation, as in torchcfm's 2-D examples.

    Example:
        v = VelocityMLP(MLPConfig(dim=2)).apply(params, t, x)
    """

    config: MLPConfig

    @nn.compact
    def __call__(
        self,
        t: Float[Array, " b"],
        x: Float[Array, "b c"],
        cond: Any = None,
        interval: Float[Array, " b"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b c"]:
        """Returns the velocity at x and time t, averaged over `interval` if it is given and the config sets
        `intervals`.

        cond: labels, the context that the config describes, or None.
        train: ignored.

        Raises ValueError if x, t or cond does not match the config.
        """
        config = self.config
        check_inputs(config, t, x)
        cond = check_condition(config, cond, len(x))
        parts = [x, t[:, None].astype(x.dtype)]
        if config.intervals:
            parts.append((jnp.zeros_like(t) if interval is None else interval)[:, None].astype(x.dtype))
        if config.num_classes:
            # A row of zeros means no class.
            parts.append(class_rows(jnp.eye(config.num_classes + 1, config.num_classes, dtype=x.dtype), cond, len(x)))
        if config.context is not None:
            parts += self._context_inputs(given_context(config.context, cond, len(x), x.dtype))
        h = jnp.concatenate(parts, axis=1)
        for _ in range(config.num_layers):
            h = jax.nn.selu(linear(config.width, h.shape[1], "float32")(h))
        return linear(config.dim, config.width, "float32")(h)

    def _context_inputs(self, given: Given) -> list[Float[Array, "b _"]]:
        """Returns the context's features, and 1 for samples with a context and 0 for the others."""
        width, tokens = self.config.width, given.tokens
        if not isinstance(self.config.context, VectorContext):
            tokens = jax.nn.selu(linear(width, tokens.shape[-1], "float32", name="context")(tokens))
        return [masked_mean(tokens, given), given.mask.any(axis=1)[:, None].astype(tokens.dtype)]


def check_inputs(config: Any, t: Array, x: Array) -> None:
    """Raises ValueError unless x is a batch of samples of the config's shape and t contains one time per sample."""
    check_floating("x", x)
    if x.shape[1:] != config.event_shape:
        shape = ", ".join(map(str, config.event_shape))
        raise ValueError(f"x has shape {tuple(x.shape)}; this network requires (batch, {shape}).")
    if getattr(t, "shape", None) != x.shape[:1]:
        raise ValueError(f"t is {shown(t)}; give one time per sample, as an array of shape {tuple(x.shape[:1])}.")
