"""Computes batches as a pure function of (seed, step, process), so a run can resume without any saved loader state."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from flowgen.arrays import shown
from flowgen.batch import Batch, check_arrays
from flowgen.data.dataset import BucketedDataset, Dataset, buckets_of, permutation

T = TypeVar("T")
# The purposes of random streams. Streams with the same seed must not share bits.
_ORDER, _FLIP, _SCHEDULE = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Loader:
    """Computes the training batch of any step from `seed` and the step alone, so that a run can resume at any step.

    The epochs form one endless sequence of samples. Every sample occurs once per epoch, and each epoch has a new random
    order. Let B be `batch_size`, the number of samples over all processes. Batch `step` consists of the samples at
    positions `step` · B to (`step` + 1) · B - 1 of the sequence. The batch is divided into equal consecutive shares,
    and process i, counted from 0, gets share i. A batch may span several epochs, and it may be larger than the dataset.
    The sequence depends neither on the number of processes nor on the batch size.

    In a `BucketedDataset`, each bucket has a separate sequence, and each batch comes from one bucket. In a pass over
    the data, each bucket provides as many whole batches as its number of samples per pass allows, and the batches of
    all buckets come in random order. Samples that do not fill a batch are used in the next pass, so in the long run all
    samples of a bucket are used equally often. At each step, all processes use the same bucket.

    flip: whether to mirror each image or clip left to right with probability one half, drawn anew whenever it is used.

    Raises:
        ValueError: `batch_size` is below 1 or not divisible by `process_count`, `seed` is negative, or `process_index`
            is not from 0 to `process_count` - 1.

    Example:
        loader = Loader(dataset, batch_size=64, seed=0, flip=True)
        batch = loader.batch(step=100)  # x uint8 `64 height width c`, context int32 `64`
    """

    dataset: Dataset | BucketedDataset
    _: dataclasses.KW_ONLY
    batch_size: int
    seed: int
    flip: bool = False
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise ValueError(
                f"train.batch_size is {self.batch_size}; it must be a positive multiple of "
                f"{self.process_count}, the number of processes."
            )
        if self.seed < 0:
            raise ValueError(f"train.seed is {self.seed}; it must be 0 or more.")
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(f"process_index is {self.process_index}; it must be from 0 to {self.process_count - 1}.")

    def batch(self, step: int) -> Batch:
        """Returns the batch_size // process_count samples of batch `step` that belong to this process."""
        bucket, index = self.place(step)
        share = self.batch_size // self.process_count
        start = index * self.batch_size + self.process_index * share
        batch = checked_batch(self._buckets[bucket][self._samples(bucket, start, share)])
        if not self.flip:
            return batch
        x = batch.pixels
        flipped = _coins(self.seed, start, share).reshape(-1, *[1] * (x.ndim - 1))
        return batch._replace(x=np.where(flipped, x[..., ::-1, :], x))

    def place(self, step: int) -> tuple[int, int]:
        """Returns the index of the bucket that batch `step` comes from, and the number of earlier batches from it."""
        if len(self._buckets) == 1:
            return 0, step
        passed = _pass_of(step, self._shares, self.batch_size)
        schedule = _schedule(self.seed, passed, self._shares, self.batch_size)
        before = _before(passed, self._shares, self.batch_size)
        position = step - sum(before)
        bucket = int(schedule[position])
        return bucket, before[bucket] + int((schedule[:position] == bucket).sum())

    @property
    def _buckets(self) -> tuple[Dataset, ...]:
        return buckets_of(self.dataset)

    @property
    def _shares(self) -> tuple[int, ...]:
        """Returns the number of samples to take from each bucket per pass."""
        shares = self.dataset.shares if isinstance(self.dataset, BucketedDataset) else None
        return shares or tuple(map(len, self._buckets))

    def _samples(self, bucket: int, start: int, count: int) -> Int[np.ndarray, " b"]:
        size = len(self._buckets[bucket])
        epochs, offsets = np.divmod(np.arange(start, start + count), size)
        orders = [
            _epoch_order(self.seed, epoch, size)[offsets[epochs == epoch]] for epoch in np.unique(epochs).tolist()
        ]
        return np.concatenate(orders)


@runtime_checkable
class StatelessLoader(Protocol):
    """An object that returns the batch of any given step.

    Example:
        batch = loader.batch(step=100)
    """

    def batch(self, step: int) -> Batch: ...


def prefetch(loader: StatelessLoader, start: int, stop: int, *, depth: int = 2) -> Iterator[Batch]:
    """Yields `loader.batch(step)` for the steps `start` to `stop` - 1, which two threads prepare in advance.

    depth: number of batches to prepare in advance, besides the one in use.

    If preparing a batch fails, the error is raised when the iterator reaches that batch. When the iterator is closed or
    garbage-collected, the threads end after their current batches.

    Example:
        for batch in prefetch(loader, start=state_step, stop=2_000):
            ...
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}; it must be at least 1.")
    return _ahead(loader.batch, range(start, stop), depth)


def fixed_batches(dataset: Dataset, batch_size: int) -> Iterator[tuple[Batch, Bool[np.ndarray, " b"]]]:
    """Yields all samples of the dataset once, in order, in batches of exactly `batch_size` samples, for evaluation.

    If the last batch is not full, it is padded with copies of its last sample. Each batch comes with a mask `b` that is
    False for these copies. Each batch is prepared while the previous one is in use.

    Example:
        for batch, mask in fixed_batches(dataset, 256):
            total += (log_prob(batch.x) * mask).sum()
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    size = len(dataset)

    def batch(start: int) -> tuple[Batch, Bool[np.ndarray, " b"]]:
        positions = np.arange(start, start + batch_size)
        return checked_batch(dataset[np.minimum(positions, size - 1)]), positions < size

    return _ahead(batch, range(0, size, batch_size), depth=1)


def checked_batch(batch: Any) -> Batch:
    """Returns a batch from a dataset. Raises ValueError if it is not a `Batch` of arrays.

    Example:
        batch = checked_batch(dataset[np.arange(4)])
    """
    if not isinstance(batch, Batch):
        raise ValueError(f"the dataset returned {shown(batch)}; it must return a flowgen.data.Batch(x, context).")
    check_arrays(batch)
    return batch


def _ahead(prepare: Callable[[int], T], numbers: range, depth: int) -> Iterator[T]:
    """Returns an iterator over the results of `prepare`. Two threads prepare the next `depth` results in advance."""
    pending: deque[Future[T]] = deque()
    # While the last files of one batch are read, the second thread reads the next batch on the other cores.
    pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="flowgen-prefetch")
    try:
        for number in numbers:
            pending.append(pool.submit(prepare, number))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # If the iterator is still open when the interpreter exits, its threads have already ended.
        if not sys.is_finalizing():
            pool.shutdown(cancel_futures=True)


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, size: int) -> Int[np.ndarray, " size"]:
    # Consecutive batches usually need the same epoch, so the results of this pure function are cached.
    order = permutation(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_ORDER, epoch))), size)
    order.flags.writeable = False
    return order


def _coins(seed: int, start: int, count: int) -> Bool[np.ndarray, " count"]:
    # Philox is counter-based: position p uses the four draws of counter p, whatever the batch size.
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_FLIP,)), counter=[start, 0, 0, 0])
    return (bits.random_raw(4 * count)[::4] & 1).astype(bool)


def _before(passed: int, sizes: Sequence[int], batch_size: int) -> list[int]:
    """Returns the number of batches from each bucket in the first `passed` passes."""
    return [passed * size // batch_size for size in sizes]


def _pass_of(step: int, sizes: Sequence[int], batch_size: int) -> int:
    """Finds by bisection the pass over the data to which a step belongs."""
    low, high = 0, 1
    while sum(_before(high, sizes, batch_size)) <= step:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(_before(middle, sizes, batch_size)) <= step else (low, middle)
    return low


@functools.lru_cache(maxsize=4)
def _schedule(seed: int, passed: int, sizes: tuple[int, ...], batch_size: int) -> Int[np.ndarray, " steps"]:
    """Returns the bucket of each step in one pass."""
    first, after = (_before(at, sizes, batch_size) for at in (passed, passed + 1))
    buckets = np.repeat(np.arange(len(sizes)), np.subtract(after, first))
    order = permutation(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_SCHEDULE, passed))), len(buckets))
    return buckets[order]
