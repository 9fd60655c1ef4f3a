"""Checks the calculated time of a decoding pass (flowgen.decoding.costs) against measured times on this device.

The three speeds of the device are fitted to half of the measurements; the other half tests the predictions.

python benchmarks/pass_costs.py --out benchmarks/results/pass_costs.json
"""

import argparse
import math
from itertools import product
from pathlib import Path

import measure
import numpy as np

WIDTHS, LAYERS, BATCHES, WINDOWS = (64, 256), (1, 4), (1, 8, 32), (4, 16, None)
TOKENS_PER_SIDE, PATCH = 8, 2


def measured_passes() -> list[dict]:
    """Returns the measured time of a pass and its counted work, for each width, depth, batch and window."""
    import jax
    import jax.numpy as jnp

    import flowgen
    from flowgen.decoding import Sequential, measure_plans, pass_cost

    rows = []
    for width, layers in product(WIDTHS, LAYERS):
        config = flowgen.TARFlowConfig(
            image_size=TOKENS_PER_SIDE * PATCH,
            patch_size=PATCH,
            channels=1,
            width=width,
            num_blocks=1,
            layers_per_block=layers,
            head_dim=32,
        )
        flow = flowgen.TARFlow(config)
        params = flowgen.init(flow, jax.random.key(0))
        (block,) = flow.config.blocks
        for batch in BATCHES:
            x = jnp.zeros((batch, *flow.config.event_shape))
            for found in measure_plans(flow, params, x, windows=WINDOWS).measurements:
                window = 1 if isinstance(found.plan, Sequential) else found.plan.window or block.num_tokens
                cost = pass_cost(block, batch, window)
                rows.append(
                    {
                        "width": width,
                        "layers": layers,
                        "batch": batch,
                        "plan": type(found.plan).__name__,
                        "window": window,
                        **cost._asdict(),
                        "microseconds": round(1e6 * found.seconds / max(found.passes, 1), 2),
                    }
                )
    return rows


def fitted(rows: list[dict]):
    """Returns the speeds of the device with the least squared error of the logarithm of the time."""
    from scipy.optimize import minimize

    from flowgen.decoding import DeviceSpeed, PassCost

    def speed_of(logs) -> DeviceSpeed:
        flop, traffic, launch = np.exp(logs)
        return DeviceSpeed(flop_per_second=flop, bytes_per_second=traffic, launch_seconds=launch)

    def loss(logs) -> float:
        speed = speed_of(logs)
        errors = [
            math.log(PassCost(*(row[n] for n in PassCost._fields)).seconds(speed) / _seconds(row)) for row in rows
        ]
        return float(np.square(errors).sum())

    return speed_of(minimize(loss, np.log([5e10, 1e10, 1e-6]), method="Nelder-Mead", options={"maxiter": 2000}).x)


def _seconds(row: dict) -> float:
    return 1e-6 * row["microseconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=1, help="number of processor cores")
    options = parser.parse_args()
    measure.check_cores(parser, "--threads", options.threads)
    measure.confine(options.threads)
    from flowgen.decoding import PassCost

    rows = measured_passes()
    speed = fitted(rows[::2])
    for number, row in enumerate(rows):
        cost = PassCost(*(row[name] for name in PassCost._fields))
        row |= {"part": "test" if number % 2 else "fit", "predicted": round(1e6 * cost.seconds(speed), 2)}
    ratios = [row["predicted"] / row["microseconds"] for row in rows if row["part"] == "test"]
    speeds = {
        name: float(f"{getattr(speed, name):.3g}") for name in ("flop_per_second", "bytes_per_second", "launch_seconds")
    }
    where = measure.environment(options.threads, None) | {"speed": speeds}
    measure.save(options.out, [row | where for row in rows])
    low, middle, high = np.quantile(ratios, [0.05, 0.5, 0.95])
    print(f"{speeds}; predicted / measured: median {middle:.2f}, 90 % within {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
