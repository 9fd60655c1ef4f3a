"""The calculated time of a pass: counts against formulas, and the plans that they choose for devices not at hand."""

import dataclasses

import jax
import laws
import pytest

import flowgen
from flowgen.backend import MACHINES
from flowgen.decoding import (
    DeviceSpeed,
    Guidance,
    PassCost,
    Sequential,
    device_speed,
    pass_cost,
    predicted_cost,
    tune,
)

WIDTH, LAYERS, TOKENS, CHANNELS = 32, 2, 16, 4


@pytest.fixture(scope="module")
def block():
    config = flowgen.TARFlowConfig(
        image_size=8, channels=1, patch_size=2, width=WIDTH, num_blocks=2, layers_per_block=LAYERS, head_dim=16
    )
    return flowgen.TARFlow(config).config.blocks[0]


def linear_sizes():
    """(inputs, outputs) of every linear map of the block."""
    layer = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
    return [(CHANNELS, WIDTH), *LAYERS * layer, (WIDTH, 2 * CHANNELS)]


@pytest.mark.parametrize(("rows", "window"), [(1, 1), (3, 5)])
def test_flop_and_traffic_are_those_of_the_products(block, rows, window):
    cost = pass_cost(block, rows, window)
    tokens, cached = rows * window, rows * TOKENS * WIDTH
    products = sum(2 * tokens * a * b for a, b in linear_sizes())
    attention = LAYERS * 4 * tokens * TOKENS * WIDTH
    assert cost.flop == products + attention
    weights = sum(a * b for a, b in linear_sizes())
    activations = sum(tokens * (a + b) for a, b in linear_sizes())
    logits = tokens * TOKENS * (WIDTH // 16)
    of_attention = LAYERS * (2 * cached + 2 * tokens * WIDTH + 2 * logits)
    assert cost.traffic == 4 * (weights + activations + of_attention)


def test_kernels_depend_on_the_layers_only(block):
    counts = {pass_cost(block, rows, window).kernels for rows in (1, 8) for window in (1, 4, 16)}
    assert len(counts) == 1
    deeper = dataclasses.replace(block, transformer=dataclasses.replace(block.transformer, num_layers=2 * LAYERS))
    assert 1.5 < pass_cost(deeper, 1, 1).kernels / counts.pop() < 2
    assert pass_cost(block, 1, 99) == pass_cost(block, 1, 16)


def test_frames_are_rows():
    block = laws.FLOWS["starflow video"].build().config.blocks[0]
    assert block.frames > 1
    assert pass_cost(block, 8, 2) == pass_cost(dataclasses.replace(block, frames=1), 8, 2)


def test_seconds_are_the_roofline_and_the_launches():
    speed = DeviceSpeed(flop_per_second=1e12, bytes_per_second=1e11, launch_seconds=1e-6)
    of_memory, of_products = PassCost(1e6, 1e6, 10), PassCost(1e9, 1e6, 10)
    assert of_memory.roofline(speed) == pytest.approx(1e-5)
    assert of_products.roofline(speed) == pytest.approx(1e-3)
    assert of_memory.seconds(speed) == pytest.approx(2e-5)


def test_every_accelerator_has_a_speed():
    for machine in MACHINES:
        speed = device_speed(machine.name)
        # The number of FLOP in the time of reading a byte lies between these bounds for all devices of this table.
        assert 30 < speed.flop_per_second / speed.bytes_per_second < 700
        assert (speed.launch_seconds == 0) == machine.name.startswith("TPU")


@pytest.mark.slow
def test_tuning_chooses_a_plan_for_a_device_that_is_not_at_hand():
    config = laws.FLOWS["starflow added class"]
    flow, params = laws.perturbed(config, jax.random.key(0), scale=0.02)
    x, cond, guidance = laws.images(config, jax.random.key(1)), laws.labels(config), Guidance(scale=1.0, rule="product")
    slow_products = DeviceSpeed(flop_per_second=1e6, bytes_per_second=1e15, launch_seconds=0.0)
    for speed, parallel in ((device_speed("H100 80 GB"), True), (slow_products, False)):
        cost = predicted_cost(flow, len(x), speed, guided_blocks=(0, 1))
        plan = tune(flow, params, x, cond, guidance=guidance, tol=1e-2, windows=(None,), cost=cost)
        assert [one != Sequential() for one in plan.blocks] == [parallel, parallel]
    once, twice = (predicted_cost(flow, 4, slow_products, guided_blocks=blocks) for blocks in ((), (1,)))
    assert twice(1, Sequential()) == pytest.approx(2 * once(1, Sequential()), rel=1e-6)
    assert twice(0, Sequential()) == once(0, Sequential())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda block: device_speed("H1000"), "name is 'H1000'; choose one of H100 80 GB"),
        (lambda block: device_speed("B200", "int3"), "dtype is 'int3'; choose 'bfloat16', 'float16' or 'float32'"),
        (lambda block: pass_cost(block, 0, 1), "rows is 0"),
        (lambda block: pass_cost(block, 1, -2), "window is -2"),
        (lambda block: DeviceSpeed(flop_per_second=0.0, bytes_per_second=1.0), "flop_per_second"),
    ],
)
def test_bad_values_are_refused(block, call, message):
    with pytest.raises(ValueError, match=message):
        call(block)
