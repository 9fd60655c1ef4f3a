"""Factorisations and inverses of stacks of small matrices, for landmarks and for chunks of the delta rule."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowgen import backend
from flowgen.backend import HIGHEST

NEWTON_ITERATIONS = 20
# The line search of the released SOFT++ halves alpha at most RELEASED_HALVINGS times, and stops when the residual is
# RELEASED_RESIDUAL or less.
RELEASED_HALVINGS = 10
RELEASED_RESIDUAL = 1.01

Ridge = float | Float[Array, ""]


@jax.custom_jvp
def unit_lower_inverse(lower: Float[Array, "*stack c c"]) -> Float[Array, "*stack c c"]:
    """Returns (I + L)⁻¹ for each matrix L of `lower`, which must be strictly lower triangular.

    In forward and reverse mode, the derivative is computed as -(I + L)⁻¹ dL (I + L)⁻¹, where dL is the change of L.
    """
    return backend.unit_lower_inverse(lower)


@unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    inverse = unit_lower_inverse(*primals)
    return inverse, -_sandwich(inverse, tangents[0])


def inverse_cholesky(a: Float[Array, "*stack l l"]) -> Float[Array, "*stack l l"]:
    """Returns C⁻¹ with C Cᵀ = a, for symmetric positive definite a."""
    factor = backend.cholesky(a)
    scale = jnp.diagonal(factor, axis1=-2, axis2=-1)
    return unit_lower_inverse(jnp.tril(factor / scale[..., None, :], -1)) / scale[..., :, None]


@jax.custom_jvp
def positive_inverse(a: Float[Array, "*stack l l"]) -> Float[Array, "*stack l l"]:
    """Returns a⁻¹ = C⁻ᵀ C⁻¹ for symmetric positive definite a.

    The derivative is -a⁻¹ da a⁻¹ in forward and reverse mode.
    """
    factor = inverse_cholesky(a)
    return jnp.matmul(factor.swapaxes(-1, -2), factor, precision=HIGHEST)


@positive_inverse.defjvp
def _positive_inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    inverse = positive_inverse(*primals)
    return inverse, -_sandwich(inverse, tangents[0])


def add_ridge(a: Float[Array, "*stack l l"], ridge: Ridge) -> Float[Array, "*stack l l"]:
    """Returns a + ridge I."""
    return a + ridge * jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)


def _newton_steps(b: Array, alpha: Array, iterations: int) -> Array:
    """Returns X after `iterations` steps X <- 2X - X B X, starting from X = alpha B."""
    matmul = partial(jnp.matmul, precision=HIGHEST)
    return jax.lax.fori_loop(0, iterations, lambda _, x: 2 * x - matmul(x, matmul(b, x)), alpha * b)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _newton(b: Array, alpha: Array, iterations: int) -> Array:
    return _newton_steps(b, alpha, iterations)


@_newton.defjvp
def _newton_jvp(iterations: int, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    # The rule is linear in the tangent, so JAX can transpose it. This gives reverse mode and derivatives of any order.
    x = _newton(*primals, iterations)
    matmul = partial(jnp.matmul, precision=HIGHEST)
    return x, -matmul(x, matmul(tangents[0], x))


@partial(jax.jit, static_argnames="iterations")
def newton_inverse(
    a: Float[Array, "*heads l l"], *, ridge: Ridge = 0.0, iterations: int = NEWTON_ITERATIONS
) -> Float[Array, "*heads l l"]:
    """Returns SOFT's Newton-Raphson inverse of B = A + ridge I, for symmetric A with entries >= 0.

    The iteration X <- 2X - X B X starts from X = alpha B, with one alpha per matrix. This alpha is 1.8 / (largest row
    sum of A)², or less if the ridge is so large that the iteration would diverge. In the result, an eigenvalue w of B
    becomes (1 - (1 - alpha w²)^(2^iterations)) / w. With the default number of iterations, this is close to 1/w only if
    w exceeds about a thousandth of the largest eigenvalue. In forward and reverse mode, the derivative is the closed
    form dX = -X dA X, which is exact only if the iteration has converged.
    """
    largest = jax.lax.stop_gradient(a).sum(axis=-1, keepdims=True).max(axis=-2, keepdims=True)
    # The iteration diverges for alpha >= 2 / |B|². With 1.8 / largest² alone, this would happen for A near I and
    # ridge > 0.05.
    alpha = jnp.minimum(1.8 / largest**2, 1.99 / (largest + ridge) ** 2)
    return _newton(add_ridge(a, ridge), alpha, iterations)


@partial(jax.jit, static_argnames="iterations")
def released_softpp_inverse(
    a: Float[Array, "*heads l l"], iterations: int = NEWTON_ITERATIONS
) -> Float[Array, "*heads l l"]:
    """Returns the inverses that the published SOFT++ code computes; each depends on all samples of the batch.

    The *whole batch and all heads* share one alpha = 2 / (largest row sum)². This alpha is halved, at most 10 times,
    while the largest column sum of |I - alpha A²| in the batch exceeds 1.01. Use this function only to reproduce
    published checkpoints. The derivative is computed by automatic differentiation.
    """
    square = jnp.matmul(a, a, precision=HIGHEST)
    eye = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)

    def halve_if_far(_, alpha):
        residual = jnp.abs(eye - alpha * square).sum(axis=-2).max()
        return jnp.where(residual > RELEASED_RESIDUAL, alpha / 2, alpha)

    alpha = jax.lax.fori_loop(0, RELEASED_HALVINGS, halve_if_far, 2 / a.sum(axis=-1).max() ** 2)
    return _newton_steps(a, alpha, iterations)


@jax.jit
def cholesky_solve(
    a: Float[Array, "*heads l l"], rhs: Float[Array, "*heads l d"], *, ridge: Ridge = 0.0
) -> Float[Array, "*heads l d"]:
    """Returns (A + ridge I)⁻¹ rhs for symmetric positive definite A + ridge I, with exact derivatives.

    Landmarks that coincide make A singular; the ridge must then exceed the rounding error of A, about 1e-5 in float32.
    """
    return jnp.matmul(positive_inverse(add_ridge(a, ridge)), rhs, precision=HIGHEST)


def _sandwich(outer: Array, inner: Array) -> Array:
    return jnp.matmul(jnp.matmul(outer, inner, precision=HIGHEST), outer, precision=HIGHEST)
