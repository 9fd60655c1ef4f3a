"""`run`: the one compiled program behind `invert` and `sample`.

Decoding first inverts the last block, segment by segment, from noise to tokens u. The other blocks then map u to
images, or to frames one by one. If frames are given, a forward pass of the other blocks first maps them to their u. A
pass over this u fills the last block's caches, and decoding continues from there.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from flowgen.backend import WHOLE, check_unmapped, copies, keep_rows, on_first_device, on_own_rows, rows_mesh
from flowgen.decoding.block import GuidedBlock, guided_block
from flowgen.decoding.denoising import denoised, enter_last_block
from flowgen.decoding.jacobi import Solution
from flowgen.decoding.layout import Segments, scan_segments
from flowgen.decoding.request import DecodeRequest, DecodeResult, SampleKeys
from flowgen.flows.block import Variables, block_parameters
from flowgen.flows.density import Flow
from flowgen.nn.layers import master_dtype


def run(request: DecodeRequest) -> DecodeResult:
    """Returns the requested images or clips with reports on their decoding, sharded like their noise.

    If the rows of the noise are divided over devices, each device decodes its own rows: the token loop of one device
    waits for no other. Raises ValueError inside `jax.shard_map`, unless its `check_vma` is False.
    """
    check_unmapped("decoding", request)
    divided = rows_mesh(request.rows, request.params)
    if divided is None:
        return keep_rows(_run, request.params, replace(request, params={}))
    mesh, axis = divided
    result = _run_on_own_rows(copies(request.params, mesh), replace(request, params={}), mesh=mesh, axis=axis)
    # On the host, because devices that wait for each other need a thread each; inside jit there is no host.
    sweeps = result.sweeps if isinstance(result.sweeps, Tracer) else np.asarray(result.sweeps)
    return result._replace(sweeps=jnp.asarray(sweeps.max(axis=0)))


@partial(jax.jit, static_argnames=("mesh", "axis"))
def _run_on_own_rows(params: Variables, request: DecodeRequest, *, mesh: Mesh, axis: str | tuple) -> DecodeResult:
    """The result of `_run`, with the sweeps `devices blocks windows` of every device."""

    leaves, tree = jax.tree.flatten(request)
    rows = jax.tree.leaves(request.by_sample)
    specs = [PartitionSpec(axis) if any(x is row for row in rows) else WHOLE for x in leaves]

    def run_one(params, leaves):
        result = _run(params, jax.tree.unflatten(tree, leaves))
        return result._replace(sweeps=result.sweeps[None])

    return on_own_rows(run_one, mesh, (WHOLE, specs), axis)(params, leaves)


@jax.jit
def _run(params: Variables, request: DecodeRequest) -> DecodeResult:
    request = replace(request, params=params)
    layout, given = request.layout, request.clip.given
    noise = _noise(request)
    last = _invert_last_block(request, noise)
    later = request.flow.with_num_frames(layout.total - layout.given)
    others, errors = _invert_other_blocks(request, later, layout.frames(last.x, layout.given, layout.total))
    x = later.to_images(others[0].x if others else layout.frames(last.x, layout.given, layout.total))
    x = x if given is None else jnp.concatenate([given, x], axis=1)
    if request.certify:
        errors.append(_last_block_error(request, x, last.x, noise))
    clean, solutions = denoised(request, x), [*others, last]
    width = max(len(solution.sweeps) for solution in solutions)
    return DecodeResult(
        x=clean,
        sweeps=jnp.stack([jnp.pad(s.sweeps, (0, width - len(s.sweeps))) for s in solutions]),
        residual=jnp.stack([s.residual for s in solutions]).max(axis=0),
        overflows=jnp.stack([s.overflows for s in solutions]).sum(axis=0),
        finite=jnp.isfinite(clean).all(axis=tuple(range(1, clean.ndim))),
        error=jnp.stack(errors).max(axis=0) if errors else None,
    )


def _noise(request: DecodeRequest) -> Float[Array, "b n c"]:
    """The noise tokens of all frames, given or drawn with one key for the first clip and one for each later frame."""
    keys = request.noise
    if not isinstance(keys, SampleKeys):
        return keys
    flow, layout = request.flow, request.layout
    tokens, channels, per_frame = flow.config.num_tokens, flow.config.token_dim, layout.tokens_per_frame
    master = master_dtype(flow.config.dtype)
    frames = tokens // per_frame
    later = jnp.arange(frames, max(layout.reached, frames))

    def of_sample(index):
        key = jax.random.fold_in(keys.key, index)  # Later frames derive their keys from it.
        first = jax.random.normal(key, (tokens, channels), master)
        rest = jax.vmap(lambda k: jax.random.normal(k, (per_frame, channels), master))(
            jax.vmap(partial(jax.random.fold_in, key))(later)
        )
        return jnp.concatenate([first, rest.reshape(-1, channels)])[: layout.reached * per_frame]

    variance = flow.apply(request.params, method="prior_variance").reshape(frames, per_frame, channels)
    scale = jnp.sqrt(variance[layout.places]).reshape(1, -1, channels)
    return jax.vmap(of_sample)(keys.indices) * scale


def _invert_last_block(request: DecodeRequest, noise: Float[Array, "b n c"]) -> Solution:
    """The tokens u of all frames, given ones included, with the report over all segments."""
    layout, given = request.layout, request.clip.given
    u, reports = noise[:, :0] if given is None else enter_last_block(request, jnp.asarray(given))[0], []
    for part in layout.segments:
        block = _last_block(request, part)

        def segment(context, z, block=block):
            solution = block.inverse(z, request.plan.blocks[-1], context, partial(_tell, request))
            if context is not None:
                context = jnp.concatenate([context, solution.x], axis=1)[:, -context.shape[1] :]
            return context, solution

        context = u[:, -part.context * layout.tokens_per_frame :] if part.context else None
        solution = scan_segments(segment, context, layout.new_tokens(noise, part))
        u = jnp.concatenate([u, layout.in_a_row(solution.x)], axis=1)
        reports.append((solution.sweeps.reshape(-1), solution.residual, solution.overflows))
    sweeps, residual, overflows = (jnp.concatenate(parts) for parts in zip(*reports, strict=True))
    return Solution(u, sweeps, residual.max(axis=0), overflows.sum(axis=0))


def _invert_other_blocks(
    request: DecodeRequest, flow: Flow, u: Float[Array, "b n c"]
) -> tuple[list[Solution], list[Float[Array, " b"]]]:
    """The other blocks' solutions, data side first; also their errors if a guided request is certified."""
    solutions, errors = [], []
    for index in reversed(range(flow.config.num_blocks - 1)):
        block = _block(request, flow, index)
        solution = block.inverse(u, request.plan.blocks[index])
        if request.certify and request.guidance is not None:
            errors.append(jnp.abs(block.forward(solution.x) - u).max(axis=(1, 2)))
        solutions.insert(0, solution)
        u = solution.x
    return solutions, errors


def _last_block_error(
    request: DecodeRequest, x: Float[Array, "b *event"], u: Float[Array, "b n c"], noise: Float[Array, "b n c"]
) -> Float[Array, " b"]:
    """The largest difference, per sample, between `noise` and the noise of the last block's tokens.

    These tokens are u under guidance; otherwise they are computed from the result x.
    """
    layout, errors = request.layout, []
    seen = u if request.guidance is not None else enter_last_block(request, x)[0]
    seen = jnp.concatenate([seen, u[:, seen.shape[1] :]], axis=1)  # x lacks the frames beyond `total`.
    for part in layout.segments:
        block = _last_block(request, part)

        def segment(_, inputs, block=block):
            tokens, z = inputs
            return None, jnp.abs(block.forward(tokens)[:, -z.shape[1] :] - z).max(axis=(1, 2))

        inputs = layout.whole_segments(seen, part), layout.new_tokens(noise, part)
        errors.append(scan_segments(segment, None, inputs).max(axis=0))
    return jnp.stack(errors).max(axis=0)


def _last_block(request: DecodeRequest, part: Segments) -> GuidedBlock:
    """The last block, with the condition for some segments."""
    flow = request.flow.with_num_frames(request.layout.clip)
    return _block(replace(request, cond=request.condition_of(part)), flow, flow.config.num_blocks - 1)


def _block(request: DecodeRequest, flow: Flow, index: int) -> GuidedBlock:
    guidance = request.guidance
    guided = guidance is not None and index in (guidance.blocks or ())
    variables = block_parameters(request.params, index)
    return guided_block(flow.config.blocks[index], variables, request.cond, guidance if guided else None)


def _tell(request: DecodeRequest, count: Array) -> None:
    """Reports newly solved tokens of the last block if the clip has a progress function."""
    layout, progress = request.layout, request.clip.progress
    if progress is not None:
        total = (layout.reached - layout.given) * layout.tokens_per_frame
        on_first_device(lambda count: jax.debug.callback(lambda n: progress(int(n), total), count), count)
