"""Derivatives of decoded tokens by the implicit function theorem, and solvers for the triangular systems that arise.

Let F(x; θ) = shift(x) + exp(log_scale(x)) · z be one sweep over all n tokens of a block, where θ stands for the
parameters, the condition, the guidance, the noise and the context. Decoded tokens satisfy x = F(x; θ), so

    (I - J) dx = ∂F/∂θ dθ,      J = ∂F/∂x

J is strictly triangular in the block's order, and therefore nilpotent: Jⁿ = 0. The iteration v <- b + J v solves the
system (I - J) v = b exactly after at most n - 1 products. Reverse mode solves the transposed system by back
substitution, from the last token to the first, which on CPUs is faster than the iteration. Each step propagates the
cotangent of one token to the token before it and, through the cache, to all earlier tokens. Back substitution requires
a cache with one slot per token, not in bfloat16. For other caches, the iteration solves the transposed system too. The
derivatives do not depend on how x was decoded.
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
from flowgen.decoding.jacobi import Conditioner

Tokens = Float[Array, "b n c"]
Linear = Callable[[Array], Array]


@runtime_checkable
class Sweeper(Protocol):
    """A pytree of arrays with the map F; see `flowgen.decoding.block.GuidedBlock`."""

    @property
    def can_pull_back(self) -> bool: ...

    def sweep(self, x: Tokens, z: Tokens, context: Float[Array, "b m c"] | None = None) -> Tokens: ...

    def pull_back(self, x: Tokens, z: Tokens, context: Float[Array, "b m c"] | None, change: Tokens) -> Tokens: ...


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
    x = _implicit(tree, x, leaves)  # Higher derivatives also depend on how x changes.
    moving = [index for index, change in enumerate(changes) if not isinstance(change, SymbolicZero)]

    def swept(x, moved):
        known = dict(zip(moving, moved, strict=True))
        block, z, context = tree.unflatten([known.get(index, leaf) for index, leaf in enumerate(leaves)])
        return block.sweep(x, z, context)

    here = [leaves[index] for index in moving]
    with any_derivative():
        _, change = jax.jvp(partial(swept, x), (here,), ([changes[index] for index in moving],))
        _, product = jax.linearize(lambda x: swept(x, here), x)
        block, z, context = tree.unflatten(leaves)

        def transpose_solve(_, b):
            if block.can_pull_back:
                return block.pull_back(x, z, context, b)
            transposed = jax.linear_transpose(product, b)
            return _nilpotent_solution(lambda v: transposed(v)[0], b)

        found = jax.lax.custom_linear_solve(
            lambda v: v - product(v),
            change,
            solve=lambda _, b: _nilpotent_solution(product, b),
            transpose_solve=transpose_solve,
        )
    return x, found


def back_substitution(conditioner: Conditioner, passthrough: int, x: Tokens, z: Tokens, b: Tokens) -> Tokens:
    """Returns the solution v of v - Jᵀ v = b; all tokens are in the block's order.

    conditioner: the conditioner of these tokens; its cache must have a slot per token. passthrough: the number of
    leading tokens that the block leaves unchanged, 0 or 1.
    """
    count = z.shape[1] - passthrough
    solved = x[:, passthrough:]
    previous = jnp.concatenate([conditioner.first, solved[:, :-1]], axis=1)
    noise = z[:, passthrough:]
    empty = conditioner.begin_cache(count)
    cache = conditioner.accept(empty, conditioner.window(previous, jnp.asarray(conditioner.begin), empty)[1])

    def at(tokens, index):
        return jax.lax.dynamic_slice_in_dim(tokens, index, 1, axis=1)

    def step(state, index):
        v, of_cache = state

        def token(previous, cache):
            maps, after = conditioner.window(previous, conditioner.begin + index, cache)
            return maps.to_data(at(noise, index)), conditioner.accept(cache, after)

        _, pull = jax.vjp(token, at(previous, index), cache)
        of_previous, of_cache = pull((at(v, index + 1), of_cache))
        return (jax.lax.dynamic_update_slice_in_dim(v, at(v, index) + of_previous, index, axis=1), of_cache), None

    # Slot 0 of v is for the network's first input, which may be a passthrough token.
    begin = jnp.pad(b, ((0, 0), (1 - passthrough, 0), (0, 0))), jax.tree.map(jnp.zeros_like, cache)
    (v, _), _ = jax.lax.scan(step, begin, jnp.arange(count), reverse=True)
    return v[:, 1 - passthrough :]


def _nilpotent_solution(product: Linear, b: Tokens) -> Tokens:
    """Iterates v <- b + J v until v no longer changes, for at most n products."""

    def unsolved(state):
        count, _, changed = state
        return (count < b.shape[1]) & changed

    def step(state):
        count, v, _ = state
        new = b + product(v)
        return count + 1, new, (new != v).any()

    return jax.lax.while_loop(unsolved, step, (jnp.asarray(0), b, jnp.asarray(True)))[1]
