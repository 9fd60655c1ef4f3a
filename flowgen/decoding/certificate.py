"""The distance of decoded samples from the exact solution: a measured error in noise, and an estimated error in data.

The error in noise is max |forward(x) - z|, which a forward pass measures exactly. A block can turn a small difference
in noise into a large one in data, so the error in data is estimated as well, to first order. Let F be one sweep over
all tokens of a block, x* its solution, and r = F(x) - x. With J = ∂F/∂x, to first order in x* - x,

    x* - x = r + J r + J² r + ... = (I - J)⁻¹ r

An error dz in the block's noise, which was itself decoded, adds (I - J)⁻¹ ∂F/∂z dz. The series has at most n terms,
because J is strictly triangular over the n tokens, but the terms can grow at first. Therefore:

* At most MAX_PRODUCTS products with J are computed. Let q be the larger of the last two ratios of successive terms, in
  the max norm. The omitted terms are estimated by a geometric series with ratio q, whose sum is
  |last term| · q / (1 - q). The first ratio alone is not enough: it is too small if the largest part of r belongs to
  the last token, which affects no other token.
* Relative to the computed sums, the omitted terms of all blocks and segments may add up to at most a third. They are
  included in the estimate. If later ratios are not larger than q, the estimate is between 1 and 2 times the first-order
  error.
* r has rounding errors, so ε |x| is added to its magnitude, where ε is the machine epsilon.
* If the omitted terms are still too large after MAX_PRODUCTS products, the estimate is infinite. An example is a long
  chain x_t = 3 x_{t-1} + z_t, whose terms triple until they reach the last token.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flowgen.backend import any_derivative
from flowgen.decoding.block import GuidedBlock, last_block, stacked_block
from flowgen.decoding.denoising import enter_last_block
from flowgen.decoding.implicit import Linear, Tokens
from flowgen.decoding.layout import scan_segments
from flowgen.decoding.request import DecodeRequest

Later = Float[Array, "b later c"]
Context = Float[Array, "b before c"]

MAX_PRODUCTS = 16  # bounds the cost, at about two passes over all tokens per product
MAX_OMITTED = 1 / 3  # as a part of the result; (1 + 1/3) / (1 - 1/3) = 2


def error(
    request: DecodeRequest, x: Float[Array, "b *event"], tokens: list[Later], last: Tokens, noise: Tokens
) -> Float[Array, " b"]:
    """Returns the largest difference |forward(x) - z| per sample, where z is the given noise.

    With guidance, it is the largest such difference in any single block.

    x: the samples before denoising. tokens: for each block, data side first, the decoded tokens of the frames that were
    not given. last: the last block's tokens of all frames. noise: the noise of all frames.
    """
    found = [_last_block_error(request, x, last, noise)]
    if request.guidance is not None:
        flow = _later_flow(request)
        for index, (x_tokens, z) in enumerate(pairwise(tokens)):
            found.append(jnp.abs(stacked_block(request, flow, index).forward(x_tokens) - z).max(axis=(1, 2)))
    return jnp.stack(found).max(axis=0)


def estimated_error(request: DecodeRequest, tokens: list[Later], last: Tokens, noise: Tokens) -> Float[Array, " b"]:
    """Returns the estimated largest error of each sample's decoded tokens, in data units; infinite if unknown.

    tokens, last, noise: as for `error`.
    """
    layout, flow = request.layout, _later_flow(request)
    solves = sum(part.count for part in layout.segments) + len(tokens) - 1
    change, omitted = _last_block_change(request, last, noise, MAX_OMITTED / solves)
    change = layout.frames(change, layout.given, layout.total)
    for index, (x, z) in reversed(list(enumerate(pairwise(tokens)))):
        block = stacked_block(request, flow, index)
        change, more = _change(block, x, z, (change, None), None, MAX_OMITTED / solves)
        omitted = omitted + more
    size = _size(change) * (1 + omitted)
    return jnp.where(jnp.isnan(size) | jnp.isinf(omitted), jnp.inf, size)


class _Series(NamedTuple):
    """The latest term, the sum so far and, per sample, the last ratio and the omitted terms relative to the sum."""

    term: Tokens
    total: Tokens
    ratio: Float[Array, " b"]
    omitted: Float[Array, " b"]
    settled: Bool[Array, " b"]
    count: Int[Array, ""]


def summed(product: Linear, b: Tokens, most: float) -> tuple[Tokens, Float[Array, " b"]]:
    """Returns a partial sum of b + J b + J² b + ... and, per sample, a bound on the rest, divided by the partial sum.

    The bound holds if the ratio of successive terms does not rise. If the bound still exceeds `most` after MAX_PRODUCTS
    products, infinity is returned instead.

    product: the map v -> J v.
    """

    def unsettled(state: _Series) -> Bool[Array, ""]:
        return (state.count < MAX_PRODUCTS) & ~state.settled.all()

    def step(state: _Series) -> _Series:
        term = product(state.term)
        before, now = _size(state.term), _size(term)
        ratio = jnp.where(now == 0, 0, now / before)
        largest = jnp.maximum(ratio, state.ratio)
        total = jnp.where(state.settled[:, None, None], state.total, state.total + term)
        rest = now * largest / (1 - largest)
        omitted = jnp.where(now == 0, 0, jnp.where(largest < 1, rest / _size(total), jnp.inf))
        omitted = jnp.where(state.settled, state.omitted, omitted)
        return _Series(term, total, ratio, omitted, omitted <= most, state.count + 1)

    unknown = jnp.full(len(b), jnp.inf, b.dtype)
    state = _Series(b, b, unknown, unknown, jnp.zeros(len(b), bool), jnp.asarray(0))
    state = jax.lax.while_loop(unsettled, step, state)
    return state.total, jnp.where(state.settled, state.omitted, jnp.inf)


def _change(
    block: GuidedBlock,
    x: Tokens,
    z: Tokens,
    changes: tuple[Tokens | None, Context | None],
    context: Context | None,
    most: float,
) -> tuple[Tokens, Float[Array, " b"]]:
    """x* - x to first order, and the bound of `summed`. changes: the errors of z and the context; None means 0."""
    with any_derivative():
        swept, product = jax.linearize(lambda x: block.sweep(x, z, context), x)
        r = swept - x
        b = r + jnp.copysign(jnp.finfo(x.dtype).eps * jnp.abs(x), r)
        if any(change is not None for change in changes):
            known = tuple(
                jnp.zeros_like(v) if d is None and v is not None else d
                for v, d in zip((z, context), changes, strict=True)
            )
            b = b + jax.jvp(lambda z, context: block.sweep(x, z, context), (z, context), known)[1]
    return summed(product, b, most)


def _last_block_change(
    request: DecodeRequest, u: Tokens, noise: Tokens, most: float
) -> tuple[Tokens, Float[Array, " b"]]:
    """u* - u to first order for all frames, and the sum of the bounds of `summed` over all segments."""
    layout = request.layout
    change, omitted = jnp.zeros_like(layout.frames(u, 0, layout.given)), jnp.zeros(len(u), u.dtype)
    for part in layout.segments:
        block, before = stacked_block(*last_block(request, part)), part.context * layout.tokens_per_frame

        def segment(of_context, inputs, block=block, before=before):
            tokens, z = inputs
            context = tokens[:, :before] if before else None
            found, rest = _change(block, tokens[:, before:], z, (None, of_context), context, most)
            if of_context is not None:
                of_context = jnp.concatenate([of_context, found], axis=1)[:, -before:]
            return of_context, (found, rest)

        inputs = layout.whole_segments(u, part), layout.new_tokens(noise, part)
        found, rest = scan_segments(segment, change[:, -before:] if before else None, inputs)
        change = jnp.concatenate([change, layout.in_a_row(found)], axis=1)
        omitted = omitted + rest.sum(axis=0)
    return change, omitted


def _last_block_error(
    request: DecodeRequest, x: Float[Array, "b *event"], u: Tokens, noise: Tokens
) -> Float[Array, " b"]:
    """The largest difference, per sample, between `noise` and the noise to which the last block maps its tokens.

    With guidance, these tokens are u. Without guidance, they are computed from the samples x.
    """
    layout, errors = request.layout, []
    seen = u if request.guidance is not None else enter_last_block(request, x)[0]
    seen = jnp.concatenate([seen, u[:, seen.shape[1] :]], axis=1)  # x ends at frame `total`.
    for part in layout.segments:
        block = stacked_block(*last_block(request, part))

        def segment(_, inputs, block=block):
            tokens, z = inputs
            return None, jnp.abs(block.forward(tokens)[:, -z.shape[1] :] - z).max(axis=(1, 2))

        inputs = layout.whole_segments(seen, part), layout.new_tokens(noise, part)
        errors.append(scan_segments(segment, None, inputs).max(axis=0))
    return jnp.stack(errors).max(axis=0)


def _later_flow(request: DecodeRequest):
    """The flow of the frames that were not given."""
    return request.flow.with_num_frames(request.layout.total - request.layout.given)


def _size(v: Tokens) -> Float[Array, " b"]:
    """The max norm of each sample."""
    return jnp.abs(v).max(axis=(1, 2))
