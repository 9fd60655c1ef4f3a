"""Trains a flow to imitate an expert that passes an obstacle on either side, and acts in one compiled loop.

    python examples/policy.py

A point starts at the left and must reach a goal at the right. An obstacle is in between; the expert passes it above or
below, at random. The policy is a flow over chunks of actions `(n, 2)` given the observed position. A policy that
predicts the mean of the expert's actions runs into the obstacle. Acting is one compiled program, a scan over chunks. At
each chunk, the flow is sampled for all environments, and an inner scan executes the actions.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key

import flowgen
from flowgen.batch import Batch
from flowgen.contexts import VectorContext
from flowgen.decoding import sample
from flowgen.flows import TokenFlow, TokenFlowConfig
from flowgen.flows.objective import nll_objective

CHUNK = 4  # actions per decision
SPEED, NOISE = 0.15, 0.01  # length of a step, and the standard deviation of the expert's errors
RADIUS, REACHED = 0.4, 0.2  # of the obstacle at (0, 0), and of the goal
START, GOAL, PASS_AT = -1.0, (1.0, 0.0), 0.7  # the expert passes the obstacle at (0, ±0.7)
# The path around the obstacle has length 2.44, and it may end at the distance REACHED from the goal.
LEAST_CHUNKS = math.ceil((math.hypot(GOAL[0], PASS_AT) + math.hypot(START, PASS_AT) - REACHED) / (CHUNK * SPEED))


class Result(NamedTuple):
    """The result of a run: the shares of successful episodes, and the simulated steps per second of acting."""

    success: float
    of_expert: float
    of_mean: float
    steps_per_second: float


def start(key: Key[Array, ""], num: int) -> Float[Array, "num 2"]:
    """Returns the initial positions of episodes."""
    return jnp.stack([jnp.full(num, START), jax.random.uniform(key, (num,), minval=-0.05, maxval=0.05)], axis=1)


def expert(key: Key[Array, ""], positions: Float[Array, "b 2"]) -> Float[Array, "b n 2"]:
    """Returns a chunk of the expert's actions, in units of `SPEED`."""
    side_key, noise_key = jax.random.split(key)
    chosen = jax.random.rademacher(side_key, (len(positions),), jnp.float32)
    side = jnp.where(jnp.abs(positions[:, 1]) < 0.1, chosen, jnp.sign(positions[:, 1]))

    def act(position, key):
        passing = jnp.stack([jnp.zeros_like(side), PASS_AT * side], axis=1)
        aim = jnp.where(position[:, :1] < -0.05, passing, jnp.array([GOAL]))
        away = aim - position
        distance = jnp.linalg.norm(away, axis=1, keepdims=True)
        step = away * jnp.minimum(1, SPEED / jnp.maximum(distance, 1e-6))
        step = step + NOISE * jax.random.normal(key, step.shape)
        return position + step, step / SPEED

    return jax.lax.scan(act, positions, jax.random.split(noise_key, CHUNK))[1].swapaxes(0, 1)


def episodes(policy: Any, key: Key[Array, ""], num: int, chunks: int) -> tuple[Array, Array, Bool[Array, " num"]]:
    """Returns the observed positions `chunks num 2`, the chunks of actions, and which episodes succeeded.

    policy: a function (key, positions) -> chunks of actions.
    """

    def move(state, action):
        position, failed, reached = state
        position = position + SPEED * action
        failed |= (jnp.linalg.norm(position, axis=1) < RADIUS) & ~reached
        reached |= (jnp.linalg.norm(position - jnp.array([GOAL]), axis=1) < REACHED) & ~failed
        return (position, failed, reached), None

    def decide(state, key):
        observed = state[0]
        actions = policy(key, observed)
        state, _ = jax.lax.scan(move, state, actions.swapaxes(0, 1))
        return state, (observed, actions)

    start_key, key = jax.random.split(key)
    nowhere = jnp.zeros(num, bool)
    state = start(start_key, num), nowhere, nowhere
    (_, _, reached), (observed, actions) = jax.lax.scan(decide, state, jax.random.split(key, chunks))
    return observed, actions, reached


@partial(jax.jit, static_argnames=("flow", "steps", "batch", "learning_rate"))
def train(
    params: Any,
    key: jax.Array,
    observed: Array,
    actions: Array,
    *,
    flow: TokenFlow,
    steps: int,
    batch: int,
    learning_rate: float,
) -> Any:
    """Returns parameters trained to predict the expert's chunks of actions from its observations."""
    objective, optimizer = nll_objective(flow), optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def step(state, key):
        params, moments = state
        rows_key, noise_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (batch,), 0, len(observed))
        slope = jax.grad(lambda params: objective(params, Batch(actions[rows], observed[rows]), noise_key)[0])(params)
        updates, moments = optimizer.update(slope, moments)
        return (optax.apply_updates(params, updates), moments), None

    return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))[0][0]


@partial(jax.jit, static_argnames=("flow", "num", "chunks", "draws"))
def act(params: Any, key: jax.Array, *, flow: TokenFlow, num: int, chunks: int, draws: int = 1) -> Bool[Array, " num"]:
    """Returns which episodes of the flow's policy succeed. draws: number of samples whose mean the policy executes."""

    def policy(key, positions):
        drawn = sample(flow, params, key, num * draws, jnp.repeat(positions, draws, axis=0), plan="sequential").x
        return drawn.reshape(num, draws, CHUNK, 2).mean(axis=1)

    return episodes(policy, key, num, chunks)[2]


def main(arguments: Sequence[str] | None = None) -> Result:
    """Trains the policy, runs it, prints the result and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demonstrations", type=int, default=2000, help="episodes of the expert (default: 2000)")
    parser.add_argument("--steps", type=int, default=2000, help="training steps (default: 2000)")
    parser.add_argument("--batch", type=int, default=256, help="decisions per training step (default: 256)")
    parser.add_argument("--width", type=int, default=32, help="channels of a token in the flow (default: 32)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="initial learning rate (default: 0.002)")
    parser.add_argument("--environments", type=int, default=256, help="episodes of the policy at a time (default: 256)")
    parser.add_argument("--chunks", type=int, default=6, help="decisions per episode (default: 6)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    asked = parser.parse_args(arguments)
    if asked.chunks < LEAST_CHUNKS:
        parser.error(
            f"--chunks is {asked.chunks}, but the goal is {GOAL[0] - START:g} away and a decision moves the point by "
            f"{CHUNK * SPEED:g}; give at least {LEAST_CHUNKS}."
        )
    data_key, init_key, train_key, first_key, act_key, mean_key = jax.random.split(jax.random.key(asked.seed), 6)
    observed, actions, reached = jax.jit(episodes, static_argnums=(0, 2, 3))(
        expert, data_key, asked.demonstrations, asked.chunks
    )
    flow = TokenFlow(
        TokenFlowConfig(
            shape=(CHUNK, 2), width=asked.width, num_blocks=4, layers_per_block=1, context=VectorContext(dim=2)
        )
    )
    params = train(
        flowgen.init(flow, init_key),
        train_key,
        observed.reshape(-1, 2),
        actions.reshape(-1, CHUNK, 2),
        flow=flow,
        steps=asked.steps,
        batch=asked.batch,
        learning_rate=asked.learning_rate,
    )
    run = partial(act, params, flow=flow, num=asked.environments, chunks=asked.chunks)
    jax.block_until_ready(run(first_key))  # compiles
    began = time.perf_counter()
    succeeded = jax.block_until_ready(run(act_key))
    rate = asked.environments * asked.chunks * CHUNK / (time.perf_counter() - began)
    of_mean = run(mean_key, draws=16)
    result = Result(float(succeeded.mean()), float(reached.mean()), float(of_mean.mean()), rate)
    print(f"successful episodes: {result.success:.3f} of the policy, {result.of_expert:.3f} of the expert")
    print(f"successful episodes if the policy executes the mean of 16 samples: {result.of_mean:.3f}")
    print(f"{result.steps_per_second:,.0f} steps per second in {asked.environments} environments")
    return result


if __name__ == "__main__":
    main()
