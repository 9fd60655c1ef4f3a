"""Objectives of flow matching: weighted regression of a path's target by a velocity network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flowgen.matching.couplings import Coupling, GibbsWeights, Independent, log_mean_exp
from flowgen.matching.diagnostics import effective_sample_size
from flowgen.matching.paths import CondOT, Path, Prediction, velocity_of
from flowgen.matching.solvers import Velocity
from flowgen.matching.times import Uniform

UNCONDITIONAL = -1
# How fast the running log-mean of Gibbs weights follows that of the batches.
RUNNING_RATE = 0.01

Loss = Callable[..., tuple[Any, ...]]


def flow_matching_loss(
    *,
    path: Path | None = None,
    coupling: Coupling | None = None,
    time: Callable[[Array, int], Array] | None = None,
    prediction: Prediction = "velocity",
    label_dropout: float = 0.0,
) -> Loss:
    """Returns loss_fn(velocity, batch, key, log_mean=None) -> (loss, metrics, log_mean): E[w |v(t, x_t) - u_t|²].

    velocity(t, x, cond): any callable; what it predicts is `prediction`, turned into a velocity before it is compared.
    batch: "x1" data, "x0" source (standard normal where missing), "cond" labels or None. The square is averaged over
    dimensions. label_dropout: share of labels replaced by -1, per example. log_mean: the running log-mean of the
    weights, None at the first step; it is handed back, and not needed unless the coupling asks for "running".
    Raises ValueError where settings or shapes do not fit.

    Example:
        loss_fn = flow_matching_loss(path=CondOT(), coupling=GibbsWeights(epsilon=2.0), time=Uniform())
    """
    path = CondOT() if path is None else path
    coupling = Independent() if coupling is None else coupling
    time = Uniform() if time is None else time
    if prediction not in ("velocity", "x1", "noise"):
        raise ValueError(f"a network cannot predict {prediction!r}; choose 'velocity', 'x1' or 'noise'.")
    if not 0 <= label_dropout < 1:
        raise ValueError(f"label_dropout is {label_dropout}; it is a share of at least 0 and below 1.")
    running = isinstance(coupling, GibbsWeights) and coupling.normalize == "running"

    def loss_fn(
        velocity: Velocity, batch: dict[str, Any], key: Key[Array, ""], log_mean: Float[Array, ""] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Array], Float[Array, ""]]:
        source_key, pair_key, time_key, path_key, drop_key = jax.random.split(key, 5)
        x1 = batch["x1"]
        x0 = batch.get("x0")
        x0 = jax.random.normal(source_key, x1.shape, x1.dtype) if x0 is None else x0
        x0, x1, cond, log_weight = coupling(pair_key, x0, x1, batch.get("cond"))
        mean = log_mean_exp(log_weight)
        log_mean = mean if log_mean is None else log_mean + RUNNING_RATE * (mean - log_mean)
        weight = jnp.exp(log_weight - log_mean) if running else jnp.exp(log_weight)
        if cond is not None and label_dropout:
            cond = jnp.where(jax.random.bernoulli(drop_key, label_dropout, cond.shape), UNCONDITIONAL, cond)
        t = time(time_key, len(x1))
        point = path.sample(path_key, t, x0, x1)
        predicted = velocity_of(path, t, point.x_t, velocity(t, point.x_t, cond), prediction)
        error = jnp.square(predicted - point.u_t).reshape(len(x1), -1).mean(axis=1)
        loss = (weight * error).mean()
        metrics = {"loss": loss, "unweighted_loss": error.mean(), "ess": effective_sample_size(log_weight)}
        return loss, metrics, log_mean

    return loss_fn
