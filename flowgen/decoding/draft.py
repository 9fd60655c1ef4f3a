"""`Draft`, which proposes the tokens of blocks from their noise.

A plan with init="draft" begins its sweeps with these tokens. The draft affects the number of sweeps, but not the
solution: with tolerance 0, the result is exact for any draft.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float

from flowgen.arrays import shown
from flowgen.conditioning import Condition
from flowgen.decoding.clips import Clip
from flowgen.decoding.plan import BlockPlan, DecodePlan, Sequential, solver_plans
from flowgen.flows.density import FlowConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draft:
    """Proposes the tokens of each block from its noise: tokens = function(variables, noise, cond).

    The argument `variables` is the block's entry of the field `variables`. The noise and the tokens have the shape `b n
    c` and are in raster order. `cond` is the condition of the block; None for unconditional blocks. The proposed tokens
    may be inaccurate, and even infinite or NaN.

    variables: one entry per block, data side first: a pytree of arrays, or None for a block without a draft.

    Example:
        draft = Draft(lambda scale, noise, cond: scale * noise, (None, jnp.asarray(0.5)))
        r = sample(flow, params, jax.random.key(0), 16, plan=Jacobi(init="draft"), draft=draft)
    """

    function: Callable[[Any, Array, Condition | None], Array] = field(metadata={"static": True})
    variables: tuple[Any, ...]

    def of_block(
        self, index: int, noise: Float[Array, "b n c"], cond: Condition | None
    ) -> Float[Array, "b n c"] | None:
        """Returns the tokens proposed for block `index`, counted from 0 on the data side; None if it has no draft."""
        variables = self.variables[index]
        return None if variables is None else _proposed(self.function, variables, noise, cond)


@partial(jax.jit, static_argnums=0)
def _proposed(
    function: Callable[[Any, Array, Condition | None], Array],
    variables: Any,
    noise: Float[Array, "b n c"],
    cond: Condition | None,
) -> Float[Array, "b n c"]:
    tokens = function(variables, noise, cond)
    shape = getattr(tokens, "shape", type(tokens).__name__)
    if shape != noise.shape:
        raise ValueError(f"draft.function returned shape {shape}; it must return an array of shape {noise.shape}.")
    return tokens.astype(noise.dtype)


def begins_with_draft(plan: BlockPlan) -> bool:
    """Returns whether a plan's initial guess is a draft."""
    first = solver_plans(plan)[0]
    return not isinstance(first, Sequential) and first.init == "draft"


def check_draft(draft: Draft | None, plan: DecodePlan, config: FlowConfig, clip: Clip | None) -> None:
    """Raises ValueError if a required draft is missing, or if a draft does not fit the flow or the clip."""
    if draft is None:
        if any(map(begins_with_draft, plan.blocks)):
            raise ValueError('draft is missing, but the plan has init="draft"; give a draft, or another init.')
        return
    if not isinstance(draft, Draft) or not callable(draft.function) or not isinstance(draft.variables, tuple):
        raise ValueError(
            f"draft is {shown(draft)}; it must be Draft(function, variables), with a tuple of variables, or None."
        )
    if len(draft.variables) != config.num_blocks:
        raise ValueError(
            f"draft.variables has {len(draft.variables)} entries, but the flow has {config.num_blocks} blocks; give "
            "one per block, or None for blocks without a draft."
        )
    if clip is not None:
        raise ValueError("clip is given, but drafts propose whole samples of the flow's size; leave out one of them.")
