"""Invertible maps of tokens: affine maps, with a choice of scale parameterisations, and elementwise maps.

An affine map and its log-determinant are

x = shift + exp(log_scale) · z,      z = (x - shift) · exp(-log_scale),      log|det dz/dx| = -Σ log_scale
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flowgen.settings.ranges import Own
from flowgen.transforms.elementwise import ElementwiseMap

SOFTPLUS_OFFSET = 0.541324854612918  # softplus of this is 1
SOFTPLUS_UNDERFLOW = -40.0  # below this, softplus(x) equals exp(x) to float64's last digit


class Affine(NamedTuple):
    """The parameters of the affine maps of tokens, one shift and log scale per value.

    Example:
        z, log_derivative = Affine(shift, log_scale).to_noise(x)
    """

    shift: Float[Array, "b n c"]
    log_scale: Float[Array, "b n c"]

    def to_noise(self, x: Float[Array, "b n c"]) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"]]:
        """Returns z = (x - shift)·exp(-log_scale) and log dz/dx = -log_scale of each value, in nats."""
        return (x - self.shift) * jnp.exp(-self.log_scale), -self.log_scale

    def to_data(self, z: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Returns x = shift + exp(log_scale)·z, the inverse of `to_noise`."""
        return self.shift + jnp.exp(self.log_scale) * z

    def where(self, exists: Bool[Array, "b n 1"]) -> Affine:
        """Returns the maps, with the identity for padding."""
        return Affine(jnp.where(exists, self.shift, 0), jnp.where(exists, self.log_scale, 0))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mapped:
    """The parameters of elementwise maps of tokens.

    raw: the network's outputs `b n outputs`. exists: bool `b n 1`, False for padding, which the map leaves unchanged;
    None without padding.
    """

    map: ElementwiseMap = field(metadata={"static": True})
    raw: Any  # JAX also builds pytrees of placeholders.
    exists: Any = None

    def to_noise(self, x: Float[Array, "b n c"]) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"]]:
        """Returns z and log dz/dx of each value, in nats."""
        z, log_derivative = self.map.to_noise(x, self.raw)
        if self.exists is None:
            return z, log_derivative
        return jnp.where(self.exists, z, x), jnp.where(self.exists, log_derivative, 0)

    def to_data(self, z: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Returns x, the inverse of `to_noise`."""
        x = self.map.to_data(z, self.raw)
        return x if self.exists is None else jnp.where(self.exists, x, z)

    def where(self, exists: Bool[Array, "b n 1"]) -> Mapped:
        """Returns the maps, with the identity for padding."""
        return replace(self, exists=exists)


# The parameters of a block's maps of tokens.
TokenMaps = Affine | Mapped


def soft_clip(raw: Float[Array, "*b c"], bound: float) -> Float[Array, "*b c"]:
    """Returns bound · tanh(raw / bound), which is within ±bound and close to raw near 0; for bound 0, returns raw."""
    return bound * jnp.tanh(raw / bound) if bound else raw


def log_softplus(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Returns log(log(1 + exp(x))), computed without overflow or underflow."""
    small = x < SOFTPLUS_UNDERFLOW
    return jnp.where(small, x, jnp.log(jax.nn.softplus(jnp.where(small, 0, x))))


@runtime_checkable
class ScaleMap(Protocol):
    """The interface of a scale parameterisation, a function (shift, raw) -> (shift, log_scale).

    Its arguments are the two outputs of a block's network for each value of a token. Its results define the block's
    affine map x = shift + exp(log_scale) · z. The function must process each token independently of the others.
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


def affine_maps(out: Float[Array, "b n outputs"], scale: ScaleParameterisation) -> Affine:
    """Returns the affine maps of all tokens.

    out: the network's outputs, in which the raw scale precedes the shift.

    Raises ValueError if a custom parameterisation returns arrays of the wrong shape.
    """
    if scale == "volume_preserving":
        return Affine(out, jnp.zeros_like(out))
    raw, shift = jnp.split(out, 2, axis=-1)
    mapped = (SCALE_MAPS[scale] if isinstance(scale, str) else scale)(shift, raw)
    shapes = tuple(jnp.shape(part) for part in mapped)
    if shapes != (raw.shape, raw.shape):
        raise ValueError(
            f"scale_parameterisation returned shapes {shapes}; it must return shift and log_scale of shape {raw.shape}."
        )
    return Affine(*mapped)
