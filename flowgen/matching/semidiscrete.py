"""Semidiscrete optimal transport, which pairs each x0 with a sample from the whole dataset instead of from a batch.

The plan partitions the space of noise into cells, one for each data point y_j. It pairs x0 with the y_j for which g_j -
|x0 - y_j|² is largest. The potentials g, one number per data point, make all cells equally probable. They are learned
once, before training (Mousavi-Hosseini et al., arXiv 2509.25519).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from flowgen.backend import take_rows
from flowgen.matching.checks import check_positive
from flowgen.matching.couplings import Cond, Coupled, cost_matrix
from flowgen.packages import need

_OTT = (
    "optax",
    "ott.geometry.semidiscrete_pointcloud",
    "ott.problems.linear.semidiscrete_linear_problem",
    "ott.solvers.linear.semidiscrete",
)
# Adam's learning rate before cosine decay, in units of the standard deviation of the costs from one x0 to all data.
LEARNING_RATE = 0.05
# Weight of the newest potentials in their running mean. The fit returns this mean.
AVERAGING = 0.02


@dataclass(frozen=True, eq=False)
class SemidiscreteOT:
    """Pairs each x0 with the data point whose cell contains it; all weights are 1.

    The data points and their conditions replace x1 and cond of the batch. In training, a conditional model sees for
    each class only the noise in the cells of the data points of this class, but in sampling, it starts from any noise.
    This coupling is therefore best suited to unconditional models. A call stores a matrix of shape `b n`.

    y: the dataset.
    potentials: the numbers g_j that define the cells, from `fit_semidiscrete` or any other solver for the squared
    Euclidean cost.
    labels: labels or other conditions of the data, as any pytree of arrays with one row per data point.

    Raises ValueError if shapes do not match, or if the batch has a condition but the data have no labels.

    Example:
        x0, x1, cond, log_weight = SemidiscreteOT(y, potentials)(key, x0, x1)
    """

    y: Float[Array, "n *event"]
    potentials: Float[Array, " n"]
    labels: Cond = None
    sees: ClassVar[str] = "row"

    def __post_init__(self):
        num = len(self.y)
        if self.potentials.shape != (num,):
            raise ValueError(
                f"potentials have shape {self.potentials.shape}; give shape {(num,)}, one number per data point."
            )
        for array in jax.tree.leaves(self.labels):
            if array.shape[:1] != (num,):
                raise ValueError(
                    f"labels contain an array of shape {array.shape}; give {num} rows, one per data point."
                )

    def __call__(
        self, key: Key[Array, ""], x0: Float[Array, "b *event"], x1: Float[Array, "b *event"], cond: Cond = None
    ) -> Coupled:
        if cond is not None and self.labels is None:
            raise ValueError("the batch has a condition, but SemidiscreteOT has no labels; give both, or neither.")
        partner = self.partner(x0)
        cond = jax.tree.map(lambda rows: take_rows(rows, partner), self.labels)
        return Coupled(x0, take_rows(self.y, partner), cond, jnp.zeros(len(x0), x0.dtype))

    def partner(self, x0: Float[Array, "b *event"]) -> Int[Array, " b"]:
        """Returns, for each x0, the index of the data point whose cell contains it."""
        return jnp.argmax(self.potentials[None] - cost_matrix(x0, self.y, "sqeuclidean"), axis=1)


class SemidiscreteFit(NamedTuple):
    """A fitted coupling and its error, the χ² divergence between the probabilities of the cells and equal
    probabilities.

    The error is an unbiased estimate from samples of noise. For exact potentials, it is close to 0 and may be negative.
    """

    coupling: SemidiscreteOT
    error: float


def fit_semidiscrete(
    key: Key[Array, ""],
    y: Float[Array, "n *event"],
    labels: Cond = None,
    *,
    noise: Callable[[Key[Array, ""], tuple[int, ...], Any], Array] = jax.random.normal,
    num_steps: int = 2000,
    batch_size: int = 1024,
) -> SemidiscreteFit:
    """Returns the semidiscrete coupling of a noise distribution with the data y, and its error.

    OTT-JAX optimises the dual transport problem with Adam. Larger datasets need more steps and larger batches:
    num_steps · batch_size, the number of noise samples drawn, should be dozens of times n, the number of data points.

    noise: a function (key, shape, dtype) -> x0.
    num_steps, batch_size: number of steps of Adam, and number of noise samples drawn in each step.

    Raises ModuleNotFoundError if OTT-JAX is not installed, and ValueError if settings are invalid.

    Example:
        coupling, error = fit_semidiscrete(jax.random.key(0), images, labels)
        loss_fn = flow_matching_loss(coupling=coupling)
    """
    check_positive("num_steps", num_steps)
    check_positive("batch_size", batch_size)
    optax, geometry, problems, solvers = (need(name, "Semidiscrete transport", "ott-jax") for name in _OTT)
    flat = y.reshape(len(y), -1)
    scale_key, fit_key = jax.random.split(key)
    draw = lambda key, shape, dtype: noise(key, (shape[0], *y.shape[1:]), dtype).reshape(shape)  # noqa: E731
    costs = cost_matrix(draw(scale_key, (256, flat.shape[1]), flat.dtype), flat, "sqeuclidean")
    scale = float(costs.std(axis=1).mean())
    solver = solvers.SemidiscreteSolver(
        num_iterations=num_steps,
        batch_size=batch_size,
        optimizer=optax.adam(optax.cosine_decay_schedule(LEARNING_RATE * scale, num_steps)),
        error_eval_every=num_steps,
        # OTT-JAX 0.6 multiplies the *new* potentials by this number.
        potential_ema=AVERAGING,
    )
    problem = problems.SemidiscreteLinearProblem(geometry.SemidiscretePointCloud(draw, flat, epsilon=0.0))
    with jax.numpy_rank_promotion("allow"):  # OTT-JAX broadcasts over missing axes
        fitted = jax.jit(solver)(fit_key, problem)
    return SemidiscreteFit(SemidiscreteOT(y, fitted.g, labels), float(fitted.errors[-1]))
