"""Batches as a pure function of (seed, step, process): nothing to save, nothing to fast-forward on resume."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from flowgen.data.dataset import Batch, Dataset, permutation

# Purposes of the random streams; order and flips of one seed must not share bits.
_ORDER, _FLIP = 0, 1


@dataclasses.dataclass(frozen=True)
class Loader:
    """Training batches in an order fixed by the seed, without state.

    The samples of all epochs, each epoch in its own random order, form one endless sequence. Batch `step` is
    positions step B .. (step + 1) B - 1 of it, B = `batch_size` over all processes, and process i of P takes
    the i-th of P equal consecutive shares. Every sample comes once per epoch, batches continue across epochs, and the
    sequence depends neither on the number of processes nor on the batch size. A batch may exceed the dataset.

    Raises:
        ValueError: batch_size below 1 or not divisible by the processes, a negative seed, or a process index
            out of range.

    Example:
        loader = Loader(dataset, batch_size=64, seed=0, flip=True)
        batch = loader.batch(step=100)    # {"image": uint8 `b h w c`, "label": int32 `b`}
    """

    dataset: Dataset
    _: dataclasses.KW_ONLY
    batch_size: int
    seed: int
    flip: bool = False
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise ValueError(
                f"train.batch_size is {self.batch_size}; it must be a positive multiple of the "
                f"{self.process_count} processes."
            )
        if self.seed < 0:
            raise ValueError(f"train.seed is {self.seed}; it must be 0 or more.")
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(f"process_index is {self.process_index}; it must be from 0 to {self.process_count - 1}.")

    def batch(self, step: int) -> Batch:
        """Returns this process's share of batch `step`, batch_size // process_count samples."""
        share = self.batch_size // self.process_count
        start = step * self.batch_size + self.process_index * share
        batch = dict(self.dataset[self._samples(start, share)])
        if self.flip:
            flipped = _coins(self.seed, start, share)
            images = batch["image"]
            batch["image"] = np.where(flipped.reshape(-1, *[1] * (images.ndim - 1)), images[..., ::-1, :], images)
        return batch

    def _samples(self, start: int, count: int) -> Int[np.ndarray, " b"]:
        size = len(self.dataset)
        epochs, offsets = np.divmod(np.arange(start, start + count), size)
        orders = [
            _epoch_order(self.seed, epoch, size)[offsets[epochs == epoch]] for epoch in np.unique(epochs).tolist()
        ]
        return np.concatenate(orders)


@runtime_checkable
class StatelessLoader(Protocol):
    """Anything that gives the batch of any step.

    Example:
        batch = loader.batch(step=100)
    """

    def batch(self, step: int) -> Batch: ...


def prefetch(loader: StatelessLoader, start: int, stop: int, *, depth: int = 2) -> Iterator[Batch]:
    """Returns an iterator over batches start..stop-1; a thread prepares the next `depth` meanwhile.

    An error while making a batch is raised when that batch is due. Closing the iterator, or leaving it to the garbage
    collector, ends the thread after its current batch.

    Example:
        for batch in prefetch(loader, start=state_step, stop=2_000):
            ...
    """
    if depth < 1:
        raise ValueError(f"prefetch depth is {depth}; it must be 1 or more.")
    return _prefetched(loader, start, stop, depth)


def fixed_batches(dataset: Dataset, batch_size: int) -> Iterator[Batch]:
    """Returns an iterator over the whole dataset once, in order, with constant shapes, for evaluation.

    The last batch repeats its last sample; `batch["mask"]` (bool `b`) is False there.

    Example:
        for batch in fixed_batches(dataset, 256):
            total += (log_prob(batch["image"]) * batch["mask"]).sum()
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more.")
    size = len(dataset)
    for start in range(0, size, batch_size):
        positions = np.arange(start, start + batch_size)
        yield {**dataset[np.minimum(positions, size - 1)], "mask": positions < size}


def _prefetched(loader: StatelessLoader, start: int, stop: int, depth: int) -> Iterator[Batch]:
    pending: deque[Future[Batch]] = deque()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flowgen-prefetch")
    try:
        for step in range(start, stop):
            pending.append(pool.submit(loader.batch, step))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # If an iterator stays open until the interpreter exits, its thread has already ended.
        if not sys.is_finalizing():
            pool.shutdown(cancel_futures=True)


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, size: int) -> Int[np.ndarray, " size"]:
    # A pure function, cached because consecutive batches need the same epoch.
    order = permutation(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_ORDER, epoch))), size)
    order.flags.writeable = False
    return order


def _coins(seed: int, start: int, count: int) -> Bool[np.ndarray, " count"]:
    # Philox is counter-based: position p owns the four draws of counter p, however positions are batched.
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_FLIP,)), counter=[start, 0, 0, 0])
    return (bits.random_raw(4 * count)[::4] & 1).astype(bool)
