"""The affine map of tokens, and the parameterisations of its scale.

x = shift + exp(log_scale) · z,      z = (x - shift) · exp(-log_scale),      log|det dz/dx| = -Σ log_scale
"""

from __future__ import annotations

from typing import Annotated, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowgen.settings.ranges import Own

SOFTPLUS_OFFSET = 0.541324854612918  # softplus of this is 1
SOFTPLUS_UNDERFLOW = -40.0  # below this, softplus(x) equals exp(x) to float64's last digit


def to_noise(
    x: Float[Array, "b n c"], shift: Float[Array, "b n c"], log_scale: Float[Array, "b n c"]
) -> tuple[Float[Array, "b n c"], Float[Array, " b"]]:
    """Returns z = (x - shift)·exp(-log_scale) and the logdet in nats, -Σ log_scale over tokens and channels."""
    return (x - shift) * jnp.exp(-log_scale), -log_scale.sum(axis=(1, 2))


def to_data(
    z: Float[Array, "b n c"], shift: Float[Array, "b n c"], log_scale: Float[Array, "b n c"]
) -> Float[Array, "b n c"]:
    """Returns x = shift + exp(log_scale)·z, the inverse of `to_noise`."""
    return shift + jnp.exp(log_scale) * z


def soft_clip(raw: Float[Array, "*b c"], bound: float) -> Float[Array, "*b c"]:
    """Returns bound · tanh(raw / bound), which lies within ±bound and is close to raw near 0; bound 0 returns raw."""
    return bound * jnp.tanh(raw / bound) if bound else raw


def log_softplus(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Returns log(log(1 + exp(x))), computed such that the result is finite for every finite x."""
    small = x < SOFTPLUS_UNDERFLOW
    return jnp.where(small, x, jnp.log(jax.nn.softplus(jnp.where(small, 0, x))))


@runtime_checkable
class ScaleMap(Protocol):
    """A scale parameterisation, which maps the network's two outputs per channel to shift and log_scale.

    It must process each token independently.
    """

    def __call__(
        self, shift: Float[Array, "b n c"], raw: Float[Array, "b n c"]
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"]]:
        """Returns (shift, log_scale). Before training, both arguments are close to 0."""
        ...


# The scale σ is exp(a) in TARFlow and softplus(a + 0.5413) in STARFlow, where a is the network's raw output.
SCALE_MAPS: dict[str, ScaleMap] = {
    "exponential": lambda shift, raw: (shift, raw),
    "softplus": lambda shift, raw: (shift, log_softplus(raw + SOFTPLUS_OFFSET)),
}
OwnScale = Annotated[ScaleMap, Own("a function (shift, raw) -> (shift, log_scale)")]
# "volume_preserving" has σ = 1, so the network has only one output per channel.
ScaleParameterisation = Literal["exponential", "softplus", "volume_preserving"] | OwnScale


def num_outputs(scale: ScaleParameterisation) -> int:
    """Returns the number of outputs per channel that a network needs for shift and scale."""
    return 1 if scale == "volume_preserving" else 2


def shift_and_log_scale(
    out: Float[Array, "b n outputs"], scale: ScaleParameterisation
) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"]]:
    """Returns (shift, log_scale) for all tokens.

    out: the network's outputs, in which the raw scale precedes the shift.

    Raises ValueError if a custom parameterisation returns arrays of the wrong shape.
    """
    if scale == "volume_preserving":
        return out, jnp.zeros_like(out)
    raw, shift = jnp.split(out, 2, axis=-1)
    mapped = (SCALE_MAPS[scale] if isinstance(scale, str) else scale)(shift, raw)
    shapes = tuple(jnp.shape(part) for part in mapped)
    if shapes != (raw.shape, raw.shape):
        raise ValueError(
            f"scale_parameterisation returned shapes {shapes}; it must return shift and log_scale of shape {raw.shape}."
        )
    return mapped
