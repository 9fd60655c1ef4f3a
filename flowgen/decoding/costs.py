"""The time of a network pass, calculated from its FLOP, memory traffic and kernel launches.

A pass takes at least as long as the device needs for the matrix products at peak throughput, or for reading the
weights, the cache and the activations once, whichever is longer (the roofline). Each kernel launch adds a fixed time.
For few rows, most of the time is spent on reading the weights and launching kernels. A pass over a window of tokens
then takes about as long as a pass over a single token.

To choose a plan for a device that you do not have, call `tune(..., cost=predicted_cost(...))`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flowgen.arrays import check_count
from flowgen.backend import MACHINES, cache_stages
from flowgen.counting import flop_of, kernels_of, traffic_of
from flowgen.decoding.plan import Sequential, SolverPlan
from flowgen.flows.block import AutoregressiveBlock, BlockConfig, BlockState
from flowgen.flows.decoding_form import decoding_config, decoding_variables
from flowgen.flows.density import Flow
from flowgen.nn.layers import master_dtype
from flowgen.settings import config
from flowgen.settings.ranges import NonNegative, Positive

# The time between kernels that a GPU runs from one recorded graph, in seconds. It is an assumption of the calculation;
# CUDA graphs need about one to three microseconds per kernel.
LAUNCH_SECONDS = 2e-6


@config
class DeviceSpeed:
    """The hardware limits of a device that determine the calculated time of a pass.

    flop_per_second: peak throughput of matrix products in the flow's dtype.
    bytes_per_second: bandwidth of the memory.
    launch_seconds: fixed overhead per kernel.

    Example:
        speed = DeviceSpeed(flop_per_second=989e12, bytes_per_second=3.35e12)
    """

    flop_per_second: Positive
    bytes_per_second: Positive
    launch_seconds: NonNegative = LAUNCH_SECONDS


class PassCost(NamedTuple):
    """The work of one network pass of a block, counted from shapes.

    flop: FLOP of the matrix products. traffic: bytes that the products read and write. kernels: estimated number of
    kernel launches.

    Example:
        seconds = pass_cost(flow.config.blocks[0], rows=8, window=32).seconds(speed)
    """

    flop: float
    traffic: float
    kernels: int

    def roofline(self, speed: DeviceSpeed) -> float:
        """Returns the minimum time of the pass in seconds, without the overhead of kernel launches."""
        return max(self.flop / speed.flop_per_second, self.traffic / speed.bytes_per_second)

    def seconds(self, speed: DeviceSpeed) -> float:
        """Returns the calculated time of the pass in seconds: `roofline` plus the overhead of kernel launches."""
        return self.roofline(speed) + self.kernels * speed.launch_seconds


def device_speed(name: str, dtype: str = "bfloat16") -> DeviceSpeed:
    """Returns the peak speed of an accelerator for products in `dtype`, by its name in `flowgen.backend.MACHINES`.

    Raises ValueError if the name or the dtype is not known.

    Example:
        speed = device_speed("H100 80 GB", "bfloat16")
    """
    machine = next((machine for machine in MACHINES if machine.name == name), None)
    if machine is None:
        raise ValueError(f"name is {name!r}; choose one of {', '.join(machine.name for machine in MACHINES)}.")
    peak = machine.peak(dtype)
    if peak is None:
        raise ValueError(f"dtype is {dtype!r}; choose 'bfloat16', 'float16' or 'float32'.")
    launch = 0.0 if name.startswith("TPU") else LAUNCH_SECONDS  # a TPU runs a whole program after one launch
    return DeviceSpeed(flop_per_second=peak, bytes_per_second=1e9 * machine.bandwidth, launch_seconds=launch)


@lru_cache(maxsize=1024)
def pass_cost(block: BlockConfig, rows: int, window: int) -> PassCost:
    """Returns the cost of one pass over a window of tokens in a block, counted from shapes; no arrays are computed.

    The cache is assumed to have the mean of its sizes during decoding.

    rows: number of sequences that are decoded together: samples × frames that the block maps independently, times 2 if
    the block is guided. window: number of tokens in the pass, or the block's number of tokens if that is smaller.

    Raises ValueError if rows or window is not positive.

    Example:
        cost = pass_cost(flow.config.blocks[0], rows=8, window=32)
    """
    check_count("rows", rows)
    check_count("window", window)
    window = min(window, block.num_tokens)
    block = dataclasses.replace(block, frames=1)  # rows contains the frames
    decoding = decoding_config(block)
    module, transformer = AutoregressiveBlock(decoding), decoding.transformer
    stages = cache_stages(block.num_tokens, transformer.num_layers)
    slots = max(window, round(block.num_tokens * (stages + 1) / (2 * stages)))

    def inputs(key):
        variables = AutoregressiveBlock(block).init(key, jnp.zeros((1, block.num_tokens, block.token_dim)))
        variables = decoding_variables(variables, block.table_order, transformer.num_layers, transformer.dtype)
        previous = jnp.zeros((rows, window, block.token_dim), master_dtype(transformer.dtype))
        return variables, previous, BlockState(jnp.asarray(0), module.init_caches(rows, slots))

    def one_pass(variables, previous, state):
        return module.apply(variables, previous, None, state, method="conditioner")

    shapes = jax.eval_shape(inputs, jax.eval_shape(lambda: jax.random.key(0)))
    traced = jax.make_jaxpr(one_pass)(*shapes).jaxpr
    return PassCost(sum(flop_of(traced).values(), start=0.0), traffic_of(traced), kernels_of(traced) + 1)


def predicted_cost(
    flow: Flow, batch: int, speed: DeviceSpeed, *, guided_blocks: tuple[int, ...] = ()
) -> Callable[[int, SolverPlan], float]:
    """Returns the function (block index, plan) -> calculated seconds per pass, for `tune(cost=...)`.

    batch: number of samples. guided_blocks: the indices of the blocks with guidance, in which a pass computes each
    sample with and without the condition; blocks are counted from 0, data side first.

    Raises ValueError if batch is not positive.

    Example:
        cost = predicted_cost(flow, 8, device_speed("H100 80 GB", flow.config.dtype))
        plan = tune(flow, params, x, cost=cost)
    """
    check_count("batch", batch)

    def seconds(index: int, plan: SolverPlan) -> float:
        block = flow.config.blocks[index]
        window = 1 if isinstance(plan, Sequential) else getattr(plan, "window", None) or block.num_tokens
        rows = batch * block.frames * (1 + (index in guided_blocks))
        return pass_cost(block, rows, window).seconds(speed)

    return seconds
