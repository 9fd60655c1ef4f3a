"""Computes features of images with a pretrained network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flowgen.arrays import check_finite, check_floating
from flowgen.data.media import from_uint8, to_uint8

AT_ONCE = 32


@runtime_checkable
class FeatureNetwork(Protocol):
    """A Flax module whose method `of_images` maps images in [-1, 1] of any size to `num_features` features."""

    num_features: int

    def apply(self, variables: Any, *args: Any, method: str) -> Any: ...


@dataclass(frozen=True)
class NetworkFeatures:
    """Computes the features of images in [-1, 1] with a network.

    The images are first rounded to the 256 levels of an image file, because published distances are computed from image
    files. A call raises ValueError if images do not have 1 or 3 channels, or if values are not finite.

    Example:
        features = NetworkFeatures(InceptionV3("fid"), variables)(images)  # float32 `n 2048`
    """

    network: FeatureNetwork
    variables: Any

    def __call__(self, images: Float[np.ndarray, "n height width c"]) -> Float[np.ndarray, "n features"]:
        check_floating("images", images)
        check_channels(images.shape[3])
        check_finite(images=images)  # Rounding would turn NaN into grey.
        size = min(AT_ONCE, len(images))
        out = np.empty((len(images), self.network.num_features), np.float32)
        for start in range(0, len(images), size):
            part = from_uint8(to_uint8(images[start : start + size]))
            # The last batch is padded, so that only one program is compiled.
            full = np.resize(part, (size, *part.shape[1:]))
            out[start : start + len(part)] = np.asarray(_features(self.network, self.variables, full))[: len(part)]
        return out


def check_channels(channels: int) -> None:
    """Raises ValueError unless `NetworkFeatures` accepts images with this number of channels.

    Example:
        check_channels(images.shape[3])
    """
    if channels not in (1, 3):
        raise ValueError(f"images have {channels} channels, but this network needs images with 1 or 3; compare pixels.")


@partial(jax.jit, static_argnums=0)
def _features(network, variables, images):
    return network.apply(variables, images, method="of_images")


def resized(images: Float[Array, "b height width c"], side: int) -> Float[Array, "b side side 3"]:
    """Returns square images with 3 channels, interpolated bilinearly without antialiasing.

    The result equals that of PyTorch's `interpolate(..., mode="bilinear")`, as used by the common FID code for PyTorch.

    Example:
        x = resized(images, 299)
    """
    x = jnp.broadcast_to(images, (*images.shape[:3], 3)) if images.shape[3] == 1 else images
    return jax.image.resize(x, (len(x), side, side, 3), "linear", antialias=False, precision="highest")
