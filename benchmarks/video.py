"""Times sampling of clips from a trained STARFlow-V: sequential, by windows and moving windows, from noise or frames.

python train.py --config configs/starflow_v_bouncing.py --workdir runs/bouncing
python benchmarks/video.py --checkpoint runs/bouncing --out benchmarks/results/video.json
"""

import argparse
from functools import partial
from pathlib import Path

import measure
import numpy as np

TOLERANCE = 1e-3
CLIPS = 4


def plans(tokens: int) -> dict:
    """Returns plans of the deep block by name; a window is a fraction of a frame, a frame, or the whole clip."""
    from flowgen.decoding import Jacobi, MovingJacobi, Sequential

    made = {"sequential": Sequential()}
    for name, window in (("half a frame", tokens // 2), ("a frame", tokens), ("two frames", 2 * tokens)):
        for init in ("z", "frame"):
            start = "frame before" if init == "frame" else "noise"
            made[f"fixed, {name}, from {start}"] = Jacobi(window=window, tol=TOLERANCE, init=init)
            made[f"moving, {name}, from {start}"] = MovingJacobi(window=window, tol=TOLERANCE, init=init)
    made["all frames, from noise"] = Jacobi(window=None, tol=TOLERANCE)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="run directory of a flow of clips")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=2, help="processor cores to use")
    parser.add_argument("--rounds", type=int, default=measure.REPEATS)
    options = parser.parse_args()
    measure.check_cores(parser, "--threads", options.threads)
    measure.confine(options.threads)

    import jax
    import jax.numpy as jnp

    from flowgen import checkpoint
    from flowgen.decoding import DecodePlan, Sequential, sample

    flow, params, _ = checkpoint.load(options.checkpoint)
    config = flow.config
    labels = jnp.arange(CLIPS, dtype=jnp.int32) % config.num_classes if config.num_classes else None
    shallow = (Sequential(),) * (config.num_blocks - 1)

    def draw(plan, params, key):
        return sample(flow, params, key, CLIPS, labels, plan=DecodePlan((*shallow, plan)), denoise=False)

    decode = {name: jax.jit(partial(draw, plan)) for name, plan in plans(config.tokens_per_image).items()}
    key = jax.random.key(0)
    results = {name: function(params, key) for name, function in decode.items()}
    memory = {
        name: function.lower(params, key).compile().memory_analysis().temp_size_in_bytes
        for name, function in decode.items()
    }
    timings = measure.alternate({n: measure.ours(f, params, key) for n, f in decode.items()}, options.rounds)
    exact, rows = results["sequential"].x, []
    for name, result in results.items():
        figures = measure.figures(timings[name], baseline="sequential", against=timings["sequential"], compiled=True)
        rows.append(
            {
                "name": name,
                "model": f"{config.frames} frames of {config.tokens_per_image} tokens, {CLIPS} clips",
                "dtype": config.dtype,
                **figures,
                "seconds_per_clip": round(timings[name].median / CLIPS, 4),
                "tokens_per_second": round(CLIPS * config.num_tokens / timings[name].median),
                "passes_of_the_deep_block": int(np.asarray(result.sweeps)[-1].sum()),
                "working_memory_bytes": memory[name],
                "tolerance": None if name == "sequential" else TOLERANCE,
                "error": float(jnp.abs(result.x - exact).max()),
            }
        )
    measure.save(options.out, [row | measure.environment(options.threads, None) for row in rows])
    for row in rows:
        print(
            f"{row['name']:36s} {row['seconds_per_clip']:8.4f} s per clip  {row['ratio']:6.3f} x sequential  "
            f"{row['passes_of_the_deep_block']:4d} passes  error {row['error']:.1e}"
        )


if __name__ == "__main__":
    main()
