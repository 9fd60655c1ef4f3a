"""Quantities computed from a flow's density: bits per dimension, the score, the Tweedie step, and class posteriors.

For a flow z = f(x) with prior N(0, v):  log p(x) = Σ log N(z; 0, v) + log|det dz/dx|.  Log-densities are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowgen.arrays import at_least_float32, shown
from flowgen.backend import keep_rows
from flowgen.conditioning import AnyCondition, Condition
from flowgen.flows.affine import ScaleParameterisation
from flowgen.flows.block import BlockConfig, Variables

LEVELS = 256


@runtime_checkable
class FlowConfig(Protocol):
    """The members of a flow's config that training, density and decoding use."""

    @property
    def event_shape(self) -> tuple[int, ...]: ...
    @property
    def tokens_per_image(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def token_dim(self) -> int: ...
    @property
    def num_dims(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def blocks(self) -> tuple[BlockConfig, ...]: ...
    @property
    def scale_parameterisation(self) -> ScaleParameterisation: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def text_dim(self) -> int: ...
    @property
    def noise_std(self) -> float: ...
    @property
    def dtype(self) -> str: ...

    def check_samples(self, x: Any) -> None: ...
    def to_tokens(self, x: Array) -> Array: ...
    def check_cond(self, cond: Any, batch: int) -> Condition | None: ...


@runtime_checkable
class Flow(Protocol):
    """The interface that training, density and decoding require of a flow: a Flax module with these members."""

    @property
    def config(self) -> FlowConfig: ...

    def apply(self, variables: Variables, *args: Any, method: str) -> Any: ...

    def with_image_size(self, height: int, width: int) -> Flow: ...

    def with_num_frames(self, frames: int) -> Flow: ...

    def to_images(self, tokens: Array) -> Array: ...


def check_flow(flow: Flow, variables: Variables) -> None:
    """Raises ValueError unless `flow` is a flow and `variables` contains "params"."""
    if not isinstance(flow, Flow):
        raise ValueError(f"flow is {shown(flow)}; give a flow, such as TARFlow(config), and then its params.")
    if not (isinstance(variables, Mapping) and "params" in variables):
        given = f"a dict of {', '.join(map(str, variables))}" if isinstance(variables, Mapping) else shown(variables)
        raise ValueError(f"params is {given}; give the dict with 'params' that flowgen.init or flowgen.load returned.")


def bits_per_dim(log_prob: Float[Array, "*b"], num_dims: int) -> Float[Array, "*b"]:
    """Returns bits/dim on the 8-bit scale, (-log p / num_dims + log 128) / log 2.

    log_prob: log p of images in [-1, 1), in nats.

    Example:
        bpd = bits_per_dim(flow.apply(params, x, method="log_prob"), flow.config.num_dims)
    """
    return (-log_prob / num_dims + math.log(LEVELS / 2)) / math.log(2)


def log_prob(
    flow: Flow, variables: Variables, x: Float[Array, "b *event"], cond: AnyCondition | None = None
) -> Float[Array, " b"]:
    """Returns log p(x | cond) in nats, like `flow.apply(variables, x, cond, method="log_prob")`.

    This function is compiled once for each flow and each combination of shapes. Outside `jax.jit`, it is therefore
    faster than `flow.apply`, which compiles parts of the flow in each call.

    Raises ValueError if x or cond does not fit the flow.

    Example:
        log_p = log_prob(flow, params, x, cond)
    """
    check_flow(flow, variables)
    flow.config.check_samples(x)
    return keep_rows(_log_prob, variables, x, flow.config.check_cond(cond, len(x)), flow=flow)


@partial(jax.jit, static_argnames="flow")
def _log_prob(variables: Variables, x: Float[Array, "b *event"], cond: Any, *, flow: Flow) -> Float[Array, " b"]:
    return flow.apply(variables, x, cond, method="log_prob")


def score(
    flow: Flow, variables: Variables, x: Float[Array, "b *event"], cond: AnyCondition | None = None
) -> Float[Array, "b *event"]:
    """Returns ∇_x log p(x | cond).

    This function is compiled once for each flow and each combination of shapes.

    Raises ValueError if x or cond does not fit the flow.

    Example:
        s = score(flow, params, x, cond)
    """
    check_flow(flow, variables)
    x = at_least_float32("x", x)
    flow.config.check_samples(x)
    return keep_rows(_score, variables, x, flow.config.check_cond(cond, len(x)), flow=flow)


@partial(jax.jit, static_argnames="flow")
def _score(variables: Variables, x: Float[Array, "b *event"], cond: Any, *, flow: Flow) -> Float[Array, "b *event"]:
    return jax.grad(lambda x: flow.apply(variables, x, cond, method="log_prob").sum())(x)


def tweedie_step(
    flow: Flow,
    variables: Variables,
    x: Float[Array, "b *event"],
    cond: AnyCondition | None = None,
    *,
    noise_std: float | None = None,
    strength: Float[Array, ""] | float = 1.0,
) -> Float[Array, "b *event"]:
    """Returns x + strength · σ² ∇_x log p(x | cond), without clipping. With strength 1, this is Tweedie's E[clean | x].

    noise_std: σ; None means the value in the flow's config. If σ is 0, x is returned unchanged.

    Example:
        clean = tweedie_step(flow, params, sample.x, cond)
    """
    check_flow(flow, variables)
    x = at_least_float32("x", x)
    sigma = flow.config.noise_std if noise_std is None else noise_std
    if sigma == 0:
        return x
    return x + strength * sigma**2 * score(flow, variables, x, cond)


def class_posterior(
    flow: Flow,
    variables: Variables,
    x: Float[Array, "b *event"],
    log_prior: Float[Array, " classes"] | None = None,
) -> Float[Array, "b classes"]:
    """Returns p(class | x) ∝ p(x | class) p(class), by Bayes' rule.

    log_prior: log p(class) up to a constant; None means uniform.

    Raises ValueError if the flow has no classes, if its samples are padded, or if `log_prior` does not have one entry
    per class.

    Example:
        labels = class_posterior(flow, params, x).argmax(axis=-1)
    """
    check_flow(flow, variables)
    num_classes = flow.config.num_classes
    if num_classes == 0:
        raise ValueError("class_posterior needs a flow with classes, but this flow has num_classes=0.")
    if getattr(flow.config, "padded", False):
        raise ValueError("class_posterior accepts no padding; compute log_prob for Padded(mask, label) of each class.")
    flow.config.check_samples(x)
    if log_prior is not None and jnp.shape(log_prior) != (num_classes,):
        raise ValueError(f"log_prior is {shown(log_prior)}; give one number per class, of shape ({num_classes},).")
    logits = _log_likelihoods(variables, x, flow=flow)
    if log_prior is not None:
        logits = logits + jnp.asarray(log_prior)[None]
    return jax.nn.softmax(logits, axis=-1)


@partial(jax.jit, static_argnames="flow")
def _log_likelihoods(variables: Variables, x: Float[Array, "b *event"], *, flow: Flow) -> Float[Array, "b classes"]:
    """Returns log p(x | class) of each class."""

    def log_likelihood(label):
        cond = jnp.full(x.shape[0], label, jnp.int32)
        return flow.apply(variables, x, cond, method="log_prob")

    return jax.lax.map(log_likelihood, jnp.arange(flow.config.num_classes)).T
