"""Two-dimensional toy distributions from the flow-matching literature.

This module keeps two quirks of the published toy data, so that results are comparable. The published code takes the
square root of the "variance 0.1" of the ring's components twice, so their standard deviation is 0.1^(1/4) = 0.562. The
noise of the moons is one uniform number per point, which is added to both coordinates.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

RADIUS = 5.0
# The published code uses √0.1 as the variance, not as the standard deviation, so the std is 0.1^(1/4).
COMPONENT_STD = 0.1**0.25


def normal(key: Key[Array, ""], num: int) -> Float[Array, "num 2"]:
    """Returns standard normal points.

    Example:
        x = normal(key, 256)
    """
    return jax.random.normal(key, (num, 2))


def gaussian_ring(key: Key[Array, ""], num: int, components: int = 8) -> Float[Array, "num 2"]:
    """Returns points from a mixture of equally likely Gaussians (std 0.562) centred on a circle of radius 5.

    components: number of Gaussians; 8 or 5 in the literature.

    Example:
        x = gaussian_ring(key, 256, components=8)
    """
    which, spread = jax.random.split(key)
    angle = 2 * jnp.pi * jax.random.randint(which, (num,), 0, components) / components
    centre = RADIUS * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    return centre + COMPONENT_STD * jax.random.normal(spread, (num, 2))


def moons(key: Key[Array, ""], num: int, noise: float = 0.2) -> Float[Array, "num 2"]:
    """Returns points from torchdyn's two moons, multiplied by 3 and shifted by -1.

    Before the multiplication, a uniform number in [0, noise) is drawn for each point and added to both of its
    coordinates. The angles are random here, whereas the published sampler spaces them evenly.

    Example:
        x = moons(key, 256)
    """
    which, where, shift = jax.random.split(key, 3)
    upper = jax.random.bernoulli(which, 0.5, (num,))
    angle = jnp.pi * jax.random.uniform(where, (num,))
    x = jnp.where(upper, jnp.cos(angle), 1 - jnp.cos(angle))
    y = jnp.where(upper, jnp.sin(angle), 0.5 - jnp.sin(angle))
    return 3 * (jnp.stack([x, y], axis=1) + noise * jax.random.uniform(shift, (num, 1))) - 1


DISTRIBUTIONS: dict[str, Callable[[Key[Array, ""], int], Float[Array, "num 2"]]] = {
    "normal": normal,
    "eight_gaussians": gaussian_ring,
    "five_gaussians": lambda key, num: gaussian_ring(key, num, components=5),
    "moons": moons,
}
