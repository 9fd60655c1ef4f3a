"""Creates a run's optimizer from its config: learning-rate schedule, clipping, update rule, and skipping of updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from flowgen.optimizers import are_kernels, keep_norms, make_named, per_layer
from flowgen.training.frozen import matches, name_of
from flowgen.training.options import OptimConfig, check_warmups

MAIN = "main"  # Labels the parameters that have no separate optimizer.


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of completed updates.

    steps: number of updates in the whole run.

    Raises:
        ValueError: `config.warmup_steps` is not below `steps`, or `config.decay_steps` exceeds the number of steps
            after the warm-up.

    Example:
        lr = make_schedule(OptimConfig(), steps=1_000)(0)
    """
    check_warmups({"optim.warmup_steps": config.warmup_steps}, steps)
    after_warmup = steps - config.warmup_steps
    if config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(config.lr, after_warmup, config.min_lr / config.lr)
    elif config.schedule == "wsd":
        decay = config.decay_steps or min(max(1, steps // 10), after_warmup)
        if decay > after_warmup:
            raise ValueError(
                f"optim.decay_steps is {decay}, but only {after_warmup} steps follow the warm-up; lower it."
            )
        rest = optax.linear_schedule(config.lr, config.min_lr, decay, transition_begin=after_warmup - decay)
    else:
        rest = optax.constant_schedule(config.lr)
    if config.warmup_steps == 0:
        return rest
    warmup = optax.linear_schedule(config.min_lr, config.lr, config.warmup_steps)
    return optax.join_schedules([warmup, rest], [config.warmup_steps])


def make_optimizer(
    config: OptimConfig, steps: int, others: Mapping[str, OptimConfig] | None = None
) -> optax.GradientTransformation:
    """Returns the optimizer that a config describes, including gradient clipping and the skipping of updates.

    steps: number of updates in the whole run.
    others: separate optimizers for some of the top-level entries of the tree of parameters, by the names of these
    entries; `config` applies to all other entries. Each optimizer clips and skips by the gradient norm of its own
    parameters.

    Example:
        tx = make_optimizer(OptimConfig(lr=3e-4), steps=1_000)
    """
    if not others:
        return _one_optimizer(config, steps)
    parts = {name: _one_optimizer(part, steps) for name, part in others.items()}

    def names(params):
        return {name: jax.tree.map(lambda _, at=name: at if at in parts else MAIN, x) for name, x in params.items()}

    return optax.partition({MAIN: _one_optimizer(config, steps), **parts}, names)


def _one_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    schedule = make_schedule(config, steps)
    tx = make_named(
        config.optimizer,
        schedule,
        options=config.all_options,
        weight_decay=config.weight_decay,
        mask=decay_mask(config),
        adam_learning_rate=(lambda count: schedule(count) * config.adam_lr / config.lr) if config.adam_lr else None,
    )
    tx = keep_norms(tx) if config.keep_norms else tx
    if config.keep_norms or config.name != "adamw":  # Plain AdamW acts elementwise, so stacking changes nothing.
        tx = per_layer(tx)
    tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx) if config.clip_norm else tx
    return skip_spikes(tx, max_norm=config.skip_norm, after=config.skip_after) if config.skip_norm else tx


def decay_mask(config: OptimConfig) -> Callable[[Any], Any] | None:
    """Returns a function params -> tree of bools, which are True for parameters that decay; None if all decay.

    Example:
        mask = decay_mask(OptimConfig(decayed="matrices", not_decayed=("*/proj_out/*",)))
    """
    if config.decayed == "all" and not config.not_decayed:
        return None

    def mask(params):
        def decays(path, kernel):
            return (kernel or config.decayed == "all") and not matches(name_of(path), config.not_decayed)

        return jax.tree_util.tree_map_with_path(decays, are_kernels(params))

    return mask


class SkipState(NamedTuple):
    """The state of `skip_spikes`.

    asked: number of updates, applied or skipped. skipped: number of skipped updates. in_a_row: number of updates
    skipped since the last applied update. inner: the state of the inner transformation.
    """

    asked: Int[Array, "*device"]
    skipped: Int[Array, "*device"]
    in_a_row: Int[Array, "*device"]
    inner: Any


def skip_spikes(
    inner: optax.GradientTransformation, *, max_norm: float, after: int = 0
) -> optax.GradientTransformation:
    """Returns a transformation that applies `inner`, but skips updates whose gradient has a spike.

    An update is skipped if the gradient's global norm is not finite or, from update `after` on, exceeds max_norm.
    A skipped update changes neither the parameters nor the state of `inner`.

    Example:
        tx = skip_spikes(optax.adamw(1e-4), max_norm=1.0, after=100)
    """

    def init(params):
        zero = jnp.zeros((), jnp.int32)
        return SkipState(zero, zero, zero, inner.init(params))

    def update(updates, state, params=None):
        norm = optax.tree.norm(updates)
        skip = ~jnp.isfinite(norm) | ((norm > max_norm) & (state.asked >= after))
        stepped, inner_state = inner.update(updates, state.inner, params)
        kept = jax.tree.map(lambda new, old: jnp.where(skip, old, new), inner_state, state.inner)
        stepped = jax.tree.map(lambda x: jnp.where(skip, jnp.zeros_like(x), x), stepped)
        in_a_row = jnp.where(skip, state.in_a_row + 1, 0)
        return stepped, SkipState(state.asked + 1, state.skipped + skip, in_a_row, kept)

    return optax.GradientTransformation(init, update)


def main_state(opt_state: Any) -> Any:
    """Returns the state of the main optimizer, which updates the parameters that have no separate optimizer.

    Example:
        state = main_state(make_optimizer(OptimConfig(), steps=1_000).init(params))
    """
    return opt_state.inner_states[MAIN].inner_state if isinstance(opt_state, optax.PartitionState) else opt_state


def updates_done(opt_state: Any, step: Int[Array, ""]) -> Int[Array, ""]:
    """Returns the number of updates that the main optimizer has applied up to a step of the run.

    Example:
        done = updates_done(state.opt_state, state.step)
    """
    main = main_state(opt_state)
    return main.asked - main.skipped if isinstance(main, SkipState) else step
