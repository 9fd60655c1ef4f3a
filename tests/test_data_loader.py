"""Batches are a pure function of (seed, step, process), and every sample comes once per epoch."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from flowgen.data import ArrayDataset, Loader, fixed_batches, prefetch

SIZE = 23
ORDER = [19, 11, 13, 22, 17, 7, 12, 6]
FLIPS = [1, 0, 0, 0, 1, 0, 1, 1]


def make_dataset(size=SIZE):
    """Returns a dataset whose image i has columns i and i + 1, so that mirroring can be read off."""
    images = np.broadcast_to(np.arange(size)[:, None, None, None] + np.arange(2)[:, None], (size, 3, 2, 1))
    return ArrayDataset(images.astype(np.uint8), np.arange(size, dtype=np.int32))


def numbers(loader, steps):
    return np.concatenate([loader.batch(step).context for step in steps])


def test_batches_are_a_pure_function_of_seed_and_step():
    loader = Loader(make_dataset(), batch_size=8, seed=5, flip=True)
    again = Loader(make_dataset(), batch_size=8, seed=5, flip=True)
    late = again.batch(7)
    for step in (0, 7, 3, 7):
        np.testing.assert_array_equal(loader.batch(step).x, again.batch(step).x)
    np.testing.assert_array_equal(late.x, loader.batch(7).x)
    other = Loader(make_dataset(), batch_size=8, seed=6)
    assert (numbers(other, range(3)) != numbers(loader, range(3))).any()


@pytest.mark.parametrize("batch_size", [1, 8, 23, 60])
def test_every_sample_once_per_epoch_in_a_new_order(batch_size):
    loader = Loader(make_dataset(), batch_size=batch_size, seed=0)
    epochs = numbers(loader, range(3 * SIZE // batch_size + 1))[: 3 * SIZE].reshape(3, SIZE)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(SIZE), (3, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_samples_and_flips_do_not_depend_on_batching_or_processes():
    one = Loader(make_dataset(), batch_size=12, seed=1, flip=True)
    small = Loader(make_dataset(), batch_size=4, seed=1, flip=True)
    shares = [
        Loader(make_dataset(), batch_size=12, seed=1, flip=True, process_index=i, process_count=3) for i in range(3)
    ]
    for step in range(5):
        batch = one.batch(step)
        for parts in ([small.batch(3 * step + i) for i in range(3)], [share.batch(step) for share in shares]):
            for name in ("x", "context"):
                np.testing.assert_array_equal(
                    getattr(batch, name), np.concatenate([getattr(part, name) for part in parts])
                )


def test_order_is_frozen():
    """A changed order would silently break the exact resumption of a run; recorded from the first release."""
    loader = Loader(make_dataset(), batch_size=8, seed=0, flip=True)
    flips = loader.batch(0).x[:, 0, 0, 0] - loader.batch(0).context
    assert loader.batch(0).context.tolist() == ORDER
    assert flips.tolist() == FLIPS


def test_half_of_the_images_are_mirrored_anew_in_every_epoch():
    loader = Loader(make_dataset(), batch_size=SIZE * 40, seed=0, flip=True)
    batch = loader.batch(0)
    mirrored = batch.x[:, 0, 0, 0] - batch.context
    assert set(mirrored.tolist()) == {0, 1}
    np.testing.assert_array_equal(batch.x[:, 0, 1, 0] - batch.context, 1 - mirrored)
    # Five standard deviations of a fair coin.
    assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / np.sqrt(mirrored.size)
    by_epoch = mirrored[np.argsort(batch.context, kind="stable")].reshape(SIZE, 40)
    assert (by_epoch.std(axis=1) > 0).all()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"batch_size": 0}, "train.batch_size is 0"),
        ({"batch_size": 8, "process_count": 3}, "train.batch_size is 8"),
        ({"seed": -1}, "train.seed is -1"),
        ({"process_index": 1}, "process_index is 1"),
    ],
)
def test_bad_arguments_are_named(options, field):
    with pytest.raises(ValueError, match=field):
        Loader(make_dataset(), **{"batch_size": 8, "seed": 0, **options})


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_prefetch_gives_the_same_batches_in_order(depth):
    loader = Loader(make_dataset(), batch_size=8, seed=0)
    got = [batch.context for batch in prefetch(loader, 3, 9, depth=depth)]
    np.testing.assert_array_equal(got, [loader.batch(step).context for step in range(3, 9)])
    assert list(prefetch(loader, 4, 4)) == []


def test_prefetch_works_ahead_by_depth_and_no_further():
    seen = []
    third = threading.Event()

    class Watched(ArrayDataset):
        def __getitem__(self, indices):
            seen.append(indices)
            if len(seen) == 3:
                third.set()
            return super().__getitem__(indices)

    dataset = make_dataset()
    batches = prefetch(Loader(Watched(dataset.x, dataset.labels), batch_size=2, seed=0), 0, 100, depth=2)
    next(batches)
    assert third.wait(timeout=10)
    assert len(seen) == 3
    batches.close()


def test_prefetch_raises_the_error_at_its_batch_and_ends_its_thread():
    class Broken(ArrayDataset):
        def __getitem__(self, indices):
            if 5 in indices:
                raise OSError("the disk went away")
            return super().__getitem__(indices)

    dataset = make_dataset()
    loader = Loader(Broken(dataset.x, dataset.labels), batch_size=1, seed=0)
    order = numbers(Loader(dataset, batch_size=1, seed=0), range(SIZE)).tolist()
    got = []
    with pytest.raises(OSError, match="the disk went away"):  # noqa: PT012
        for batch in prefetch(loader, 0, SIZE):
            got.append(batch.context.item())
    assert got == order[: order.index(5)]
    assert not any(thread.name.startswith("flowgen-prefetch") for thread in threading.enumerate())


def test_closing_prefetch_ends_its_thread():
    batches = prefetch(Loader(make_dataset(), batch_size=8, seed=0), 0, 10**9)
    next(batches)
    assert any(thread.name.startswith("flowgen-prefetch") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("flowgen-prefetch") for thread in threading.enumerate())


def test_prefetch_refuses_depth_zero_at_the_call():
    with pytest.raises(ValueError, match="depth is 0"):
        prefetch(Loader(make_dataset(), batch_size=8, seed=0), 0, 1, depth=0)


@pytest.mark.parametrize("batch_size", [1, 8, 23, 40])
def test_fixed_batches_cover_the_source_once_with_constant_shapes(batch_size):
    batches = list(fixed_batches(make_dataset(), batch_size))
    assert {batch.x.shape for batch, _ in batches} == {(batch_size, 3, 2, 1)}
    assert all(mask.dtype == bool for _, mask in batches)
    real = np.concatenate([batch.context[mask] for batch, mask in batches])
    np.testing.assert_array_equal(real, np.arange(SIZE))
    last, mask = batches[-1]
    assert (last.context[~mask] == SIZE - 1).all()


def test_iterator_left_open_lets_the_interpreter_exit_quietly():
    script = (
        "from flowgen.data import *\n"
        "dataset = load(DataConfig(), image_size=(8, 8), channels=1, split='train')\n"
        "batches = prefetch(Loader(dataset, batch_size=8, seed=0), 0, 10**9)\n"
        "next(batches)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
