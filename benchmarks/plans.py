"""Compares decoding plans on trained flows: passes, token-passes, time and error, for several batch sizes.

python benchmarks/plans.py --flow MNIST=runs/mnist \\
    --flow "MNIST, trained for parallel decoding=runs/mnist_parallel" --flow "bouncing digits=runs/bouncing" \\
    --flow digits=runs/digits --flow "STARFlow digits=runs/starflow" --threads 1 --rounds 3 \\
    --out benchmarks/results/plans.json

docs/decoding.md#all-plans-side-by-side lists the commands that train the flows.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import measure
import numpy as np

TOLERANCE = 1e-3
GUIDANCE = 1.0
FITTED = 1024  # number of the flow's own samples to which affine drafts are fitted
PUBLISHED = {"segments": 8, "sweeps": 32, "others": 10}  # GS-Jacobi (2505.12849) on AFHQ: [7-8-32-10]


def plans(tokens: list[int], hardest: int) -> dict:
    """Returns the plans to compare, by name.

    tokens: the number of tokens that each block decodes. hardest: the number of the block that needs most passes.
    """
    from flowgen.decoding import DecodePlan, Jacobi, LowPrecision, Sequential, SlidingWindow

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
        "sliding, quarter, affine draft": each(partial(SlidingWindow, tol=TOLERANCE, init="draft"), 4),
        "fixed, all, affine draft": each(partial(fixed, init="draft"), 1),
        "int8, then fixed, all": DecodePlan((LowPrecision(polish=fixed()),) * len(tokens)),
    }


def of_a_run(name: str, run_dir: Path, batches: list[int], rounds: int) -> list[dict]:
    """Returns the rows for a trained flow, before denoising."""
    import jax

    from flowgen import checkpoint
    from flowgen.decoding import Guidance, Jacobi, fit_affine_draft, sample, tune

    flow, params, experiment = checkpoint.load(run_dir)
    config = flow.config
    tokens = [block.num_tokens - (block.shift == "output") for block in config.blocks]
    key, rows = jax.random.key(0), []

    def labels_of(num):
        return np.arange(num, dtype=np.int32) % config.num_classes if config.num_classes else None

    def draw(plan, guidance, draft, batch, params):
        options = {"plan": plan, "guidance": guidance, "draft": draft, "denoise": False}
        return sample(flow, params, key, batch, labels_of(batch), **options)

    known = sample(flow, params, jax.random.key(1), FITTED, labels_of(FITTED), plan="sequential", denoise=False)
    draft = fit_affine_draft(flow, params, known.x, labels_of(FITTED))
    for batch in batches:
        for scale in (0.0, GUIDANCE):
            guidance = Guidance(scale=scale, rule=experiment.sampling.rule)
            probe = draw(Jacobi(tol=TOLERANCE), guidance, None, batch, params)
            made = plans(tokens, int(np.asarray(probe.sweeps).sum(axis=1).argmax()))
            x = draw("sequential", guidance, None, batch, params).x
            tuned = partial(tune, flow, params, x, labels_of(batch), guidance=guidance, tol=TOLERANCE)
            made["tuned on this CPU"] = tuned()
            made["tuned, if all passes cost the same"] = tuned(cost=lambda block, plan: 1.0)
            decode = {n: jax.jit(partial(draw, plan, guidance, draft, batch)) for n, plan in made.items()}
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
    """Returns the passes per block, and passes and token-passes (passes times window) per token."""
    from flowgen.decoding.plan import Sequential, SlidingWindow, solver_plans

    windows, token_passes = [], 0
    for one, n, passes in zip(plan.blocks, tokens, sweeps, strict=True):
        begin, of_block = 0, []
        for part in solver_plans(one):
            window = 1 if isinstance(part, Sequential) else min(part.window or n, n)
            end = begin + (1 if isinstance(part, SlidingWindow) else -(-n // window))
            token_passes += window * int(passes[begin:end].sum())
            of_block.append(window)
            begin = end
        windows.append(of_block)
    return {
        "tokens": tokens,
        "windows": windows,
        "passes": sweeps.sum(axis=1).tolist(),
        "passes_per_token": round(float(sweeps.sum() / sum(tokens)), 4),
        "token_passes_per_token": round(token_passes / sum(tokens), 4),
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
