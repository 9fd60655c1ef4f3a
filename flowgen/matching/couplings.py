"""Couplings, which pair noise with data and give each pair a log-weight.

The attribute `sees` of a coupling defines the rows on which a pair and its weight depend:

    "row"      the row of the pair alone
    "device"   the rows of one device, so the number of devices changes what the network learns
    "global"   the rows of all devices, which `flowgen.matching.loss.couple` gathers; this is the default

With pair weights w, the loss of independent pairs is E[w |v - u|²]. Up to a factor, this is the loss of the coupling q
∝ w · p(x0) p(x1) (W-CFM, arXiv 2507.22270). `MinibatchOT` instead reorders the noise x0 by a transport plan of the
batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Key

from flowgen.arrays import check_floating, shown
from flowgen.backend import keep_axes, nan_if, of_rows, take_rows
from flowgen.matching.checks import check_batch
from flowgen.matching.plans import assignment, corrected_log_weight, entropic_plan, relative_cost
from flowgen.settings import config
from flowgen.settings.ranges import OpenFraction, Own, Positive, Within
from flowgen.weights import log_mean_exp

SMALLEST_EPSILON = 1e-20
Epsilon = Annotated[float, Within(SMALLEST_EPSILON)]
MAX_SWEEPS = 1 << 16  # largest number of Sinkhorn sweeps that a coupling accepts

# The condition of a batch, with one row per pair; for example labels of shape `b`.
Cond = Any
Cost = Literal["euclidean", "sqeuclidean"] | Callable[[Array, Array], Array]


class Coupled(NamedTuple):
    """The result of a coupling: pairs (x0[i], x1[i]) of noise and data, their conditions and log-weights."""

    x0: Float[Array, "b *event"]
    x1: Float[Array, "b *event"]
    cond: Cond
    log_weight: Float[Array, " b"]


@runtime_checkable
class Coupling(Protocol):
    """The interface of couplings, which pair noise with data.

    A coupling may have an attribute `sees`, which names the rows of the batch on which a pair and its weight depend:
    "row", "device" or "global" (the default).
    """

    def __call__(
        self, key: Key[Array, ""], x0: Float[Array, "b *event"], x1: Float[Array, "b *event"], cond: Cond = None
    ) -> Coupled:
        """Returns pairs and their log-weights."""
        ...


@config
class Independent:
    """Keeps the pairs of noise and data as they were drawn, each with weight 1.

    Example:
        x0, x1, cond, log_weight = Independent()(key, x0, x1)
    """

    sees: ClassVar[str] = "row"

    def __call__(
        self, key: Key[Array, ""], x0: Float[Array, "b *event"], x1: Float[Array, "b *event"], cond: Cond = None
    ) -> Coupled:
        check_batch(x0, x1)
        return Coupled(x0, x1, cond, jnp.zeros(len(x0), x0.dtype))


@config
class MinibatchOT:
    """Pairs noise and data by optimal transport within the batch, at squared Euclidean cost (OT-CFM, arXiv 2302.00482).

    method: "exact" permutes the noise by the optimal assignment, which scipy computes on the host. "sinkhorn" draws an
    x0 for each x1 from an entropic plan, which the device computes; an x0 may then be used several times or never.
    epsilon: for "sinkhorn", strength of the entropic regularisation of the plan, in units of the mean cost; positive.
    tolerance: for "sinkhorn", largest allowed relative error of the marginal of x0 in the plan, averaged over the
    samples x0; positive.
    num_sweeps: for "sinkhorn", maximum number of Sinkhorn sweeps with `epsilon`; before these, up to 50 sweeps use each
    of several larger epsilons; at least 1. If the error of the plan then exceeds `tolerance`, the coupling raises
    ValueError; inside jit, as in training, the weights and the loss become NaN instead.
    class_aware: whether noise is exchanged only between pairs of the same class. If false, the noise of a class has
    different distributions in training and in sampling (C2OT, ICCV 2025). If true, the condition of each sample must be
    an integer label.
    scope: "global" computes one plan for the pairs of all devices, and each device computes all of it; "device"
    computes a separate plan for the pairs of each device.

    Example:
        x0, x1, cond, log_weight = MinibatchOT(method="exact")(key, x0, x1)
    """

    method: Literal["exact", "sinkhorn"] = "exact"
    epsilon: Epsilon = 0.05
    num_sweeps: Annotated[int, Within(1, MAX_SWEEPS)] = 5000
    class_aware: bool = False
    tolerance: Positive = 1e-2
    scope: Literal["global", "device"] = "global"

    @property
    def sees(self) -> str:
        """Equals `scope`: the rows of all devices ("global") or of each device ("device") share a plan."""
        return self.scope

    def __call__(
        self, key: Key[Array, ""], x0: Float[Array, "b *event"], x1: Float[Array, "b *event"], cond: Cond = None
    ) -> Coupled:
        check_batch(x0, x1)
        cost = cost_matrix(x1, x0, "sqeuclidean")
        allowed = self._allowed(cost, cond)
        # A NaN cost makes the plan meaningless, but the permuted noise may look valid. The weights become NaN instead.
        spoilt = 0 * relative_cost(cost).mean()
        if self.method == "exact":
            # A forbidden pair costs more than any complete assignment within the classes.
            chosen = assignment(jnp.where(allowed, cost, (cost.max() + 1) * len(cost)))
        else:
            plan = entropic_plan(cost, allowed, self.epsilon, tolerance=self.tolerance, max_sweeps=self.num_sweeps)
            self._check_error(plan.error)
            draw = lambda key, logits: jax.random.categorical(key, logits, axis=1)  # noqa: E731
            chosen = keep_axes(draw, key, plan.log_plan, named=[(plan.log_plan, "b m")], out="b")
            spoilt = spoilt + nan_if(plan.error > self.tolerance, spoilt.dtype)
        log_weight = jnp.broadcast_to(spoilt, (len(x0),)).astype(x0.dtype)
        return Coupled(take_rows(x0, chosen), x1, cond, log_weight)

    def _allowed(self, cost: Float[Array, "b b"], cond: Cond) -> Bool[Array, "b b"]:
        """Returns the mask of pairs (x1, x0) that the plan may use."""
        if not self.class_aware:
            return jnp.ones(cost.shape, bool)
        if cond is None:
            raise ValueError(
                "class_aware transport needs labels, but cond is None; give labels, or set class_aware to False."
            )
        if getattr(cond, "shape", None) != (len(cost),) or not jnp.issubdtype(cond.dtype, jnp.integer):
            raise ValueError(
                f"cond is {shown(cond)}; class_aware transport needs one label per sample, as an integer array "
                f"of shape {(len(cost),)}."
            )
        return keep_axes(lambda y: y[:, None] == y[None, :], cond, named=[(cost, "b m")], out="b m")

    def _check_error(self, error: Float[Array, ""]) -> None:
        """Raises ValueError outside jit if the error of a plan exceeds the tolerance."""
        if not isinstance(error, Tracer) and not float(error) <= self.tolerance:
            raise ValueError(
                f"num_sweeps is {self.num_sweeps}, but the plan with epsilon {self.epsilon} is then still off by "
                f"{float(error):.2g}, above tolerance {self.tolerance}; increase num_sweeps or epsilon, or use "
                "method='exact'."
            )


@config
class GibbsWeights:
    """Gives each random pair of noise and data the weight w = exp(-cost / epsilon) (W-CFM, arXiv 2507.22270).

    A call raises ValueError if epsilon is None or, outside jit, if a cost is NaN. Inside jit, a NaN cost makes the
    weight and the loss NaN.

    epsilon: divisor of the cost; positive. None to choose it from data before the first training step, with the target
    `tilt` if given, and `ess` otherwise. Outside training, call `flowgen.matching.fit_epsilon`.
    cost: cost of a pair: "euclidean" for the distance (as published), "sqeuclidean" for its square, or a function of
    two batches that returns one cost per pair.
    normalize: "running" divides w by its running mean, which the loss updates in each step; "batch" divides w by its
    mean over the batch; "none" leaves w unchanged. For images, unchanged weights often make the loss too small.
    sinkhorn_sweeps: number of Sinkhorn sweeps; 0 for none. Without sweeps, the weights change (tilt) the distributions
    of noise and of data; sweeps reduce the tilt. With sweeps, the log-weight of pair i is -cost_ii/epsilon + f_i + g_i,
    where f and g are the Sinkhorn potentials of the batch.
    ess: target for the choice of epsilon: the effective sample size as a fraction of the number of pairs, between 0 and
    1. Unused if epsilon or tilt is given.
    tilt: target for the choice of epsilon, used instead of `ess`: the largest tilt to allow, measured as the relative
    variance of the factors by which w re-weights noise and data; None for no such target.
    scope: "global" computes Sinkhorn sweeps, and with normalize "batch" the mean of w, over the pairs of all devices
    together; "device" computes both over the pairs of each device separately.

    Example:
        x0, x1, cond, log_weight = GibbsWeights(epsilon=2.0)(key, x0, x1)
        coupling = fit_epsilon(GibbsWeights(ess=0.3, sinkhorn_sweeps=10), x0, x1)
    """

    epsilon: Epsilon | None = None
    cost: Cost = "euclidean"
    normalize: Literal["running", "batch", "none"] = "running"
    sinkhorn_sweeps: Annotated[int, Within(0, MAX_SWEEPS)] = 0
    ess: OpenFraction = 0.5
    tilt: Positive | None = None
    scope: Literal["global", "device"] = "global"

    @property
    def sees(self) -> str:
        """The rows on which a weight depends: `scope` with Sinkhorn sweeps or normalize="batch", otherwise "row"."""
        return self.scope if self.sinkhorn_sweeps or self.normalize == "batch" else "row"

    def __call__(
        self, key: Key[Array, ""], x0: Float[Array, "b *event"], x1: Float[Array, "b *event"], cond: Cond = None
    ) -> Coupled:
        check_batch(x0, x1)
        if self.epsilon is None:
            raise ValueError(
                "epsilon is None; set it, or choose it from data with coupling = fit_epsilon(coupling, x0, x1)."
            )
        if self.sinkhorn_sweeps:
            log_weight = corrected_log_weight(-cost_matrix(x0, x1, self.cost) / self.epsilon, self.sinkhorn_sweeps)
        else:
            log_weight = -paired_cost(x0, x1, self.cost) / self.epsilon
        log_weight = jax.lax.stop_gradient(log_weight)
        if self.normalize == "batch":
            log_weight = log_weight - log_mean_exp(log_weight)
        return Coupled(x0, x1, cond, log_weight)


@config
class FromFlow:
    """Pairs each x1 with the noise to which a trained flow maps it (Normalized Flow Matching, arXiv 2603.09014).

    An experiment loads the flow before the first training step, and replaces this config by the coupling
    `flowgen.matching.FlowDistilled`. Outside experiments, use `FlowDistilled` itself: a call of this config raises
    ValueError.

    path: run directory of a flow, folder of an exported flow, or name of a flow that ships with flowgen.

    Example:
        matching = MatchingConfig(coupling=FromFlow(path="digits"))
    """

    path: str
    sees: ClassVar[str] = "row"

    def __call__(
        self, key: Key[Array, ""], x0: Float[Array, "b *event"], x1: Float[Array, "b *event"], cond: Cond = None
    ) -> Coupled:
        raise ValueError(
            f"path is {self.path!r}, and this config contains no flow; use FlowDistilled(flow, variables)."
        )


# The couplings that a config may contain; add new ones here.
OwnCoupling = Annotated[Coupling, Own("a function (key, x0, x1, cond) -> Coupled")]
AnyCoupling = Independent | GibbsWeights | MinibatchOT | FromFlow | OwnCoupling


def paired_cost(x0: Float[Array, "b *event"], x1: Float[Array, "b *event"], cost: Cost) -> Float[Array, " b"]:
    """Returns the cost of each pair, in at least float32 unless the cost function is custom.

    Raises ValueError if a custom cost function returns the wrong shape or, outside jit, if a cost is NaN.
    """
    if callable(cost):
        value = cost(x0, x1)
        if value.shape != x0.shape[:1]:
            raise ValueError(
                f"cost returned shape {value.shape}; it must return shape {x0.shape[:1]}, one number per pair."
            )
        return check_cost(value)

    def distance(x0, x1):
        square = jnp.square(_flat(x0) - _flat(x1)).sum(axis=1)
        return square if cost == "sqeuclidean" else square_root(square)

    return check_cost(keep_axes(distance, x0, x1, named=[(x0, of_rows(x0)), (x1, of_rows(x1))], out="b"))


def cost_matrix(x0: Float[Array, "b *event"], x1: Float[Array, "m *event"], cost: Cost) -> Float[Array, "b m"]:
    """Returns the cost of pairing every x0 with every x1.

    Raises ValueError if the samples of x0 and x1 differ in shape or, outside jit, if a cost is NaN.
    """
    check_floating("x0", x0)
    check_floating("x1", x1)
    if x0.shape[1:] != x1.shape[1:]:
        raise ValueError(
            f"x0 has samples of shape {x0.shape[1:]}, but x1 has samples of shape {x1.shape[1:]}; they must match."
        )
    named = [(x0, of_rows(x0)), (x1, of_rows(x1, "m"))]
    return check_cost(keep_axes(partial(_cost_matrix, cost=cost), x0, x1, named=named, out="b m"))


def _cost_matrix(x0: Float[Array, "b *event"], x1: Float[Array, "m *event"], cost: Cost) -> Float[Array, "b m"]:
    if callable(cost):
        return jax.vmap(lambda x: paired_cost(jnp.broadcast_to(x[None], x1.shape), x1, cost))(x0)
    a, b = _flat(x0), _flat(x1)
    # Centre both at the mean of x1, which reduces cancellation in the expanded square.
    centre = b.mean(axis=0)
    a, b = a - centre[None], b - centre[None]
    cross = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    square = jnp.maximum(jnp.square(a).sum(1)[:, None] + jnp.square(b).sum(1)[None, :] - 2 * cross, 0)
    return square if cost == "sqeuclidean" else square_root(square)


def square_root(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns √x, whose gradient at 0 is that of x instead of infinity.

    The distance between equal points therefore has the gradient 0, not NaN.

    Example:
        distance = square_root(jnp.square(x - y).sum())
    """
    zero = x == 0
    return jnp.where(zero, x, jnp.sqrt(jnp.where(zero, 1, x)))


def to_sphere(x: Float[Array, "b *event"]) -> Float[Array, "b *event"]:
    """Returns x with every sample scaled to norm √d, where d is the number of dimensions; a sample of zeros stays 0.

    √d is the typical norm of standard normal noise. The distance from such noise to a point on a sphere around 0 has
    the same distribution for all points. Therefore, Gibbs weights without Sinkhorn sweeps do not change the
    distribution of the scaled data. The gradient with respect to a sample of zeros is 0.

    Example:
        x1 = to_sphere(x1)
    """
    check_floating("x", x)
    flat = _flat(x)
    # Scale the largest coordinate to 1 first, so that no square underflows. The result does not depend on this factor.
    largest = jax.lax.stop_gradient(jnp.abs(flat).max(axis=1, keepdims=True))
    zero = largest == 0
    flat = flat / jnp.where(zero, 1, largest)
    norm = jnp.sqrt(jnp.where(zero, 1, jnp.square(flat).sum(axis=1, keepdims=True)))
    scaled = jnp.where(zero, 0, flat * jnp.sqrt(flat.shape[1]) / norm)
    return scaled.reshape(x.shape).astype(x.dtype)


def check_cost(cost: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the costs unchanged. Outside jit, raises ValueError if a cost is NaN."""
    if not isinstance(cost, Tracer):
        bad = int(np.isnan(np.asarray(cost)).sum())
        if bad:
            raise ValueError(
                f"{bad} of {cost.size} costs are NaN; check the cost function, and look for NaN in the batch."
            )
    return cost


def _flat(x: Float[Array, "b *event"]) -> Float[Array, "b d"]:
    return x.reshape(len(x), math.prod(x.shape[1:])).astype(jnp.promote_types(x.dtype, jnp.float32))
