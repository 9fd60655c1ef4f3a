"""Optimizers by name: those of optax that need only gradients and parameters, and those of this package."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flowgen.optimizers.adamp import adamp
from flowgen.optimizers.auon import auon
from flowgen.optimizers.conda import conda
from flowgen.optimizers.matrices import muon

Optimizer = Callable[..., optax.GradientTransformation]
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": optax.adamw,
    "adamp": adamp,
    "auon": auon,
    "conda": conda,
    "muon": muon,
    "adabelief": optax.adabelief,
    "adadelta": optax.adadelta,
    "adafactor": optax.adafactor,
    "adagrad": optax.adagrad,
    "adam": optax.adam,
    "adamax": optax.adamax,
    "adamaxw": optax.adamaxw,
    "adan": optax.adan,
    "ademamix": optax.contrib.ademamix,
    "adopt": optax.contrib.adopt,
    "amsgrad": optax.amsgrad,
    "fromage": optax.fromage,
    "lamb": optax.lamb,
    "lars": optax.lars,
    "lion": optax.lion,
    "nadam": optax.nadam,
    "nadamw": optax.nadamw,
    "novograd": optax.novograd,
    "radam": optax.radam,
    "rmsprop": optax.rmsprop,
    "sgd": optax.sgd,
    "sign_sgd": optax.sign_sgd,
    "yogi": optax.yogi,
}
# Descriptions of an option's valid values, by the type of its default.
KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
RESERVED = ("learning_rate", "adam_learning_rate", "weight_decay", "mask", "weight_decay_mask")


def options_of(optimizer: Optimizer) -> dict[str, inspect.Parameter] | None:
    """Returns the parameters of an optimizer function by name, without its learning rates, weight decay and mask.

    The result is None if the function has a parameter such as **kwargs, and so accepts any name.

    Example:
        list(options_of(OPTIMIZERS["lion"]))  # ["b1", "b2", "mu_dtype"]
    """
    others = list(inspect.signature(optimizer).parameters.items())[1:]
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for _, parameter in others):
        return None
    return {name: parameter for name, parameter in others if name not in RESERVED}


def check_options(optimizer: Optimizer, options: Mapping[str, Any]) -> None:
    """Raises ValueError if an optimizer cannot be created with the options, or cannot be used in a run.

    To be used in a run, it must update a small tree of parameters without an error, and keep no random keys in its
    state.

    Example:
        check_options(OPTIMIZERS["sgd"], {"momentum": 0.9})
    """
    try:
        known = options_of(optimizer)
    except ValueError as error:  # a function written in C
        raise ValueError("name is a function whose arguments are unknown; wrap it in one of your own.") from error
    for name, value in options.items():
        if known is None:
            break
        if name not in known:
            raise ValueError(f"options has {name}, which is not an option of the optimizer; {_instead(name, known)}")
        default = known[name].default
        kind = next((kind for kind in KINDS if isinstance(default, kind)), None)
        fits = kind is None or type(value) is kind or (kind is float and type(value) is int)
        if not fits:
            raise ValueError(f"options.{name} is {value!r}; it must be {KINDS[kind]}, as its default {default!r} is.")
    params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    try:
        with jax.ensure_compile_time_eval():
            tx = make_named(optimizer, lambda count: 1e-3, options=options)
        state = jax.eval_shape(tx.init, params)
        jax.eval_shape(tx.update, params, state, params)
    except Exception as error:  # A user's function may raise anything, and optax does not check its options.
        given = f" with the options {dict(options)}" if options else ""
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"name{given} does not make an optax optimizer that can update parameters ({reason})."
        ) from error
    if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state)):
        raise ValueError("name is an optimizer that keeps random keys, which runs cannot store; choose another.")


def _instead(name: str, known: Mapping[str, Any]) -> str:
    """Returns the end of an error message, which suggests an option."""
    if close := difflib.get_close_matches(name.replace("-", "_"), known, n=1):
        return f"did you mean {close[0]}?"
    return f"choose from {', '.join(known)}." if known else "it has none."


def make_named(
    optimizer: Optimizer,
    learning_rate: optax.ScalarOrSchedule,
    *,
    options: Mapping[str, Any],
    weight_decay: float = 0.0,
    mask: Callable[[Any], Any] | None = None,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformation:
    """Returns the optimizer that the function `optimizer`, such as `optax.lion`, creates.

    options: further keyword arguments of `optimizer`.
    weight_decay: the factor λ of decoupled weight decay. If `optimizer` does not accept both a weight decay and a mask,
    AdamW's weight decay is added to the updates: w <- w - lr λ w.
    mask: a function params -> tree of bools, True for parameters to which weight decay applies; None means all.
    adam_learning_rate: the learning rate of all parameters that are not weight matrices, for an `optimizer` that has
    such a parameter, such as `muon`; None means `learning_rate`, and other optimizers ignore it.

    Example:
        tx = make_named(OPTIMIZERS["lion"], 1e-4, options={"b1": 0.9, "b2": 0.99}, weight_decay=0.1)
    """
    known = inspect.signature(optimizer).parameters
    given = dict(options)
    masked = next((name for name in ("mask", "weight_decay_mask") if name in known and "weight_decay" in known), None)
    if masked:
        given |= {"weight_decay": weight_decay, masked: mask}
    if "adam_learning_rate" in known:
        given["adam_learning_rate"] = adam_learning_rate
    chosen = optimizer(learning_rate, **given)
    if weight_decay and not masked:
        chosen = optax.chain(chosen, _decay(learning_rate, weight_decay, mask))
    return chosen


def _decay(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float, mask: Callable[[Any], Any] | None
) -> optax.GradientTransformation:
    """Returns AdamW's weight decay as a transformation that comes last in a chain."""

    def init(params):
        del params
        return jnp.zeros((), jnp.int32)

    def update(updates, state, params=None):
        rate: Any = learning_rate(state) if callable(learning_rate) else learning_rate
        decays = jax.tree.map(lambda _: True, params) if mask is None else mask(params)
        decayed = jax.tree.map(lambda u, w, own: u - rate * weight_decay * w if own else u, updates, params, decays)
        return decayed, state + 1

    return optax.GradientTransformation(init, update)
