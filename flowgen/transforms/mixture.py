"""An elementwise monotone map from a mixture of distributions to their base distribution, and its inverse.

Let Φ be the CDF of the standard normal ("gaussian") or the standard logistic distribution ("logistic"). For each
element x, there is a mixture of k components with weights π, means μ and scales s:

    F(x) = Σ_k π_k Φ((x - μ_k) / s_k),      z = Φ⁻¹(F(x)),      dz/dx = F'(x) / φ(z)

If x has the density F', then z has the density φ. With Gaussian components and noise z from N(0, 1), the density of x
is therefore a mixture of Gaussians (TarFlowLM, arXiv 2507.00425). With logistic components, the map is that of Flow++
(arXiv 1902.00275, Eq. 6) without its affine part. Components and base belong to the same family of distributions. Hence
the map is affine if there is one component, close to affine in the tails, and the identity if all components are
standard.

z is computed from the logarithm of the smaller of F and 1 - F, so it keeps float32's relative precision far outside the
mixture. The upper tail is computed as the lower tail of the mirrored mixture.
"""

from __future__ import annotations

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flowgen.arrays import at_least_float32, shown
from flowgen.transforms.tails import TAILS, Kind

# Two iterations at least halve either the bracket or the Newton step, one bit of the mantissa. Further bits are for
# brackets of up to 2²⁰ scales. Usually, 3 to 8 iterations suffice.
ITERATIONS_PER_BIT, BRACKET_BITS = 2, 20


def mixture_forward(
    x: Float[Array, "*b"],
    logits: Float[Array, "*b k"],
    means: Float[Array, "*b k"],
    log_scales: Float[Array, "*b k"],
    kind: Kind = "gaussian",
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """Returns z = Φ⁻¹(F(x)) and log dz/dx of each element; the weights of the components are softmax(logits).

    The computation uses at least float32, and is accurate to float32's precision even for elements that are 30 or more
    of a component's scales away from all components.

    kind: the family of the components and of the base, "gaussian" or "logistic".

    Raises ValueError if the shapes do not match or if the kind is unknown.

    Example:
        z, log_derivative = mixture_forward(x, logits, means, log_scales)
    """
    x, *parameters = _checked(x, logits, means, log_scales, kind)
    return _forward(kind, x, *parameters)


def mixture_inverse(
    z: Float[Array, "*b"],
    logits: Float[Array, "*b k"],
    means: Float[Array, "*b k"],
    log_scales: Float[Array, "*b k"],
    kind: Kind = "gaussian",
) -> Float[Array, "*b"]:
    """Returns, for each element, the x with Φ⁻¹(F(x)) = z: the inverse of `mixture_forward`.

    x lies between the smallest and the largest of the components' quantiles μ_k + s_k z. Newton steps narrow this
    bracket. A step that would leave the bracket, or that is longer than half the previous step, is replaced by a
    bisection. One compiled loop runs until all elements are solved to the precision of their dtype. The result of an
    element does not depend on other elements.

    Derivatives of any order, in forward and reverse mode, with respect to z and the parameters θ of the mixture are
    computed by the implicit function theorem, dx = (dz - ∂z/∂θ dθ) / (dz/dx). The loop itself is not differentiated.

    Raises ValueError if the shapes do not match or if the kind is unknown.

    Example:
        x = mixture_inverse(z, logits, means, log_scales)
    """
    z, *parameters = _checked(z, logits, means, log_scales, kind)
    return _inverse(kind, z, *parameters)


def _checked(values: Array, logits: Array, means: Array, log_scales: Array, kind: Kind) -> list[Array]:
    if kind not in TAILS:
        raise ValueError(f"kind is {shown(kind)}; choose {' or '.join(map(repr, get_args(Kind)))}.")
    named = {"the array of elements": values, "logits": logits, "means": means, "log_scales": log_scales}
    arrays = [at_least_float32(name, array) for name, array in named.items()]
    first, *parameters = (array.shape for array in arrays)
    if any(shape[:-1] != first or shape != parameters[0] for shape in parameters) or 0 in parameters[0][-1:]:
        raise ValueError(
            f"the elements have shape {first}, and logits, means and log_scales have shapes "
            f"{', '.join(map(str, parameters))}; give parameters of one shape, with an axis of components after the "
            "axes of the elements."
        )
    dtype = jnp.result_type(*arrays)
    return [array.astype(dtype) for array in arrays]


def _forward(kind: Kind, x: Array, logits: Array, means: Array, log_scales: Array) -> tuple[Array, Array]:
    tail = TAILS[kind]
    log_weights = jax.nn.log_softmax(logits)
    # Which tail is smaller need not be decided exactly: near the median, both are precise.
    below = jnp.exp(log_weights + tail.log_cdf((x[..., None] - means) * jnp.exp(-log_scales))).sum(axis=-1) <= 0.5
    mirror = jnp.where(below, 1, -1).astype(x.dtype)
    log_tail, log_slope = _lower_tail(kind, mirror * x, log_weights, mirror[..., None] * means, log_scales)
    z = tail.quantile(log_tail)
    return mirror * z, log_slope - tail.log_hazard(z)


def _lower_tail(kind: Kind, x: Array, log_weights: Array, means: Array, log_scales: Array) -> tuple[Array, Array]:
    """Returns log F(x) and log(d log F(x) / dx).

    The derivative is the mean of the components' hazards, weighted by the components' shares of F(x).
    """
    tail = TAILS[kind]
    t = (x[..., None] - means) * jnp.exp(-log_scales)
    log_parts = log_weights + tail.log_cdf(t)
    log_hazards = tail.log_hazard(t) - log_scales
    return (
        jax.nn.logsumexp(log_parts, axis=-1),
        jax.nn.logsumexp(jax.nn.log_softmax(log_parts) + log_hazards, axis=-1),
    )


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _inverse(kind: Kind, z: Array, logits: Array, means: Array, log_scales: Array) -> Array:
    mirror = jnp.where(z <= 0, 1, -1).astype(z.dtype)
    parameters = jax.nn.log_softmax(logits), mirror[..., None] * means, log_scales
    return mirror * _solve(kind, mirror * z, *parameters)


@_inverse.defjvp
def _inverse_jvp(kind: Kind, primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    (z, *parameters), (change, *changes) = primals, tangents
    x = _inverse(kind, z, *parameters)
    _, moved, log_slope = jax.jvp(partial(_forward, kind, x), tuple(parameters), tuple(changes), has_aux=True)
    return x, (change - moved) * jnp.exp(-log_slope)


@partial(jax.jit, static_argnums=0)
def _solve(kind: Kind, z: Array, log_weights: Array, means: Array, log_scales: Array) -> Array:
    """Returns the x with F(x) = Φ(z) for z ≤ 0, by Newton steps for log F(x) within a bracket."""
    quantiles = means + jnp.exp(log_scales) * z[..., None]
    target = TAILS[kind].log_cdf(z)
    eps = jnp.finfo(z.dtype).eps
    rounding = 2 * eps * (1 - target)
    limit = ITERATIONS_PER_BIT * (jnp.finfo(z.dtype).nmant + BRACKET_BITS)
    low, high = quantiles.min(axis=-1), quantiles.max(axis=-1)
    start = jnp.clip((jnp.exp(log_weights) * quantiles).sum(axis=-1), low, high)

    def unsolved(state: tuple[Array, ...]) -> Bool[Array, ""]:
        count, *_, solved = state
        return (count < limit) & ~solved.all()

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        count, x, low, high, last, solved = state
        log_tail, log_slope = _lower_tail(kind, x, log_weights, means, log_scales)
        error = log_tail - target
        low, high = jnp.where(error <= 0, x, low), jnp.where(error >= 0, x, high)
        newton = x - error * jnp.exp(-log_slope)
        is_last = ~(jnp.abs(error) > rounding)  # True for NaN, which then is the result.
        shrinks = (newton >= low) & (newton <= high) & (2 * jnp.abs(newton - x) <= last)
        new = jnp.where(is_last | shrinks, jnp.clip(newton, low, high), low + 0.5 * (high - low))
        new = jnp.where(solved, x, new)
        last = jnp.where(shrinks, jnp.abs(new - x), high - low)
        solved |= is_last | (jnp.abs(new - x) <= eps * jnp.abs(x))
        return count + 1, new, low, high, last, solved

    state = jnp.asarray(0), start, low, high, high - low, low == high
    return jax.lax.while_loop(unsolved, step, state)[1]
