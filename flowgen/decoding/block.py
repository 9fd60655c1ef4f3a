"""One flow block for decoding: it maps noise to tokens and back, optionally with a condition and with guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flowgen.attention import causal_kernel
from flowgen.attention.slices import Start, positions
from flowgen.backend import cache_stages
from flowgen.conditioning import Condition, Padded, split_padded, unconditional
from flowgen.decoding.implicit import back_substitution, with_derivatives
from flowgen.decoding.jacobi import Conditioner, PreviousFrame, Solution, ignore, solve
from flowgen.decoding.layout import Segments
from flowgen.decoding.plan import (
    BlockPlan,
    Jacobi,
    LowPrecision,
    RoundedDtype,
    Sequential,
    SlidingWindow,
    SolverPlan,
    solver_plans,
)
from flowgen.decoding.request import DecodeRequest
from flowgen.decoding.sliding import solve_sliding
from flowgen.decoding.weights import rounded_config
from flowgen.flows.affine import Affine, TokenMaps
from flowgen.flows.block import AutoregressiveBlock, BlockConfig, BlockState, Variables, block_parameters, each_frame
from flowgen.flows.density import Flow
from flowgen.flows.orders import SampleOrder, order_without_padding, permutation, to_order, to_raster
from flowgen.guidance import AffineParameters, Guidance
from flowgen.nn.layers import master_dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GuidedBlock:
    """A block with its variables, condition and guidance.

    cond is None for unconditional blocks, and guidance is None for unguided blocks.
    """

    block: AutoregressiveBlock = field(metadata={"static": True})
    variables: Variables
    cond: Condition | None
    guidance: Guidance | None

    def forward(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Returns the noise z to which the block maps tokens x, in one parallel pass; x and z are in raster order."""
        return self._maps(x).to_noise(x)[0]

    def sweep(
        self, x: Float[Array, "b n c"], z: Float[Array, "b n c"], context: Float[Array, "b m c"] | None = None
    ) -> Float[Array, "b n c"]:
        """Returns shift(x) + exp(log_scale(x)) · z in one parallel pass; this equals x if and only if forward(x) = z.

        context: the tokens before x; see `inverse`.
        """
        if context is None:
            return self._maps(x).to_data(z)
        maps, before = self._maps(jnp.concatenate([context, x], axis=1)), context.shape[1]
        return jax.tree.map(lambda part: part[:, before:], maps).to_data(z)

    @property
    def can_pull_back(self) -> bool:
        """Whether `pull_back` works: its cache needs one slot per token and a dtype other than bfloat16."""
        transformer = self.block.config.transformer
        return causal_kernel(transformer.attention).has_slots and transformer.dtype != "bfloat16"

    def pull_back(
        self, x: Float[Array, "b n c"], z: Float[Array, "b n c"], context: Float[Array, "b m c"] | None, change: Array
    ) -> Float[Array, "b n c"]:
        """Returns the solution v of v = change + Jᵀ v, as `flowgen.decoding.implicit` describes; J is ∂`sweep`/∂x.

        The block's config must be from `decoding_config`.
        """
        frames, passthrough = self.block.config.frames, self.block.num_passthrough
        u, noise, b = (each_frame(part, frames) for part in (x, z, change))
        known = u[:, :passthrough] if context is None else context
        return back_substitution(self.conditioner(known), passthrough, u, noise, b).reshape(x.shape)

    def _maps(self, x: Float[Array, "b n c"]) -> TokenMaps:
        """The maps of all tokens in raster order, with guidance applied; the identity for passthrough tokens."""
        if self.guidance is None:
            return self.block.apply(self.variables, x, self.cond, method="parameters")
        config, passthrough = self.block.config, self.block.num_passthrough
        order = config.order_of(self.cond)
        u = to_order(each_frame(x, config.frames), order)
        rows = self.block.apply(self.variables, u, method="previous")
        maps, _ = self._with_both_conditions().parameters(rows, 0, None)
        padding = ((0, 0), (passthrough, 0), (0, 0))
        return jax.tree.map(lambda part: to_raster(jnp.pad(part, padding), order).reshape(x.shape), maps)

    def conditioner(
        self,
        known: Float[Array, "b m c"],
        stages: int = 1,
        solved: Callable[[Array], None] = ignore,
        draft: Float[Array, "b n c"] | None = None,
    ) -> Conditioner:
        """Returns the `Conditioner` for the tokens after `known`. All tokens are in the block's order.

        draft: proposed tokens after `known`; see `Conditioner`.
        """
        block, variables, both = self.block, self.variables, self._with_both_conditions()
        batch, begin = len(known), known.shape[1] - block.num_passthrough

        def begin_cache(length: int) -> tuple | None:
            """Returns caches that contain the prefix and the known tokens, with room for `length` more tokens."""
            factors = self._inverse_temperature(batch)
            branches = batch if factors is None else 2 * batch
            caches = block.apply(variables, branches, begin + length, both.cond, factors, method="prefill")
            if not begin:
                return caches
            rows = block.apply(variables, known, method="previous")
            return block.accept(caches, both.parameters(rows, 0, caches)[1])

        return Conditioner(
            window=both.parameters,
            rewind=block.rewind,
            accept=lambda before, after, count=None: block.accept(before, after, self._of_branches(count)),
            begin_cache=begin_cache,
            first=known[:, -1:] if begin else block.apply(variables, known, method="first_previous"),
            begin=begin,
            previous_frame=_last_frame(block.config, known),
            draft=draft,
            solved=solved,
            grow=lambda caches, length: block.grow_caches(caches, begin + length),
            stages=stages,
        )

    def rounded(self, variables: Variables, dtype: RoundedDtype) -> GuidedBlock:
        """Returns the block with rounded variables; see `flowgen.decoding.weights.rounded_weights`."""
        return replace(self, block=AutoregressiveBlock(rounded_config(self.block.config, dtype)), variables=variables)

    def parameters(
        self, previous: Float[Array, "b w c"], start: Start, caches: tuple | None
    ) -> tuple[TokenMaps, tuple | None]:
        """Returns the maps of the tokens that follow `previous`, with guidance applied, and the window for `accept`.

        previous: the network's inputs, beginning with row `start`. Both branches of guidance run as one batch, so
        `self.cond` must contain the conditions of both branches. The block's `accept` adds the window's rows to the
        caches of both branches.
        """
        batch, width = previous.shape[:2]
        state = BlockState(self._of_branches(start), caches, self._inverse_temperature(batch))
        rows = self._of_branches(previous)
        maps, window = self.block.apply(self.variables, rows, self.cond, state, method="conditioner")
        if self.guidance is None:
            return maps, window
        tokens = positions(start, width) + self.block.num_passthrough
        mask, _ = split_padded(self.cond)
        count = self.block.config.num_tokens if mask is None else mask[:batch].sum(axis=1)[:, None]
        progress = tokens / jnp.maximum(count - 1, 1)
        shift, log_scale = maps
        conditional: AffineParameters = (shift[:batch], log_scale[:batch])
        unconditional: AffineParameters = (shift[batch:], log_scale[batch:])
        return Affine(*self.guidance.combine(conditional, unconditional, progress[:, :, None])), window

    def _of_branches(self, x: Any) -> Any:
        """With guidance, repeats an array with one row per sample for both branches; otherwise, returns x unchanged."""
        return x if self.guidance is None or x is None or not jnp.ndim(x) else jnp.concatenate([x, x])

    def _with_both_conditions(self) -> GuidedBlock:
        """The block; with guidance, its condition becomes those of both branches, the conditional branch first."""
        if self.guidance is None or self.cond is None:
            return self
        null = unconditional(self.cond, self.guidance.null)
        return replace(self, cond=jax.tree.map(lambda *parts: jnp.concatenate(parts), self.cond, null))

    def _inverse_temperature(self, batch: int) -> Float[Array, " branches"] | None:
        """The factor of the attention logits for each sample and branch; None without guidance."""
        if self.guidance is None:
            return None
        dtype = master_dtype(self.block.config.transformer.dtype)
        return jnp.where(jnp.arange(2 * batch) < batch, 1.0, 1.0 / self.guidance.temperature).astype(dtype)


class Order(NamedTuple):
    """A block's token order as arrays: a flag for reversed raster order, or permutations.

    With padding, each sample has its own permutation; otherwise, all samples share one.
    """

    is_reversed: Bool[Array, ""] | bool = False
    permutation: Int[Array, "#b n"] | None = None

    def of(self, tokens: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Returns tokens in this order; the given tokens are in raster order."""
        return self._applied(tokens, to_order)

    def undone(self, tokens: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Returns tokens in raster order; the given tokens are in this order."""
        return self._applied(tokens, to_raster)

    def _applied(self, tokens: Float[Array, "b n c"], change: Callable[[Array, SampleOrder], Array]) -> Array:
        if self.permutation is None:
            return jnp.where(self.is_reversed, change(tokens, "reversed"), tokens)
        return change(tokens, jnp.asarray(self.permutation))


@partial(jax.jit, static_argnames=("plan", "layers", "solved"))
def inverse(
    guided: GuidedBlock,
    z: Float[Array, "b n c"],
    order: Order,
    context: Float[Array, "b m c"] | None = None,
    rounded: Variables | None = None,
    draft: Float[Array, "b n c"] | None = None,
    *,
    plan: BlockPlan,
    layers: int,
    solved: Callable[[Array], None] = ignore,
) -> Solution:
    """Returns the tokens that the block maps to z, with the solver's reports. Tokens and noise are in raster order.

    The tokens can be differentiated with respect to guided, z and context; see `flowgen.decoding.implicit`.

    guided: a block whose config is from `decoding_config` and whose condition is in the block's order; see
    `in_block_order`.
    order: the block's order; blocks of different orders share this compiled program.
    context: the tokens before the first token to decode; only for blocks in raster order without passthrough tokens.
    rounded: the block's rounded variables, for `LowPrecision`; see `flowgen.decoding.weights`.
    draft: the tokens that a draft proposes, in raster order, for plans with init="draft".
    layers: total number of layers in the compiled program; with more layers, the cache grows in fewer stages.
    solved: a function that is called on the device after each window, with the number of tokens solved in that window.
    """
    block = guided.block
    config, passthrough = block.config, block.num_passthrough

    u = order.of(each_frame(z, config.frames))
    parts = guided, rounded, u, u[:, :passthrough] if context is None else context
    fixed, rounded, tokens, known = jax.lax.stop_gradient(parts)
    noise = tokens[:, passthrough:]
    layers *= len(solver_plans(plan))
    if draft is not None:
        draft = jax.lax.stop_gradient(order.of(each_frame(draft, config.frames))[:, passthrough:])
    stages = cache_stages(noise.shape[1], layers) if block.has_growing_caches else 1
    conditioner = partial(fixed.conditioner, known, stages)
    if isinstance(plan, LowPrecision):
        assert rounded is not None
        cheap = fixed.rounded(rounded, plan.dtype).conditioner(known, stages, solved, draft)
        solution = _polished(plan, cheap, lambda tokens: conditioner(draft=tokens), noise)
    else:
        solution = _solution(plan, conditioner(solved, draft), noise)
    x = jnp.concatenate([tokens[:, :passthrough], solution.x], axis=1).reshape(z.shape)
    x = with_derivatives(guided, x, u.reshape(z.shape), context)
    return Solution(
        x=order.undone(each_frame(x, config.frames)).reshape(z.shape),
        sweeps=solution.sweeps,
        residual=solution.residual.reshape(len(z), config.frames).max(axis=1),
        overflows=solution.overflows.reshape(len(z), config.frames).sum(axis=1),
        unsolved=solution.unsolved,
    )


def _solution(plan: SolverPlan, conditioner: Conditioner, noise: Float[Array, "b n c"]) -> Solution:
    if isinstance(plan, SlidingWindow):
        return solve_sliding(conditioner, noise, plan)
    return solve(conditioner, noise, Jacobi(window=1, tol=0.0) if isinstance(plan, Sequential) else plan)


def _polished(
    plan: LowPrecision, cheap: Conditioner, exact: Callable[[Array], Conditioner], noise: Float[Array, "b n c"]
) -> Solution:
    """Decodes with the cheap conditioner and, unless `plan.polish` is None, repairs the tokens with the exact one.

    exact: returns the exact conditioner, with the given tokens as its draft.
    """
    first = _solution(plan.plan, cheap, noise)
    if plan.polish is None:
        return first
    polished = _solution(replace(plan.polish, init="draft"), exact(first.x), noise)
    return polished._replace(
        sweeps=jnp.concatenate([first.sweeps, polished.sweeps]),
        overflows=first.overflows + polished.overflows,
        unsolved=jnp.concatenate([jnp.zeros_like(first.unsolved), polished.unsolved]),  # The polish repairs the others.
    )


def guided_block(request: DecodeRequest, config: BlockConfig, index: int, variables: Variables) -> GuidedBlock:
    """Returns a block with the request's condition and, if guidance changes block `index`, the request's guidance."""
    guided = request.guidance is not None and index in (request.guidance.blocks or ())
    cond = config.condition(request.cond)
    return GuidedBlock(AutoregressiveBlock(config), variables, cond, request.guidance if guided else None)


def in_block_order(config: BlockConfig, guided: GuidedBlock) -> tuple[GuidedBlock, Order]:
    """Returns the block with its condition in the block's order, and the order itself, for `inverse`.

    config: the config of the block before `decoding_config` replaced its order. guided: the block with its
    `decoding_config`.
    """
    cond, order = guided.cond, config.order
    if isinstance(cond, Padded):
        order = order_without_padding(order, cond.mask)
        mask = jnp.take_along_axis(jnp.asarray(cond.mask), order, axis=1)
        return replace(guided, cond=Padded(mask, cond.cond)), Order(permutation=order)
    if isinstance(order, str):
        return guided, Order(is_reversed=order == "reversed")
    return guided, Order(permutation=jnp.asarray(permutation(order, config.num_tokens))[None])


def stacked_block(request: DecodeRequest, flow: Flow, index: int) -> GuidedBlock:
    """Returns block `index` of a flow for parallel passes over whole sequences."""
    return guided_block(request, flow.config.blocks[index], index, block_parameters(request.params, index))


def block_states(request: DecodeRequest, tokens: Float[Array, "b n c"]) -> list[Float[Array, "b n c"]]:
    """Returns the tokens before the first block and after each block, with guidance applied. Nothing is decoded."""
    states = [tokens]
    for index in range(request.flow.config.num_blocks):
        states.append(_forward(stacked_block(request, request.flow, index), states[-1]))
    return states


@jax.jit
def _forward(guided: GuidedBlock, tokens: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
    return guided.forward(tokens)


def last_block(request: DecodeRequest, part: Segments) -> tuple[DecodeRequest, Flow, int]:
    """Returns the request with these segments' condition, the flow that decodes them, and the last block's index."""
    flow = request.flow.with_num_frames(request.layout.clip)
    return replace(request, cond=request.condition_of(part)), flow, flow.config.num_blocks - 1


def _last_frame(config: BlockConfig, known: Float[Array, "b m c"]) -> PreviousFrame | None:
    """The last frame of the known tokens; None for blocks that model one frame."""
    if config.positions is None or config.positions.frames == 1:
        return None
    tokens = config.num_tokens // config.positions.frames
    last = known[:, -tokens:]
    missing = tokens - last.shape[1]
    return PreviousFrame(jnp.pad(last, ((0, 0), (missing, 0), (0, 0))), jnp.asarray(tokens - missing, jnp.int32))
