"""Images of several shapes: a dataset for each, and batches of one shape at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from flowgen.data.dataset import Batch, Dataset, permutation
from flowgen.data.loader import Loader

_SCHEDULE = 2  # Purpose of the random stream, distinct from the loader's.


@dataclasses.dataclass(frozen=True)
class BucketedDataset:
    """Datasets of different shapes with the same classes, one per bucket; a batch has one shape.

    shares: samples of each bucket per pass over the data; None is all of them, so that every sample is used equally
    often.

    Example:
        dataset = BucketedDataset((square, wide))
        loader = BucketLoader(dataset, batch_size=64, seed=0)
    """

    buckets: tuple[Dataset, ...]
    shares: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.buckets:
            raise ValueError("A bucketed dataset needs at least one bucket that is not empty.")
        if self.shares is not None and (len(self.shares) != len(self.buckets) or min(self.shares) < 1):
            raise ValueError(f"shares are {self.shares}, of {len(self.buckets)} buckets; give each at least 1.")

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.buckets[0].class_names

    @property
    def image_shapes(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(bucket.image_shape for bucket in self.buckets)

    def __len__(self) -> int:
        return sum(map(len, self.buckets))


@dataclasses.dataclass(frozen=True)
class BucketLoader:
    """Training batches of one bucket each, in an order fixed by the seed, without state, as in `Loader`.

    In every pass over the data each bucket comes as often as its share holds full batches, in random order; the rest
    carries over into the next pass, so that in the long run every sample of a bucket is used equally often. All
    processes take the same bucket at the same step.

    Example:
        batch = BucketLoader(dataset, batch_size=64, seed=0).batch(step=100)
    """

    dataset: BucketedDataset
    _: dataclasses.KW_ONLY
    batch_size: int
    seed: int
    flip: bool = False
    process_index: int = 0
    process_count: int = 1

    def batch(self, step: int) -> Batch:
        """Returns this process's share of batch `step`."""
        bucket, index = self.place(step)
        return self._loaders[bucket].batch(index)

    def place(self, step: int) -> tuple[int, int]:
        """Returns the bucket of a step and the number of earlier batches from that bucket."""
        sizes = self.dataset.shares or tuple(len(bucket) for bucket in self.dataset.buckets)
        passed = _pass_of(step, sizes, self.batch_size)
        schedule = _schedule(self.seed, passed, sizes, self.batch_size)
        position = step - sum(_before(passed, sizes, self.batch_size))
        bucket = int(schedule[position])
        return bucket, _before(passed, sizes, self.batch_size)[bucket] + int((schedule[:position] == bucket).sum())

    @functools.cached_property
    def _loaders(self) -> list[Loader]:
        return [
            Loader(
                bucket,
                batch_size=self.batch_size,
                seed=self.seed,
                flip=self.flip,
                process_index=self.process_index,
                process_count=self.process_count,
            )
            for bucket in self.dataset.buckets
        ]


def _before(passed: int, sizes: Sequence[int], batch_size: int) -> list[int]:
    """Batches of each bucket in the first `passed` passes."""
    return [passed * size // batch_size for size in sizes]


def _pass_of(step: int, sizes: Sequence[int], batch_size: int) -> int:
    """The pass over the data that a step belongs to, by bisection: earlier batches increase with the pass."""
    low, high = 0, 1
    while sum(_before(high, sizes, batch_size)) <= step:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(_before(middle, sizes, batch_size)) <= step else (low, middle)
    return low


@functools.lru_cache(maxsize=4)
def _schedule(seed: int, passed: int, sizes: tuple[int, ...], batch_size: int) -> Int[np.ndarray, " steps"]:
    """The buckets of the steps of one pass."""
    first, after = (_before(at, sizes, batch_size) for at in (passed, passed + 1))
    buckets = np.repeat(np.arange(len(sizes)), np.subtract(after, first))
    order = permutation(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_SCHEDULE, passed))), len(buckets))
    return buckets[order]
