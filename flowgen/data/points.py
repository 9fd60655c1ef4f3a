"""Endless points in the plane: pairs of distributions by name, drawn anew in every step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from flowgen.data.sources import Batch
from flowgen.matching import toy
from flowgen.settings import config

Distribution = Literal["normal", "eight_gaussians", "five_gaussians", "moons"]


@config
class PointsConfig:
    """Which points to transport; see `flowgen.matching.toy`.

    source: distribution of x0, at t = 0.
    target: distribution of x1, the data.

    Example:
        config = PointsConfig(source="eight_gaussians", target="moons")
        x0, x1 = config.draw(key, 256)
    """

    source: Distribution = "normal"
    target: Distribution = "eight_gaussians"

    def draw(self, key: Key[Array, ""], num: int) -> tuple[Float[Array, "num 2"], Float[Array, "num 2"]]:
        """Returns independent points of source and target; pure, for use inside compiled programs."""
        source_key, target_key = jax.random.split(key)
        return toy.DISTRIBUTIONS[self.source](source_key, num), toy.DISTRIBUTIONS[self.target](target_key, num)


def blank_batches(share: int, start: int, stop: int) -> Iterator[Batch]:
    """Returns batches that hold nothing but their size: points are drawn on the device from the key of the step.

    Example:
        for batch in blank_batches(256, 0, 20_000):
            ...
    """
    blank = {"blank": np.zeros(share, np.int8)}
    return (blank for _ in range(start, stop))
