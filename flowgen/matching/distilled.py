"""The coupling that an autoregressive flow has learned (Normalized Flow Matching, Berthelot et al., arXiv 2603.09014).

A flow f maps data to normal noise, one to one. Each x1 is therefore paired with its own noise,

    x0 = f(x1 + σ ε, cond) / √v,

where σ is the standard deviation of the noise that the flow's training adds to data, ε is normal noise, and v is the
variance of the flow's prior. For a flow trained on dequantised images, dequantised x1 replaces x1 + σ ε. From these
pairs, the velocity network learns nearly straight trajectories from x0 to the clean x1, which need few solver steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flowgen.arrays import shown
from flowgen.matching.checks import check_batch
from flowgen.matching.couplings import Cond, Coupled


@partial(jax.tree_util.register_dataclass, data_fields=["variables"], meta_fields=["flow", "noise_std", "noise"])
@dataclass(frozen=True, eq=False)
class FlowDistilled:
    """Pairs each x1 with the noise to which a trained flow maps it; all weights are 1.

    The x0 with which the coupling is called must be standard normal, as the losses draw it: it serves as the noise ε
    that is added to x1. The flow receives the batch's condition as it is before label dropout. No gradient reaches the
    flow. The coupling is a pytree of the flow's variables: pass it to jitted functions as an argument, so that large
    variables do not become constants.

    flow: a flow whose samples have the shape of x1.
    variables: the flow's variables.
    noise_std: standard deviation σ of the noise added to x1; None means the value in the flow's config. No effect with
    noise="uniform".
    noise: "normal" adds σ ε to x1; "uniform" adds uniform noise one level wide to x1, which must be images of 256
    levels in [-1, 1].

    Raises ValueError if `flow` is not a flow, if noise_std or noise is invalid or, when called, if x1 or the condition
    does not fit the flow.

    Example:
        flow, params, _ = flowgen.load("digits")
        loss_fn = flow_matching_loss(coupling=FlowDistilled(flow, params))
    """

    sees: ClassVar[str] = "row"

    flow: Any
    variables: Any
    noise_std: float | None = None
    noise: Literal["normal", "uniform"] = "normal"

    def __post_init__(self):
        if self.noise not in ("normal", "uniform"):
            raise ValueError(f"noise is {shown(self.noise)}; it must be 'normal' or 'uniform'.")
        if not hasattr(getattr(self.flow, "config", None), "to_images"):
            raise ValueError(
                f"flow is {shown(self.flow)}; give a flow, such as TARFlow(config), and then its variables."
            )
        if self.noise_std is not None and not 0 <= self.noise_std < float("inf"):
            raise ValueError(f"noise_std is {self.noise_std}; it must be at least 0 and finite.")

    def __call__(
        self, key: Key[Array, ""], x0: Float[Array, "b *event"], x1: Float[Array, "b *event"], cond: Cond = None
    ) -> Coupled:
        check_batch(x0, x1)
        config = self.flow.config
        if x1.shape[1:] != config.event_shape:
            raise ValueError(
                f"x1 has samples of shape {x1.shape[1:]}, but the flow of the coupling models samples of shape "
                f"{config.event_shape}; use a flow that was trained on the same data."
            )
        sigma = config.noise_std if self.noise_std is None else self.noise_std
        noisy = x1 + sigma * x0 if self.noise == "normal" else dequantised(x1, x0)
        given = config.check_cond(cond, len(x1)) if accepts_conditions(config) else None
        noise = jax.lax.stop_gradient(_noise(self.variables, noisy, given, flow=self.flow)).astype(x0.dtype)
        return Coupled(noise, x1, cond, jnp.zeros(len(x0), x0.dtype))


@partial(jax.jit, static_argnames="flow")
def _noise(variables: Any, x: Float[Array, "b *event"], cond: Any, *, flow: Any) -> Float[Array, "b *event"]:
    """Returns the noise to which the flow maps x, scaled to variance 1, in the shape of x."""
    z, _ = flow.apply(variables, x, cond)
    scale = jax.lax.rsqrt(flow.apply(variables, method="prior_variance"))
    return flow.config.to_images(z * scale[None])


def dequantised(x1: Float[Array, "b *event"], noise: Float[Array, "b *event"]) -> Float[Array, "b *event"]:
    """Returns images with uniform noise one level wide, ((x1 + 1) 127.5 + Φ(noise)) / 128 - 1, in [-1, 1].

    Φ is the standard normal distribution function.

    x1: images of 256 levels in [-1, 1], as `flowgen.data.from_uint8` returns them.
    noise: standard normal noise.

    Example:
        x = dequantised(from_uint8(images), jax.random.normal(key, images.shape))
    """
    return ((x1 + 1) * 127.5 + jax.scipy.special.ndtr(noise)) / 128 - 1


def accepts_conditions(config: Any) -> bool:
    """Returns whether a flow is conditioned on classes, texts or a context.

    Example:
        accepts_conditions(flow.config)
    """
    return bool(config.num_classes or config.text_dim or getattr(config, "context", None) is not None)
