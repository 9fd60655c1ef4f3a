"""Times the loss, its gradient and one optimizer update of flowgen and of the published PyTorch model.

GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \\
    python benchmarks/train_step.py --reference PATH_TO_ml-tarflow --out benchmarks/results/train_step.json
"""

import dataclasses
from functools import partial

import measure
import published

METHODS = {"forward": "forward", "forward backward": "backward", "forward backward adamw": "adamw"}
FORMS = {"forward backward, activations stored": False, "forward backward, activations recomputed": True}
LIBRARY_STEP = "library step"
COUNTERPARTS = {
    **{name: name for name in METHODS},
    **dict.fromkeys(FORMS, "forward backward"),
    LIBRARY_STEP: "forward backward adamw",
}


def measure_shape(shape: str, theirs, threads: int) -> list[dict]:
    """Returns the rows for one shape; its runs take turns."""
    loss_of_ours, runs = our_runs(shape)
    more = {}
    if theirs is not None:
        more["difference_to_published"] = abs(loss_of_ours - float(theirs.result("forward")))
        for name, method in METHODS.items():
            for count in sorted({1, threads}):
                runs[f"published {name}, threads {count}"] = partial(theirs.time, method, count)
    timings = measure.alternate(runs)

    rows = []
    for name, counterpart in COUNTERPARTS.items():
        candidates = [key for key in timings if key.startswith(f"published {counterpart},")] or ["forward"]
        baseline = min(candidates, key=lambda key: timings[key].median)
        extra = more if name == "forward" else {}
        against = timings[baseline]
        rows.append(measure.row(name, shape, timings[name], baseline=baseline, against=against, compiled=True, **extra))
    for name, timing in timings.items():
        if name.startswith("published"):
            ours = name.removeprefix("published ").partition(",")[0]
            rows.append(measure.row(name, shape, timing, baseline=ours, against=timings[ours], compiled=False))
    return rows


def our_runs(shape: str) -> tuple[float, dict[str, measure.Run]]:
    """Returns our loss before any update, and the runs, each of a compiled program."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from flowgen import convert
    from flowgen.data import Batch
    from flowgen.flows.objective import nll_objective
    from flowgen.training import OptimConfig, make_step
    from flowgen.training.parallel import DataParallel
    from flowgen.training.step import init_state

    model = measure.SHAPES[shape]
    flow, variables = convert.tarflow(
        measure.rw.state_dict(model), image_size=model.image_size, patch_size=model.patch_size
    )
    params = jax.tree.map(jnp.asarray, variables["params"])
    images = jnp.asarray(np.moveaxis(measure.rw.images(model, measure.BATCH), 1, -1))
    labels = jnp.arange(measure.BATCH, dtype=jnp.int32) % model.num_classes

    forms = {name: type(flow)(dataclasses.replace(flow.config, remat=remat)) for name, remat in FORMS.items()}

    def loss(params, flow=flow):
        z, logdet = flow.apply({"params": params}, images, labels, method="forward")
        return 0.5 * jnp.square(z).mean() - logdet.mean() / flow.config.num_dims

    adamw = optax.adamw(1e-4, b1=0.9, b2=0.95, eps=1e-8, weight_decay=1e-4)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        changes, state = adamw.update(gradient, state, params)
        return optax.apply_updates(params, changes), state, value

    # The step of `flowgen train`, including dequantisation, metrics, clipping and the parameter average.
    optim, steps = OptimConfig(), 1_000
    parallel = DataParallel(jax.local_devices()[:1])
    library_step = parallel.compile(make_step(nll_objective(flow), optim, steps=steps))
    pixels = np.moveaxis(measure.rw.pixels(model, measure.BATCH), 1, -1)
    batch = parallel.shard(Batch(pixels, np.asarray(labels)))
    key = parallel.replicate_key(jax.random.key(0))

    forward = jax.jit(loss)
    return float(forward(params)), {
        "forward": measure.ours(forward, params),
        "forward backward": measure.ours(jax.jit(jax.value_and_grad(loss)), params),
        **{name: measure.ours(jax.jit(jax.value_and_grad(partial(loss, flow=f))), params) for name, f in forms.items()},
        "forward backward adamw": _carrying(update, *jax.tree.map(jnp.copy, (params, adamw.init(params)))),
        LIBRARY_STEP: _carrying(
            lambda state, _: library_step(state, batch, key),
            parallel.replicate(init_state({"params": params}, optim, steps)),
            None,
        ),
    }


def _carrying(function, first, second) -> measure.Run:
    """Returns a run that feeds the first two outputs of each call into the next one; each call donates its inputs."""
    carry = [first, second]

    def call():
        carry[:] = (outputs := function(*carry))[:2]
        return outputs

    return measure.ours(call)


if __name__ == "__main__":
    published.run(__doc__.splitlines()[0], measure_shape)
