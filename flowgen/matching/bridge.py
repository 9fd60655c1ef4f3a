"""[SF]²M: simulation-free training of one network for the velocity and the score of a Schroedinger bridge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float, Key

from flowgen.matching.checks import check_output
from flowgen.matching.couplings import Coupling
from flowgen.matching.loss import (
    Loss,
    check_dropout,
    check_parts,
    check_step,
    draw_pairs,
    draw_point,
    mean_square,
    rows_of,
)
from flowgen.matching.paths import SchroedingerBridge, over_event
from flowgen.matching.times import Uniform


def score_and_flow_matching_loss(
    *,
    bridge: SchroedingerBridge | None = None,
    coupling: Coupling | None = None,
    time: Callable[[Array, int], Array] | None = None,
    label_dropout: float = 0.0,
) -> Loss:
    """Returns the [SF]²M loss, loss_fn(network, batch, key, log_mean=None) -> (loss, metrics, log_mean).

    The loss is E[w (|v - u_t|² + |λs + noise|²)], where (v, s) = network(t, x_t, cond) is the prediction, and x_t, u_t
    and noise are drawn by `bridge.sample` (Tong et al., arXiv 2307.03672). As in torchcfm, λ = 2 √(t(1-t)) / sigma,
    where sigma is `bridge.sigma`. Both squares are averaged over dimensions. The optimal s is the *scaled* score
    sigma²/2 · ∇ log p_t.

    bridge: None means `SchroedingerBridge()`.
    coupling, time, label_dropout, and the pair weights w, batch and log_mean: as for `flow_matching_loss`.

    The network learns the Schroedinger bridge between noise and data only if the pairs follow the entropic transport
    plan for the squared Euclidean cost with epsilon = 2 sigma². The coupling `GibbsWeights(epsilon=2 * sigma**2,
    cost="sqeuclidean", sinkhorn_sweeps=20)` approximates this plan.

    The bridge is the SDE dX = (v + s) dt + sigma dW; backward in time, the drift is -v + s. To sample the SDE, call
    `integrate_sde` with 2/sigma² · s as `score` and the constant sigma as `diffusion`. The ODE dx = v dt has the same
    marginals.

    Example:
        loss_fn = score_and_flow_matching_loss(bridge=SchroedingerBridge(sigma=0.5))
        score = lambda t, x, cond: 2 / 0.5**2 * network(t, x, cond)[1]
        x1, nfe = integrate_sde(lambda *a: network(*a)[0], score, x0, key, diffusion=lambda t: 0.5)
    """
    bridge = SchroedingerBridge() if bridge is None else bridge
    time = Uniform() if time is None else time
    check_parts(bridge, coupling, time)
    check_dropout(label_dropout)

    def loss_fn(
        network: Callable[[Array, Array, Any], tuple[Array, Array]],
        batch: dict[str, Any],
        key: Key[Array, ""],
        log_mean: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array], Float[Array, ""]]:
        check_step(network, batch, key)
        pair_rows, time_rows, path_rows = rows_of(batch, key).split(3)
        pairs = draw_pairs(pair_rows, batch, coupling, log_mean, label_dropout=label_dropout)
        t = time_rows.draw_whole(time)
        point = draw_point(path_rows, bridge, t, pairs)
        velocity, score = (check_output(out, point.x_t) for out in network(t, point.x_t, pairs.cond))
        flow_error = mean_square(velocity - point.u_t)
        score_error = mean_square(over_event(bridge.score_scale(t), score) * score + point.noise)
        loss = (pairs.weight * (flow_error + score_error)).mean()
        metrics = {
            "loss": loss,
            "unweighted_loss": (flow_error + score_error).mean(),
            "flow_loss": flow_error.mean(),
            "score_loss": score_error.mean(),
            "ess": pairs.ess,
        }
        return loss, metrics, pairs.log_mean

    return loss_fn
