"""One block of a flow as a decoder sees it: its condition and guidance filled in, its caches behind two functions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flowgen.conditioning import unconditional
from flowgen.decoding.guidance import linear_rule, product_rule
from flowgen.decoding.jacobi import Conditioner, Recent, solve
from flowgen.decoding.moving import solve_moving
from flowgen.decoding.plan import Jacobi, MovingJacobi, Sequential
from flowgen.flows.affine import reorder, to_noise
from flowgen.flows.block import block_parameters, decoding_block, each_frame
from flowgen.nn.layers import master_dtype


class DecodingBlock:
    """One block of a flow with its condition and guidance filled in. progress: called with the tokens solved, on the
    host, after every window."""

    def __init__(self, flow, params, index, conds, guidance, weights, progress=None):
        self.progress = progress
        self.config = flow.config.blocks[index]
        self.module, self.params = decoding_block(self.config, block_parameters(params, index))
        guidance = guidance if guidance is not None and index in guidance.blocks else None
        self.guidance, self.weights = guidance, weights
        cond, null = conds
        self.cond = cond if self.config.is_conditional else None
        if guidance is not None and self.cond is not None:
            both = self.cond, unconditional(self.cond, null)
            self.cond = jax.tree.map(lambda *parts: jnp.concatenate(parts), *both)

    def call(self, method, *args):
        return self.module.apply(self.params, *args, method=method)

    def decode(self, z, plan, known=None):
        """Raster-order tokens of the noise z and the report of the solver.

        known: tokens that stand before those of z, for a block in raster order over one run of tokens.
        """
        frames = self.config.frames
        tokens, solution = self._decode(each_frame(z, frames), plan, known)
        residual = solution.residual.reshape(len(z), frames).max(axis=1)
        overflows = solution.overflows.reshape(len(z), frames).sum(axis=1)
        return tokens.reshape(z.shape), solution._replace(residual=residual, overflows=overflows)

    def _decode(self, z, plan, known):
        plan = Jacobi(window=1, tol=0.0) if isinstance(plan, Sequential) else plan
        order, free = self.config.order, self.module.num_free
        if known is not None:
            assert order == "raster"
            assert self.config.frames == 1
            solution = self.solve(known, z, plan)
            return solution.x, solution
        v = reorder(z, order)
        solution = self.solve(v[:, :free], v[:, free:], plan)
        return reorder(jnp.concatenate([v[:, :free], solution.x], axis=1), order), solution

    def solve(self, known, z, plan):
        """The solution for the noise z of the tokens after `known`, in the block's order."""
        rows = known.shape[1] - self.module.num_free  # of what the network sees, each for the token after it
        conditioner = Conditioner(
            lambda previous, start, cache: self.window(previous, start + rows, cache), self.module.rewind, self.solved
        )
        first = known[:, -1:] if rows else self.call("first_previous", known)
        solver: Any = solve_moving if isinstance(plan, MovingJacobi) else solve
        return solver(conditioner, first, z, lambda length: self.filled(known, length), plan, self.recent(known))

    def solved(self, count):
        """Tells of solved tokens without waiting for the host."""
        if self.progress is not None:
            jax.debug.callback(self.progress, count)

    def recent(self, known):
        """The last frame of the known tokens, in blocks over several frames; else None."""
        positions = self.config.positions
        if positions is None or positions.frames == 1:
            return None
        period = self.config.num_tokens // positions.frames
        last = known[:, -period:]
        missing = period - last.shape[1]
        return Recent(jnp.pad(last, ((0, 0), (missing, 0), (0, 0))), jnp.asarray(period - missing, jnp.int32))

    def filled(self, known, length):
        """Caches for `length` more tokens behind the condition's prefix and `known`, all of it seen in one pass."""
        rows = known.shape[1] - self.module.num_free
        caches = self.prefill(len(known), rows + length)
        return self.window(self.call("previous", known), 0, caches)[2] if rows else caches

    def encode(self, x):
        """Raster-order noise of tokens by one parallel pass, guidance included: the certificate of `decode`."""
        u = reorder(each_frame(x, self.config.frames), self.config.order)
        free = self.module.num_free
        shift, log_scale, _ = self.window(self.call("previous", u), 0, None)
        z, _ = to_noise(u[:, free:], shift, log_scale)
        return reorder(jnp.concatenate([u[:, :free], z], axis=1), self.config.order).reshape(x.shape)

    def prefill(self, batch, length):
        """Caches for `length` tokens behind the condition's prefix, both branches where guided."""
        branches = 1 if self.guidance is None else 2
        return self.call("prefill", branches * batch, length, self.cond, self.inverse_temperature(batch))

    def inverse_temperature(self, batch):
        if self.guidance is None:
            return None
        dtype = master_dtype(self.config.transformer.dtype)
        return jnp.where(jnp.arange(2 * batch) < batch, 1.0, 1.0 / self.weights[1]).astype(dtype)

    def window(self, previous, start, cache):
        """(shift, log_scale, caches) of the tokens after `previous`, both branches in one pass where guided."""
        if self.guidance is None:
            return self.call("conditioner", previous, start, self.cond, cache, None)
        batch, width = previous.shape[:2]
        scale, _ = self.weights
        both = jnp.concatenate([previous, previous])
        cold = self.inverse_temperature(batch)
        shift, log_scale, cache = self.call("conditioner", both, start, self.cond, cache, cold)
        conditional = shift[:batch], log_scale[:batch]
        unconditional = shift[batch:], log_scale[batch:]
        tokens = start + jnp.arange(width) + self.module.num_free
        ramp = tokens / max(self.config.num_tokens - 1, 1) if self.guidance.anneal else jnp.ones(width)
        weight = (scale * ramp)[:, None].astype(both.dtype)
        if self.guidance.rule == "product":
            return *product_rule(conditional, unconditional, weight), cache
        return *linear_rule(conditional, unconditional, weight, self.guidance.parts), cache
