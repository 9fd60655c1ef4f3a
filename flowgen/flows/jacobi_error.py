"""A penalty that trains the blocks of a flow to need fewer Jacobi sweeps in parallel decoding.

Decoding a block repeats the sweep F(y) = shift(y) + exp(log_scale(y)) · z, from y = z until it reaches y = x, the
tokens that the block maps to the noise z. In training, x and z are both known, so the error after any number of sweeps
is known too. Let y_0 = z and y_k = F(y_{k-1}). The penalty is

    weight · mean over blocks and samples of log rms(y_K - x),

where K is the number of sweeps, and rms is the root mean square over the tokens of a sample. The gradient flows only
through the last sweep, not into y_{K-1}, x or z, as in Jacobi Forcing (arXiv 2512.14681) for language models. Because
of the logarithm, halving the error lowers the penalty by the same amount, whether the error is large or small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowgen.backend import keep_rows
from flowgen.conditioning import Condition, split_padded
from flowgen.flows.affine import Affine
from flowgen.flows.block import AutoregressiveBlock, BlockConfig, Variables, block_parameters
from flowgen.flows.density import Flow
from flowgen.flows.orders import without_padding
from flowgen.settings import FieldError, config, in_group
from flowgen.settings.ranges import MAX_BLOCKS, Count, CountOrZero, Entries, Positive

# The square of this error is added to the mean square error, because smaller errors are not worth another sweep.
SOLVED = 1e-3
# Iterates are clipped to this limit, far beyond the tokens of any block, whose variance is about 1.
DIVERGED = 1e3
# With larger log scales, exp overflows, and a clipped token would have the gradient 0 · inf.
MOST_LOG_SCALE = 40.0


@config
class JacobiPenalty:
    """A penalty on the error that remains after a few sweeps of Jacobi decoding; see `flowgen.flows.jacobi_error`.

    weight: weight of the penalty in the loss, which is in nats per dimension; positive.
    sweeps: number of sweeps after which the error is measured; each sweep costs a forward pass of the penalised blocks
    in every training step.
    blocks: indices of the penalised blocks, counted from 0 at the data side; None for all blocks.

    Example:
        objective = nll_objective(flow, jacobi=JacobiPenalty(weight=0.05, sweeps=5, blocks=(3,)))
    """

    weight: Positive = 0.05
    sweeps: Count = 5
    blocks: Annotated[tuple[CountOrZero, ...], Entries(1, MAX_BLOCKS)] | None = None

    def numbers(self, num_blocks: int) -> tuple[int, ...]:
        """Returns the numbers of the penalised blocks of a flow. Raises FieldError if the flow lacks one of them."""
        numbers = tuple(range(num_blocks)) if self.blocks is None else self.blocks
        if max(numbers) >= num_blocks:
            raise FieldError(
                f"blocks contains {max(numbers)}, but this flow has blocks 0 to {num_blocks - 1}; give some of these, "
                "or none to penalise all."
            )
        return numbers


def jacobi_penalty(
    flow: Flow,
    variables: Variables,
    x: Float[Array, "b *event"],
    states: Sequence[Float[Array, "b n token"]],
    cond: Condition | None,
    penalty: JacobiPenalty,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Returns the weighted penalty, and the metrics jacobi_error/<block>: rms(y_K - x), averaged over samples.

    states: the tokens after each block, for samples x.

    Raises ValueError if the flow lacks one of the blocks.

    Example:
        states, _ = flow.apply(params, x, cond, method="trajectory")
        loss, metrics = jacobi_penalty(flow, params, x, states, cond, JacobiPenalty())
    """
    cond, blocks = flow.config.check_cond(cond, len(x)), flow.config.blocks
    tokens = without_padding(flow.config.to_tokens(x).astype(states[0].dtype), cond)
    entering, errors = [tokens, *states[:-1]], {}
    with in_group("jacobi"):
        numbers = penalty.numbers(len(blocks))
    for index in numbers:
        of_block, tokens, z = block_parameters(variables, index), entering[index], states[index]
        errors[index] = jacobi_error(blocks[index], of_block, tokens, z, cond, penalty.sweeps)
    metrics = {f"jacobi_error/{index}": error.mean() for index, error in errors.items()}
    return penalty.weight * jnp.log(jnp.stack(list(errors.values()))).mean(), metrics


def jacobi_error(
    block: BlockConfig,
    variables: Variables,
    x: Float[Array, "b n c"],
    z: Float[Array, "b n c"],
    cond: Condition | None,
    sweeps: int,
) -> Float[Array, " b"]:
    """Returns rms(y_K - x) of each sample, at least 0.001; y_K are the tokens after K sweeps from y_0 = z.

    variables: the block's variables. sweeps: K.

    Example:
        error = jacobi_error(flow.config.blocks[0], block_parameters(params, 0), tokens, z, cond, sweeps=5)
    """
    module = AutoregressiveBlock(block)

    def of_rows(variables, x, z, cond):
        def sweep(variables, y):
            maps = module.apply(variables, y, cond, method="parameters")
            if isinstance(maps, Affine):
                maps = maps._replace(log_scale=jnp.minimum(maps.log_scale, MOST_LOG_SCALE))
            return _bounded(maps.to_data(z))

        fixed = jax.lax.stop_gradient(variables)
        y, _ = jax.lax.scan(lambda y, _: (sweep(fixed, y), None), z, length=sweeps - 1)
        error = sweep(variables, jax.lax.stop_gradient(y)) - x  # 0 for padding
        mask, _ = split_padded(cond)
        count = x.shape[1] if mask is None else jnp.maximum(mask.sum(axis=1), 1)
        return jnp.sqrt(jnp.square(error).mean(axis=2).sum(axis=1) / count + SOLVED**2)

    return keep_rows(of_rows, variables, *jax.lax.stop_gradient((x, z)), cond)


def _bounded(y: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
    """Clips y to ±DIVERGED and replaces NaN by 0."""
    return jnp.clip(jnp.nan_to_num(y, nan=0.0), -DIVERGED, DIVERGED)
