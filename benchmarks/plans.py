"""Compares decoding plans on trained flows: passes, token-passes, time and error, for several batch sizes.

The flows are runs of configs/tarflow_digits.py, configs/starflow_digits.py and configs/starflow_v_bouncing.py, and of a
small flow on MNIST; docs/decoding.md gives the commands.

python benchmarks/plans.py --flow mnist=runs/mnist --flow digits=runs/digits --out benchmarks/results/plans.json
"""

import argparse
import json
from functools import partial
from pathlib import Path

import measure
import numpy as np

TOLERANCE = 1e-3
GUIDANCE = 1.0
PUBLISHED = {"segments": 8, "sweeps": 32, "others": 10}  # GS-Jacobi (2505.12849) on AFHQ: [7-8-32-10]


def plans(tokens: list[int], hardest: int) -> dict:
    """Returns the plans to compare, by name.

    tokens: the number of tokens that each block decodes. hardest: the number of the block that needs most passes.
    """
    from flowgen.decoding import DecodePlan, Jacobi, Sequential, SlidingWindow

    def each(make, share):
        return DecodePlan(tuple(make(window=max(1, n // share)) for n in tokens))

    fixed = partial(Jacobi, tol=TOLERANCE)
    segment = -(-tokens[hardest] // PUBLISHED["segments"])
    published = [Jacobi(tol=0.0, max_sweeps=min(PUBLISHED["others"], n)) for n in tokens]
    published[hardest] = Jacobi(window=segment, tol=0.0, max_sweeps=min(PUBLISHED["sweeps"], segment))
    return {
        "sequential": DecodePlan((Sequential(),) * len(tokens)),
        "GS-Jacobi, published settings": DecodePlan(tuple(published)),
        "published stop rule, quarter": each(partial(fixed, stop="relative_mse"), 4),
        "fixed, quarter": each(fixed, 4),
        "fixed, all": each(fixed, 1),
        "sliding, eighth": each(partial(SlidingWindow, tol=TOLERANCE), 8),
        "sliding, quarter": each(partial(SlidingWindow, tol=TOLERANCE), 4),
        "sliding, half": each(partial(SlidingWindow, tol=TOLERANCE), 2),
    }


def of_a_run(name: str, run_dir: Path, batches: list[int], rounds: int) -> list[dict]:
    """Returns the rows for a trained flow, before denoising."""
    import jax

    from flowgen import checkpoint
    from flowgen.decoding import Guidance, Jacobi, sample, tune

    flow, params, experiment = checkpoint.load(run_dir)
    config = flow.config
    tokens = [block.num_tokens - (block.shift == "output") for block in config.blocks]
    key, rows = jax.random.key(0), []

    def draw(plan, guidance, labels, params):
        return sample(flow, params, key, len(labels), labels, plan=plan, guidance=guidance, denoise=False)

    for batch in batches:
        labels = np.arange(batch, dtype=np.int32) % max(config.num_classes, 1)
        for scale in (0.0, GUIDANCE):
            guidance = Guidance(scale=scale, rule=experiment.sampling.rule)
            probe = draw(Jacobi(tol=TOLERANCE), guidance, labels, params)
            made = plans(tokens, int(np.asarray(probe.sweeps).sum(axis=1).argmax()))
            x = draw("sequential", guidance, labels, params).x
            tuned = partial(tune, flow, params, x, labels, guidance=guidance, tol=TOLERANCE)
            made["tuned on this CPU"] = tuned()
            made["tuned, if all passes cost the same"] = tuned(cost=lambda block, plan: 1.0)
            decode = {n: jax.jit(partial(draw, plan, guidance, labels)) for n, plan in made.items()}
            results = {n: function(params) for n, function in decode.items()}
            timings = measure.alternate({n: measure.ours(f, params) for n, f in decode.items()}, rounds)
            for n, result in results.items():
                rows.append(
                    {"flow": name, "batch": batch, "guidance": scale, "name": n}
                    | counted(tokens, made[n], np.asarray(result.sweeps))
                    | measure.figures(timings[n], baseline="sequential", against=timings["sequential"], compiled=True)
                    | {"error": float(np.abs(result.x - results["sequential"].x).max())}
                )
                print(json.dumps(rows[-1]), flush=True)
    return rows


def counted(tokens: list[int], plan, sweeps: np.ndarray) -> dict:
    """Returns the passes per block, and passes and token-passes per token."""
    from flowgen.decoding import Sequential

    passes = sweeps.sum(axis=1)
    windows = [
        1 if isinstance(one, Sequential) else min(one.window or n, n)
        for one, n in zip(plan.blocks, tokens, strict=True)
    ]
    return {
        "tokens": tokens,
        "windows": windows,
        "passes": passes.tolist(),
        "passes_per_token": round(float(passes.sum() / sum(tokens)), 4),
        "token_passes_per_token": round(float((passes * windows).sum() / sum(tokens)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flow", action="append", required=True, help="NAME=RUN, a trained flow; may be repeated")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="batch sizes")
    parser.add_argument("--rounds", type=int, default=5, help="number of calls of each plan to time")
    parser.add_argument("--threads", type=int, default=2, help="number of processor cores")
    arguments = parser.parse_args()
    measure.check_cores(parser, "--threads", arguments.threads)
    measure.confine(arguments.threads)
    rows = []
    for flow in arguments.flow:
        name, _, run_dir = flow.partition("=")
        rows += of_a_run(name, Path(run_dir), arguments.batches, arguments.rounds)
    conditions = measure.environment(arguments.threads, None) | {"tolerance": TOLERANCE}
    measure.save(arguments.out, [row | conditions for row in rows])


if __name__ == "__main__":
    main()
