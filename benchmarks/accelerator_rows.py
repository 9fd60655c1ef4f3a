"""Measures the rows of accelerator.py, one row per function."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import measure
import published

Row = dict[str, Any]
SLOW_REPEATS = 1  # for calls that take seconds, to leave time for more rows
LENGTHS = (1023, 255, 2048, 4096, 8192, 16384, 256)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes to measure: sequence lengths, heads and batch of attention, rows per training step, number of samples,
    and the dtype.
    """

    lengths: tuple[int, ...] = LENGTHS
    heads: int = 12
    tokens_at_once: int = 16 * 1024
    rows: int = 16
    samples: int = 4
    window: int = 64
    dtype: str = "bfloat16"
    toy: bool = False


TOY = Sizes(lengths=(15, 32), heads=2, tokens_at_once=64, rows=2, samples=1, window=4, dtype="float32", toy=True)


def attention(kind: str, n: int, sizes: Sizes) -> Row:
    """Returns the time of causal attention with its gradient; kind: "nala", or an implementation of softmax
    attention.
    """
    import jax
    import jax.numpy as jnp

    from flowgen.attention import nala_attention, softmax_attention
    from flowgen.backend import attention_plan

    batch = max(1, sizes.tokens_at_once // n)
    q, k, v = jax.random.normal(jax.random.key(0), (3, batch, n, sizes.heads, 64)).astype(jnp.dtype(sizes.dtype))
    attend = nala_attention if kind == "nala" else partial(softmax_attention, implementation=kind)
    loss = lambda q, k, v: attend(q, k, v, is_causal=True).astype(jnp.float32).sum()  # noqa: E731
    gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    more = {} if kind == "nala" else {"chosen": attention_plan(q, k, v, is_causal=True, implementation=kind)._asdict()}
    return more | timed(lambda: gradient(q, k, v), batch * n, flop=counted(gradient, q, k, v))


def experiment_of(config: str, sizes: Sizes) -> Any:
    """Returns the experiment or, for toy sizes, its debug version; a TARFlow then has heads of the published width."""
    import flowgen

    experiment = flowgen.load_config(config)
    if not sizes.toy:
        return experiment
    experiment = experiment.debug()
    wide = {"width": 64, "head_dim": 64} if isinstance(experiment.model, flowgen.TARFlowConfig) else {}
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, **wide))


def perturbed(variables: Any) -> Any:
    """Returns variables with noise added, so that no block is the identity and no gradient is zero."""
    import jax

    noise = lambda leaf: leaf + 0.01 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)  # noqa: E731
    return jax.tree.map(noise, variables)


def training_step(config: str, sizes: Sizes) -> Row:
    """Returns the time of a config's training step on a batch of zeros."""
    import jax
    import jax.numpy as jnp

    from flowgen.training.parallel import DataParallel
    from flowgen.training.step import init_state, make_step
    from flowgen.training.work import CountedStep

    experiment = experiment_of(config, sizes)
    rehearsal = experiment.rehearsal(experiment.build(), sizes.rows)
    parallel = DataParallel(jax.local_devices()[:1])
    count = CountedStep(make_step(rehearsal.objective, experiment.optim, steps=experiment.train.steps))
    step = parallel.compile(count)
    batch = parallel.shard(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rehearsal.batch))
    variables = jax.jit(lambda key: perturbed(rehearsal.init(key)))(jax.random.key(0))
    state = parallel.replicate(init_state(variables, experiment.optim, experiment.train.steps))
    carry, key = [state], parallel.replicate_key(jax.random.key(1))
    del state, variables

    def call():
        carry[0], metrics = step(carry[0], batch, key)
        return carry[0], metrics

    row = timed(call, sizes.rows * experiment.model.num_tokens, flop=lambda: count.flop(batch))
    return row | {"rows": sizes.rows, "dtype": experiment.model.dtype}


def decoding(config: str, plan: str, sizes: Sizes) -> Row:
    """Returns the time of drawing samples with guidance and without denoising."""
    import jax
    import jax.numpy as jnp

    import flowgen
    from flowgen.decoding import Guidance, Jacobi, sample
    from flowgen.experiments.estimates import some_condition

    flow = experiment_of(config, sizes).build()
    params = jax.jit(lambda key: perturbed(flowgen.init(flow, key)))(jax.random.key(0))
    chosen = Jacobi(window=sizes.window, tol=1e-3) if plan == "jacobi" else plan
    cond = some_condition(flow.config, sizes.samples)
    # Without classes, only a temperature distinguishes the two branches.
    guidance = Guidance(scale=1.5, temperature=1.0 if flow.config.num_classes else 0.5)

    def call():
        key = jax.random.key(1)
        return sample(flow, params, key, sizes.samples, cond, plan=chosen, guidance=guidance, denoise=False)

    row = timed(call, sizes.samples * flow.config.num_tokens)
    passes = jax.tree.map(lambda leaf: jnp.sum(leaf).item(), call().sweeps)
    return row | {"rows": sizes.samples, "sweeps": passes, "dtype": flow.config.dtype}


def deep_block(sizes: Sizes) -> Row:
    """Returns the time per layer of the video model's deep block and its gradient, from two layers on a whole clip."""
    import jax
    import jax.numpy as jnp

    from flowgen.nn import transformer_stack

    config = experiment_of("starflow_v_480p", sizes).model
    transformer = dataclasses.replace(config.blocks[-1].transformer, num_layers=2)
    stack, shape = transformer_stack(transformer), (1, config.num_tokens, transformer.width)
    h = jax.random.normal(jax.random.key(1), shape, transformer.dtype)
    params = jax.jit(lambda key: stack.init(key, h[:, :8], None, 0, None, None))(jax.random.key(0))
    loss = lambda params: stack.apply(params, h, None, 0, None, None)[0].astype(jnp.float32).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))
    row = timed(lambda: gradient(params), config.num_tokens, flop=counted(gradient, params), steps=2)
    return row | {"dtype": transformer.dtype}


def counted(function: Callable, *inputs: Any) -> Callable[[], Mapping[str, float]]:
    """Returns a function that counts the FLOP of a call by dtype, excluding recomputation."""
    import jax

    from flowgen.counting import flop_of

    return lambda: flop_of(jax.make_jaxpr(function)(*inputs).jaxpr)


def timed(
    call: Callable[[], Any],
    tokens: int,
    *,
    flop: Callable[[], Mapping[str, float]] = dict,
    steps: int = 1,
    compiled: bool = True,
) -> Row:
    """Returns the timing of a call that computes `tokens` tokens `steps` times, and the device's peak memory so far.

    flop: returns the FLOP of a call by dtype. compiled: whether the call runs a jax program; if not, the call returns
    its own cost.
    """
    import jax

    from flowgen.backend import peak_memory, seconds_at_peak

    runs = {"call": measure.ours(call) if compiled else call}
    timing = dataclasses.replace(measure.alternate(runs, slow_rounds=SLOW_REPEATS)["call"], steps=steps)
    work = flop()
    ideal = seconds_at_peak(work, jax.local_devices()[0].device_kind) if work else None
    row = {
        "milliseconds": round(1e3 * timing.median, 3),
        "fastest": round(1e3 * timing.fastest, 3),
        "repeats": len(timing.calls),
        "tokens_per_second": round(tokens / timing.median),
        "flop": {dtype: count / steps for dtype, count in work.items()},
        "share_of_peak": None if ideal is None else round(ideal / steps / timing.median, 4),
    }
    if compiled:
        row["compile_seconds"] = round(max(timing.first.seconds - timing.median * steps, 0.0), 2)
        row["peak_bytes_so_far"] = peak_memory(jax.local_devices()[:1])
    return row


class Reference:
    """Runs the published code in a separate process for each row, which frees the memory for the next row."""

    def __init__(self, path: Path, python: Path | None):
        self.path, self.python = path, python or Path(sys.executable)
        self._running: published.Remote | None = None

    def row(self, config: str, method: str, sizes: Sizes) -> Row:
        """Returns the time of a method of `published.Published` for a model of a config's shape."""
        import jax

        model = experiment_of(config, sizes).model
        shape = measure.rw.Shape(
            **{name: getattr(model, name) for name in ("image_size", "patch_size", "channels", "width")},
            **{name: getattr(model, name) for name in ("num_blocks", "layers_per_block", "num_classes")},
        )
        batch = sizes.rows if method == "adamw" else sizes.samples
        self._running = theirs = published.Remote(self.python, self.path, shape, batch, mixed=True)
        with contextlib.closing(theirs):
            if theirs.device == "cpu" and jax.default_backend() != "cpu":
                raise ValueError("torch has no accelerator here")
            threads = len(os.sched_getaffinity(0))
            row = timed(partial(theirs.time, method, threads), batch * model.num_tokens, compiled=False)
            memory = theirs.peak_memory()
        return row | {"dtype": "bfloat16 by autocast", "peak_bytes": memory, "rows": batch, "torch": theirs.version}

    def stop(self) -> None:
        """Ends the process of a row that is being measured."""
        if self._running is not None:
            self._running.process.kill()
