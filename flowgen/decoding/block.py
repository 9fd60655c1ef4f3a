"""One flow block for decoding: noise to tokens and back, under a condition and guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowgen.conditioning import Condition, TextCondition, unconditional
from flowgen.decoding.jacobi import Conditioner, PreviousFrame, Solution, solve
from flowgen.decoding.plan import BlockPlan, Jacobi, Sequential, SlidingWindow
from flowgen.decoding.sliding import solve_sliding
from flowgen.flows.affine import reorder, to_noise
from flowgen.flows.block import (
    AutoregressiveBlock,
    BlockConfig,
    BlockState,
    Variables,
    decoding_block,
    each_frame,
)
from flowgen.guidance import AffineParameters, Guidance
from flowgen.nn.layers import master_dtype


@dataclass(frozen=True)
class BlockDecoder:
    """One block with its variables, condition and guidance bound.

    cond: the condition, of both branches if guided, the conditional one first; None for a block without one.
    solved: called on the device with the number of tokens solved by a window.
    """

    config: BlockConfig
    variables: Variables
    cond: Condition | None
    guidance: Guidance | None
    solved: Callable[[Array], None]

    def decode(
        self, z: Float[Array, "b n c"], plan: BlockPlan, context: Float[Array, "b m c"] | None = None
    ) -> tuple[Float[Array, "b n c"], Solution]:
        """Returns the tokens that z decodes to, in raster order, and the solver's report.

        context: tokens that precede those of z, for a block in raster order without passthrough tokens.
        """
        config = self.config
        plan = Jacobi(window=1, tol=0.0) if isinstance(plan, Sequential) else plan
        u = reorder(each_frame(z, config.frames), config.order)
        passthrough = AutoregressiveBlock(config).num_passthrough
        known = u[:, :passthrough] if context is None else context
        solution = self._solve(known, u[:, passthrough:], plan)
        tokens = reorder(jnp.concatenate([u[:, :passthrough], solution.x], axis=1), config.order).reshape(z.shape)
        residual = solution.residual.reshape(len(z), config.frames).max(axis=1)
        overflows = solution.overflows.reshape(len(z), config.frames).sum(axis=1)
        return tokens, Solution(tokens, solution.sweeps, residual, overflows)

    def encode(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Returns the noise of tokens, both in raster order, by one parallel pass: the inverse of `decode`."""
        block = AutoregressiveBlock(self.config)
        if self.guidance is None:
            return block.apply(self.variables, x, self.cond)[0]
        frames = each_frame(x, self.config.frames)
        u = reorder(frames, self.config.order)
        passthrough = block.num_passthrough
        rows = block.apply(self.variables, u, method="previous")
        shift, log_scale, _ = self._parameters(block, self.variables, rows, BlockState())
        z, _ = to_noise(u[:, passthrough:], shift, log_scale)
        return reorder(jnp.concatenate([u[:, :passthrough], z], axis=1), self.config.order).reshape(x.shape)

    def _solve(self, known: Float[Array, "b m c"], z: Float[Array, "b n c"], plan: Jacobi | SlidingWindow) -> Solution:
        """The solution for z, the noise of the tokens after the known ones, all in the block's order."""
        block, variables = decoding_block(self.config, self.variables)
        batch, rows = len(known), known.shape[1] - block.num_passthrough  # Row t gives the next token's parameters.
        cold = self._inverse_temperature(batch)

        def empty_caches(length: int) -> tuple | None:
            """Caches with room for `length` more tokens, filled with the prefix and the known tokens."""
            branches = batch if cold is None else 2 * batch
            caches = block.apply(variables, branches, rows + length, self.cond, cold, method="prefill")
            if not rows:
                return caches
            seen = block.apply(variables, known, method="previous")
            return self._parameters(block, variables, seen, BlockState(0, caches, cold))[2]

        def window(previous: Array, start: Array, caches: tuple | None) -> tuple[Array, Array, tuple | None]:
            return self._parameters(block, variables, previous, BlockState(start + rows, caches, cold))

        conditioner = Conditioner(window, block.rewind, self.solved)
        first = known[:, -1:] if rows else block.apply(variables, known, method="first_previous")
        if isinstance(plan, SlidingWindow):
            return solve_sliding(conditioner, first, z, empty_caches, plan, self._previous_frame(known))
        return solve(conditioner, first, z, empty_caches, plan, self._previous_frame(known))

    def _parameters(
        self, block: AutoregressiveBlock, variables: Variables, rows: Float[Array, "b w c"], state: BlockState
    ) -> tuple[Float[Array, "b w c"], Float[Array, "b w c"], tuple | None]:
        """(shift, log_scale, caches) of the tokens after `rows`; both branches of guidance are one batch."""
        if self.guidance is None:
            return block.apply(variables, rows, self.cond, state, method="conditioner")
        batch, width = rows.shape[:2]
        state = state._replace(inverse_temperature=self._inverse_temperature(batch))
        both = jnp.concatenate([rows, rows])
        shift, log_scale, caches = block.apply(variables, both, self.cond, state, method="conditioner")
        tokens = state.start + jnp.arange(width) + block.num_passthrough
        progress = tokens / max(self.config.num_tokens - 1, 1)
        conditional: AffineParameters = (shift[:batch], log_scale[:batch])
        shift, log_scale = self.guidance.combine(
            conditional, (shift[batch:], log_scale[batch:]), progress[None, :, None]
        )
        return shift, log_scale, caches

    def _inverse_temperature(self, batch: int) -> Float[Array, " branches"] | None:
        """The factors on attention logits in both branches; None without guidance."""
        if self.guidance is None:
            return None
        dtype = master_dtype(self.config.transformer.dtype)
        return jnp.where(jnp.arange(2 * batch) < batch, 1.0, 1.0 / self.guidance.temperature).astype(dtype)

    def _previous_frame(self, known: Float[Array, "b m c"]) -> PreviousFrame | None:
        """The last frame of the known tokens; None for blocks of one frame."""
        positions = self.config.positions
        if positions is None or positions.frames == 1:
            return None
        tokens = self.config.num_tokens // positions.frames
        last = known[:, -tokens:]
        missing = tokens - last.shape[1]
        return PreviousFrame(jnp.pad(last, ((0, 0), (missing, 0), (0, 0))), jnp.asarray(tokens - missing, jnp.int32))


def block_decoder(
    config: BlockConfig,
    variables: Variables,
    cond: Condition | None,
    *,
    guidance: Guidance | None,
    null: TextCondition | None,
    solved: Callable[[Array], None],
) -> BlockDecoder:
    """Returns the decoder of a block. null: the text of guidance's unconditional branch, for a text flow."""
    cond = cond if config.is_conditional else None
    if guidance is not None and cond is not None:
        cond = jax.tree.map(lambda *parts: jnp.concatenate(parts), cond, unconditional(cond, null))
    return BlockDecoder(config, variables, cond, guidance, solved)
