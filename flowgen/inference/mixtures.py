"""Densities and stratified samples of mixtures q(x) = Σ_k π_k q_k(x).

The components may be different flows, one flow with different parameters, or different conditions of one flow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key

from flowgen.arrays import at_least_float32, check_count, check_key, shown
from flowgen.conditioning import AnyCondition, Condition, split_padded
from flowgen.decoding.plan import Plan
from flowgen.decoding.sampler import sample
from flowgen.flows.block import Variables
from flowgen.flows.density import Flow, check_flow
from flowgen.inference.densities import flow_log_density
from flowgen.weights import check_any_weight, weights_along


class Component(NamedTuple):
    """One component of a mixture: a flow, its parameters and, optionally, a condition.

    cond: the condition of all samples from the component: a class label, or a condition of one row that
    `flowgen.decoding.sample` accepts, such as a context `1 d`; None means unconditional. For padded samples, cond
    is a `flowgen.conditioning.Padded` whose mask has one row.
    """

    flow: Flow
    params: Variables
    cond: AnyCondition | int | None = None

    def cond_of(self, num: int) -> Condition | None:
        """Returns the condition, repeated for `num` samples; None if cond is None.

        Raises ValueError if cond is neither a label nor a condition of one row, or if it does not fit the flow.
        """
        dtype = getattr(self.cond, "dtype", type(self.cond))
        is_label = getattr(self.cond, "shape", ()) == () and dtype is not bool and np.issubdtype(dtype, np.integer)
        one = self.flow.config.check_cond(np.full(1, self.cond) if is_label else self.cond, 1)
        return jax.tree.map(lambda row: jnp.broadcast_to(row, (num, *row.shape[1:])), one)


def mixture_log_prob(log_probs: Float[Array, "k *b"], log_weight: Float[Array, " k"]) -> Float[Array, "*b"]:
    """Returns log Σ_k π_k q_k(x), in nats, with π = softmax(log_weight).

    log_probs: log q_k(x) of each component; -inf outside its support.

    If all weights are 0, the result is NaN inside jit.

    Raises ValueError if log_probs and log_weight differ in their number of components, or (outside jit) if a log weight
    is NaN or +inf, or all weights are 0.

    Example:
        log_q = mixture_log_prob(jnp.stack([log_q_0, log_q_1]), jnp.log(jnp.array([0.3, 0.7])))
    """
    log_probs, log_weight = at_least_float32("log_probs", log_probs), weights_along(log_weight)
    if log_weight.shape != log_probs.shape[:1]:
        raise ValueError(
            f"log_probs has shape {log_probs.shape}, and log_weight has shape {log_weight.shape}; give one weight per "
            "component, along the first axis."
        )
    check_any_weight(log_weight)
    shares = jax.nn.log_softmax(log_weight).reshape(-1, *[1] * (log_probs.ndim - 1))
    return jax.nn.logsumexp(shares + log_probs, axis=0)


def stratified_counts(shares: Sequence[float | int] | np.ndarray, num: int) -> tuple[int, ...]:
    """Returns the number of samples from each component: num π_k, rounded so that the total is `num`.

    The components whose num π_k have the largest fractional parts are rounded up.

    shares: the numbers π_k, up to a common factor.

    Raises ValueError if shares are negative, not finite or all 0, or if `num` is not positive.

    Example:
        stratified_counts([0.5, 0.25, 0.25], 10)  # (5, 3, 2)
    """
    check_count("num", num)
    given = np.asarray(shares, np.float64)
    if given.ndim != 1 or not (np.isfinite(given).all() and (given >= 0).all() and given.sum() > 0):
        raise ValueError(f"shares is {given.tolist()}; give one number per component, none negative and not all 0.")
    exact = num * given / given.sum()
    counts = np.floor(exact).astype(int)
    for index in np.argsort(counts - exact, kind="stable")[: num - counts.sum()]:
        counts[index] += 1
    return tuple(counts.tolist())


def sample_mixture(
    components: Sequence[Component],
    key: Key[Array, ""],
    num: int,
    shares: Sequence[float | int] | None = None,
    *,
    plan: Plan | str = "auto",
) -> tuple[Float[Array, "b *event"], Float[Array, " b"]]:
    """Returns stratified samples of a mixture, and their log-density under it, in nats.

    The samples come in the order of the components: first counts[0] samples of component 0, then counts[1] of component
    1, and so on, with counts = stratified_counts(shares, num). The density is that of the mixture with
    π_k = counts[k] / num. With this density, importance-weighted means are unbiased for any `num`, and their variance
    is at most as large as with randomly chosen components (Owen & Zhou 2000).

    components: flows of the same event shape. If samples are padded, all components must have the same mask.
    num: total number of samples.
    shares: the numbers π_k, up to a common factor; None means equal shares.
    plan: as for `flowgen.decoding.sample`.

    Raises ValueError if there is no component, if a condition does not fit its flow, if event shapes or masks differ,
    if there is not one share per component, and in the same cases as `stratified_counts`.

    Example:
        x, log_q = sample_mixture([Component(flow, old), Component(flow, new)], jax.random.key(0), 100)
    """
    check_key(key)
    _check_components(components)
    shares = [1.0] * len(components) if shares is None else shares
    if len(shares) != len(components):
        raise ValueError(f"shares has {len(shares)} numbers; give one for each of the {len(components)} components.")
    counts = stratified_counts(shares, num)
    keys = jax.random.split(key, len(components))
    x = jnp.concatenate(
        [
            sample(part.flow, part.params, key, count, part.cond_of(count), plan=plan, denoise=False).x
            for part, key, count in zip(components, keys, counts, strict=True)
            if count
        ]
    )
    log_probs = [flow_log_density(part.flow, part.params, part.cond_of(num))(x) for part in components]
    return x, mixture_log_prob(jnp.stack(log_probs), jnp.log(jnp.asarray(counts, log_probs[0].dtype)))


def _check_components(components: Sequence[Component]) -> None:
    if not components:
        raise ValueError("components is empty; give at least one Component(flow, params).")
    for component in components:
        if not isinstance(component, Component):
            raise ValueError(f"components contains {shown(component)}; give Component(flow, params, cond).")
        check_flow(component.flow, component.params)
    shapes = [part.flow.config.event_shape for part in components]
    masks = [_mask(part) for part in components]
    for index, (shape, mask) in enumerate(zip(shapes, masks, strict=True)):
        if shape != shapes[0]:
            raise ValueError(
                f"components[{index}] has samples of shape {shape}, but components[0] has samples of shape "
                f"{shapes[0]}; give flows of one event shape."
            )
        if not np.array_equal(mask, masks[0]):
            raise ValueError(
                f"components[{index}] and components[0] have different masks, so their samples have different numbers "
                "of dimensions; give all components one mask."
            )


def _mask(component: Component) -> np.ndarray:
    """Returns the tokens of the component's samples that are not padding; all if the mask is traced."""
    mask, _ = split_padded(component.cond_of(1))
    if mask is None or isinstance(mask, Tracer):
        return np.ones((1, component.flow.config.num_tokens), bool)
    return np.asarray(mask)
