"""Metrics of velocity fields in the plane: distance to the data, path energy, and few-step quality."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Key

from flowgen.matching import PathReport, integrate, path_report, signed_path_energy, wasserstein
from flowgen.matching.solvers import Velocity

Draw = Callable[[Key[Array, ""], int], tuple[Float[Array, "n 2"], Float[Array, "n 2"]]]


class PointSamples(NamedTuple):
    """Noise, data, more data, and samples generated from the noise with 100 rk4 steps and 1, 4 and 10 Euler steps."""

    x0: Float[Array, "n 2"]
    x1: Float[Array, "n 2"]
    more: Float[Array, "n 2"]
    generated: Float[Array, "n 2"]
    euler_1: Float[Array, "n 2"]
    euler_4: Float[Array, "n 2"]
    euler_10: Float[Array, "n 2"]
    paths: PathReport


def point_samples(velocity: Velocity, draw: Draw, key: Key[Array, ""], *, num: int = 1000) -> PointSamples:
    """Returns the samples that `point_metrics` compares; works under `jax.jit`.

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
    """Measures how well a field transports noise to data, with exact distances computed on the host.

    w2: 2-Wasserstein distance between generated points and data. w2_floor: W2 between two samples of the data; w2 below
    this value is not meaningful. euler_k: w2 after k Euler steps. path_energy: E ∫|v|² dt. signed_npe: (path_energy
    - W2²) / W2² with W2 between noise and data; below 0, the paths are too short for these marginals. curvature: see
    `path_report`.

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
