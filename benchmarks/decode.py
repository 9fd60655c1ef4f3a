"""Times our sampling (sequential, guided, parallel) against the published PyTorch sampler.

Rows named "all devices" split the batch over one CPU device per core. For comparison, the published code splits it over
as many processes with one thread each.

python benchmarks/decode.py --reference PATH_TO_ml-tarflow --out benchmarks/results/decode.json
"""

import contextlib
from functools import partial

import measure
import numpy as np
import published

GUIDANCE_SCALE = 1.5
TOLERANCE = 1e-4


def measure_shape(shape: str, theirs, threads: int) -> list[dict]:
    """Returns the rows for one shape; its runs take turns."""
    import jax
    import jax.numpy as jnp

    from flowgen import backend, convert
    from flowgen.decoding import Guidance, Jacobi, Sequential, invert

    model = measure.SHAPES[shape]
    flow, params = convert.tarflow(
        measure.rw.state_dict(model), image_size=model.image_size, patch_size=model.patch_size
    )
    inputs = (
        jax.tree.map(jnp.asarray, params),
        jnp.asarray(measure.rw.noise(model, measure.BATCH)),
        jnp.arange(measure.BATCH, dtype=jnp.int32) % model.num_classes,
    )
    decode = {
        "sequential": partial(invert, flow, plan=Sequential()),
        "guided 1.5": partial(invert, flow, plan=Sequential(), guidance=Guidance(scale=GUIDANCE_SCALE)),
        "jacobi window 16": partial(invert, flow, plan=Jacobi(window=16, tol=TOLERANCE)),
        "jacobi window full": partial(invert, flow, plan=Jacobi(window=None, tol=TOLERANCE)),
    }
    methods = {"sequential": "reverse", "guided 1.5": "reverse_guided"}
    runs = {name: measure.ours(function, *inputs) for name, function in decode.items()}
    mesh = backend.sharing(measure.BATCH)
    if mesh is not None:
        divided = backend.copies(inputs[0], mesh), *backend.share_rows(inputs[1:], mesh)
        runs |= {f"{name}, all devices": measure.ours(decode[name], *divided) for name in methods}
    with contextlib.ExitStack() as stack:
        if theirs is not None:
            shares = published.Shares(*theirs.given, threads)
            stack.callback(shares.close)
            for name, method in methods.items():
                for count in sorted({1, threads}):
                    runs[f"published {name}, threads {count}"] = partial(theirs.time, method, count)
                if threads > 1:
                    runs[f"published {name}, processes {threads}"] = partial(shares.time, method)
        timings = measure.alternate(runs)
    results = {name: function(*inputs) for name, function in decode.items()}

    rows = []
    for name, result in results.items():
        exact = name in methods
        baseline = "sequential"
        if exact and theirs is not None:
            candidates = [key for key in timings if key.startswith(f"published {name},")]
            baseline = min(candidates, key=lambda key: timings[key].median)
        more = {}
        if exact and theirs is not None:
            images = np.moveaxis(theirs.result(methods[name]), 1, -1)
            more["difference_to_published"] = float(np.abs(images - np.asarray(result.x)).max())
        if not exact:
            more["tolerance"] = TOLERANCE
            more["error"] = float(np.abs(np.asarray(result.x - results["sequential"].x)).max())
            more["sweeps_per_block"] = np.asarray(result.sweeps.sum(axis=1)).tolist()
        rows.append(
            measure.row(name, shape, timings[name], baseline=baseline, against=timings[baseline], compiled=True, **more)
        )
        if (shared := f"{name}, all devices") in timings:
            other = name if theirs is None else baseline
            rows.append(
                measure.row(shared, shape, timings[shared], baseline=other, against=timings[other], compiled=True)
            )
    for name, timing in timings.items():
        if name.startswith("published"):
            ours = name.removeprefix("published ").partition(",")[0]
            rows.append(measure.row(name, shape, timing, baseline=ours, against=timings[ours], compiled=False))
    return rows


if __name__ == "__main__":
    published.run(__doc__.splitlines()[0], measure_shape, core_devices=True)
