"""`run`, which executes the compiled programs behind `invert` and `sample`.

Decoding first inverts the last block, in the segments of `flowgen.decoding.layout`, and so maps noise to tokens u. It
then inverts the other blocks to map u to images or, frame by frame, to clips. If frames are given, a forward pass of
the other blocks first maps them to their tokens u. The last block adds these tokens to its caches before it decodes the
next ones.

XLA spends most of the compile time on the loops over tokens, so blocks with the same shape and plan share a program.
Inside the caller's `jit`, decoding becomes part of the caller's program.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from flowgen.backend import WHOLE, check_unmapped, copies, keep_rows, on_first_device, on_own_rows, rows_mesh, settled
from flowgen.decoding.block import guided_block, in_block_order, inverse, last_block
from flowgen.decoding.certificate import error, estimated_error
from flowgen.decoding.denoising import denoised, enter_last_block
from flowgen.decoding.draft import begins_with_draft
from flowgen.decoding.implicit import Tokens
from flowgen.decoding.jacobi import Solution, ignore
from flowgen.decoding.layout import scan_segments
from flowgen.decoding.plan import LowPrecision, rounded_dtypes
from flowgen.decoding.request import DecodeRequest, DecodeResult, SampleKeys
from flowgen.decoding.weights import (
    SomeWeights,
    decoding_weights,
    new_rounded_weights,
    rounded_weights,
    unstacked_weights,
)
from flowgen.flows.block import Variables
from flowgen.flows.decoding_form import decoding_config
from flowgen.flows.density import Flow
from flowgen.flows.orders import without_padding
from flowgen.nn.layers import master_dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Blocks:
    """The blocks' variables for decoding and, for each block, the number of layers in the program that inverts it.

    weights: None for blocks that need only rounded variables. rounded: None for blocks that need no rounded variables.
    """

    weights: SomeWeights
    rounded: SomeWeights
    layers: tuple[int, ...] = field(metadata={"static": True})


@dataclass(frozen=True)
class _Progress:
    """Calls a clip's progress function on the host, with the number of newly solved tokens."""

    function: Callable[[int, int], None]
    total: int

    def __call__(self, count: Array) -> None:
        def report(count):
            jax.debug.callback(lambda n: self.function(int(n), self.total), count)

        on_first_device(report, count)


def run(request: DecodeRequest) -> DecodeResult:
    """Decodes the requested images or clips. The result and its reports are sharded in the same way as the noise.

    If the rows of the noise are sharded over devices, each device decodes its own rows, and its token loop does not
    wait for other devices. Raises ValueError if an array varies over an axis of a `jax.shard_map` with check_vma=True.
    """
    check_unmapped("decoding", request)
    params = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.asarray(x), request.params)
    request = replace(request, params={})
    mesh, axis = rows_mesh(request.rows, params) or (None, None)
    params = copies(params, mesh)
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((params, request)))
    weights = None if traced else _weights(request, params)
    if mesh is None:
        return keep_rows(_run, (params, weights), request)
    result = _run_on_own_rows((params, weights), request, mesh=mesh, axis=axis)
    # The host computes the maximum, because devices that wait for each other need one thread each. Inside jit, the host
    # cannot do so.
    reports = result.sweeps, result.unsolved
    sweeps, unsolved = reports if isinstance(result.sweeps, Tracer) else map(np.asarray, reports)
    return result._replace(sweeps=jnp.asarray(sweeps.max(axis=0)), unsolved=jnp.asarray(unsolved.any(axis=0)))


# The parameters and, unless they are traced, the weights for decoding.
_AllVariables = tuple[Variables, tuple[SomeWeights, SomeWeights] | None]


def _weights(request: DecodeRequest, params: Variables) -> tuple[SomeWeights, SomeWeights]:
    """The cached unrounded and rounded weights of each block; None where its plan does not need them."""
    config, plan = request.flow.config, request.plan
    needed = [not isinstance(block, LowPrecision) or block.polish is not None for block in plan.blocks]
    weights = decoding_weights(config, params) if any(needed) else (None,) * len(needed)
    read = (own if is_needed else None for own, is_needed in zip(weights, needed, strict=True))
    return tuple(read), rounded_weights(config, params, rounded_dtypes(plan))


@partial(jax.jit, static_argnames=("mesh", "axis"))
def _run_on_own_rows(
    variables: _AllVariables, request: DecodeRequest, *, mesh: Mesh, axis: str | tuple
) -> DecodeResult:
    """The result of `_run`, except that `sweeps` and `unsolved` have the shape `devices blocks windows`."""

    leaves, tree = jax.tree.flatten(request)
    rows = jax.tree.leaves(request.by_sample)
    specs = [PartitionSpec(axis) if any(x is row for row in rows) else WHOLE for x in leaves]

    def run_one(variables, leaves):
        result = _run(variables, jax.tree.unflatten(tree, leaves), in_one_program=True)
        return result._replace(sweeps=result.sweeps[None], unsolved=result.unsolved[None])

    return on_own_rows(run_one, mesh, (WHOLE, specs), axis)(variables, leaves)


def _run(variables: _AllVariables, request: DecodeRequest, *, in_one_program: bool = False) -> DecodeResult:
    params, weights = variables
    config, layout = request.flow.config, request.layout
    layers = tuple(block.transformer.num_layers for block in config.blocks)
    if weights is None:  # inside a program that the caller compiles
        rounded = new_rounded_weights(config, params, rounded_dtypes(request.plan))
        weights, in_one_program = (unstacked_weights(config, params), rounded), True
    if in_one_program:
        layers = (sum(layers),) * len(layers)
    blocks = _Blocks(*weights, layers)
    noise, given = _begin(request.with_params(params))
    last = settled(_invert_last_block(request, blocks, noise, given))
    flow, others = request.flow.with_num_frames(layout.total - layout.given), []
    u = layout.frames(last.x, layout.given, layout.total)
    for index in reversed(range(config.num_blocks - 1)):
        others.insert(0, settled(_invert_block(request, blocks, flow, index, u)))
        u = others[0].x
    return _result(request.with_params(params), noise, others, last)


@jax.jit
def _begin(request: DecodeRequest) -> tuple[Float[Array, "b n c"], Float[Array, "b m c"]]:
    """The noise of all frames, and the last block's tokens u of the given frames."""
    noise, given = _noise(request), request.clip.given
    return noise, noise[:, :0] if given is None else enter_last_block(request, jnp.asarray(given))[0]


def _result(
    request: DecodeRequest, noise: Float[Array, "b n c"], others: list[Solution], last: Solution
) -> DecodeResult:
    """The denoised result and the solvers' reports; if the request has `certify`, also the error.

    Result and reports are computed by separate programs, so that a new plan does not recompile the result, which is
    larger.
    """
    finished = settled(_finished(request, noise, [solution.x for solution in others], last.x))
    reports = _reports(*zip(*(solution[1:] for solution in (*others, last)), strict=True))  # without the tokens
    return DecodeResult(**finished, **reports)


@jax.jit
def _finished(
    request: DecodeRequest, noise: Float[Array, "b n c"], others: list[Float[Array, "b later c"]], last: Tokens
) -> dict[str, Any]:
    """The denoised samples, whether they are finite and, if the request has `certify`, their error."""
    layout, given = request.layout, request.clip.given
    u = layout.frames(last, layout.given, layout.total)
    later = request.flow.with_num_frames(layout.total - layout.given)
    x = later.to_images(others[0] if others else u)
    x = x if given is None else jnp.concatenate([given, x], axis=1)
    tokens, clean = [*others, u], denoised(request, x)
    return {
        "x": clean,
        "finite": jnp.isfinite(clean).all(axis=tuple(range(1, clean.ndim))),
        "error": error(request, x, tokens, last, noise) if request.certify else None,
        "error_estimate": estimated_error(request, tokens, last, noise) if request.certify else None,
    }


@jax.jit
def _reports(
    sweeps: tuple[Array, ...], residual: tuple[Array, ...], overflows: tuple[Array, ...], unsolved: tuple[Array, ...]
) -> dict[str, Array]:
    """Combines the reports of the blocks; see `Solution`."""
    width = max(map(len, sweeps))

    def by_window(reports):
        return jnp.stack([jnp.pad(report, (0, width - len(report))) for report in reports])

    return {
        "sweeps": by_window(sweeps),
        "residual": jnp.stack(residual).max(axis=0),
        "overflows": jnp.stack(overflows).sum(axis=0),
        "unsolved": by_window(unsolved),
    }


def _noise(request: DecodeRequest) -> Float[Array, "b n c"]:
    """The noise tokens of all frames; 0 for padding."""
    noise = request.noise if not isinstance(request.noise, SampleKeys) else _drawn(request, request.noise)
    return without_padding(noise, request.cond)


def _drawn(request: DecodeRequest, keys: SampleKeys) -> Float[Array, "b n c"]:
    """Noise with the prior's variance. The first clip and each later frame are drawn with separate keys."""
    flow, layout = request.flow, request.layout
    tokens, channels, per_frame = flow.config.num_tokens, flow.config.token_dim, layout.tokens_per_frame
    master = master_dtype(flow.config.dtype)
    frames = tokens // per_frame
    later = jnp.arange(frames, max(layout.reached, frames))

    def of_sample(index):
        key = jax.random.fold_in(keys.key, index)  # The keys of later frames are derived from it.
        first = jax.random.normal(key, (tokens, channels), master)
        rest = jax.vmap(lambda k: jax.random.normal(k, (per_frame, channels), master))(
            jax.vmap(partial(jax.random.fold_in, key))(later)
        )
        return jnp.concatenate([first, rest.reshape(-1, channels)])[: layout.reached * per_frame]

    variance = flow.apply(request.params, method="prior_variance").reshape(frames, per_frame, channels)
    scale = jnp.sqrt(variance[layout.places]).reshape(1, -1, channels)
    return jax.vmap(of_sample)(keys.indices) * scale


def _invert_last_block(
    request: DecodeRequest, blocks: _Blocks, noise: Float[Array, "b n c"], given: Float[Array, "b m c"]
) -> Solution:
    """The tokens u of all frames, including given ones, and the solver's reports for all segments."""
    layout = request.layout
    if not layout.is_one_segment:
        return _invert_segments(request, blocks, noise, given)
    request, flow, index = last_block(request, layout.segments[0])
    return _invert_block(request, blocks, flow, index, noise, solved=_progress(request))


@jax.jit
def _invert_segments(
    request: DecodeRequest, blocks: _Blocks, noise: Float[Array, "b n c"], u: Float[Array, "b m c"]
) -> Solution:
    layout, solved, reports = request.layout, _progress(request), []
    blocks = replace(blocks, layers=tuple(layers * len(layout.segments) for layers in blocks.layers))
    for part in layout.segments:
        of_part, flow, index = last_block(request, part)

        def segment(context, z, of_part=of_part, flow=flow, index=index):
            solution = _invert_block(of_part, blocks, flow, index, z, context, solved)
            if context is not None:
                context = jnp.concatenate([context, solution.x], axis=1)[:, -context.shape[1] :]
            return context, solution

        context = u[:, -part.context * layout.tokens_per_frame :] if part.context else None
        solution = scan_segments(segment, context, layout.new_tokens(noise, part))
        u = jnp.concatenate([u, layout.in_a_row(solution.x)], axis=1)
        by_window = solution.sweeps.reshape(-1), solution.unsolved.reshape(-1)
        reports.append((*by_window, solution.residual, solution.overflows))
    sweeps, unsolved, residual, overflows = (jnp.concatenate(parts) for parts in zip(*reports, strict=True))
    return Solution(u, sweeps, residual.max(axis=0), overflows.sum(axis=0), unsolved)


def _invert_block(
    request: DecodeRequest,
    blocks: _Blocks,
    flow: Flow,
    index: int,
    z: Float[Array, "b n c"],
    context: Float[Array, "b m c"] | None = None,
    solved: Callable[[Array], None] = ignore,
) -> Solution:
    """The tokens that block `index` of a flow maps to z; see `flowgen.decoding.block.inverse`."""
    config = flow.config.blocks[index]
    plan, layers = request.plan.blocks[index], blocks.layers[index]
    weights, rounded = blocks.weights[index], blocks.rounded[index]
    block = guided_block(request, decoding_config(config), index, weights or {})
    if weights is None:  # No derivatives are taken, so the rounded block can replace the block itself.
        assert rounded is not None
        assert isinstance(plan, LowPrecision)
        block, plan, rounded = block.rounded(rounded, plan.dtype), plan.plan, None
    draft = request.draft if begins_with_draft(plan) else None
    draft = None if draft is None else draft.of_block(index, z, block.cond)
    block, order = in_block_order(config, block)
    return inverse(block, z, order, context, rounded, draft, plan=plan, layers=layers, solved=solved)


def _progress(request: DecodeRequest) -> Callable[[Array], None]:
    """The function to call with the number of tokens that the last block has just solved."""
    layout, function = request.layout, request.clip.progress
    return (
        ignore if function is None else _Progress(function, (layout.reached - layout.given) * layout.tokens_per_frame)
    )
