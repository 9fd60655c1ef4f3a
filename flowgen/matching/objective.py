"""The config for training a velocity network, and the objective that the training loop minimises."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowgen.contexts import check_context
from flowgen.matching.checks import check_takes
from flowgen.matching.conversions import (
    NETWORK_SMALLEST,
    Prediction,
    check_prediction,
    clip_times,
    prediction_to_velocity,
)
from flowgen.matching.couplings import AnyCoupling, GibbsWeights, Independent
from flowgen.matching.diagnostics import fit_epsilon, warn_if_tilted, weight_report
from flowgen.matching.loss import Loss, combined_log_mean, flow_matching_loss
from flowgen.matching.mean_flow import mean_flow_loss
from flowgen.matching.paths import (
    CondOT,
    LinearVariancePreserving,
    Polynomial,
    SchroedingerBridge,
    Target,
    Trigonometric,
    VariancePreserving,
)
from flowgen.matching.solvers import Velocity
from flowgen.matching.times import LogitNormal, Shifted, Uniform
from flowgen.rows import StatefulObjective, batch_rows, with_rows, without_rows
from flowgen.settings import config
from flowgen.settings.ranges import Fraction, NonNegative

# The collection in the train state that stores the running log-mean of the weights.
STATE = "matching"
# Number of pairs for choosing epsilon and checking the tilt. The pairs suffice for estimating a mean, and their cost
# matrix fits in memory.
REPORT_PAIRS = 1024


@config
class FlowMatching:
    """Regression of the velocity, or of another quantity that determines the velocity.

    prediction: the quantity that the network predicts: the velocity, the data x1, the noise or the score; all except
    the velocity need a path that adds no noise (sigma 0).
    """

    prediction: Prediction = "velocity"


@config
class MeanFlow:
    """Regression of average velocities, for sampling in one step (arXiv 2505.13447); see
    `flowgen.matching.mean_flow_loss`.

    instantaneous: fraction of the pairs of noise and data for which the time interval has length 0, so that the network
    also learns the velocity itself; between 0 and 1.
    power: exponent p of the adaptive weight 1 / (e + 0.01)^p of a pair, where e is the pair's squared error, summed
    over dimensions; 0 for equal weights.
    guidance_weight: weight of the classifier-free guidance that the network learns; 0 for no guidance, above 0 only if
    the experiment's train.label_dropout is above 0.
    """

    instantaneous: Fraction = 0.75
    power: NonNegative = 1.0
    guidance_weight: NonNegative = 0.0


@config
class MatchingConfig:
    """The loss, path, coupling and distribution of times with which a velocity network is trained.

    Noise x0 is at t = 0, and data x1 are at t = 1.

    loss: what the network learns: velocities, or a quantity that determines them (FlowMatching); velocities and average
    velocities (MeanFlow).
    path: probability path from noise at t = 0 to data at t = 1.
    coupling: rule that pairs noise with data and weights the pairs.
    time: distribution of the times t at which the network is trained.
    """

    loss: FlowMatching | MeanFlow = FlowMatching()
    path: (
        CondOT
        | Target
        | Trigonometric
        | Polynomial
        | VariancePreserving
        | LinearVariancePreserving
        | SchroedingerBridge
    ) = CondOT()
    coupling: AnyCoupling = Independent()
    time: Uniform | LogitNormal | Shifted = Uniform()

    def __post_init__(self):
        try:
            check_prediction(self.prediction, self.path)
        except ValueError as error:
            raise ValueError(f"loss.{error}") from None
        check_takes("coupling", self.coupling, "key", "x0", "x1", "cond")

    @property
    def prediction(self) -> Prediction:
        """The quantity that the network predicts; "velocity" for the loss MeanFlow."""
        return self.loss.prediction if isinstance(self.loss, FlowMatching) else "velocity"

    def fitted(self, x0: Float[Array, "b *event"], x1: Float[Array, "b *event"]) -> MatchingConfig:
        """Returns this config with an epsilon chosen from noise x0 and data x1, if the coupling is `GibbsWeights`
        without an epsilon.

        A config with another coupling or with an epsilon is returned unchanged. If the coupling is `GibbsWeights`
        without Sinkhorn sweeps, `warn_if_tilted` checks its weights, and may warn (UserWarning).
        """
        coupling = self.coupling
        if not isinstance(coupling, GibbsWeights):
            return self
        coupling = fit_epsilon(coupling, x0, x1)
        if coupling.sinkhorn_sweeps == 0 and coupling.epsilon is not None:
            warn_if_tilted(weight_report(x0, x1, coupling.epsilon, coupling.cost))
        return dataclasses.replace(self, coupling=coupling)

    def loss_fn(self, *, label_dropout: float = 0.0) -> Loss:
        """Returns the loss function that this config describes; `label_dropout` as for `flow_matching_loss`."""
        if isinstance(self.loss, MeanFlow):
            return mean_flow_loss(
                path=self.path,
                coupling=self.coupling,
                time=self.time,
                instantaneous=self.loss.instantaneous,
                power=self.loss.power,
                guidance_weight=self.loss.guidance_weight,
                label_dropout=label_dropout,
            )
        return flow_matching_loss(
            path=self.path,
            coupling=self.coupling,
            time=self.time,
            prediction=self.loss.prediction,
            label_dropout=label_dropout,
        )

    def state(self) -> dict[str, Any]:
        """Returns the initial value of the state that the objective carries from step to step; see
        `matching_objective`.

        The state is empty unless the coupling is `GibbsWeights` with normalize="running".
        """
        running = isinstance(self.coupling, GibbsWeights) and self.coupling.normalize == "running"
        return {STATE: {"log_mean": jnp.full((), -jnp.inf, jnp.float32)}} if running else {}


def matching_objective(
    network: Any,
    loss_fn: Loss,
    pairs: Callable[[Array, Any], dict[str, Any]],
    *,
    train: bool = True,
) -> Callable[..., tuple]:
    """Returns the objective (variables, batch, key) -> (loss, metrics[, carried state]) of a velocity network.

    If `variables` contains the collection "matching" (see `MatchingConfig.state`), the objective also returns the
    carried state for the next step, which is the running log-mean of the pair weights.

    pairs: a function (key, batch) that turns a batch of the data into the batch for `loss_fn`: a dict of "x1" and,
    optionally, "x0" and "cond". Its key differs between devices. If its random numbers must be the same on any number
    of devices, draw them with `flowgen.rows.batch_rows(batch, key, num)`.
    train: whether to apply dropout. If True, and if the network's config has a positive `dropout`, the network is
    applied to each row separately, with one dropout key per row.

    Example:
        pairs = lambda key, batch: {"x1": from_uint8(batch.pixels)}
        objective = matching_objective(network, flow_matching_loss(), pairs)
    """
    described = getattr(network, "config", None)
    drops, context = train and getattr(described, "dropout", 0.0) > 0, getattr(described, "context", None)

    def objective(variables, batch, key):
        pair_key, _, key = jax.random.split(key, 3)
        num = len(jax.tree.leaves(without_rows(batch))[0])
        pair_rows, loss_rows, dropout_rows = batch_rows(batch, key, num).split(3)
        carried = variables.get(STATE)
        weights = {name: value for name, value in variables.items() if name != STATE}

        def dropping(key, t, x, cond, *interval):
            return network.apply(weights, t, x, cond, *interval, train=True, rngs={"dropout": key})

        def field(*inputs):
            return dropout_rows.draw(dropping, *inputs) if drops else network.apply(weights, *inputs)

        log_mean = None if carried is None else carried["log_mean"]
        given = with_rows(without_rows(pairs(pair_key, with_rows(without_rows(batch), pair_rows))), loss_rows)
        if context is not None:  # The loss drops contexts only in this form.
            given = {**given, "cond": check_context(given.get("cond"), context, len(given["x1"]))}
        loss, metrics, log_mean = loss_fn(field, given, loss_rows.key, log_mean)
        return (loss, metrics) if carried is None else (loss, metrics, {STATE: {"log_mean": log_mean}})

    return StatefulObjective(objective, combined_state)


def combined_state(before: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """Returns the carried state after a batch, given the state after each of its micro-batches.

    Example:
        state = combined_state({"matching": {"log_mean": before}}, {"matching": {"log_mean": stacked}})
    """
    if STATE not in before:
        return {}
    return {STATE: {"log_mean": combined_log_mean(before[STATE]["log_mean"], parts[STATE]["log_mean"])}}


def velocity_field(network: Any, variables: Any, matching: MatchingConfig) -> Velocity:
    """Returns the velocity function (t, x, cond) -> v of a trained network, whatever quantity the network predicts.

    A network that predicts x1, noise or a score is evaluated only at times at which alpha/beta, the ratio of the
    coefficients of data and noise in x_t, is between 0.02 and 50. Closer to the ends of the path, the conversion to a
    velocity would amplify the network's error without bound.

    Example:
        x1, nfe = integrate(velocity_field(network, variables, matching), x0, labels)
    """

    path, kind = matching.path, matching.prediction

    def field(t, x, cond):
        asked = t if kind == "velocity" else clip_times(path, t, NETWORK_SMALLEST)
        return prediction_to_velocity(
            path, t, x, network.apply(variables, asked, x, cond), kind, smallest=NETWORK_SMALLEST
        )

    return field
