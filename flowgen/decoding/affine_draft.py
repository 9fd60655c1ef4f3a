"""Fits a draft, a cheap guess of a block's tokens, as an affine map of the noise by ridge regression.

In a block's order, token t depends only on the noise of the tokens 0..t. The draft has the same dependencies, and a
bias per label:

    u_t = b_t(label) + Σ_{s≤t} W_ts z_s

Let each row of F contain one sample's features [label, z], and each row of U its tokens. Let A = FᵀF + λI and B = FᵀU.
A regression on the first m features needs only the leading m × m block of A. With the Cholesky factor L of A, the
weights of all tokens are therefore W = L⁻ᵀ M(L⁻¹ B), where M sets the rows s > t in the columns of token t to 0.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flowgen.arrays import check_floating
from flowgen.conditioning import AnyCondition, Condition, Padded
from flowgen.decoding.block import block_states
from flowgen.decoding.draft import Draft
from flowgen.decoding.request import decode_request
from flowgen.flows.block import BlockConfig, Variables
from flowgen.flows.density import Flow, FlowConfig, check_flow
from flowgen.flows.orders import permutation
from flowgen.guidance import Guidance
from flowgen.nn.embeddings import class_one_hot
from flowgen.nn.layers import master_dtype

# The ridge, relative to the mean of the normal matrix' diagonal.
RIDGE = 0.01
# The weights of a block are a matrix of this size at most, about 64 MiB.
MOST_DIMS = 4096
ROWS = 256


def fit_affine_draft(
    flow: Flow,
    params: Variables,
    x: Float[Array | np.ndarray, "b *event"],
    cond: AnyCondition | None = None,
    *,
    guidance: Guidance | None = None,
) -> Draft:
    """Returns a draft that computes each block's tokens as an affine function of the block's noise and the class label.

    The draft ignores any condition that is not a label, such as a text. Encoding x yields every block's noise and
    tokens, to which the function is fitted in closed form. Evaluating the function takes one matrix product, which is
    cheaper than a network pass in most flows.

    x: a few thousand samples, with the condition `cond`: drawn from the flow without denoising, or from its training
    data with the training noise added.
    guidance: the guidance with which the draft will be used.

    Raises ValueError if x, cond or guidance does not fit the flow, if x is empty, if cond is `Padded`, or if a block
    maps more than 4096 values (tokens times channels) together.

    Example:
        draft = fit_affine_draft(flow, params, x, labels)
        r = sample(flow, params, jax.random.key(0), 16, cond, plan=SlidingWindow(init="draft"), draft=draft)
    """
    check_flow(flow, params)
    check_floating("x", x)
    config = flow.config
    config.check_samples(x)
    if not len(x):
        raise ValueError("x is empty; give a few thousand samples.")
    _check_sizes(config)
    params = jax.tree.map(jnp.asarray, params)
    cond = config.check_cond(cond, len(x))
    if isinstance(cond, Padded):
        raise ValueError("cond is Padded, but an affine draft needs samples without padding; use another draft.")
    sums: list[Any] = [None] * config.num_blocks
    for begin in range(0, len(x), ROWS):
        rows = slice(begin, begin + ROWS)
        tokens = config.to_tokens(jnp.asarray(x[rows], master_dtype(config.dtype)))
        of_rows = jax.tree.map(lambda leaf, rows=rows: leaf[rows], cond)
        states = block_states(decode_request(flow, params, tokens, of_rows, "sequential", guidance), tokens)
        for index, block in enumerate(config.blocks):
            sums[index] = _added(block, sums[index], states[index], states[index + 1], of_rows)
    return Draft(affine_tokens, tuple(map(_weights, config.blocks, sums)))


def affine_tokens(
    weights: Float[Array, "features dims"], noise: Float[Array, "b n c"], cond: Condition | None
) -> Float[Array, "b n c"]:
    """Returns the proposed tokens; the function of the draft that `fit_affine_draft` returns."""
    features, dims = weights.shape
    return (_features(noise, cond, features - dims, dims) @ weights).reshape(noise.shape)


def _check_sizes(config: FlowConfig) -> None:
    for index, block in enumerate(config.blocks):
        dims = block.num_tokens * block.token_dim
        if dims > MOST_DIMS:
            raise ValueError(
                f"flow is too large for an affine draft: block {index} maps {dims} values together, and the limit is "
                f"{MOST_DIMS}; write a Draft of your own."
            )


def _features(
    noise: Float[Array, "b n c"], cond: Condition | None, labels: int, dims: int
) -> Float[Array, "b_and_frames features"]:
    """The one-hot label, whose last feature means "none", and the noise; one row per sequence that the block maps."""
    rows = noise.reshape(-1, dims)
    cond = None if isinstance(cond, tuple) else cond
    label = class_one_hot(cond, labels - 1, len(noise), noise.dtype)
    return jnp.concatenate([jnp.repeat(label, len(rows) // len(noise), axis=0), rows], axis=1)


@partial(jax.jit, static_argnums=0)
def _added(
    config: BlockConfig,
    sums: tuple[Array, Array] | None,
    tokens: Float[Array, "b n c"],
    noise: Float[Array, "b n c"],
    cond: Condition | None,
) -> tuple[Float[Array, "features features"], Float[Array, "features dims"]]:
    """The sums FᵀF and FᵀU of the module's docstring, with these samples added."""
    dims = config.num_tokens * config.token_dim
    classes = config.num_classes or getattr(config.prefix, "num_classes", 0)
    features = _features(noise, cond if config.is_conditional else None, classes + 1, dims)
    products = jnp.concatenate([features, tokens.reshape(-1, dims)], axis=1)
    added = jnp.einsum("bf,bp->fp", features, products, precision="highest")
    new = added[:, : features.shape[1]], added[:, features.shape[1] :]
    return new if sums is None else (sums[0] + new[0], sums[1] + new[1])


@partial(jax.jit, static_argnums=0)
def _weights(
    config: BlockConfig, sums: tuple[Float[Array, "features features"], Float[Array, "features dims"]]
) -> Float[Array, "features dims"]:
    """The weights W of the module's docstring."""
    normal, products = sums
    features, dims = products.shape
    place = jnp.repeat(np.argsort(permutation(config.order, config.num_tokens)), config.token_dim)
    place = jnp.concatenate([jnp.full(features - dims, -1), place])
    order = jnp.argsort(place)  # features, first those of the labels and then the noise in the block's order
    normal = normal[order][:, order]
    normal = normal + RIDGE * jnp.trace(normal) / features * jnp.eye(features, dtype=normal.dtype)
    lower = jnp.linalg.cholesky(normal)
    solve = partial(jax.scipy.linalg.solve_triangular, lower, lower=True)
    visible = place[order][:, None] <= place[features - dims :][None]
    weights = solve(jnp.where(visible, solve(products[order]), 0), trans="T")
    return weights[jnp.argsort(order)]
