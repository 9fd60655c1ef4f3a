"""Invertible elementwise maps of tokens. A network computes the parameters of a map from the preceding tokens.

Before training, the network's raw outputs are close to 0. For such outputs, a map must be close to the identity.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Annotated, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flowgen.arrays import at_least_float32, check_count
from flowgen.settings import config
from flowgen.settings.ranges import Within
from flowgen.transforms.mixture import mixture_forward, mixture_inverse
from flowgen.transforms.tails import TAILS, Kind

# The scale of a component is within exp(±4) of its initial value, so no component can collapse onto a single sample.
MAX_LOG_SCALE = 4.0
# Standard deviation of the components' initial means. See `mixture_parameters`.
INITIAL_SPREAD = 0.3


@runtime_checkable
class ElementwiseMap(Protocol):
    """The interface of an invertible map of tokens that acts on each element separately."""

    def num_outputs(self, channels: int) -> int:
        """Returns the number of raw network outputs that a token of `channels` elements needs."""
        ...

    def to_noise(
        self, x: Float[Array, "b n c"], raw: Float[Array, "b n outputs"]
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"]]:
        """Returns z and log dz/dx of each element, in nats. For raw outputs of 0, z is close to x."""
        ...

    def to_data(self, z: Float[Array, "b n c"], raw: Float[Array, "b n outputs"]) -> Float[Array, "b n c"]:
        """Returns x, the inverse of `to_noise` for the same raw outputs."""
        ...


def mixture_parameters(
    raw: Float[Array, "*b outputs"], components: int, kind: Kind = "gaussian"
) -> tuple[Float[Array, "*b c k"], Float[Array, "*b c k"], Float[Array, "*b c k"]]:
    """Returns (logits, means, log_scales) of a mixture of k = `components` distributions for each of c channels.

    raw: raw outputs of a network: for each token and channel, k logits, then k means, then k log-scales.
    kind: family of the components, and of the base distribution to which `MixtureMap` maps the mixture.

    For raw outputs of 0, the mixture has the mean and variance of the base distribution, so the map is close to the
    identity. If there are several components, their means then have a standard deviation of 0.3 times that of the base
    distribution. With equal means, the map would be exactly the identity, but the components would have equal
    gradients, and training could not separate them. With 8 Gaussian components, this spread of the means changes z by
    less than 0.006 for |x| < 3, and by a factor of less than 1.05 in the tails. The log-scales differ from their values
    for raw outputs of 0 by at most 4.

    Raises ValueError unless the size of the last axis of raw is a positive multiple of 3 · components.

    Example:
        logits, means, log_scales = mixture_parameters(raw, 8)
    """
    check_count("components", components)
    raw = at_least_float32("raw", raw)
    outputs = raw.shape[-1] if raw.ndim else 0
    if outputs == 0 or outputs % (3 * components):
        raise ValueError(
            f"raw has shape {raw.shape}; its last axis must be a multiple of 3 · {components}, for the logits, means "
            f"and log-scales of {components} components per channel."
        )
    raw = raw.reshape(*raw.shape[:-1], outputs // (3 * components), 3, components)
    logits, means, log_scales = (raw[..., part, :] for part in range(3))
    offsets, log_scale = _initial(components)
    means = means + jnp.broadcast_to(jnp.asarray(TAILS[kind].std * offsets, raw.dtype), means.shape)
    return logits, means, log_scale + MAX_LOG_SCALE * jnp.tanh(log_scales / MAX_LOG_SCALE)


def _initial(components: int) -> tuple[np.ndarray, float]:
    """Returns initial means that are spread like normal quantiles, and the log-scale that makes the variance 1."""
    levels = (np.arange(components) + 0.5) / components
    quantiles = np.array([NormalDist().inv_cdf(level) for level in levels])
    if components == 1:
        return quantiles, 0.0
    return INITIAL_SPREAD * quantiles / quantiles.std(), 0.5 * float(np.log1p(-(INITIAL_SPREAD**2)))


@config
class MixtureMap:
    """Maps each element of a token to noise by the CDF of a mixture; see `flowgen.transforms.mixture`.

    components: number of components of the mixture per channel. With more components, the density can have more modes.
    Each component requires 3 network outputs per channel.
    kind: family of the components. With "gaussian" and standard normal noise z, the density of each element, given the
    earlier tokens, is a mixture of Gaussians. "logistic" is cheaper to compute.

    Example:
        z, log_derivative = MixtureMap(components=8).to_noise(x, raw)
    """

    components: Annotated[int, Within(1, 1024)] = 8
    kind: Kind = "gaussian"

    def num_outputs(self, channels: int) -> int:
        """Returns 3 · components · channels."""
        return 3 * self.components * channels

    def to_noise(
        self, x: Float[Array, "b n c"], raw: Float[Array, "b n outputs"]
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"]]:
        """Returns z and log dz/dx of each element, in nats."""
        return mixture_forward(x, *mixture_parameters(raw, self.components, self.kind), self.kind)

    def to_data(self, z: Float[Array, "b n c"], raw: Float[Array, "b n outputs"]) -> Float[Array, "b n c"]:
        """Returns x, the inverse of `to_noise`, by `mixture_inverse`."""
        return mixture_inverse(z, *mixture_parameters(raw, self.components, self.kind), self.kind)
