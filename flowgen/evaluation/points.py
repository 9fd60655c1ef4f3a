"""Metrics of velocity fields for 2-D points: distance to the data, path energy, and sample quality with few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Key

from flowgen.matching import PathReport, integrate, path_report, signed_path_energy, wasserstein
from flowgen.matching.solvers import Velocity

Draw = Callable[[Key[Array, ""], int], tuple[Float[Array, "n 2"], Float[Array, "n 2"]]]


class PointSamples(NamedTuple):
    """Samples of noise and data, and points generated from the noise.

    x0: the noise.
    x1: the data.
    more: a second sample of the data.
    generated: points generated from x0 with 100 rk4 steps.
    euler_1, euler_4, euler_10: points generated from x0 with 1, 4 and 10 Euler steps.
    paths: energy and curvature of the paths that start at x0.
    """

    x0: Float[Array, "n 2"]
    x1: Float[Array, "n 2"]
    more: Float[Array, "n 2"]
    generated: Float[Array, "n 2"]
    euler_1: Float[Array, "n 2"]
    euler_4: Float[Array, "n 2"]
    euler_10: Float[Array, "n 2"]
    paths: PathReport


def point_samples(velocity: Velocity, draw: Draw, key: Key[Array, ""], *, num: int = 1000) -> PointSamples:
    """Returns points of noise, points of data, and points that `velocity` generates, all for `point_metrics`.

    draw: a function (key, num) that returns `num` independent points of noise and as many of data.
    num: number of points in each sample.

    The function can be called inside `jax.jit`.

    Example:
        samples = jax.jit(lambda key: point_samples(velocity, config.draw, key))(key)
    """
    first, second = jax.random.split(key)
    x0, x1 = draw(first, num)
    _, more = draw(second, num)
    generated, _ = integrate(velocity, x0, method="rk4", num_steps=100)
    few = (integrate(velocity, x0, method="euler", num_steps=steps)[0] for steps in (1, 4, 10))
    return PointSamples(x0, x1, more, generated, *few, path_report(velocity, x0))


def point_metrics(samples: PointSamples) -> dict[str, float]:
    """Returns a dict of metrics that measure how well a velocity field transports noise to data.

    The Wasserstein distances are exact. They are computed on the host, so the function cannot be called inside
    `jax.jit`. The metrics are:

    w2: 2-Wasserstein distance W2 between `samples.generated` and the data.
    w2_floor: W2 between two samples of the data. The w2 of a perfect model has the same expectation.
    euler_1, euler_4, euler_10: W2 between the data and the points generated with 1, 4 and 10 Euler steps.
    path_energy: E ∫|v|² dt of the velocity v along the paths.
    signed_npe: (path_energy - W2²) / W2², with W2 between noise and data; if negative, the paths are too short to
        transport the noise to the data.
    curvature: E ∫|v - (x(1) - x(0))|² dt along the paths x(t), which is 0 for straight paths of constant speed.

    Example:
        metrics = point_metrics(samples)
    """
    distances = {
        "w2": samples.generated,
        "w2_floor": samples.more,
        "euler_1": samples.euler_1,
        "euler_4": samples.euler_4,
        "euler_10": samples.euler_10,
    }
    metrics = {name: float(wasserstein(points, samples.x1)) for name, points in distances.items()}
    energy, squared = float(samples.paths.energy), float(wasserstein(samples.x0, samples.x1)) ** 2
    return {
        **metrics,
        "path_energy": energy,
        "signed_npe": signed_path_energy(energy, squared),
        "curvature": float(samples.paths.curvature),
    }
