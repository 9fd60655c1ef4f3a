"""Times the sampling of clips from a trained STARFlow-V, sequentially and in fixed or sliding windows.

python train.py --config configs/starflow_v_bouncing.py --workdir runs/bouncing
python benchmarks/video.py --checkpoint runs/bouncing --out benchmarks/results/video.json \\
    --reference PATH_TO_ml-starflow --torch-python PATH_TO_python_WITH_torch
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import measure
import numpy as np

TOLERANCE = 1e-3
CLIPS = 4


def plans(tokens: int) -> dict:
    """Returns plans for the deep block, by name; a window is half a frame, one frame or the whole clip."""
    from flowgen.decoding import Jacobi, Sequential, SlidingWindow

    made = {"sequential": Sequential()}
    for name, window in (("half a frame", tokens // 2), ("a frame", tokens)):
        for init in ("noise", "previous_frame"):
            start = "frame before" if init == "previous_frame" else "noise"
            made[f"fixed, {name}, from {start}"] = Jacobi(window=window, tol=TOLERANCE, init=init)
            made[f"sliding, {name}, from {start}"] = SlidingWindow(window=window, tol=TOLERANCE, init=init)
    made["all frames, from noise"] = Jacobi(window=None, tol=TOLERANCE)
    return made


def of_a_run(run_dir: Path, rounds: int) -> list[dict]:
    """Returns the rows for a trained flow, without guidance and before denoising."""
    import jax
    import jax.numpy as jnp

    from flowgen import checkpoint
    from flowgen.decoding import DecodePlan, Sequential, sample

    flow, params, _ = checkpoint.load(run_dir)
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
    timings = measure.alternate({n: measure.ours(f, params, key) for n, f in decode.items()}, rounds)
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
    return rows


def beside_the_published(other: measure.Process, version: str, rounds: int) -> list[dict]:
    """Returns the rows for a small guided text model, with the same weights and noise on both sides.

    other: the process that runs `video_published.py`. version: its version of torch.
    """
    import jax
    import jax.numpy as jnp
    import video_published as theirs

    from flowgen import convert
    from flowgen.conditioning import TextCondition
    from flowgen.decoding import DecodePlan, Guidance, Jacobi, Sequential, SlidingWindow, invert

    shape = theirs.SHAPE
    flow, params = convert.starflow(theirs.sv.state_dict(shape), shape.arguments())
    flow = flow.with_image_size(*shape.grid)
    noise = np.moveaxis(theirs.sv.noise(shape), 2, -1)
    z = jnp.asarray(noise.reshape(len(noise), flow.config.num_tokens, -1))
    text, null = (
        TextCondition(*map(jnp.asarray, part)) for part in (theirs.sw.text(shape), theirs.sw.null_text(shape))
    )
    guidance = Guidance(scale=theirs.GUIDANCE, rule="product", null=null)
    frame, shallow = flow.config.tokens_per_image, flow.config.num_blocks - 1
    fixed = Jacobi(window=theirs.BLOCK, tol=TOLERANCE)
    window = {"window": frame, "tol": TOLERANCE, "init": "previous_frame"}
    ours = {
        "sequential": Sequential(),
        "fixed, a frame": DecodePlan((fixed,) * shallow + (Jacobi(**window),)),
        "sliding, a frame": DecodePlan((fixed,) * shallow + (SlidingWindow(**window),)),
    }
    decode = {
        name: jax.jit(lambda z, plan=plan: invert(flow, params, z, text, guidance=guidance, plan=plan))
        for name, plan in ours.items()
    }
    runs = {name: measure.ours(function, z) for name, function in decode.items()}
    runs |= {f"published: {n}": lambda n=n: measure.Cost(*other.ask({"time": n})) for n in theirs.METHODS}
    timings = measure.alternate(runs, rounds)
    clips = {name: np.asarray(function(z).x) for name, function in decode.items()}
    with tempfile.TemporaryDirectory() as folder:
        for name in theirs.METHODS:
            other.ask({"result": name, "path": f"{folder}/clips.npy"})
            clips[f"published: {name}"] = np.moveaxis(np.load(f"{folder}/clips.npy"), 2, -1)
    return [
        {
            "name": name,
            "model": f"{shape.frames} frames of {frame} tokens, {len(z)} clips, guidance {theirs.GUIDANCE}",
            "dtype": "float32",
            **measure.figures(
                timing,
                baseline="published: sequential",
                against=timings["published: sequential"],
                compiled=name in decode,
            ),
            "seconds_per_clip": round(timing.median / len(z), 4),
            "tokens_per_second": round(len(z) * flow.config.num_tokens / timing.median),
            "passes_of_the_deep_block": int(np.asarray(decode[name](z).sweeps)[-1].sum()) if name in decode else None,
            "error": float(np.abs(clips[name] - clips["sequential"]).max()),
            "torch": version,
        }
        for name, timing in timings.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="run directory of a video flow")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--reference", type=Path, help="checkout of apple/ml-starflow; without it, only our side runs")
    parser.add_argument(
        "--torch-python", type=Path, help="interpreter with torch, numpy, einops and tqdm, for --reference"
    )
    parser.add_argument("--threads", type=int, default=2, help="number of processor cores to use")
    parser.add_argument("--rounds", type=int, default=measure.REPEATS)
    options = parser.parse_args()
    measure.check_cores(parser, "--threads", options.threads)
    measure.confine(options.threads)

    if options.reference is not None:  # Started first, so that it fails before a minute of measuring.
        other = measure.Process(options.torch_python, Path(__file__).with_name("video_published.py"))
        version = other.ask({"reference": str(options.reference), "threads": options.threads})
    rows = of_a_run(options.checkpoint, options.rounds)
    if options.reference is not None:
        rows += beside_the_published(other, version, options.rounds)
    measure.save(options.out, [row | measure.environment(options.threads, None) for row in rows])
    for row in rows:
        print(
            f"{row['name']:36s} {row['seconds_per_clip']:8.4f} s per clip  {row['ratio']:6.3f} x {row['baseline']}  "
            f"{row['passes_of_the_deep_block']} passes  error {row['error']:.1e}"
        )


if __name__ == "__main__":
    main()
