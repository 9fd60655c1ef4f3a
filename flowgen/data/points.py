"""2-D points from a pair of named distributions. New points are drawn at every step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from flowgen.batch import Batch
from flowgen.matching import toy
from flowgen.settings import config

Distribution = Literal["normal", "eight_gaussians", "five_gaussians", "moons"]


@config
class PointsConfig:
    """Selects two distributions of points in the plane for flow matching; `flowgen.matching.toy` defines them.

    x0: distribution at t = 0, from which sampling starts.
    x1: distribution at t = 1, to which the model learns to transport samples from x0.

    Example:
        config = PointsConfig(x0="eight_gaussians", x1="moons")
        x0, x1 = config.draw(key, 256)
    """

    x0: Distribution = "normal"
    x1: Distribution = "eight_gaussians"

    def draw(self, key: Key[Array, ""], num: int) -> tuple[Float[Array, "num 2"], Float[Array, "num 2"]]:
        """Returns `num` samples from x0 and, independently, `num` samples from x1. Can be used under `jax.jit`."""
        key0, key1 = jax.random.split(key)
        return toy.DISTRIBUTIONS[self.x0](key0, num), toy.DISTRIBUTIONS[self.x1](key1, num)


def blank_batches(share: int, start: int, stop: int) -> Iterator[Batch]:
    """Yields one placeholder batch for each step from `start` to `stop` - 1, for training on a `PointsConfig`.

    The batches contain only zeros, because the training step itself draws the points, with its own random key. share:
    number of samples per batch in each process.

    Example:
        for batch in blank_batches(256, 0, 20_000):
            ...
    """
    blank = Batch(np.zeros(share, np.uint8))
    return (blank for _ in range(start, stop))
