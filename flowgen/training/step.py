"""The training step: its state, and the pure function that runs on devices.

g = mean over devices and micro-batches of ∇ loss;   θ <- θ - optimizer(clip(g));   θ̄ <- θ̄ + (1 - d)(θ - θ̄)

θ are the parameters, θ̄ is their average, and d is its decay rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, Key

from flowgen.arrays import shown
from flowgen.counting import OPTIMIZER
from flowgen.rows import StatefulObjective, micro_batches, share_of_batch, with_rows
from flowgen.training.frozen import check_patterns, trained, with_frozen
from flowgen.training.optimizer import SkipState, main_state, make_optimizer, make_schedule, updates_done
from flowgen.training.options import OptimConfig

Metrics = dict[str, Array]
Objective = Callable[[Any, Any, Key[Array, ""]], tuple]
Step = Callable[..., tuple[Any, Metrics]]  # (state, batch, key[, fixed]) -> (state, metrics)
AXIS = "data"


class TrainState(struct.PyTreeNode):
    """Everything that a run keeps between steps.

    step: number of completed steps. params: all parameters, including frozen ones. collections: all other collections
    of the Flax variables, including the state of the objective. opt_state: the optimizer's state. ema: the moving
    average of `params`; None if no average is kept. The fields have no types, because the same class also stores the
    shardings of the arrays.
    """

    step: Any
    params: Any
    collections: Any
    opt_state: Any
    ema: Any

    @property
    def averaged(self) -> Any:
        """The variables for evaluation and sampling; their parameters are `ema` or, if it is None, `params`."""
        return {"params": self.params if self.ema is None else self.ema, **self.collections}


def init_state(
    variables: Any,
    config: OptimConfig,
    steps: int,
    others: Mapping[str, OptimConfig] | None = None,
    frozen: Sequence[str] = (),
) -> TrainState:
    """Returns the state of training at step 0. The average of the parameters, if any, starts at their initial values.

    steps: number of updates in the whole run. others: separate optimizers, as for `make_optimizer`. frozen: patterns of
    the names of frozen parameters, as for `make_step`.

    Raises ValueError if a pattern of `frozen` or `config.not_decayed` matches no parameter, or if all parameters are
    frozen.

    Example:
        state = init_state(flowgen.init(flow, key), OptimConfig(), steps=1_000)
    """
    params = variables["params"]
    check_patterns("optim.not_decayed", params, config.not_decayed)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        collections={name: value for name, value in variables.items() if name != "params"},
        opt_state=make_optimizer(config, steps, others).init(trained(params, frozen)),
        ema=jax.tree.map(jnp.asarray, params) if config.ema_decay else None,
    )


def make_step(
    objective: Objective,
    config: OptimConfig,
    *,
    steps: int,
    accumulation: int = 1,
    axis_name: str | None = AXIS,
    others: Mapping[str, OptimConfig] | None = None,
    frozen: Sequence[str] = (),
) -> Step:
    """Returns the update of one device, a function (state, batch, key[, fixed]) -> (state, metrics).

    It must be mapped over the devices with `axis_name`, for example by `jax.pmap`. If `axis_name` is None, the update
    processes the whole batch, and the compiler may divide the work over devices.

    objective: a function (variables, batch, key) -> (loss, metrics) or (loss, metrics, collections).
    steps: number of updates in the whole run.
    accumulation: number of micro-batches into which the update divides its batch.
    frozen: patterns of the names of parameters that stay unchanged; see `flowgen.training.frozen.trained`.
    others: separate optimizers, as for `make_optimizer`.

    Arguments and results of the update:
    batch: this device's share of the rows of the whole batch; the shares are consecutive, in the order of the devices
    along `axis_name`.
    key: the same key for all steps and devices.
    fixed: collections that are passed to the objective with its variables, but are not part of the state; see `Job`.
    metrics: the means of `loss` and of the objective's metrics over devices and micro-batches; `grad_norm`, the norm of
    the mean gradient before clipping; and `lr`, the learning rate. If config.skip_norm is set, the metrics include
    `skipped`, which is 1 if this update was skipped and otherwise 0, and `skipped_in_a_row`, the number of updates that
    were skipped since the last applied one. `lr`, `skipped` and `skipped_in_a_row` describe the optimizer of `config`,
    not those of `others`.

    The objective receives a key that is unique to the device, step and micro-batch. If the batch is a `Batch` or a
    dict, the update adds `rows` to it, a `flowgen.rows.Rows`. Random numbers drawn with `rows` are the same for any
    number of devices and micro-batches; numbers drawn with the key are not. Micro-batch j contains the rows j, j +
    accumulation, ... of the whole batch.

    The collections that the objective returns are a state that is carried from step to step. Each micro-batch computes
    a new state from the state before the update. The state after the update is the mean of the new states over devices
    and micro-batches, unless the objective is a `flowgen.rows.StatefulObjective`, which defines how to combine the
    states of micro-batches. Integers in the state are not averaged, so they must not depend on the batch.

    Tracing the update raises ValueError if the batch already has `rows`, if micro-batches cannot share the batch
    equally, or if the objective's result is invalid.

    Example:
        update = jax.pmap(make_step(objective, OptimConfig(), steps=1_000), axis_name="data", donate_argnums=0)
    """
    schedule, tx = make_schedule(config, steps), make_optimizer(config, steps, others)

    def loss_and_rest(moving, params, collections, fixed, batch, key):
        variables = {"params": with_frozen(moving, params), **collections, **(fixed or {})}
        loss, metrics, *carried = check_outcome(objective(variables, batch, key))
        return loss, ({**metrics, "loss": loss}, {**collections, **(carried[0] if carried else {})})

    gradient_of = jax.grad(loss_and_rest, has_aux=True)

    def gradients(state, fixed, batch, rows, key):
        """Returns the mean gradients and metrics of the micro-batches, and the combination of their states."""
        differentiate = partial(gradient_of, trained(state.params, frozen), state.params, state.collections, fixed)
        if accumulation == 1:
            grads, (metrics, collections) = differentiate(with_rows(batch, rows), key)
            return grads, metrics, collections

        def micro(total, part):
            index, micro_batch, positions, micro_key = part
            # All micro-batches share the key; their rows have different positions.
            own = rows.replace(key=jax.random.clone(rows.key), positions=positions, part=index)
            grads, aux = differentiate(with_rows(micro_batch, own), micro_key)
            return jax.tree.map(jnp.add, total, grads), aux

        parts, positions = micro_batches((batch, rows.positions), accumulation)
        zeros = jax.tree.map(jnp.zeros_like, trained(state.params, frozen))
        numbered = (jnp.arange(accumulation), parts, positions, jax.random.split(key, accumulation))
        total, (metrics, collections) = lax.scan(micro, zeros, numbered)
        combined = jax.tree.map(_mean_of_parts, collections)
        if isinstance(objective, StatefulObjective):
            combined |= objective.combine(state.collections, collections)
        return jax.tree.map(lambda x: x / accumulation, total), jax.tree.map(_mean_of_parts, metrics), combined

    def update(
        state: TrainState, batch: Any, key: Key[Array, ""], fixed: Mapping[str, Any] | None = None
    ) -> tuple[TrainState, Metrics]:
        shared_key, own_key = jax.random.split(jax.random.fold_in(key, state.step))
        rows = share_of_batch(shared_key, check_share(batch, accumulation), axis_name).measured(batch)
        own_key = jax.random.fold_in(own_key, 0 if axis_name is None else lax.axis_index(axis_name))
        grads, metrics, collections = gradients(state, fixed, batch, rows, own_key)
        if axis_name is not None:
            grads, metrics, collections = jax.tree.map(
                lambda x: lax.pmean(x, axis_name) if _is_float(x) else x, (grads, metrics, collections)
            )
        done = updates_done(state.opt_state, state.step)
        metrics = {**metrics, "grad_norm": optax.tree.norm(grads), "lr": schedule(done)}
        moving = trained(state.params, frozen)
        with jax.named_scope(OPTIMIZER):
            updates, opt_state = tx.update(grads, state.opt_state, moving)
        main = main_state(opt_state)
        if isinstance(main, SkipState):
            skipped = main.in_a_row > 0
            metrics |= {"skipped": skipped, "skipped_in_a_row": main.in_a_row}
            collections = jax.tree.map(lambda new, old: jnp.where(skipped, old, new), collections, state.collections)
        params = with_frozen(optax.apply_updates(moving, updates), state.params)
        return TrainState(
            step=state.step + 1,
            params=params,
            collections=collections,
            opt_state=opt_state,
            ema=None if state.ema is None else _average(state.ema, params, ema_decay(config, state.step)),
        ), jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), metrics)

    return update


def check_share(batch: Any, accumulation: int) -> int:
    """Returns the number of rows in a device's share of a batch.

    Raises ValueError if the arrays differ in their number of rows, or if micro-batches cannot share the rows equally.

    Example:
        num = check_share({"x": jnp.zeros((8, 3))}, accumulation=2)
    """
    shapes = [jnp.shape(x) for x in jax.tree.leaves(batch)]
    if not shapes or any(shape[:1] != shapes[0][:1] or not shape for shape in shapes):
        raise ValueError(
            f"the batch has arrays of shapes {shapes}; give them all the same number of rows, one per sample."
        )
    num = shapes[0][0]
    if num == 0 or num % accumulation:
        raise ValueError(
            f"each device has {num} rows of the batch; give a multiple of train.accumulation, which is {accumulation}."
        )
    return num


def check_outcome(outcome: Any) -> tuple:
    """Returns an objective's result. Raises ValueError unless it is (loss, metrics) or (loss, metrics, collections).

    Example:
        loss, metrics, *carried = check_outcome(objective(variables, batch, key))
    """
    if not isinstance(outcome, tuple | list) or len(outcome) not in (2, 3):
        size = f" of {len(outcome)}" if isinstance(outcome, tuple | list) else ""
        raise ValueError(
            f"the objective returned {shown(outcome)}{size}; it must return (loss, metrics) or "
            "(loss, metrics, collections), with metrics as a dict of numbers."
        )
    loss, metrics, *carried = outcome
    if not _is_number(loss) or not _is_float(loss):
        raise ValueError(f"the objective's loss is {shown(loss)}; it must be a single floating-point number.")
    for name, value in (("metrics", metrics), *(("collections", x) for x in carried)):
        if not isinstance(value, Mapping):
            raise ValueError(f"the objective's {name} must be a dict, not {shown(value)}.")
    for name, value in metrics.items():
        if not _is_number(value):
            raise ValueError(f"metric {name!r} is {shown(value)}; it must be a single number, such as a mean.")
    return tuple(outcome)


def _is_number(x: Any) -> bool:
    shape = () if isinstance(x, bool | int | float) else getattr(x, "shape", None)
    return shape == () and any(jnp.issubdtype(jnp.result_type(x), kind) for kind in (jnp.number, jnp.bool_))


def ema_decay(config: OptimConfig, step: Int[Array, ""] | int) -> Float[Array, ""] | float:
    """Returns config.ema_decay or, with ema_warmup, min(ema_decay, (1 + step) / (10 + step)) after `step` updates.

    Example:
        decay = ema_decay(OptimConfig(ema_decay=0.999), 100)
    """
    return jnp.minimum(config.ema_decay, (1 + step) / (10 + step)) if config.ema_warmup else config.ema_decay


def _average(ema: Any, params: Any, decay: Any) -> Any:
    return jax.tree.map(lambda average, value: average + (1 - decay) * (value - average), ema, params)


def _mean_of_parts(x: Array) -> Array:
    return x.mean(axis=0) if _is_float(x) else x[0]


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)
