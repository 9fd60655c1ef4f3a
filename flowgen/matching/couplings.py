"""Couplings: which source goes with which datum, and how much the pair counts. All return log-weights.

Weights turn the loss of independent pairs into that of the coupling q ∝ w · (source x data): E[w |v - u|²]
(W-CFM, arXiv 2507.22270). A plan over the batch instead moves the sources.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key
from scipy.optimize import linear_sum_assignment

from flowgen.arrays import check_floating
from flowgen.matching.checks import check_batch, check_positive, check_share, check_whole
from flowgen.typed import typed

# Of the potentials that help the assignment along: in units of the mean cost, and how many sweeps make them.
ASSIGNMENT_EPSILON, ASSIGNMENT_SWEEPS = 0.02, 5

SMALLEST_EPSILON = 1e-20
# Values of so many points reach a callback at once; jax 0.10 hands more of them over by the threads that wait for it.
MOST_POINTS_ON_ONE_CORE = 256

Cost = Literal["euclidean", "sqeuclidean"] | Callable[[Array, Array], Array]


class Coupled(NamedTuple):
    """Pairs, their condition and their log-weights."""

    x0: Float[Array, "b *event"]
    x1: Float[Array, "b *event"]
    cond: Any
    log_weight: Float[Array, " b"]


@runtime_checkable
class Coupling(Protocol):
    """What a loss asks of a coupling."""

    def __call__(
        self, key: Key[Array, ""], x0: Float[Array, "b *event"], x1: Float[Array, "b *event"], cond: Any = None
    ) -> Coupled:
        """Returns pairs and their log-weights."""
        ...


@dataclass(frozen=True)
class Independent:
    """Pairs as they come, all of weight 1: I-CFM.

    Example:
        x0, x1, cond, log_weight = Independent()(key, x0, x1)
    """

    def __call__(self, key, x0, x1, cond=None):
        check_batch(x0, x1)
        return Coupled(x0, x1, cond, jnp.zeros(len(x0), x0.dtype))


@dataclass(frozen=True)
@typed
class MinibatchOT:
    """Optimal transport within the batch, on the squared Euclidean cost: OT-CFM (Tong et al., arXiv 2302.00482).

    method: "exact" permutes the sources by the optimal assignment (scipy's, on the host), so that each is used once;
    "sinkhorn" draws a source for each datum from the entropic plan inside the compiled program.
    epsilon: of the entropic plan, in units of the mean cost; positive.
    num_sweeps: of Sinkhorn's iteration; at least 1.
    class_aware: pair i lends its label to its source, and sources move only within a class; otherwise the sources that
    a class sees are not those it is sampled from (C2OT, ICCV 2025). It needs integer labels `b` as cond.

    Example:
        x0, x1, cond, log_weight = MinibatchOT(method="exact")(key, x0, x1)
    """

    method: Literal["exact", "sinkhorn"] = "exact"
    epsilon: float = 0.05
    num_sweeps: int = 50
    class_aware: bool = False

    def __post_init__(self):
        if self.method not in ("exact", "sinkhorn"):
            raise ValueError(f"method is {self.method!r}; choose 'exact' or 'sinkhorn'.")
        check_epsilon(self.epsilon)
        check_whole("num_sweeps", self.num_sweeps, least=1)

    def __call__(self, key, x0, x1, cond=None):
        check_batch(x0, x1)
        cost = pairwise_cost(x1, x0, "sqeuclidean")
        if self.class_aware:
            if cond is None:
                raise ValueError("class_aware transport needs labels as cond; give them, or switch it off.")
            if cond.shape != (len(x1),):
                raise ValueError(f"cond has shape {cond.shape}; class_aware transport needs one label for each datum.")
            allowed = cond[:, None] == cond[None, :]
        else:
            allowed = jnp.ones(cost.shape, bool)
        if self.method == "exact":
            # Above any sum of costs that an assignment within the classes can have.
            source = assignment(jnp.where(allowed, cost, (cost.max() + 1) * len(cost)))
        else:
            # The diagonal is always allowed, so that potentials are finite.
            logits = jnp.where(allowed, -cost / (self.epsilon * cost.mean()), -jnp.inf)
            f, g = sinkhorn_potentials(logits, self.num_sweeps)
            source = jax.random.categorical(key, logits + f[:, None] + g[None, :], axis=1)
        # One NaN among the costs spoils the plan, which the sources drawn from it need not show: the weights do. Not by
        # selecting a constant NaN: XLA makes exp(where(p, nan, 0)) 1 on CPUs.
        log_weight = jnp.broadcast_to(0 * cost.mean(), (len(x0),)).astype(x0.dtype)
        return Coupled(x0[source], x1, cond, log_weight)


@dataclass(frozen=True)
@typed
class GibbsWeights:
    """Independent pairs weighted by w = exp(-cost / epsilon): weighted conditional flow matching (arXiv 2507.22270).

    Called before it has an epsilon, it raises ValueError. A cost of NaN raises ValueError outside jit, and gives a
    weight of NaN, hence a loss of NaN, inside.

    epsilon: positive; None to choose it from data, as training does by `flowgen.matching.fit_epsilon`: for the share
    `ess` of effective pairs or, if `tilt` is given, for that tilt.
    cost: "euclidean" as published, "sqeuclidean", or a function of two batches that gives one cost per pair.
    normalize: "running" divides by a running mean of w that the loss carries from step to step, "batch" by the mean
    of the batch, "none" by nothing: weights can then be 1e-13 for images, and optimizers do not see them.
    sinkhorn_sweeps: with more than 0, the weights are those of the entropic plan with the batch's own marginals,
    exp(-cost_ii/epsilon + f_i + g_i), which undoes the tilt of source and data that plain weights bring; 0 for none.
    ess: effective share of the pairs that an epsilon is chosen for; between 0 and 1.
    tilt: largest relative variance of the marginals' re-weighting that an epsilon is chosen for; None for ess.

    Example:
        x0, x1, cond, log_weight = GibbsWeights(epsilon=2.0)(key, x0, x1)
        coupling = fit_epsilon(GibbsWeights(ess=0.3, sinkhorn_sweeps=10), x0, x1)
    """

    epsilon: float | None = None
    cost: Cost = "euclidean"
    normalize: Literal["running", "batch", "none"] = "running"
    sinkhorn_sweeps: int = 0
    ess: float = 0.5
    tilt: float | None = None

    def __post_init__(self):
        if self.epsilon is not None:
            check_epsilon(self.epsilon)
        check_share(self.ess)
        if self.tilt is not None:
            check_positive("tilt", self.tilt)
        if self.normalize not in ("running", "batch", "none"):
            raise ValueError(f"normalize is {self.normalize!r}; choose 'running', 'batch' or 'none'.")
        if isinstance(self.cost, str) and self.cost not in ("euclidean", "sqeuclidean"):
            raise ValueError(f"cost is {self.cost!r}; choose 'euclidean', 'sqeuclidean' or give a function.")
        check_whole("sinkhorn_sweeps", self.sinkhorn_sweeps, least=0)

    def __call__(self, key, x0, x1, cond=None):
        check_batch(x0, x1)
        if self.epsilon is None:
            raise ValueError("epsilon is None; choose it from data by fit_epsilon(coupling, x0, x1), or give it.")
        if self.sinkhorn_sweeps:
            log_weight = corrected_log_weight(-pairwise_cost(x0, x1, self.cost) / self.epsilon, self.sinkhorn_sweeps)
        else:
            log_weight = -pair_cost(x0, x1, self.cost) / self.epsilon
        log_weight = jax.lax.stop_gradient(log_weight)
        if self.normalize == "batch":
            log_weight = log_weight - log_mean_exp(log_weight)
        return Coupled(x0, x1, cond, log_weight)


def sinkhorn_potentials(logits: Float[Array, "b b"], num_sweeps: int) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Returns f, g such that exp(logits_ij + f_i + g_j) has rows and columns of mean 1, in the log domain.

    After a sweep the columns are exact and the rows nearly. Any finite logits give finite potentials.

    Example:
        f, g = sinkhorn_potentials(-cost / epsilon, 50)
    """
    log_size = jnp.log(len(logits))

    def sweep(_, potentials):
        _, g = potentials
        f = log_size - jax.nn.logsumexp(logits + g[None, :], axis=1)
        return f, log_size - jax.nn.logsumexp(logits + f[:, None], axis=0)

    zeros = jnp.zeros(len(logits), logits.dtype)
    return jax.lax.fori_loop(0, num_sweeps, sweep, (zeros, zeros))


def corrected_log_weight(logits: Float[Array, "b b"], num_sweeps: int) -> Float[Array, " b"]:
    """Returns logits_ii + f_i + g_i: the log-weights of pairs (i, i) in the plan with the batch's own marginals.

    Example:
        log_weight = corrected_log_weight(-cost / epsilon, 10)
    """
    f, g = sinkhorn_potentials(logits, num_sweeps)
    return jnp.diagonal(logits) + f + g


def assignment(cost: Float[Array, "b b"]) -> Int[Array, " b"]:
    """Returns the column of each row in the assignment of least total cost, by scipy on the host.

    Sinkhorn's potentials are taken off the costs first: sums over rows and columns do not change the optimum, and what
    is left is solved in about half the time. Compiled for several CPU devices, or for more than 256 points on a single
    core, callbacks can wait forever for values of their own program: there optax's solver is taken, inside it and
    slower. Costs of NaN count as 0.

    Example:
        source = assignment(pairwise_cost(x1, x0, "sqeuclidean"))
    """
    cost = jnp.where(jnp.isnan(cost), 0, cost)
    scale = ASSIGNMENT_EPSILON * cost.mean()
    scale = jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1)
    f, g = sinkhorn_potentials(-cost / scale, ASSIGNMENT_SWEEPS)

    if isinstance(cost, Tracer) and _callbacks_can_wait_forever(len(cost)):
        from optax.assignment import hungarian_algorithm

        rows, columns = hungarian_algorithm(cost - scale * f[:, None] - scale * g[None, :])
        return jnp.zeros(len(cost), jnp.int32).at[rows].set(columns.astype(jnp.int32))

    def solve(matrix, rows, columns):
        matrix, rows, columns = (np.asarray(x, np.float64) for x in (matrix, rows, columns))
        return linear_sum_assignment(matrix - rows[:, None] - columns[None, :])[1].astype(np.int32)

    shape = jax.ShapeDtypeStruct((len(cost),), jnp.int32)
    return jax.pure_callback(solve, shape, cost, scale * f, scale * g, vmap_method="sequential")


def pair_cost(x0: Float[Array, "b *event"], x1: Float[Array, "b *event"], cost: Cost) -> Float[Array, " b"]:
    """Returns the cost of each pair, float32 at least.

    Raises ValueError where a user's function gives another shape and, outside jit, where a cost is NaN.

    Example:
        c = pair_cost(x0, x1, "euclidean")
    """
    if callable(cost):
        value = cost(x0, x1)
        if value.shape != x0.shape[:1]:
            raise ValueError(f"cost gave shape {value.shape}; it must give one number per pair, {x0.shape[:1]}.")
        return check_cost(value)
    square = jnp.square(_flat(x0) - _flat(x1)).sum(axis=1)
    return check_cost(square if cost == "sqeuclidean" else jnp.sqrt(square))


def pairwise_cost(x0: Float[Array, "b *event"], x1: Float[Array, "m *event"], cost: Cost) -> Float[Array, "b m"]:
    """Returns the cost of every x0 with every x1.

    Raises ValueError where their events differ in shape and, outside jit, where a cost is NaN.

    Example:
        c = pairwise_cost(x0, x1, "sqeuclidean")
    """
    check_floating("x0", x0)
    check_floating("x1", x1)
    if x0.shape[1:] != x1.shape[1:]:
        raise ValueError(f"x0 has events of shape {x0.shape[1:]} and x1 {x1.shape[1:]}; they must have the same.")
    if callable(cost):
        return check_cost(jax.vmap(lambda x: pair_cost(jnp.broadcast_to(x[None], x1.shape), x1, cost))(x0))
    a, b = _flat(x0), _flat(x1)
    # Shifted to their common mean, so that little cancels in the expanded square.
    centre = b.mean(axis=0)
    a, b = a - centre[None], b - centre[None]
    cross = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    square = jnp.maximum(jnp.square(a).sum(1)[:, None] + jnp.square(b).sum(1)[None, :] - 2 * cross, 0)
    return check_cost(square if cost == "sqeuclidean" else jnp.sqrt(square))


def log_mean_exp(x: Float[Array, " b"]) -> Float[Array, ""]:
    """Returns log of the mean of exp(x).

    Example:
        centred = log_weight - log_mean_exp(log_weight)
    """
    return jax.nn.logsumexp(x) - jnp.log(len(x))


def to_sphere(x: Float[Array, "b *event"]) -> Float[Array, "b *event"]:
    """Returns x with every sample scaled to the norm √d that normal noise has; zeros stay zeros.

    On a sphere no datum is nearer than another to a round source, so that plain Gibbs weights do not tilt the data.

    Example:
        x1 = to_sphere(x1)
    """
    flat = _flat(x)
    # First to a largest coordinate of 1, so that no square underflows.
    largest = jnp.abs(flat).max(axis=1, keepdims=True)
    flat = flat / jnp.where(largest > 0, largest, 1)
    norm = jnp.linalg.norm(flat, axis=1, keepdims=True)
    scaled = flat * jnp.sqrt(flat.shape[1]) / jnp.maximum(norm, 1)
    return scaled.reshape(x.shape).astype(x.dtype)


def check_cost(cost: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the costs; ValueError where one of them is NaN, if they have values, which is outside jit.

    Example:
        cost = check_cost(cost)
    """
    if not isinstance(cost, Tracer):
        bad = int(np.isnan(np.asarray(cost)).sum())
        if bad:
            raise ValueError(f"{bad} of {cost.size} costs are NaN; look at the cost function and for NaN in the batch.")
    return cost


def check_epsilon(epsilon: float) -> None:
    """Raises ValueError unless costs can be divided by epsilon in float32.

    Example:
        check_epsilon(2.0)
    """
    check_positive("epsilon", epsilon)
    if epsilon < SMALLEST_EPSILON:
        raise ValueError(f"epsilon is {epsilon}; below {SMALLEST_EPSILON} float32 has no cost/epsilon.")


def _callbacks_can_wait_forever(num: int) -> bool:
    """Whether all threads of a program may be waiting for the `num` x `num` values that a callback asks them for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return jax.default_backend() == "cpu" and (
        jax.local_device_count() > 1 or (cores == 1 and num > MOST_POINTS_ON_ONE_CORE)
    )


def _flat(x: Array) -> Array:
    return x.reshape(len(x), -1).astype(jnp.promote_types(x.dtype, jnp.float32))
