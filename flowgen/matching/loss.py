"""Flow-matching losses: weighted regression of a velocity network onto a path's target velocity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flowgen.arrays import check_floating, check_key, shown
from flowgen.conditioning import drop_condition
from flowgen.matching.checks import check_output, check_pair, check_velocity
from flowgen.matching.conditions import as_condition
from flowgen.matching.conversions import Prediction, check_prediction
from flowgen.matching.couplings import Coupled, Coupling, GibbsWeights, Independent
from flowgen.matching.paths import CondOT, Path, PathSample, over_event
from flowgen.matching.solvers import Velocity
from flowgen.matching.times import Uniform
from flowgen.rows import ROWS, Rows, batch_rows
from flowgen.weights import effective_sample_size, log_mean_exp

# Update rate of the running log-mean of the Gibbs weights.
RUNNING_RATE = 0.01
BATCH_NAMES = ("x1", "x0", "cond", ROWS)

Loss = Callable[..., tuple[Any, ...]]


class Pairs(NamedTuple):
    """The pairs on which a loss is computed, after coupling, weighting and dropout of conditions.

    ess: effective sample size of the weights, as a share of the batch.
    log_mean: running estimate of the logarithm of the mean weight (see `draw_pairs`), to pass to the next step.

    ess and log_mean refer to the whole batch, even if it is split over devices.
    """

    x0: Float[Array, "b *event"]
    x1: Float[Array, "b *event"]
    cond: Any
    weight: Float[Array, " b"]
    ess: Float[Array, ""]
    log_mean: Float[Array, ""]


def flow_matching_loss(
    *,
    path: Path | None = None,
    coupling: Coupling | None = None,
    time: Callable[[Array, int], Array] | None = None,
    prediction: Prediction = "velocity",
    label_dropout: float = 0.0,
) -> Loss:
    """Returns the flow-matching loss, loss_fn(velocity, batch, key, log_mean=None) -> (loss, metrics, log_mean).

    The loss is E[w |v(t, x_t, cond) - u_t|²], with the path's target velocity u_t and the pair weights w of the
    coupling. velocity(t, x, cond) is any callable that predicts the quantity named by `prediction`. Predictions are not
    converted to velocities: a predicted x1 is compared with the data x1, predicted noise with x0, and beta times a
    predicted score with -x0, where beta is the coefficient of x0 in x_t. With independent pairs and normal noise, the
    learned score is ∇ log p_t. The squared error is averaged over dimensions, in at least float32.

    path, coupling, time: None means `CondOT()`, `Independent()` and `Uniform()`, respectively.
    batch: argument of loss_fn; a dict of "x1", the data, and optionally "x0", the noise (standard normal if missing),
    "cond", the condition or None, and "rows", a `flowgen.rows.Rows`. A training step adds "rows", so that the random
    numbers do not depend on the number of devices. "cond" may be any pytree of arrays that the velocity accepts; each
    array must have one row per sample.
    label_dropout: probability with which each sample becomes unconditional, independently of the others: its label is
    replaced by -1, or its context is masked. If label_dropout is positive, a condition must consist of labels, vectors,
    tokens, texts or `ContextTokens`.
    log_mean: argument of loss_fn; running estimate of the logarithm of the mean pair weight, -inf or None before the
    first step. loss_fn returns the updated value. Only the coupling `GibbsWeights` with normalize="running" uses it.

    Raises ValueError if settings or shapes are invalid.

    Example:
        loss_fn = flow_matching_loss(path=CondOT(), coupling=GibbsWeights(epsilon=2.0), time=Uniform())
    """
    path = CondOT() if path is None else path
    time = Uniform() if time is None else time
    check_parts(path, coupling, time)
    check_prediction(prediction, path)
    check_dropout(label_dropout)

    def loss_fn(
        velocity: Velocity, batch: dict[str, Any], key: Key[Array, ""], log_mean: Float[Array, ""] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Array], Float[Array, ""]]:
        check_step(velocity, batch, key)
        pair_rows, time_rows, path_rows = rows_of(batch, key).split(3)
        pairs = draw_pairs(pair_rows, batch, coupling, log_mean, label_dropout=label_dropout)
        t = time_rows.draw_whole(time)
        point = draw_point(path_rows, path, t, pairs)
        value = check_output(velocity(t, point.x_t, pairs.cond), point.x_t)
        error = mean_square(residual(path, t, pairs, point, value, prediction))
        loss = (pairs.weight * error).mean()
        return loss, {"loss": loss, "unweighted_loss": error.mean(), "ess": pairs.ess}, pairs.log_mean

    return loss_fn


def residual(
    path: Path,
    t: Float[Array, " b"],
    pairs: Pairs,
    point: PathSample,
    value: Float[Array, "b *event"],
    kind: Prediction,
) -> Float[Array, "b *event"]:
    """Returns the predicted quantity minus its target; for a score, this difference is multiplied by beta.

    Example:
        loss = mean_square(residual(path, t, pairs, point, network(t, point.x_t), "x1")).mean()
    """
    if kind == "x1":
        return value - pairs.x1
    if kind == "noise":
        return value - pairs.x0
    if kind == "score":
        return over_event(path.schedule(t).beta, value) * value + pairs.x0
    return value - point.u_t


def rows_of(batch: dict[str, Any], key: Key[Array, ""]) -> Rows:
    """Returns the `Rows` with which a loss draws random numbers: those in the batch, or new ones from `key`.

    Raises ValueError if the batch contains unknown names or lacks "x1".

    Example:
        pair_rows, time_rows = rows_of(batch, key).split(2)
    """
    check_names(batch)
    return batch_rows(batch, key, len(batch["x1"]))


def draw_pairs(
    rows: Rows,
    batch: dict[str, Any],
    coupling: Coupling | None = None,
    log_mean: Float[Array, ""] | None = None,
    *,
    label_dropout: float = 0.0,
) -> Pairs:
    """Returns the pairs of noise and data of a batch, with their weights.

    The function draws noise if the batch contains none, applies the coupling (`Independent()` if None), and makes each
    sample unconditional with probability label_dropout. The weights are w = exp(log_weight), with the log_weight that
    the coupling returns. log_mean is updated by log_mean ← log_mean + 0.01 (log mean w - log_mean); if log_mean is -inf
    or None, it becomes log mean w. If the coupling is `GibbsWeights` with normalize="running", the weights are divided
    by exp of the updated log_mean. The mean of w is over all devices that share the batch. No gradient flows through
    the weights.

    rows: source of random numbers, from `flowgen.rows.batch_rows`.
    batch, label_dropout: as for `flow_matching_loss`.

    Example:
        pairs = draw_pairs(rows_of(batch, key), batch, GibbsWeights(epsilon=5.0), label_dropout=0.1)
    """
    noise_rows, pair_rows, drop_rows = rows.split(3)
    coupling = Independent() if coupling is None else coupling
    check_names(batch)
    x1, x0 = batch["x1"], batch.get("x0")
    check_data(x1 if x0 is None else x0, x1, batch.get("cond"), label_dropout)
    x0 = noise_rows.draw(lambda key, x: jax.random.normal(key, x.shape, x.dtype), x1) if x0 is None else x0
    x0, x1, cond, log_weight = couple(pair_rows, coupling, x0, x1, batch.get("cond"))
    log_weight = jax.lax.stop_gradient(log_weight)
    of_all = rows.gather(log_weight)
    log_mean = followed_log_mean(log_mean, log_mean_exp(of_all))
    running = isinstance(coupling, GibbsWeights) and coupling.normalize == "running"
    weight = jnp.exp(log_weight - log_mean if running else log_weight)
    if cond is not None and label_dropout:
        cond = drop_rows.draw(partial(drop_condition, null=None, rate=label_dropout), as_condition(cond))
    return Pairs(x0, x1, cond, weight, effective_sample_size(of_all), log_mean)


def couple(
    rows: Rows, coupling: Coupling, x0: Float[Array, "b *event"], x1: Float[Array, "b *event"], cond: Any
) -> Coupled:
    """Returns the coupled pairs for these rows; first gathers the rows of all devices if the coupling needs them.

    Whether rows are gathered depends on the coupling's attribute `sees`; see `flowgen.matching.couplings`.

    Example:
        x0, x1, cond, log_weight = couple(rows, MinibatchOT(), x0, x1, labels)
    """
    sees = getattr(coupling, "sees", "global")
    if sees == "global":
        return rows.own(_coupled(coupling(rows.part_key(), *rows.gather((x0, x1, cond)))))
    key = rows.device_key() if sees == "device" else rows.part_key()
    return _coupled(coupling(key, x0, x1, cond))


def _coupled(result: Any) -> Coupled:
    """Returns a coupling's result as a `Coupled`; raises ValueError if a custom coupling returned anything else."""
    if not isinstance(result, tuple) or len(result) != len(Coupled._fields):
        raise ValueError(f"coupling returned {shown(result)}; it must return a Coupled (x0, x1, cond, log_weight).")
    return Coupled(*result)


def followed_log_mean(log_mean: Float[Array, ""] | None, found: Float[Array, ""]) -> Float[Array, ""]:
    """Returns the running log-mean after a batch whose log-mean is `found`; the first batch sets the initial value.

    Example:
        log_mean = followed_log_mean(log_mean, log_mean_exp(log_weight))
    """
    start = found if log_mean is None else jnp.where(jnp.isneginf(log_mean), found, log_mean)
    return start + RUNNING_RATE * (found - start)


def combined_log_mean(before: Float[Array, ""], followed: Float[Array, " parts"]) -> Float[Array, ""]:
    """Returns the running log-mean after a batch, given the running log-mean after each of its micro-batches.

    Example:
        log_mean = combined_log_mean(log_mean, jnp.stack([followed_log_mean(log_mean, found) for found in parts]))
    """
    started = ~jnp.isneginf(before)
    start = jnp.where(started, before, 0)
    found = jnp.where(started, start + (followed - start) / RUNNING_RATE, followed)
    return followed_log_mean(before, log_mean_exp(found))


def draw_point(rows: Rows, path: Path, t: Float[Array, " b"], pairs: Pairs) -> PathSample:
    """Returns x_t and u_t of each pair. If the path adds noise to x_t, each row draws it with its own key.

    Example:
        point = draw_point(path_rows, CondOT(), t, pairs)
    """
    check_pair(t, pairs.x0, pairs.x1)
    return rows.draw(path.sample, t, pairs.x0, pairs.x1)


def mean_square(error: Float[Array, "b *event"]) -> Float[Array, " b"]:
    """Returns each sample's squared error, averaged over dimensions, in at least float32.

    Example:
        loss = mean_square(predicted - target).mean()
    """
    error = error.astype(jnp.promote_types(error.dtype, jnp.float32))
    return jnp.square(error).reshape(len(error), -1).mean(axis=1)


def check_data(x0: Array, x1: Array, cond: Any, label_dropout: float) -> None:
    """Raises ValueError unless noise and data are floating-point arrays with at least one sample, and conditions have
    one row per sample.

    With label dropout, conditions must be labels or contexts that `as_condition` accepts.

    Example:
        check_data(x0, x1, labels, 0.1)
    """
    check_floating("x1", x1)
    check_floating("x0", x0)
    if len(x1) == 0:
        raise ValueError("the batch is empty; give at least one sample.")
    for part in jax.tree.leaves(cond):
        if not hasattr(part, "shape"):
            raise ValueError(f"cond contains {part!r}; give arrays with one row per sample.")
        if part.shape[:1] != x1.shape[:1]:
            raise ValueError(f"cond has shape {part.shape} for {len(x1)} samples; give one row per sample.")
    if label_dropout:
        try:
            as_condition(cond)
        except ValueError as error:
            raise ValueError(f"label_dropout is {label_dropout}, but {error} Or set label_dropout to 0.") from None


def check_parts(path: object, coupling: object, time: object) -> None:
    """Raises ValueError if path, coupling or time is a name or a class instead of an object that a loss can use.

    Example:
        check_parts(CondOT(), MinibatchOT(), Uniform())
    """
    if isinstance(path, type) or not (hasattr(path, "schedule") and hasattr(path, "sample")):
        raise ValueError(f"path is {shown(path)}; give a path, such as CondOT().")
    if coupling is not None and (isinstance(coupling, type) or not callable(coupling)):
        raise ValueError(f"coupling is {shown(coupling)}; give a coupling, such as MinibatchOT().")
    if isinstance(time, type) or not callable(time):
        raise ValueError(f"time is {shown(time)}; give a function (key, batch) -> t, such as Uniform().")


def check_step(velocity: object, batch: object, key: object) -> None:
    """Raises ValueError unless a loss received a velocity, a dict and a key, in this order.

    Example:
        check_step(velocity, {"x1": images}, key)
    """
    check_velocity(velocity)
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"batch is {shown(batch)}; give a dict with 'x1' (data) and, if needed, 'x0' (noise) and 'cond' (labels)."
        )
    check_key(key)


def check_names(batch: dict[str, Any]) -> None:
    """Raises ValueError if a batch lacks "x1" or contains names other than "x1", "x0", "cond" and "rows".

    Example:
        check_names({"x1": images, "cond": labels})
    """
    unknown = sorted(set(batch) - set(BATCH_NAMES))
    if unknown or "x1" not in batch:
        raise ValueError(
            f"the batch contains {', '.join(map(repr, batch)) or 'nothing'}; it needs 'x1' (data), and may contain "
            "'x0' (noise), 'cond' (labels) and 'rows' (from a training step)."
        )


def check_dropout(label_dropout: float) -> None:
    """Raises ValueError unless label_dropout, the share of dropped conditions, is at least 0 and below 1.

    Example:
        check_dropout(0.1)
    """
    if not 0 <= label_dropout < 1:
        raise ValueError(f"label_dropout is {label_dropout}; it must be at least 0 and below 1.")
