"""Fits a flow to the many-well energy by reverse KL, without data, and compares its log Z with the exact value.

    python examples/many_well.py
    python examples/many_well.py --dim 32 --steps 800 --samples 10000

Reverse KL alone finds only some of the modes. The flow therefore learns p^β, where β grows from 0.05 to 1 during the
first half of the steps. The barriers between the modes of p^0.05 are low.

All training steps are compiled into one program. The report contains the error of log Z and two effective sample sizes:
of the flow's samples and of exact samples. Both should be near 1. The latter is small if the flow has missed a mode.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import flowgen
from flowgen import inference
from flowgen.flows import TokenFlow, TokenFlowConfig
from flowgen.transforms import MixtureMap

FIRST_BETA = 0.05


class Result(NamedTuple):
    """The result of a run. ess, forward_ess: the effective sample sizes of the flow's and of exact samples, as shares
    of the samples. log_z_error: in nats. loss: at the last step.
    """

    ess: float
    forward_ess: float
    log_z_error: float
    standard_error: float
    loss: float
    seconds: float


def make_flow(dim: int, width: int) -> TokenFlow:
    """Returns a flow for vectors whose blocks map each coordinate by a mixture, which models both wells at once."""
    return TokenFlow(
        TokenFlowConfig(
            shape=(dim,), group=2, width=width, num_blocks=2, layers_per_block=1, mixture=MixtureMap(components=4)
        )
    )


@partial(jax.jit, static_argnames=("flow", "target", "steps", "batch", "learning_rate"))
def train(
    params: Any,
    key: jax.Array,
    *,
    flow: TokenFlow,
    target: inference.ManyWell,
    steps: int,
    batch: int,
    learning_rate: float,
) -> tuple[Any, jax.Array]:
    """Returns the trained parameters and the loss of each step."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    )

    def step(state, at):
        (params, moments), (key, beta) = state, at

        def loss(params):
            return inference.reverse_kl(
                flow, params, key, batch, lambda x: beta * target.log_density(x), plan="sequential"
            )

        slope, metrics = jax.grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(slope, moments)
        return (optax.apply_updates(params, updates), moments), metrics["loss"]

    tempered = steps // 2
    betas = jnp.concatenate([jnp.geomspace(FIRST_BETA, 1, tempered), jnp.ones(steps - tempered)])
    at = (jax.random.split(key, steps), betas)
    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), at)
    return params, losses


def main(arguments: Sequence[str] | None = None) -> Result:
    """Trains a flow, prints the result and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=8, help="coordinates of a sample, an even number (default: 8)")
    parser.add_argument("--steps", type=int, default=1500, help="training steps (default: 1500)")
    parser.add_argument("--batch", type=int, default=128, help="samples per training step (default: 128)")
    parser.add_argument("--width", type=int, default=32, help="channels of a token in the flow (default: 32)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="initial learning rate (default: 0.003)")
    parser.add_argument("--samples", type=int, default=2000, help="samples for the report (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    asked = parser.parse_args(arguments)
    for name in ("steps", "batch", "width", "samples"):
        if getattr(asked, name) < 1:
            parser.error(f"--{name} is {getattr(asked, name)}; give at least 1.")
    if asked.dim < 2 or asked.dim % 2:
        parser.error(f"--dim is {asked.dim}; give an even number of at least 2, because each well has two coordinates.")
    target, flow = inference.ManyWell(asked.dim), make_flow(asked.dim, asked.width)
    init_key, train_key, sample_key, exact_key = jax.random.split(jax.random.key(asked.seed), 4)
    began = time.perf_counter()
    params, losses = train(
        flowgen.init(flow, init_key),
        train_key,
        flow=flow,
        target=target,
        steps=asked.steps,
        batch=asked.batch,
        learning_rate=asked.learning_rate,
    )
    losses = jax.device_get(losses)
    seconds = time.perf_counter() - began
    drawn = inference.importance_sample(flow, params, sample_key, asked.samples, target.log_density)
    exact = target.sample(exact_key, asked.samples)
    of_exact = target.log_density(exact) - inference.flow_log_density(flow, params)(exact)
    log_z, error = inference.log_normaliser(drawn.log_weight)
    result = Result(
        ess=float(inference.effective_sample_size(drawn.log_weight)),
        forward_ess=float(inference.forward_effective_sample_size(of_exact)),
        log_z_error=float(log_z) - target.log_normaliser,
        standard_error=float(error),
        loss=float(losses[-1]),
        seconds=seconds,
    )
    print(f"{asked.dim} dimensions, {asked.steps} steps, {seconds:.0f} s with compilation")
    print(f"ess {result.ess:.3f} of the flow's samples, {result.forward_ess:.3f} of exact samples")
    print("Both should be near 1. A small ess of exact samples means that the flow has missed modes.")
    print(f"log Z - exact {result.log_z_error:.3f} ± {result.standard_error:.3f} nats")
    return result


if __name__ == "__main__":
    main()
