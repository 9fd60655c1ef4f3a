"""Options for sampling velocity networks, and the function that draws the samples."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key, PyTree

from flowgen.contexts import check_condition
from flowgen.data import PointsConfig
from flowgen.data.points import Distribution
from flowgen.experiments.drawing import CompareOptions, DrawOptions, check_compared
from flowgen.matching import MatchingConfig, edm_times, guided, integrate, integrate_mean, velocity_field
from flowgen.settings import config
from flowgen.settings.ranges import NonNegative, Positive, Samples, Within

Solver = Literal["euler", "midpoint", "heun", "rk4", "dopri5", "mean_flow"]


@config
class SolverConfig:
    """Options for drawing samples of a velocity network: the field `sampling` of a `MatchingExperiment`. Training uses
    them for its sample grids. The commands sample and evaluate use them too, unless they are given other values.

    num: number of samples that training draws for a sample grid, and that the command sample draws; at least 1.
    method: ODE solver of `flowgen.matching.integrate`, or "mean_flow" for networks trained with the loss MeanFlow.
    "dopri5" adapts its steps to rtol and atol; the others take num_steps steps.
    num_steps: number of steps, for all methods except "dopri5"; at least 1, or at least 2 if times is "edm".
    times: "uniform" for equal steps from t = 0 to t = 1; "edm" for the times of `flowgen.matching.edm_times`, which
    begin at t = 1/81 and are dense near both ends. The methods "dopri5" and "mean_flow" accept only "uniform".
    rtol: relative error tolerance of "dopri5"; positive.
    atol: absolute error tolerance of "dopri5"; positive.
    guidance: weight w in the guided velocity (1 + w) v_c - w v_u, where v_c and v_u are the velocities with and without
    the condition; 0 for no guidance, as "mean_flow" requires.
    guidance_interval: start and end of the interval of times in which guidance is applied; noise is at time 0, data at
    time 1.
    frechet_samples: for images, the number of samples that each evaluation in training draws, to report their Fréchet
    distance to held-out images; at least 2, or 0 for no such distance.
    """

    num: Samples = 64
    method: Solver = "heun"
    num_steps: Annotated[int, Within(1, 1 << 20)] = 25
    times: Literal["uniform", "edm"] = "uniform"
    rtol: Positive = 1e-5
    atol: Positive = 1e-5
    guidance: NonNegative = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    frechet_samples: Annotated[int, Within(0, 1 << 24)] = 0

    def __post_init__(self):
        low, high = self.guidance_interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"guidance_interval is {self.guidance_interval}; give two increasing times in [0, 1].")
        if self.frechet_samples == 1:
            raise ValueError("frechet_samples is 1, but a distance needs at least 2; raise it, or set it to 0.")
        if self.times == "edm" and self.num_steps < 2:
            raise ValueError(f"num_steps is {self.num_steps}; it must be at least 2 for times 'edm'.")
        if self.times == "edm" and self.method in ("dopri5", "mean_flow"):
            raise ValueError(f"times is 'edm', but {self.method} uses no time grid; set it to 'uniform'.")


@config
class VelocityDrawOptions(DrawOptions):
    """Options for sampling a velocity network, in addition to those in the experiment's field `sampling`.

    classes: classes to draw in turn, by name (cat,dog) or number (0,1,2); -1 is unconditional, as in --classes=-1,3.
    """

    classes: str = ""


@config
class VelocityEvaluateOptions(CompareOptions):
    """Options for evaluating a velocity network.

    samples: number of samples to draw and compare with the data; 0 means one per image of the data, or 1,000 points.
    unconditional: evaluate a class-conditional model without labels.
    """

    samples: Annotated[int, Within(0, 1 << 24)] = 0
    unconditional: bool = False

    def __post_init__(self):
        check_compared(self.samples)
        if self.samples and self.neighbours > self.samples:
            raise ValueError(f"neighbours is {self.neighbours}, but samples is {self.samples}; lower it.")

    def check_points(self) -> None:
        """Raises ValueError if an option is set that has no effect on points."""
        for name in ("features", "reference", "neighbours"):
            if (value := getattr(self, name)) != getattr(type(self), name):
                raise ValueError(f"--{name} is {value}, but it applies only to images, not to points; leave it out.")


def draw_by_solver(
    shared: tuple[PyTree, Key[Array, ""]],
    indices: Int[Array, " b"],
    cond: Any,
    *,
    network: nn.Module,
    distribution: Distribution | None,
    matching: MatchingConfig,
    sampling: SolverConfig,
) -> tuple[Float[Array, "b *event"], Int[Array, " b"]]:
    """Returns samples and the number of velocity evaluations for each.

    `flowgen.backend.by_rows` can run this function on several devices.

    shared: the pair of the network's variables and the key. Sample i starts from noise that depends only on (key, i).
    indices: the numbers i of the samples. cond: the condition of each sample, or None.
    distribution: the distribution of x0, by its name in `PointsConfig`; None means Gaussian noise.

    Example:
        settings = {"distribution": None, "matching": MatchingConfig(), "sampling": SolverConfig()}
        x, evaluations = by_rows(draw_by_solver, (params, key), np.arange(4), None, network=network, **settings)
    """
    variables, key = shared
    keys = jax.vmap(partial(jax.random.fold_in, key))(indices)
    cond = check_condition(network.config, cond, len(indices))  # Guidance needs contexts in this form.
    if distribution is None:
        x0 = jax.vmap(lambda key: jax.random.normal(key, network.config.event_shape))(keys)
    else:
        x0 = jax.vmap(lambda key: PointsConfig(x0=distribution).draw(key, 1)[0][0])(keys)
    if sampling.method == "mean_flow":

        def average(t, x, cond, interval):
            return network.apply(variables, t, x, cond, interval)

        x, evaluations = integrate_mean(average, x0, cond, num_steps=sampling.num_steps)
        return x, jnp.full(len(x), evaluations)
    velocity = velocity_field(network, variables, matching)
    if sampling.guidance:
        velocity = guided(velocity, weight=sampling.guidance, interval=sampling.guidance_interval)
    x, evaluations = integrate(
        velocity,
        x0,
        cond,
        method=sampling.method,
        num_steps=sampling.num_steps,
        times=edm_times(sampling.num_steps) if sampling.times == "edm" else None,
        rtol=sampling.rtol,
        atol=sampling.atol,
    )
    return x, jnp.full(len(x), evaluations)
