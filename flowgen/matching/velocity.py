"""Velocity networks: modules of (t, x, cond), t of shape `b` in [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

# Times in [0, 1] are stretched to the 1,000 steps that sinusoidal embeddings are made for: without it all angles are
# below one radian.
TIME_SCALE = 1000.0


@dataclass(frozen=True)
class MLPConfig:
    """Shape of a velocity network for points: `dim` coordinates, `num_layers` hidden layers of `width`."""

    dim: int
    width: int = 64
    num_layers: int = 3
    num_classes: int = 0

    def __post_init__(self):
        for name in ("dim", "width", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")


class VelocityMLP(nn.Module):
    """A multi-layer perceptron of [x, t, label]: SELU layers, as in the usual two-dimensional experiments.

    Example:
        v = VelocityMLP(MLPConfig(dim=2)).apply(params, t, x)
    """

    config: MLPConfig

    @nn.compact
    def __call__(
        self, t: Float[Array, " b"], x: Float[Array, "b c"], cond: Int[Array, " b"] | None = None
    ) -> Float[Array, "b c"]:
        """Returns the velocity at x and time t; cond: labels, -1 for none."""
        config = self.config
        h = jnp.concatenate([x, t[:, None].astype(x.dtype)], axis=1)
        if config.num_classes:
            cond = jnp.full(len(x), -1) if cond is None else cond
            h = jnp.concatenate([h, jax.nn.one_hot(cond, config.num_classes, dtype=x.dtype)], axis=1)
        for _ in range(config.num_layers):
            h = jax.nn.selu(nn.Dense(config.width)(h))
        return nn.Dense(config.dim)(h)


def time_features(t: Float[Array, " b"], dim: int, max_period: float = 10_000.0) -> Float[Array, "b dim"]:
    """Returns [cos; sin] of 1000 t at dim/2 frequencies from 1 to 1/max_period; ValueError unless dim is even.

    Example:
        features = time_features(t, 256)
    """
    if dim % 2:
        raise ValueError(f"dim is {dim}; half of the features are cosines and half sines, so it must be even.")
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(dim // 2) / (dim // 2))
    angles = TIME_SCALE * t[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)
