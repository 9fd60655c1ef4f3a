"""Counts the samples, tokens and FLOP of each training step, for the reports on speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from flowgen import backend
from flowgen.counting import flop_of
from flowgen.training.pace import Work
from flowgen.training.step import Step

Shapes = tuple[tuple[int, ...], ...]


class CountedStep:
    """A training step that counts its FLOP when JAX traces it for compilation.

    devices: the number of devices over which the compiler divides the step; None if the step is traced for one device.
    In this case, batches have a device axis.

    Example:
        counted = CountedStep(make_step(objective, OptimConfig(), steps=1_000))
        state, metrics = parallel.compile(counted)(state, batch, key)
        flop = counted.flop(batch)  # {"float32": 1.2e9}
    """

    def __init__(self, step: Step, devices: int | None = None):
        # Inlining keeps the program of `step` unchanged. Both uses in `__call__` share one cached trace.
        self._step = jax.jit(step, inline=True)
        self._devices = devices
        self._flop: dict[Shapes, dict[str, float]] = {}

    def __call__(self, state: Any, batch: Any, key: jax.Array, fixed: Any = None) -> tuple[Any, dict[str, jax.Array]]:
        self._flop[_shapes(batch)] = flop_of(self._step.trace(state, batch, key, fixed).jaxpr.jaxpr)
        return self._step(state, batch, key, fixed)

    def flop(self, batch: Any) -> dict[str, float]:
        """Returns {dtype: FLOP} of a step on one device; {} if the step was not compiled for these shapes."""
        if self._devices is None:
            return self._flop.get(tuple(shape[1:] for shape in _shapes(batch)), {})
        return {dtype: flop / self._devices for dtype, flop in self._flop.get(_shapes(batch), {}).items()}


def work_of(flop: Mapping[str, float], devices: Sequence[jax.Device], samples: int, tokens: int) -> Work:
    """Returns the work of all processes in a step.

    flop: the FLOP of one device, by dtype. devices: the devices of one process. samples, tokens: the numbers of samples
    and tokens in one process's batch.

    Example:
        pace.add(work_of(counted.flop(batch), jax.local_devices(), samples=64, tokens=0))
    """
    processes = jax.process_count()
    return Work(
        samples=processes * samples,
        tokens=processes * tokens,
        flop=processes * len(devices) * sum(flop.values(), start=0.0),
        seconds_at_peak=backend.seconds_at_peak(flop, devices[0].device_kind) if flop else None,
    )


def _shapes(batch: Any) -> Shapes:
    return tuple(x.shape for x in jax.tree.leaves(batch))
