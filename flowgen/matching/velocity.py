"""Velocity networks for points, and what all velocity networks share.

A velocity network is a Flax module called as `network.apply(variables, t, x, cond, span, train=False)`:
t `b` in [0, 1], 0 at the source and 1 at the data; x `b *event`; cond integer labels `b`, -1 for none, or None.
span `b` is for networks whose config says `spans`: they then answer with the average velocity from t to t + span
(MeanFlow), and with the velocity itself where span is 0 or None. The config has `event_shape` and `num_classes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from flowgen.arrays import check_floating, check_key, shown
from flowgen.conditioning import UNCONDITIONAL, check_labels
from flowgen.nn.layers import linear, master_dtype
from flowgen.ranges import Channels, Classes, Loops, Width, check_ranges
from flowgen.sharding import OnMeshes
from flowgen.typed import typed

# Times in [0, 1] are stretched to the 1,000 steps that sinusoidal embeddings are made for: without it all angles are
# below one radian.
TIME_SCALE = 1000.0
EMBEDDING_STDDEV = 0.02


@dataclass(frozen=True)
@typed
class MLPConfig:
    """Shape of a velocity network for points.

    dim: coordinates of a point.
    width: of the hidden layers.
    num_layers: hidden layers.
    num_classes: of the labels the field is conditioned on; 0 for none.
    spans: also predict average velocities over a span (MeanFlow).
    """

    dim: Channels = 2
    width: Width = 64
    num_layers: Loops = 3
    num_classes: Classes = 0
    spans: bool = False

    def __post_init__(self):
        check_ranges(self, "model")

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return (self.dim,)


class VelocityMLP(OnMeshes, nn.Module):
    """A multi-layer perceptron of [x, t, label]: SELU layers initialised as PyTorch's, as in 2-D experiments.

    Example:
        v = VelocityMLP(MLPConfig(dim=2)).apply(params, t, x)
    """

    config: MLPConfig

    @nn.compact
    def __call__(
        self,
        t: Float[Array, " b"],
        x: Float[Array, "b c"],
        cond: Int[Array, " b"] | None = None,
        span: Float[Array, " b"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b c"]:
        """Returns the velocity at x and time t, averaged over `span` where given. train: nothing differs here."""
        config = self.config
        check_inputs(config, t, x)
        cond = check_labels(cond, num_classes=config.num_classes, batch=len(x))
        parts = [x, t[:, None].astype(x.dtype)]
        if config.spans:
            parts.append(_span(span, t)[:, None].astype(x.dtype))
        if config.num_classes:
            parts.append(_one_hot(cond, config.num_classes, len(x)).astype(x.dtype))
        h = jnp.concatenate(parts, axis=1)
        for _ in range(config.num_layers):
            h = jax.nn.selu(linear(config.width, h.shape[1], "float32")(h))
        return linear(config.dim, config.width, "float32")(h)


class ConditionEmbedding(nn.Module):
    """A vector `b width` of time, span and class for the layers of a network: the sum of their embeddings.

    Times pass through sinusoids, stretched by time_scale, and two layers with SiLU, classes through a table whose last
    row means none.

    Example:
        c = ConditionEmbedding(width=256, num_classes=10, spans=False).apply(params, t, cond, None)
    """

    width: int
    num_classes: int
    spans: bool
    frequencies: int = 256
    time_scale: float = TIME_SCALE

    @nn.compact
    def __call__(
        self, t: Float[Array, " b"], cond: Int[Array, " b"] | None, span: Float[Array, " b"] | None
    ) -> Float[Array, "b width"]:
        init = nn.initializers.normal(EMBEDDING_STDDEV)

        def embedded(value, name):
            features = time_features(value, self.frequencies, scale=self.time_scale)
            h = nn.Dense(self.width, kernel_init=init, name=f"{name}_up")(features)
            return nn.Dense(self.width, kernel_init=init, name=f"{name}_down")(jax.nn.silu(h))

        c = embedded(t, "time")
        if self.spans:
            c = c + embedded(_span(span, t), "span")
        if self.num_classes:
            table = self.param("class_embed", init, (self.num_classes + 1, self.width), jnp.float32)
            c = c + class_or_none(jnp.asarray(table), cond, len(t))
        return c


def check_time_scale(time_scale: float) -> None:
    """Raises ValueError where times cannot be stretched so.

    Example:
        check_time_scale(1000.0)
    """
    if not 0 < time_scale < float("inf"):
        raise ValueError(f"model.time_scale is {time_scale}; use 1000.0, or 1.0 as in the published code.")


def class_or_none(
    table: Float[Array, "classes_and_none d"], labels: Int[Array, " b"] | None, batch: int
) -> Float[Array, "b d"]:
    """Returns the row of each label; the last row where the label is -1 or `labels` is None, NaN for other labels.

    Example:
        e = class_or_none(table, jnp.array([3, -1]), batch=2)
    """
    none = table.shape[0] - 1
    if labels is None:
        return jnp.broadcast_to(table[none][None], (batch, table.shape[1]))
    known = (labels >= UNCONDITIONAL) & (labels < none)
    rows = jnp.take(table, jnp.where(labels == UNCONDITIONAL, none, labels), axis=0, mode="clip")
    return jnp.where(known[:, None], rows, jnp.nan)


def time_features(
    t: Float[Array, " b"], dim: int, max_period: float = 10_000.0, scale: float = TIME_SCALE
) -> Float[Array, "b dim"]:
    """Returns [cos; sin] of scale · t at dim/2 frequencies from 1 to 1/max_period; ValueError unless dim is even.

    Example:
        features = time_features(t, 256)
    """
    if dim % 2:
        raise ValueError(f"dim is {dim}; half of the features are cosines and half sines, so it must be even.")
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(dim // 2) / (dim // 2))
    angles = scale * t[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


def init(network: nn.Module, key: Key[Array, ""]) -> Any:
    """Returns freshly initialised variables of a velocity network; shapes come from its config.

    Example:
        variables = init(VelocityMLP(MLPConfig(dim=2)), jax.random.key(0))
    """
    check_key(key)
    config: Any = getattr(network, "config")  # noqa: B009  (a module's type does not say that it has one)
    x = jnp.zeros((1, *config.event_shape), master_dtype(getattr(config, "dtype", "float32")))
    return jax.jit(network.init)(key, jnp.zeros(1), x)


def check_inputs(config: Any, t: Array, x: Array) -> None:
    """Raises ValueError unless x is a batch of the config's samples and t has one time for each.

    Example:
        check_inputs(config, t, x)
    """
    check_floating("x", x)
    if x.shape[1:] != config.event_shape:
        shape = ", ".join(map(str, config.event_shape))
        raise ValueError(f"x has shape {tuple(x.shape)}; this network takes (batch, {shape}).")
    if getattr(t, "shape", None) != x.shape[:1]:
        raise ValueError(f"t is {shown(t)}; there must be one time per sample, of shape {tuple(x.shape[:1])}.")


def _span(span: Array | None, t: Array) -> Array:
    return jnp.zeros_like(t) if span is None else span


def _one_hot(labels: Array | None, num_classes: int, batch: int) -> Array:
    if labels is None:
        return jnp.zeros((batch, num_classes))
    known = (labels >= UNCONDITIONAL) & (labels < num_classes)
    return jnp.where(known[:, None], jax.nn.one_hot(labels, num_classes), jnp.nan)
