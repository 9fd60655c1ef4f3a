"""The PyTorch side of the benchmarks: the published TARFlow, unchanged, in this interpreter or in another.

As a script, it answers one JSON request per line; `connect` chooses the interpreter.
"""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
from measure import Cost, cost, rw


class Published:
    """The published model in this process, with our weights and inputs. It runs eagerly in float32, as in the published
    scripts for CPUs.

    mixed: whether the model runs as in its training script: on a GPU if torch has one, and in bfloat16 by autocast. The
    weights are then the model's own random ones, because the formula for our weights is slow for large shapes.
    """

    def __init__(self, reference: Path, shape: rw.Shape, batch: int, *, mixed: bool = False):
        import torch

        sys.path.insert(0, str(reference))
        import transformer_flow

        self.given = None, reference, shape, batch
        self.torch, self.version = torch, torch.__version__
        self.device = "cuda" if mixed and torch.cuda.is_available() else "cpu"
        self.precision = partial(torch.autocast, self.device, torch.bfloat16, enabled=mixed)
        self.scaler = torch.amp.GradScaler(self.device, enabled=self.device == "cuda")
        with torch.device(self.device):
            self.model = transformer_flow.Model(
                in_channels=shape.channels,
                img_size=shape.image_size,
                patch_size=shape.patch_size,
                channels=shape.width,
                num_blocks=shape.num_blocks,
                layers_per_block=shape.layers_per_block,
                nvp=not shape.volume_preserving,
                num_classes=shape.num_classes,
            )
        if mixed:
            for block in self.model.blocks:  # Otherwise, all gradients but those of this matrix are zero.
                torch.nn.init.normal_(block.proj_out.weight, std=0.01)
        else:
            self.model.load_state_dict({k: torch.from_numpy(v) for k, v in rw.state_dict(shape).items()}, strict=True)
        self.images = torch.from_numpy(rw.images(shape, batch)).to(self.device)
        self.noise = torch.from_numpy(rw.noise(shape, batch)).to(self.device)
        labels = torch.arange(batch, device=self.device)
        self.labels = labels % shape.num_classes if shape.num_classes else None
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4
        )

    def reverse(self):
        with self.torch.inference_mode(), self.precision():
            return self.model.reverse(self.noise, self.labels)

    def reverse_guided(self):
        with self.torch.inference_mode(), self.precision():
            return self.model.reverse(self.noise, self.labels, guidance=1.5)

    def forward(self):
        with self.torch.no_grad(), self.precision():
            z, _, logdet = self.model(self.images, self.labels)
            return self.model.get_loss(z, logdet)

    def backward(self):
        self.optimizer.zero_grad()
        with self.precision():
            z, _, logdet = self.model(self.images, self.labels)
            loss = self.model.get_loss(z, logdet)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def adamw(self):
        loss = self.backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss

    def time(self, name: str, threads: int) -> Cost:
        """Returns the cost of one call to method `name`."""
        self.torch.set_num_threads(threads)
        return cost(partial(self._finished, name))

    def result(self, name: str) -> np.ndarray:
        """Returns the result of method `name`."""
        return self._finished(name).float().cpu().numpy()

    def peak_memory(self) -> int | None:
        """Returns the peak GPU memory so far in bytes, or None on a CPU."""
        return self.torch.cuda.max_memory_allocated() if self.device == "cuda" else None

    def _finished(self, name: str):
        out = getattr(self, name)()
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        return out

    def close(self) -> None:
        """Does nothing; the counterpart of `Remote.close`."""


class Remote:
    """The published model in another interpreter, which measures its own time."""

    def __init__(self, python: Path, reference: Path, shape: rw.Shape, batch: int, *, mixed: bool = False):
        self.process = subprocess.Popen(
            [str(python), str(Path(__file__).resolve())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.given = python, reference, shape, batch
        setup = {"reference": str(reference), "shape": dataclasses.asdict(shape), "batch": batch, "mixed": mixed}
        self.version, self.device = self._ask(setup)

    def time(self, name: str, threads: int) -> Cost:
        self.begin(name, threads)
        return self.end()

    def begin(self, name: str, threads: int) -> None:
        """Starts a call to method `name` and does not wait for it."""
        self._send({"time": name, "threads": threads})

    def end(self) -> Cost:
        """Waits for the call that was started, and returns its cost."""
        return Cost(*self._receive())

    def result(self, name: str) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/result.npy"
            self._ask({"result": name, "path": path})
            return np.load(path, allow_pickle=False)

    def peak_memory(self) -> int | None:
        return self._ask({"peak_memory": True})

    def close(self) -> None:
        self.process.communicate()

    def _ask(self, request: dict[str, Any]) -> Any:
        self._send(request)
        return self._receive()

    def _send(self, request: dict[str, Any]) -> None:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def _receive(self) -> Any:
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("The process of --torch-python ended early; its message is above.")
        return json.loads(answer)


class Shares:
    """The published model in single-threaded processes, which compute equal shares of the batch at the same time.

    python, reference, shape, batch: as in `Remote.given`.
    """

    def __init__(self, python: Path | None, reference: Path, shape: rw.Shape, batch: int, count: int):
        python = python or Path(sys.executable)
        self.processes = [Remote(python, reference, shape, batch // count) for _ in range(count)]

    def time(self, name: str) -> Cost:
        """Returns the time until all processes are done, and the sum of their processor times."""
        began = time.perf_counter()
        for process in self.processes:
            process.begin(name, threads=1)
        costs = [process.end() for process in self.processes]
        return Cost(time.perf_counter() - began, sum(cost.processor for cost in costs))

    def close(self) -> None:
        for process in self.processes:
            process.close()


def run(description: str, measure_shape: Callable[..., list[dict]], *, core_devices: bool = False) -> None:
    """Runs a benchmark; `measure_shape(shape, theirs, threads)` returns the rows for a shape.

    core_devices: whether jax gets one CPU device per core. Programs use the first device by default.
    """
    arguments = measure.parse_arguments(description)
    import jax

    if core_devices:
        jax.config.update("jax_num_cpu_devices", arguments.threads)
    rows, version = [], None
    for shape in arguments.shapes:
        theirs = connect(arguments.reference, arguments.torch_python, measure.SHAPES[shape], measure.BATCH)
        rows += measure_shape(shape, theirs, arguments.threads)
        if theirs is not None:
            version = theirs.version
            theirs.close()
        jax.clear_caches()
    measure.write(arguments.out, rows, measure.environment(arguments.threads, version))


def connect(
    reference: Path | None, torch_python: Path | None, shape: rw.Shape, batch: int
) -> Published | Remote | None:
    """Returns the published model, or None if there is no checkout. Raises SystemExit if torch is missing."""
    if reference is None:
        return None
    check(reference, torch_python)
    return Published(reference, shape, batch) if torch_python is None else Remote(torch_python, reference, shape, batch)


def check(reference: Path, torch_python: Path | None) -> None:
    """Raises SystemExit if the checkout or torch is missing."""
    if not (reference / "transformer_flow.py").is_file():
        raise SystemExit(f"--reference {reference} has no transformer_flow.py; give a checkout of apple/ml-tarflow.")
    if torch_python is None and importlib.util.find_spec("torch") is None:
        raise SystemExit("This interpreter has no torch; install it, or give another interpreter with --torch-python.")


def serve() -> None:
    """Answers requests on standard input until it closes."""
    setup = json.loads(sys.stdin.readline())
    model = Published(Path(setup["reference"]), rw.Shape(**setup["shape"]), setup["batch"], mixed=setup["mixed"])
    print(json.dumps([model.version, model.device]), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "time" in request:
            answer = model.time(request["time"], request["threads"])
        elif "peak_memory" in request:
            answer = model.peak_memory()
        else:
            np.save(request["path"], model.result(request["result"]))
            answer = None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
