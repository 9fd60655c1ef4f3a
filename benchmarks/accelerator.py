"""Measures flowgen on one accelerator: attention, training steps and decoding, the most telling rows first.

python benchmarks/accelerator.py --out accelerator.jsonl [--minutes 8]

Each row is appended as soon as it is measured, and the program ends when its time is over. `--toy` measures tiny shapes
on a CPU, to check that everything runs.
"""

import argparse
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import measure

Row = dict[str, Any]
LENGTHS = (1023, 255, 2048, 4096, 256)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured: the lengths and batch of attention, rows of a training step, samples, and the dtype."""

    lengths: tuple[int, ...] = LENGTHS
    heads: int = 12
    tokens_at_once: int = 16 * 1024
    rows: int = 16
    samples: int = 4
    window: int = 64
    dtype: str = "bfloat16"
    toy: bool = False


TOY = Sizes(lengths=(15, 32), heads=2, tokens_at_once=64, rows=2, samples=1, window=4, dtype="float32", toy=True)


def all_rows(sizes: Sizes) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Returns the names of rows with functions that measure them, ordered by value."""
    first, *others = sizes.lengths
    for implementation in ("auto", "xla"):
        yield f"softmax attention, {implementation}, {first} tokens", partial(attention, implementation, first, sizes)
    for config in ("tarflow_afhq256", "tarflow_imagenet64"):
        yield f"training step, {config}", partial(training_step, config, sizes)
    for plan in ("sequential", "jacobi"):
        yield f"decoding, tarflow_afhq256, {plan}", partial(decoding, "tarflow_afhq256", plan, sizes)
    yield "training step, starflow_imagenet256", partial(training_step, "starflow_imagenet256", sizes)
    yield "deep block of starflow_v_480p, per layer", partial(deep_block, sizes)
    for n in others:
        for implementation in ("auto", "xla"):
            yield f"softmax attention, {implementation}, {n} tokens", partial(attention, implementation, n, sizes)
    for n in sizes.lengths:
        yield f"linear attention, {n} tokens", partial(attention, "nala", n, sizes)


def attention(kind: str, n: int, sizes: Sizes) -> Row:
    """Returns the time of causal attention with its gradient; kind: an implementation of softmax attention, or nala."""
    import jax
    import jax.numpy as jnp

    from flowgen.attention import nala_attention, softmax_attention
    from flowgen.backend import attention_plan

    batch = max(1, sizes.tokens_at_once // n)
    q, k, v = jax.random.normal(jax.random.key(0), (3, batch, n, sizes.heads, 64)).astype(jnp.dtype(sizes.dtype))
    attend = nala_attention if kind == "nala" else partial(softmax_attention, implementation=kind)
    gradient = jax.jit(jax.grad(lambda q, k, v: attend(q, k, v, is_causal=True).astype(jnp.float32).sum(), (0, 1, 2)))
    more = {} if kind == "nala" else {"chosen": attention_plan(q, k, v, is_causal=True, implementation=kind)._asdict()}
    return more | timed(lambda: gradient(q, k, v), tokens=batch * n)


def training_step(config: str, sizes: Sizes) -> Row:
    """Returns the time of the training step of a config, on a batch of zeros."""
    import jax
    import jax.numpy as jnp

    import flowgen
    from flowgen.training.parallel import DataParallel
    from flowgen.training.step import init_state, make_step

    experiment = flowgen.load_config(config)
    experiment = experiment.debug() if sizes.toy else experiment
    rehearsal = experiment.rehearsal(experiment.build(), sizes.rows)
    parallel = DataParallel(jax.local_devices()[:1])
    step = parallel.compile(make_step(rehearsal.objective, experiment.optim, steps=experiment.train.steps))
    batch = parallel.shard(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rehearsal.batch))
    state = init_state(rehearsal.init(jax.random.key(0)), experiment.optim, experiment.train.steps)
    carry, key = [parallel.replicate(state)], parallel.replicate_key(jax.random.key(1))

    def call():
        carry[0], metrics = step(carry[0], batch, key)
        return carry[0], metrics

    return timed(call, tokens=sizes.rows * experiment.model.num_tokens) | {"rows": sizes.rows}


def decoding(config: str, plan: str, sizes: Sizes) -> Row:
    """Returns the time of drawing samples with guidance; parameters are perturbed, so that no block is the identity."""
    import jax
    import jax.numpy as jnp

    import flowgen
    from flowgen.decoding import Guidance, Jacobi, Sequential, sample
    from flowgen.experiments.estimates import some_condition

    experiment = flowgen.load_config(config)
    flow = (experiment.debug() if sizes.toy else experiment).build()
    noise = lambda leaf: leaf + 0.01 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)  # noqa: E731
    params = jax.jit(lambda params: jax.tree.map(noise, params))(flowgen.init(flow, jax.random.key(0)))
    chosen = Sequential() if plan == "sequential" else Jacobi(window=sizes.window, tol=1e-3)
    cond = some_condition(flow.config, sizes.samples)

    def call():
        return sample(flow, params, jax.random.key(1), sizes.samples, cond, plan=chosen, guidance=Guidance(scale=2.0))

    passes = jax.tree.map(lambda leaf: jnp.sum(leaf).item(), call().sweeps)
    return timed(call, tokens=sizes.samples * flow.config.num_tokens) | {"samples": sizes.samples, "sweeps": passes}


def deep_block(sizes: Sizes) -> Row:
    """Returns the time per layer of the video model's deep block, with its gradient: two layers over the whole clip."""
    import jax
    import jax.numpy as jnp

    import flowgen
    from flowgen.nn import transformer_stack

    experiment = flowgen.load_config("starflow_v_480p")
    config = (experiment.debug() if sizes.toy else experiment).model
    transformer = dataclasses.replace(config.blocks[-1].transformer, num_layers=2)
    stack, h = transformer_stack(transformer), jnp.zeros((1, config.num_tokens, transformer.width), transformer.dtype)
    params = jax.jit(lambda key: stack.init(key, h[:, :8], None, 0, None, None))(jax.random.key(0))
    loss = lambda params: stack.apply(params, h, None, 0, None, None)[0].astype(jnp.float32).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))
    return timed(lambda: gradient(params), tokens=config.num_tokens, steps=2)


def timed(call: Callable[[], Any], tokens: int, steps: int = 1) -> Row:
    """Returns the timing of a call that computes `tokens` tokens `steps` times, and the device's peak memory so far."""
    import jax

    from flowgen.backend import peak_memory

    timing = dataclasses.replace(measure.alternate({"call": measure.ours(call)})["call"], steps=steps)
    return {
        "milliseconds": round(1e3 * timing.median, 3),
        "fastest": round(1e3 * timing.fastest, 3),
        "repeats": len(timing.calls),
        "compile_seconds": round(max(timing.first.seconds - timing.median * steps, 0.0), 2),
        "tokens_per_second": round(tokens / timing.median),
        "peak_bytes_so_far": peak_memory(jax.local_devices()[:1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file to append JSON rows to, one per line")
    parser.add_argument("--minutes", type=float, default=8.0, help="time after which the program ends")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, for a CPU")
    arguments = parser.parse_args()
    began, limit = time.perf_counter(), 60 * arguments.minutes
    # Compilation cannot be interrupted: at the end of the time, the process ends. Its rows are written.
    watch = threading.Timer(limit, os._exit, (0,))
    watch.daemon = True
    watch.start()
    import jax

    sizes = TOY if arguments.toy else Sizes()
    if not arguments.toy and jax.default_backend() == "cpu":
        parser.error("there is no accelerator; give --toy to check that everything runs.")
    where = measure.environment(len(os.sched_getaffinity(0)), None)
    for name, row in all_rows(sizes):
        try:
            result = row()
        except (ValueError, RuntimeError, MemoryError) as error:  # out of memory, or nothing that can run
            result = {"error": " ".join(str(error).split())[:300]}
        line = {"name": name, "dtype": sizes.dtype, "seconds_so_far": round(time.perf_counter() - began, 1)}
        with arguments.out.open("a") as file:
            file.write(json.dumps(line | result | where) + "\n")
        print(name, result.get("milliseconds", result.get("error")), flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main()
