"""Derivatives of decoded tokens by the implicit function theorem, and the triangular systems that they solve.

Let F(x; θ) = shift(x) + exp(log_scale(x)) · z be one sweep over all n tokens of a block, where θ stands for the
parameters, the condition, the guidance, the noise and the context. Decoded tokens satisfy x = F(x; θ), so

    (I - J) dx = ∂F/∂θ dθ,      J = ∂F/∂x

J is strictly triangular in the block's order, and therefore nilpotent: Jⁿ = 0. The iteration v <- b + J v solves the
system (I - J) v = b exactly after at most n - 1 products, and so does the same iteration for the transposed system.
The derivatives do not depend on how x was decoded: they are those at the exact solution if x is the solution.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from flowgen.backend import any_derivative

Tokens = Float[Array, "b n c"]
Linear = Callable[[Array], Array]


@runtime_checkable
class Sweeper(Protocol):
    """A pytree of arrays with the map F; see `flowgen.decoding.block.GuidedBlock`."""

    def sweep(self, x: Tokens, z: Tokens, context: Float[Array, "b m c"] | None = None) -> Tokens: ...


def with_derivatives(block: Sweeper, x: Tokens, z: Tokens, context: Float[Array, "b m c"] | None) -> Tokens:
    """Returns x, whose derivatives with respect to block, z and context are those of the solution of x = F(x).

    x: tokens that satisfy this equation; their own derivatives are ignored.
    """
    leaves, tree = jax.tree.flatten((block, z, context))
    return _implicit(tree, x, leaves)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _implicit(tree: jax.tree_util.PyTreeDef, x: Tokens, leaves: list) -> Tokens:
    """x as a function of the leaves of (block, z, context), whose structure is `tree`."""
    return x


@partial(_implicit.defjvp, symbolic_zeros=True)
def _derivatives(tree: jax.tree_util.PyTreeDef, primals: tuple, tangents: tuple) -> tuple[Tokens, Tokens]:
    (x, leaves), (_, changes) = primals, tangents
    moving = [index for index, change in enumerate(changes) if not isinstance(change, SymbolicZero)]

    def swept(x, moved):
        known = dict(zip(moving, moved, strict=True))
        block, z, context = tree.unflatten([known.get(index, leaf) for index, leaf in enumerate(leaves)])
        return block.sweep(x, z, context)

    here = [leaves[index] for index in moving]
    with any_derivative():
        _, change = jax.jvp(partial(swept, x), (here,), ([changes[index] for index in moving],))
        _, product = jax.linearize(lambda x: swept(x, here), x)
    return _implicit(tree, x, leaves), solve_triangular(product, change)


def solve_triangular(product: Linear, b: Tokens) -> Tokens:
    """Returns the solution v of v - J v = b, which can be differentiated in both modes.

    product: the map v -> J v, where J is strictly triangular over the tokens.
    """
    transposed = jax.linear_transpose(product, b)
    return jax.lax.custom_linear_solve(
        lambda v: v - product(v),
        b,
        solve=lambda _, b: _nilpotent_solution(product, b),
        transpose_solve=lambda _, b: _nilpotent_solution(lambda v: transposed(v)[0], b),
    )


def _nilpotent_solution(product: Linear, b: Tokens) -> Tokens:
    """The solution of v = b + J v. The loop ends when v no longer changes, which takes at most n products."""

    def unsolved(state):
        count, _, changed = state
        return (count < b.shape[1]) & changed

    def step(state):
        count, v, _ = state
        new = b + product(v)
        return count + 1, new, (new != v).any()

    return jax.lax.while_loop(unsolved, step, (jnp.asarray(0), b, jnp.asarray(True)))[1]
