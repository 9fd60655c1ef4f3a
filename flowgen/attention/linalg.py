"""Factors and inverses of small matrices by products alone, for stacks of landmarks and for chunks of the delta rule.

LAPACK calls that run at the same time can wait for each other's threads forever on CPUs with few cores (jaxlib 0.10:
two independent `jnp.linalg.cholesky` in one program, or triangular solves in a gradient). Products cannot, and they
are what accelerators are good at.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Of products that feed a state or one another, where errors add up; accelerators would round their factors.
HIGHEST = jax.lax.Precision.HIGHEST


@jax.custom_jvp
def unit_lower_inverse(lower: Float[Array, "*stack c c"]) -> Float[Array, "*stack c c"]:
    """Returns (I + L)⁻¹ for a strictly lower triangular L, from the inverses of ever larger blocks on its diagonal.

    Two neighbours A, D with B below A give the next: [[A⁻¹, 0], [-D⁻¹ B A⁻¹, D⁻¹]].

    Example:
        inverse = unit_lower_inverse(jnp.tril(a, -1))
    """
    size = lower.shape[-1]
    token = jnp.arange(size)
    inverse = _eye_like(lower)
    for width in (2**level for level in range((size - 1).bit_length())):
        block = token // width
        joined = (block[:, None] // 2 == block[None, :] // 2) & (block[:, None] != block[None, :])
        below = jnp.where(jnp.broadcast_to(joined, lower.shape), lower, 0)
        inverse = inverse - _sandwich(inverse, below) if width > 1 else inverse - below
    return inverse


@unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    inverse = unit_lower_inverse(*primals)
    return inverse, -_sandwich(inverse, tangents[0])


def cholesky(a: Float[Array, "*stack l l"]) -> Float[Array, "*stack l l"]:
    """Returns the lower triangular C with C Cᵀ = a, for symmetric positive definite a; column by column.

    Example:
        factor = cholesky(a + 1e-3 * jnp.eye(64))
    """
    rows = jnp.arange(a.shape[-1])[:, None]

    def column(k, carry):
        rest, factor = carry
        below = jax.lax.dynamic_slice_in_dim(rest, k, 1, axis=-1)
        pivot = jax.lax.dynamic_slice_in_dim(below, k, 1, axis=-2)
        below = jnp.where(jnp.broadcast_to(rows >= k, below.shape), below, 0) * jax.lax.rsqrt(pivot)
        factor = jax.lax.dynamic_update_slice_in_dim(factor, below, k, axis=-1)
        return rest - below * below.swapaxes(-1, -2), factor

    return jax.lax.fori_loop(0, a.shape[-1], column, (a, jnp.zeros_like(a)))[1]


def inverse_cholesky(a: Float[Array, "*stack l l"]) -> Float[Array, "*stack l l"]:
    """Returns C⁻¹ with C Cᵀ = a, for symmetric positive definite a.

    Example:
        whitened = inverse_cholesky(covariance) @ x
    """
    factor = cholesky(a)
    scale = jnp.diagonal(factor, axis1=-2, axis2=-1)
    return unit_lower_inverse(jnp.tril(factor / scale[..., None, :], -1)) / scale[..., :, None]


@jax.custom_jvp
def positive_inverse(a: Float[Array, "*stack l l"]) -> Float[Array, "*stack l l"]:
    """Returns a⁻¹ = C⁻ᵀ C⁻¹ for symmetric positive definite a; its derivative is -a⁻¹ da a⁻¹ in both modes.

    Example:
        inverse = positive_inverse(a)
    """
    factor = inverse_cholesky(a)
    return jnp.matmul(factor.swapaxes(-1, -2), factor, precision=HIGHEST)


@positive_inverse.defjvp
def _positive_inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    inverse = positive_inverse(*primals)
    return inverse, -_sandwich(inverse, tangents[0])


def _eye_like(a: Array) -> Array:
    return jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)


def _sandwich(outer: Array, inner: Array) -> Array:
    return jnp.matmul(jnp.matmul(outer, inner, precision=HIGHEST), outer, precision=HIGHEST)
