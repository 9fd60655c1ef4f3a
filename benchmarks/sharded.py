"""Trains a flow with divided parameters on virtual CPU devices, and compares the memory with the estimate of `info`.

python benchmarks/sharded.py --out benchmarks/results/sharded.json
"""

import argparse
import ctypes
import dataclasses
import gc
import itertools
import json
import os
import threading
import time
from pathlib import Path

DEVICES = 4

# Before jax starts. NPROC enlarges the thread pool, without which collectives between virtual devices can hang.
os.environ.setdefault("NPROC", "16")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"

import jax  # noqa: E402
import measure  # noqa: E402

import flowgen  # noqa: E402
from flowgen.data import Batch, DataConfig, Loader, load  # noqa: E402
from flowgen.experiments import FlowExperiment  # noqa: E402
from flowgen.experiments.estimates import training_cost  # noqa: E402
from flowgen.training import OptimConfig, TrainConfig, make_step  # noqa: E402
from flowgen.training.fsdp import FullySharded  # noqa: E402
from flowgen.training.step import init_state  # noqa: E402

STEPS = 12
SIZE = 32  # side of the images, which are digits of 8 x 8 pixels enlarged four times
LAYOUTS = {"fsdp": (4, 1), "fsdp_and_tensor": (2, 2)}
MODEL = flowgen.TARFlowConfig(
    image_size=SIZE,
    channels=1,
    patch_size=4,
    width=1024,
    head_dim=64,
    num_blocks=4,
    layers_per_block=2,
    num_classes=10,
    noise_std=0.1,
)


class PeakMemory:
    """Records the peak of the resident memory of this process, in bytes."""

    def __enter__(self):
        self.start = self.peak = self.now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._done.set()
        self._thread.join()

    @staticmethod
    def now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, self.now())


def batches(size: int):
    """Yields batches of enlarged digits."""
    loader = Loader(load(DataConfig(), image_size=8, channels=1, split="train"), batch_size=size, seed=0)
    for step in itertools.count():
        batch = loader.batch(step)
        pixels = batch.x.repeat(SIZE // 8, axis=1).repeat(SIZE // 8, axis=2)
        yield Batch(pixels, batch.context)


def planned_bytes(parallel: FullySharded, step, *arguments) -> int:
    """Returns the bytes that XLA plans for each device in a step of `FullySharded.compile`."""

    def update(state, batch, key):
        state, metrics = step(state, batch, key)
        return jax.lax.with_sharding_constraint(state, parallel.shardings(state)), metrics

    with jax.set_mesh(parallel.mesh):
        plan = jax.jit(update, donate_argnums=0).lower(*arguments).compile().memory_analysis()
    inputs_and_outputs = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return inputs_and_outputs + plan.temp_size_in_bytes


def measure_layout(name: str, batch_size: int, remat: bool) -> dict:
    """Returns the row of one layout: bytes per device, counted and measured, and the losses."""
    mesh, model = LAYOUTS[name], dataclasses.replace(MODEL, remat=remat)
    train = TrainConfig(steps=STEPS, batch_size=batch_size, parallel="fsdp", mesh=mesh)
    experiment = FlowExperiment(name=name, model=model, train=train, optim=OptimConfig(lr=2e-4, warmup_steps=4))
    cost = training_cost(experiment, batch_size // mesh[0], dict(zip(("fsdp", "tensor"), mesh, strict=True)))
    rehearsal, parallel = experiment.rehearsal(experiment.build(), batch_size), FullySharded(mesh_shape=mesh)
    step = make_step(rehearsal.objective, experiment.optim, steps=STEPS, axis_name=None)
    update, given = parallel.compile(step), batches(batch_size)

    def initial():
        return init_state(rehearsal.init(jax.random.key(0)), experiment.optim, STEPS)

    # The first step compiles everything; the memory is measured afterwards, from an empty start.
    state, key = parallel.create(initial), parallel.replicate_key(jax.random.key(1))
    planned = planned_bytes(parallel, step, state, parallel.shard(next(given)), key)
    jax.block_until_ready(update(state, parallel.shard(next(given)), key))
    del state
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    losses, seconds = [], []
    with PeakMemory() as during:
        state = parallel.create(initial)
        stored = [sum(x.addressable_shards[i].data.nbytes for x in jax.tree.leaves(state)) for i in range(DEVICES)]
        for _ in range(STEPS):
            began = time.perf_counter()
            state, metrics = update(state, parallel.shard(next(given)), key)
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - began)
    peak = during.peak - during.start
    counted, state_counted = cost.state + cost.activations, cost.state - cost.gradient
    return {
        "name": name,
        "mesh": mesh,
        "model": dataclasses.asdict(model),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "batch": batch_size,
        "steps": STEPS,
        "state_counted": state_counted,
        "state_stored": max(stored),
        "ratio_state": round(max(stored) / state_counted, 4),
        "step_counted": counted,
        "step_planned": planned,
        "ratio_step": round(planned / counted, 4),
        "process_counted": DEVICES * counted,
        "process_peak": peak,
        "ratio_process": round(peak / (DEVICES * counted), 4),
        "losses": [round(loss, 4) for loss in losses],
        "seconds_per_step": round(min(seconds), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to add a row to")
    parser.add_argument("--layout", choices=LAYOUTS, default="fsdp")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--store", action="store_true", help="store activations instead of recomputing layers")
    arguments = parser.parse_args()
    row = measure_layout(arguments.layout, arguments.batch, not arguments.store)
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    measure.save(arguments.out, [*rows, row | measure.environment(os.cpu_count(), None)])
    print(
        f"{arguments.layout}, batch {arguments.batch}: state {row['state_stored'] / 1e6:.0f} MB ({row['ratio_state']}),"
        f" step {row['step_planned'] / 1e6:.0f} MB ({row['ratio_step']}), process {row['process_peak'] / 1e6:.0f} MB "
        f"({row['ratio_process']}), {row['seconds_per_step']} s, loss {row['losses'][0]} -> {row['losses'][-1]}"
    )


if __name__ == "__main__":
    main()
