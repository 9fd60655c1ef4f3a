"""Fits a flow to sets of points whose density is known, and compares the held-out likelihood with the exact one.

    python examples/point_sets.py

A set has 2 to 6 points around a random centre m ~ N(0, I). Given m, each point is drawn from a ring: a mixture of four
Gaussians at m + r_k. The points are therefore independent given m, but dependent if m is unknown. The exact density of
a set integrates m out on a grid:

    p(x_1, ..., x_n) = ∫ N(m; 0, I) Π_i ¼ Σ_k N(x_i; m + r_k, s² I) dm

Sets are padded to 6 rows. The density of a set is the density of its points, in the order in which they are drawn,
given their number.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Key

import flowgen
from flowgen.batch import Batch
from flowgen.conditioning import Padded
from flowgen.evaluation import Estimate, mean_of
from flowgen.flows import TokenFlow, TokenFlowConfig
from flowgen.flows.objective import nll_objective
from flowgen.transforms import MixtureMap

LEAST, MOST = 2, 6  # points in a set
RING = np.array([(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)], np.float32)
STD = 0.3
# A posterior of m has a standard deviation of at least 0.12 along each axis, for which this step is exact to 1e-6.
EDGE, GRID = 5.0, 81


class Result(NamedTuple):
    """The negative log-likelihood of held-out sets, in nats per set. difference: flow - exact, an estimate of the KL
    divergence.
    """

    flow: Estimate
    exact: Estimate
    difference: Estimate


def draw(key: Key[Array, ""], num: int) -> tuple[Float[Array, "num n 2"], Bool[Array, "num n"]]:
    """Returns sets of points, padded with zeros, and the mask that is True for points."""
    size_key, centre_key, ring_key, noise_key = jax.random.split(key, 4)
    mask = jnp.arange(MOST)[None] < jax.random.randint(size_key, (num, 1), LEAST, MOST + 1)
    centre = jax.random.normal(centre_key, (num, 1, 2))
    places = jnp.asarray(RING)[jax.random.randint(ring_key, (num, MOST), 0, len(RING))]
    points = centre + places + STD * jax.random.normal(noise_key, (num, MOST, 2))
    return jnp.where(mask[..., None], points, 0), mask


@jax.jit
def exact_log_prob(points: Float[Array, "b n 2"], mask: Bool[Array, "b n"]) -> Float[Array, " b"]:
    """Returns log p of each set in nats, integrated over the centre by the trapezoidal rule."""
    axis = jnp.linspace(-EDGE, EDGE, GRID)
    centres = jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    log_prior = -0.5 * jnp.square(centres).sum(axis=1) - math.log(2 * math.pi)
    log_cell = 2 * math.log(2 * EDGE / (GRID - 1))

    def one(inputs):
        points, mask = inputs
        means = centres[:, None] + jnp.asarray(RING)[None]  # grid k 2
        squares = jnp.square(points[None, :, None] - means[:, None]).sum(axis=-1)  # grid n k
        log_ring = jax.nn.logsumexp(-0.5 * squares / STD**2, axis=2) - math.log(len(RING) * 2 * math.pi * STD**2)
        return jax.nn.logsumexp(log_prior + jnp.where(mask[None], log_ring, 0).sum(axis=1)) + log_cell

    return jax.lax.map(one, (points, mask))


@partial(jax.jit, static_argnames=("flow", "steps", "batch", "learning_rate"))
def train(params: Any, key: jax.Array, *, flow: TokenFlow, steps: int, batch: int, learning_rate: float) -> Any:
    """Returns the parameters after training with new sets at every step."""
    objective, optimizer = nll_objective(flow), optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def step(state, key):
        params, moments = state
        draw_key, noise_key = jax.random.split(key)
        points, mask = draw(draw_key, batch)
        slope = jax.grad(lambda params: objective(params, Batch(points, Padded(mask)), noise_key)[0])(params)
        updates, moments = optimizer.update(slope, moments)
        return (optax.apply_updates(params, updates), moments), None

    return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))[0][0]


def main(arguments: Sequence[str] | None = None) -> Result:
    """Trains a flow, prints the result and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="training steps (default: 3000)")
    parser.add_argument("--batch", type=int, default=128, help="sets per training step (default: 128)")
    parser.add_argument("--width", type=int, default=32, help="channels of a token in the flow (default: 32)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="initial learning rate (default: 0.002)")
    parser.add_argument("--held-out", type=int, default=500, help="sets for the comparison (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    asked = parser.parse_args(arguments)
    flow = TokenFlow(
        TokenFlowConfig(
            shape=(MOST, 2),
            padded=True,
            width=asked.width,
            num_blocks=3,
            layers_per_block=2,
            mixture=MixtureMap(components=6),
        )
    )
    init_key, train_key, held_key = jax.random.split(jax.random.key(asked.seed), 3)
    params = train(
        flowgen.init(flow, init_key),
        train_key,
        flow=flow,
        steps=asked.steps,
        batch=asked.batch,
        learning_rate=asked.learning_rate,
    )
    points, mask = draw(held_key, asked.held_out)
    of_flow = -np.asarray(flow.apply(params, points, Padded(mask), method="log_prob"), np.float64)
    exact = -np.asarray(exact_log_prob(points, mask), np.float64)
    result = Result(mean_of(of_flow), mean_of(exact), mean_of(of_flow - exact))
    print(f"nats per set: {result.flow} of the flow, {result.exact} exactly; difference {result.difference}")
    return result


if __name__ == "__main__":
    main()
