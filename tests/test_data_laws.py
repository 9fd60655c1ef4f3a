"""What every dataset of images, clips or latents gives: one shape, contexts that fit, and samples by their position."""

import numpy as np
import pytest

from flowgen.conditioning import TextCondition
from flowgen.data import (
    ArrayDataset,
    Batch,
    BucketedDataset,
    ClipsConfig,
    DataConfig,
    Dataset,
    Loader,
    Moments,
    buckets_of,
    fixed_batches,
    load,
    load_clips,
)
from flowgen.data.clip_views import ContinuedClips, StillClips
from flowgen.data.latents import LatentDataset, Shard, kind_of
from flowgen.data.video import write_video


def images():
    return load(DataConfig(), image_size=(8, 6), channels=3, split="eval")


def bouncing():
    return load_clips(ClipsConfig(num=40), frames=3, image_size=(10, 12), channels=1, split="eval")


def videos(folder, in_memory_bytes):
    frames = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
    for name in ("cat/a.gif", "dog/b.gif"):
        (folder / name).parent.mkdir()
        write_video(folder / name, frames, fps=10)
    config = ClipsConfig("folder", path=str(folder), fps=0, eval_fraction=0.0, in_memory_bytes=in_memory_bytes)
    return load_clips(config, frames=3, image_size=(8, 8), channels=3, split="train")


def latents(kind, shape, *, texts):
    random = np.random.default_rng(0)
    shards = [
        Shard(
            Moments(*np.abs(random.standard_normal((2, count, *shape))).astype(np.float32)),
            np.arange(count, dtype=np.int32) % 2,
            TextCondition(random.standard_normal((count, 4, 5)), np.ones((count, 4), bool)) if texts else None,
        )
        for count in (3, 4)
    ]
    return LatentDataset(tuple(shards), ("cat", "dog"), kind=kind)


DATASETS = {
    "images": ("image", lambda folder: images()),
    "bouncing": ("clip", lambda folder: bouncing()),
    "videos in memory": ("clip", lambda folder: videos(folder, 2**20)),
    "videos from disk": ("clip", lambda folder: videos(folder, 0)),
    "clips in memory": (
        "clip",
        lambda folder: ArrayDataset(np.zeros((5, 2, 4, 4, 1), np.uint8), np.zeros(5, np.int32)),
    ),
    "stills": ("still", lambda folder: StillClips(images())),
    "continued": ("continued", lambda folder: ContinuedClips(bouncing())),
    "latents of images": ("image", lambda folder: latents("image", (4, 4, 2), texts=False)),
    "latents of clips": ("clip", lambda folder: latents("clip", (3, 4, 4, 2), texts=False)),
    "latents with texts": ("still", lambda folder: latents("still", (1, 4, 4, 2), texts=True)),
}


def arrays(batch):
    x = batch.x if isinstance(batch.x, Moments) else (batch.x,)
    return [*x, *(batch.context if isinstance(batch.context, TextCondition) else (batch.context,))]


@pytest.mark.parametrize("name", DATASETS)
def test_datasets_keep_the_contract(name, tmp_path):
    kind, make = DATASETS[name]
    dataset = make(tmp_path)
    assert isinstance(dataset, Dataset)
    assert kind_of(dataset) == kind
    assert buckets_of(dataset) == (dataset,)
    positions = np.array([3, 0, 3, 1])
    batch = dataset[positions]
    assert isinstance(batch, Batch)
    assert batch.size == 4
    for x in batch.x if isinstance(batch.x, Moments) else (batch.pixels,):
        assert x.shape == (4, *dataset.event_shape)
    for array in arrays(batch):
        np.testing.assert_array_equal(array[0], array[2])  # a sample depends on its position alone
    one = dataset[np.array([1])]
    for whole, part in zip(arrays(batch), arrays(one), strict=True):
        np.testing.assert_array_equal(whole[3:], part)
    assert batch.labels.dtype == np.int32
    assert batch.labels.max() < max(1, len(dataset.class_names))
    seen = [part for part, mask in fixed_batches(dataset, 3) for _ in range(mask.sum())]
    assert len(seen) == len(dataset)
    again = Loader(dataset, batch_size=4, seed=1).batch(5)
    for first, second in zip(arrays(again), arrays(Loader(dataset, batch_size=4, seed=1).batch(5)), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", [name for name in DATASETS if "latents" not in name])
def test_a_loader_mirrors_half_of_the_images_and_whole_clips(name, tmp_path):
    dataset = DATASETS[name][1](tmp_path)
    plain = Loader(dataset, batch_size=32, seed=0).batch(0).pixels
    mirrored = Loader(dataset, batch_size=32, seed=0, flip=True).batch(0).pixels
    turned = [not np.array_equal(a, b) for a, b in zip(plain, mirrored, strict=True)]
    for here, before, after in zip(turned, plain, mirrored, strict=True):
        np.testing.assert_array_equal(after, before[..., ::-1, :] if here else before)
    assert any(turned) == bool(plain.any())
    assert not all(turned)


def test_latents_are_not_mirrored():
    loader = Loader(latents("image", (4, 4, 2), texts=False), batch_size=2, seed=0, flip=True)
    with pytest.raises(ValueError, match="must be images or clips, not the moments of latents"):
        loader.batch(0)


def test_a_dataset_of_ones_own_gives_batches():
    class Dicts:
        event_shape, class_names, captions = (2, 2, 1), (), ()

        def __len__(self):
            return 4

        def __getitem__(self, positions):
            return {"image": np.zeros((len(positions), 2, 2, 1), np.uint8)}

    with pytest.raises(ValueError, match=r"the dataset returned a dict; it must return a flowgen\.data\.Batch"):
        Loader(Dicts(), batch_size=2, seed=0).batch(0)


def test_a_bucketed_dataset_is_no_dataset_of_one_shape():
    assert not isinstance(BucketedDataset((images(), images())), Dataset)
